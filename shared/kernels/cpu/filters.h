// Which ids top_k, top_p and min_p leave over. The definition is shared/engine/filters.py, and the bits agree with it.
//
// Nothing is sorted. Ids that certainly fall out are left aside with a comparison; among the others (candidates, ascending)
// the border is found by counting, 10 bits of the values' order at a time.
#pragma once

#include "exact.h"
#include "simd.h"

namespace SL_NS {

constexpr int SCALE_BITS = 43;     // of the largest value's weight
constexpr double LOWEST = -31.0;   // differences from the largest value are raised to this; e^-31 * 2^43 rounds to 0
constexpr double PRUNING_MARGIN = 0.01;
constexpr int BLOCK = 64;          // logits of which only the largest counts in a first bound on the k-th
constexpr int BUCKET_BITS = 10;

struct Filters {
    int32_t top_k;  // 0: off
    double top_p, min_p;
};

inline float scaled_logit(float logit, double temperature) { return (float)((double)logit / temperature); }

// The integer weight of a scaled logit when `top` is the largest.
inline int64_t weigh(float scaled, double top) {
    double d = (double)scaled - top;
    double whole = exponential(d > LOWEST ? d : LOWEST) * 0x1p43 + 0x1p52;  // the sum is rounded to an integer
    int64_t bits;
    std::memcpy(&bits, &whole, 8);
    return bits - 0x4330000000000000;
}

inline int64_t total_weight(const float* logits, int32_t size, double temperature, double top) {
    int64_t total = 0;
    for (int32_t i = 0; i < size; i++) total += weigh(scaled_logit(logits[i], temperature), top);
    return total;
}

// Orders floats as integers; -0 and 0 are equal.
inline uint32_t order_of(float value) {
    uint32_t bits;
    value += 0.0f;
    std::memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Ids that may still be drawn, ascending, in memory of one thread that only grows.
class Candidates {
  public:
    int32_t count = 0;
    int32_t* ids = nullptr;
    float* scaled = nullptr;
    int64_t* weights = nullptr;
    float* tops = nullptr;  // of the blocks

    // Room for a whole vocabulary; false when there is no memory.
    bool reserve(int32_t size) {
        if (size <= size_) return true;
        size_ = 0;
        ids_.reset(new (std::nothrow) int32_t[size]);
        scaled_.reset(new (std::nothrow) float[size]);
        weights_.reset(new (std::nothrow) int64_t[size]);
        tops_.reset(new (std::nothrow) float[size / BLOCK + 1]);
        ids = ids_.get(), scaled = scaled_.get(), weights = weights_.get(), tops = tops_.get();
        if (!ids || !scaled || !weights || !tops) return false;
        size_ = size;
        return true;
    }

    template <typename Keep>
    void keep_if(const Keep& keep) {
        int32_t kept = 0;
        for (int32_t i = 0; i < count; i++) {
            if (!keep(i)) continue;
            ids[kept] = ids[i];
            scaled[kept] = scaled[i];
            weights[kept++] = weights[i];
        }
        count = kept;
    }

  private:
    int32_t size_ = 0;
    std::unique_ptr<int32_t[]> ids_;
    std::unique_ptr<float[]> scaled_, tops_;
    std::unique_ptr<int64_t[]> weights_;
};

// The last rank that is kept: everything above `order`, and of those equal to it the first `ties`.
struct Border {
    uint32_t order;
    int64_t ties;
};

// Where, by rank, the weight before an item reaches `limit`. Everything is kept where it never does.
template <typename Weight>
Border find_border(const float* values, int32_t count, int64_t limit, const Weight& weight) {
    uint32_t low = 0xFFFFFFFFu, high = 0;
    for (int32_t i = 0; i < count; i++) {
        uint32_t order = order_of(values[i]);
        low = order < low ? order : low;
        high = order > high ? order : high;
    }
    int64_t before = 0;
    while (low < high) {
        int width = 32 - __builtin_clz(high - low), shift = width > BUCKET_BITS ? width - BUCKET_BITS : 0;
        int64_t sums[1 << BUCKET_BITS] = {};
        for (int32_t i = 0; i < count; i++) {
            uint32_t order = order_of(values[i]);
            if (order >= low && order <= high) sums[(high - order) >> shift] += weight(i);
        }
        uint32_t bucket = 0, last = (high - low) >> shift;
        for (; bucket <= last && before + sums[bucket] < limit; bucket++) before += sums[bucket];
        if (bucket > last) return {low, count};
        high -= bucket << shift;
        if (high - low >= 1u << shift) low = high - ((1u << shift) - 1);
    }
    int64_t ties = 0;
    for (int32_t i = 0; i < count && before < limit; i++)
        if (order_of(values[i]) == high) {
            before += weight(i);
            ties++;
        }
    return {high, ties};
}

inline void keep_within(Candidates& c, Border border) {
    c.keep_if([&](int32_t i) {
        uint32_t order = order_of(c.scaled[i]);
        return order > border.order || (order == border.order && border.ties-- > 0);
    });
}

// A logit that at least `k` of the row reach: the k-th largest of the blocks' largest ones.
inline float bound_of_top_k(const float* logits, int32_t size, int32_t k, float* tops) {
    int32_t blocks = size / BLOCK;
    if (k > blocks) return -INFINITY;
    for (int32_t block = 0; block < blocks; block++) {
        F16 top = f_set(-INFINITY);
        for (int i = 0; i < BLOCK; i += LANES) top = f_max(f_load(logits + block * BLOCK + i), top);
        tops[block] = f_top(top);
    }
    uint32_t order = find_border(tops, blocks, k, [](int32_t) { return 1; }).order;
    for (int32_t block = 0; block < blocks; block++)
        if (order_of(tops[block]) == order) return tops[block];
    return -INFINITY;
}

// All finite ids whose logit is not below `least`, or so little that it could be equal once scaled.
inline void collect(const float* logits, int32_t size, double temperature, double least, Candidates& c) {
    least -= std::fabs(least) * 1e-6 + temperature * 1e-37;
    float bound = least > -3e38 ? (float)least : -3.402823466e38f;
    c.count = 0;
    int32_t whole = size / LANES * LANES;
    for (int32_t i = 0; i < whole; i += LANES)
        for (uint32_t mask = f_at_least(f_load(logits + i), f_set(bound)); mask; mask &= mask - 1)
            c.ids[c.count++] = i + __builtin_ctz(mask);
    for (int32_t i = whole; i < size; i++)
        if (logits[i] >= bound) c.ids[c.count++] = i;
    for (int32_t i = 0; i < c.count; i++) c.scaled[i] = scaled_logit(logits[c.ids[i]], temperature);
}

inline int64_t nucleus_limit(int64_t total, double top_p) {
    int64_t limit = (int64_t)std::ceil(top_p * (double)total);
    limit = limit < total ? limit : total;
    return limit > 1 ? limit : 1;
}

// The natural logarithm of a weight, less what rounding could do: ids further below the best one are lighter.
inline double log_of_weight(double weight) { return std::log(weight) - SCALE_BITS * LN2_HIGH - PRUNING_MARGIN; }

// What the filters leave of a row whose largest logit is `top`.
inline void filter(const float* logits, int32_t size, double temperature, float top, const Filters& f, Candidates& c) {
    const double best = scaled_logit(top, temperature);
    const int64_t min_weight = (int64_t)std::ceil(f.min_p * 0x1p43);
    int64_t total = 0;
    if (f.top_k > 0) {
        bool some = f.top_k < size;
        collect(logits, size, temperature, some ? bound_of_top_k(logits, size, f.top_k, c.tops) : -INFINITY, c);
        if (some) keep_within(c, find_border(c.scaled, c.count, f.top_k, [](int32_t) { return 1; }));
    } else {
        double least = min_weight > 1 ? log_of_weight((double)min_weight - 0.5) : -INFINITY;
        if (f.top_p < 1.0) {
            total = total_weight(logits, size, temperature, best);
            // Ids that weigh no more than an equal share of what may be left out are never needed.
            double share = (double)(total - nucleus_limit(total, f.top_p)) / size - 0.5;
            least = std::fmax(least, log_of_weight(std::fmax(share, 0.5)));
        }
        collect(logits, size, temperature, temperature * (best + least), c);
    }
    for (int32_t i = 0; i < c.count; i++) c.weights[i] = weigh(c.scaled[i], best);
    if (f.top_p < 1.0) {
        if (f.top_k > 0)
            for (int32_t i = 0; i < c.count; i++) total += c.weights[i];
        keep_within(c, find_border(c.scaled, c.count, nucleus_limit(total, f.top_p), [&](int32_t i) { return c.weights[i]; }));
    }
    c.keep_if([&](int32_t i) { return c.weights[i] >= min_weight; });
}

}  // namespace SL_NS
