// The paged KV cache: where a head's keys and values lie, and how a token's are written.
//
// [layer][block][k|v][kv_head], then [row][slot] for keys and [slot][row] for values. A row is head_dim values; int8 rows
// end with the four bytes of their float32 scale.
#pragma once

#include "attention.h"

namespace SL_NS {

class Cache {
  public:
    Cache(const sl_model& model, const sl_step& step, int layer)
        : m_(model), s_(step), layer_(layer), row_width_(model.head_dim + (model.kv_dtype == SL_KV_INT8 ? 4 : 0)) {}

    // One head of every block of this layer.
    KvView view(int head) const {
        return KvView{at(offset(0, 0, head)), at(offset(0, 1, head)), 2 * m_.num_kv_heads * head_size(),
                      m_.block_size, m_.head_dim, row_width_};
    }

    // One head's key and value of a token into its slot.
    void write(int64_t token, int head, const float* key, const float* value) const {
        int64_t block = s_.slots[token] / m_.block_size, slot = s_.slots[token] % m_.block_size;
        write_row(offset(block, 0, head) + slot, m_.block_size, key);
        write_row(offset(block, 1, head) + slot * row_width_, 1, value);
    }

  private:
    int64_t head_size() const { return (int64_t)m_.block_size * row_width_; }

    // In values, of one head's keys (side 0) or values (side 1) in one block.
    int64_t offset(int64_t block, int side, int head) const {
        return (((layer_ * s_.num_blocks + block) * 2 + side) * m_.num_kv_heads + head) * head_size();
    }

    char* at(int64_t offset) const {
        int64_t bytes = m_.kv_dtype == SL_KV_F32 ? 4 : m_.kv_dtype == SL_KV_BF16 ? 2 : 1;
        return (char*)s_.kv + bytes * offset;
    }

    // head_dim values, `stride` places apart.
    void write_row(int64_t first, int64_t stride, const float* row) const {
        if (m_.kv_dtype == SL_KV_INT8) {
            write_int8((int8_t*)at(first), stride, row);
        } else if (m_.kv_dtype == SL_KV_BF16) {
            uint16_t* out = (uint16_t*)at(first);
            for (int d = 0; d < m_.head_dim; d++) out[d * stride] = to_bf16(row[d]);
        } else {
            float* out = (float*)at(first);
            for (int d = 0; d < m_.head_dim; d++) out[d * stride] = row[d];
        }
    }

    // Symmetric: scale = max |x| / 127.
    void write_int8(int8_t* out, int64_t stride, const float* row) const {
        float top = 0.0f;
        for (int d = 0; d < m_.head_dim; d++) top = std::fabs(row[d]) > top ? std::fabs(row[d]) : top;
        float scale = top / 127.0f, inverse = top > 1e-30f ? 127.0f / top : 0.0f;
        for (int d = 0; d < m_.head_dim; d++) out[d * stride] = (int8_t)std::lrint(row[d] * inverse);
        int8_t bytes[4];
        std::memcpy(bytes, &scale, sizeof scale);
        for (int byte = 0; byte < 4; byte++) out[(m_.head_dim + byte) * stride] = bytes[byte];
    }

    const sl_model& m_;
    const sl_step& s_;
    int64_t layer_;
    int row_width_;
};

}  // namespace SL_NS
