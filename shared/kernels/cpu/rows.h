// Work on single rows: quantised activations, norms, rotary positions, activation functions.
#pragma once

#include "simd.h"
#include "slipstream_cpu.h"

namespace SL_NS {

constexpr int GROUP = 32;  // activations share a scale over this many inputs

// Rows of activations as the integer kernels read them. All pointers are [row][...], rows `stride` inputs apart.
struct QuantRows {
    int8_t* q;        // [row][stride]
    int16_t* pairs;   // the same as 16-bit numbers, inputs 0 2 1 3 of every four; only where SL_PAIRS
    float* scale;     // [row][stride / 32]
    float* scaled_sum;  // scale * sum of the group's q
    int32_t* sum;     // [row][stride / 16], sums of q over 16
    int64_t stride;
};

#if SL_LEVEL == 1
#define SL_PAIRS 1
#else
#define SL_PAIRS 0
#endif

// Quantise one group of 32: scale = max|x| / 127, q = round to nearest even of x / scale.
inline void quantise_group(const float* x, const QuantRows& out, int64_t row, int64_t group) {
    F16 a = f_load(x), b = f_load(x + 16);
    float top = f_top(f_max(f_abs(a), f_abs(b)));
    float scale = top / 127.0f;
    F16 inverse = f_set(top > 0.0f ? 127.0f / top : 0.0f);
    int8_t* q = out.q + row * out.stride + group * GROUP;
    i_store_i8(q, i_round(a * inverse));
    i_store_i8(q + 16, i_round(b * inverse));
    int32_t sums[2] = {0, 0};
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 16; i++) sums[half] += q[16 * half + i];
    int64_t at = row * (out.stride / GROUP) + group;
    out.scale[at] = scale;
    out.scaled_sum[at] = scale * (float)(sums[0] + sums[1]);
    out.sum[2 * at] = sums[0];
    out.sum[2 * at + 1] = sums[1];
#if SL_PAIRS
    int16_t* pairs = out.pairs + row * out.stride + group * GROUP;
    for (int i = 0; i < GROUP; i += 4) {
        pairs[i] = q[i];
        pairs[i + 1] = q[i + 2];
        pairs[i + 2] = q[i + 1];
        pairs[i + 3] = q[i + 3];
    }
#endif
}

// `size` values of one row from `first` on; all multiples of 32.
inline void quantise(const float* x, const QuantRows& out, int64_t row, int64_t first, int64_t size) {
    for (int64_t i = 0; i < size; i += GROUP) quantise_group(x + i, out, row, (first + i) / GROUP);
}

// Root mean square norm (Zhang and Sennrich 2019) or layer norm of `size` values; any size, sums in a fixed order.
inline void normalise(const float* x, const sl_norm_weights& weights, int norm, float eps, int64_t size, float* out) {
    F16 squares = f_set(0.0f), total = f_set(0.0f);
    int64_t whole = size / LANES * LANES;
    float tail[LANES] = {};
    for (int64_t i = whole; i < size; i++) tail[i - whole] = x[i];
    for (int64_t i = 0; i < whole; i += LANES) total = total + f_load(x + i);
    total = total + f_load(tail);
    float mean = norm == SL_NORM_LAYER ? f_sum(total) / (float)size : 0.0f;
    for (int64_t i = whole; i < size; i++) tail[i - whole] = x[i] - mean;
    for (int64_t i = 0; i < whole; i += LANES) {
        F16 v = f_load(x + i) - f_set(mean);
        squares = f_fma(v, v, squares);
    }
    squares = f_fma(f_load(tail), f_load(tail), squares);
    float scale = 1.0f / std::sqrt(f_sum(squares) / (float)size + eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        F16 v = (f_load(x + i) - f_set(mean)) * f_set(scale) * f_load(weights.weight + i);
        f_store(out + i, weights.bias ? v + f_load(weights.bias + i) : v);
    }
    for (int64_t i = whole; i < size; i++) {
        float v = (x[i] - mean) * scale * weights.weight[i];
        out[i] = weights.bias ? v + weights.bias[i] : v;
    }
}

// Turn neighbouring pairs of one head by the position's angles; `turn` is [head_dim / 2][cos, sin].
inline void rotate(float* head, const float* turn, int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        float a = head[i], b = head[i + 1], c = turn[i], s = turn[i + 1];
        head[i] = std::fma(a, c, -(b * s));
        head[i + 1] = std::fma(a, s, b * c);
    }
}

inline F16 activate(F16 x, int activation) {
    if (activation == SL_SILU) return x / (f_set(1.0f) + f_exp(f_set(0.0f) - x));
    if (activation == SL_RELU) return f_max(x, f_set(0.0f));
    // GELU with tanh: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
    F16 inner = f_fma(x * x * x, f_set(0.044715f), x) * f_set(1.5957691216057308f);
    return x / (f_set(1.0f) + f_exp(f_set(0.0f) - inner));
}

}  // namespace SL_NS
