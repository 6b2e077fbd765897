// Memory of steps: it grows to the largest step seen and is then used again.
#pragma once

#include "rows.h"

namespace SL_NS {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// 64-byte aligned, never shrunk.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // At least `bytes`, or null when there is no memory. The content is lost when it grows.
    void* take(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            int64_t rounded = ceil_div(bytes + bytes / 4, 64) * 64;
            data_ = std::aligned_alloc(64, (size_t)rounded);
            if (!data_) return nullptr;
            size_ = rounded;
        }
        return data_;
    }
    float* floats(int64_t count) { return (float*)take(4 * count); }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Quantised rows and the memory they live in.
class QuantBuffer {
  public:
    // Room for rows of `stride` values; false when there is no memory.
    bool take(int64_t rows, int64_t stride) {
        QuantRows& r = rows_;
        r.stride = stride;
        r.q = (int8_t*)q_.take(rows * stride);
        r.scale = scale_.floats(rows * stride / GROUP);
        r.scaled_sum = scaled_sum_.floats(rows * stride / GROUP);
        r.sum = (int32_t*)sum_.take(rows * stride / 16 * 4);
        r.pairs = SL_PAIRS ? (int16_t*)pairs_.take(rows * stride * 2) : nullptr;
        return r.q && r.scale && r.scaled_sum && r.sum && (r.pairs || !SL_PAIRS);
    }
    const QuantRows& rows() const { return rows_; }

  private:
    Buffer q_, scale_, scaled_sum_, sum_, pairs_;
    QuantRows rows_ = {};
};

}  // namespace SL_NS
