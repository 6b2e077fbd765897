// Products of a packed matrix with a few rows of activations.
//
// A tile is 16 outputs. For every (output, row) the block sums are exact integers and the float chain runs over the blocks
// in order, so neither the number of rows computed together nor the instruction set can change a bit.
#pragma once

#include "rows.h"

namespace SL_NS {

constexpr int MAX_TOKENS = 8;  // rows a tile is computed for at once

// With this many rows a tile takes longer to compute than to read, and the processor's own look-ahead, which ends with each
// page, does not keep up. With fewer it is memory that limits, and asking early only costs.
constexpr int FETCH_ROWS = 4;
constexpr int FETCH_AHEAD = 5 << 10;  // bytes

// Keeps the compiler from moving loads and regrouping sums over this line. Left alone it loads everything first and adds
// in trees, runs out of registers and spends most of its time storing and loading: half the speed.
#define SL_HOLD_LOADS() __asm__ volatile("" ::: "memory")
#define SL_HOLD(vector) __asm__ volatile("" : "+x"(vector))

struct Half {
    typedef uint16_t type;
    static F16 load(const void* p) { return f_load_half((const uint16_t*)p); }
};
struct Single {
    typedef float type;
    static F16 load(const void* p) { return f_load((const float*)p); }
};

template <typename Scale, bool MIN, int INPUTS, int BITS>
struct BlockShape {
    static constexpr int scale_bytes = 16 * (int)sizeof(typename Scale::type);
    static constexpr int min_at = scale_bytes;
    static constexpr int quants_at = MIN ? 2 * scale_bytes : scale_bytes;
    static constexpr int bytes = quants_at + 16 * INPUTS * BITS / 8;
};

// Sums of quant * activation of one block for T rows; `sums[t]` has one lane an output.
template <int T>
inline void dot_q4(const uint8_t* w, const QuantRows& x, int64_t row, int64_t block, I16* sums) {
#if SL_LEVEL == 2
    const __m512i mask = _mm512_set1_epi8(15);
    const int8_t* q[T];
    __m512i low[T], high[T];
    for (int t = 0; t < T; t++) {
        q[t] = x.q + (row + t) * x.stride + block * GROUP;
        low[t] = high[t] = _mm512_setzero_si512();
    }
    for (int j = 0; j < 4; j++) {
        __m512i packed = _mm512_loadu_si512(w + 64 * j);
        __m512i a = _mm512_and_si512(packed, mask), b = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
        for (int t = 0; t < T; t++) {
            int32_t first, second;
            std::memcpy(&first, q[t] + 4 * j, 4);
            std::memcpy(&second, q[t] + 16 + 4 * j, 4);
            low[t] = _mm512_dpbusd_epi32(low[t], a, _mm512_set1_epi32(first));
            high[t] = _mm512_dpbusd_epi32(high[t], b, _mm512_set1_epi32(second));
        }
    }
    for (int t = 0; t < T; t++) sums[t].v = _mm512_add_epi32(low[t], high[t]);
#elif SL_LEVEL == 1
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        __m256i sum[T];
        for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_si256();
        for (int j = 0; j < 4; j++) {
            SL_HOLD_LOADS();
            __m256i packed = _mm256_loadu_si256((const __m256i*)(w + 64 * j + 32 * half));
            __m256i a = _mm256_and_si256(packed, mask), b = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            for (int t = 0; t < T; t++) {
                const int8_t* q = x.q + (row + t) * x.stride + block * GROUP;
                int32_t first, second;
                std::memcpy(&first, q + 4 * j, 4);
                std::memcpy(&second, q + 16 + 4 * j, 4);
                // 8 sums of two products of at most 15 * 127 each stay below 2^15.
                sum[t] = _mm256_add_epi16(sum[t], _mm256_maddubs_epi16(a, _mm256_set1_epi32(first)));
                sum[t] = _mm256_add_epi16(sum[t], _mm256_maddubs_epi16(b, _mm256_set1_epi32(second)));
                SL_HOLD(sum[t]);
            }
        }
        for (int t = 0; t < T; t++) {
            __m256i wide = _mm256_madd_epi16(sum[t], ones);
            if (half)
                sums[t].b = wide;
            else
                sums[t].a = wide;
        }
    }
#else
    for (int t = 0; t < T; t++) {
        const int8_t* q = x.q + (row + t) * x.stride + block * GROUP;
        for (int lane = 0; lane < LANES; lane++) {
            int32_t sum = 0;
            for (int i = 0; i < 16; i++) {
                uint8_t packed = w[64 * (i / 4) + 4 * lane + i % 4];
                sum += (packed & 15) * q[i] + (packed >> 4) * q[16 + i];
            }
            sums[t].v[lane] = sum;
        }
    }
#endif
}

// The same for 8-bit quants, which carry +128; `start` is the block's first input.
template <int T, int INPUTS>
inline void dot_q8(const uint8_t* w, const QuantRows& x, int64_t row, int64_t start, I16* sums) {
    int32_t offset[T];
    for (int t = 0; t < T; t++) {
        const int32_t* sum = x.sum + (row + t) * (x.stride / 16) + start / 16;
        offset[t] = -128 * (INPUTS == 32 ? sum[0] + sum[1] : sum[0]);
    }
#if SL_LEVEL == 2
    __m512i even[T], odd[T];
    const int8_t* q[T];
    for (int t = 0; t < T; t++) {
        q[t] = x.q + (row + t) * x.stride + start;
        even[t] = _mm512_set1_epi32(offset[t]);
        odd[t] = _mm512_setzero_si512();
    }
    for (int j = 0; j < INPUTS / 4; j += 2) {
        __m512i a = _mm512_loadu_si512(w + 64 * j), b = _mm512_loadu_si512(w + 64 * j + 64);
        for (int t = 0; t < T; t++) {
            int32_t first, second;
            std::memcpy(&first, q[t] + 4 * j, 4);
            std::memcpy(&second, q[t] + 4 * j + 4, 4);
            even[t] = _mm512_dpbusd_epi32(even[t], a, _mm512_set1_epi32(first));
            odd[t] = _mm512_dpbusd_epi32(odd[t], b, _mm512_set1_epi32(second));
        }
    }
    for (int t = 0; t < T; t++) sums[t].v = _mm512_add_epi32(even[t], odd[t]);
#elif SL_LEVEL == 1
    const __m256i mask = _mm256_set1_epi16(255);
    for (int half = 0; half < 2; half++) {
        __m256i sum[T];
        for (int t = 0; t < T; t++) sum[t] = _mm256_set1_epi32(offset[t]);
        for (int j = 0; j < INPUTS / 4; j++) {
            __m256i packed = _mm256_loadu_si256((const __m256i*)(w + 64 * j + 32 * half));
            __m256i even = _mm256_and_si256(packed, mask), odd = _mm256_srli_epi16(packed, 8);
            for (int t = 0; t < T; t++) {
                const int16_t* pairs = x.pairs + (row + t) * x.stride + start + 4 * j;
                int32_t first, second;
                std::memcpy(&first, pairs, 4);
                std::memcpy(&second, pairs + 2, 4);
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(even, _mm256_set1_epi32(first)));
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(odd, _mm256_set1_epi32(second)));
            }
        }
        for (int t = 0; t < T; t++) {
            if (half)
                sums[t].b = sum[t];
            else
                sums[t].a = sum[t];
        }
    }
#else
    for (int t = 0; t < T; t++) {
        const int8_t* q = x.q + (row + t) * x.stride + start;
        for (int lane = 0; lane < LANES; lane++) {
            int32_t sum = offset[t];
            for (int i = 0; i < INPUTS; i++) sum += w[64 * (i / 4) + 4 * lane + i % 4] * q[i];
            sums[t].v[lane] = sum;
        }
    }
#endif
}

// One tile times T rows of quantised activations.
template <typename Scale, bool MIN, int INPUTS, int BITS, int T>
inline void tile_quantised(const uint8_t* w, int64_t num_in, const QuantRows& x, int64_t row, F16* out) {
    typedef BlockShape<Scale, MIN, INPUTS, BITS> Shape;
    F16 acc[T];
    for (int t = 0; t < T; t++) acc[t] = f_set(0.0f);
    int64_t groups = x.stride / GROUP;
    for (int64_t start = 0; start < num_in; start += INPUTS, w += Shape::bytes) {
        if constexpr (T >= FETCH_ROWS)
            for (int line = 0; line < Shape::bytes; line += 64) __builtin_prefetch(w + FETCH_AHEAD + line, 0, 2);
        I16 sums[T];
        int64_t group = start / GROUP;
        if constexpr (BITS == 4)
            dot_q4<T>(w + Shape::quants_at, x, row, group, sums);
        else
            dot_q8<T, INPUTS>(w + Shape::quants_at, x, row, start, sums);
        F16 scale = Scale::load(w);
        for (int t = 0; t < T; t++) {
            int64_t at = (row + t) * groups + group;
            acc[t] = f_fma(f_from(sums[t]), scale * f_set(x.scale[at]), acc[t]);
        }
        if constexpr (MIN) {
            F16 minimum = Scale::load(w + Shape::min_at);
            for (int t = 0; t < T; t++) acc[t] = f_fma(minimum, f_set(x.scaled_sum[(row + t) * groups + group]), acc[t]);
        }
    }
    for (int t = 0; t < T; t++) out[t] = acc[t];
}

// One tile of a dense matrix times T float rows, `stride` apart.
template <bool BF16, int T>
inline void tile_dense(const void* w, int64_t num_in, const float* x, int64_t stride, F16* out) {
    F16 acc[T];
    for (int t = 0; t < T; t++) acc[t] = f_set(0.0f);
    for (int64_t k = 0; k < num_in; k++) {
        F16 column = BF16 ? f_load_bf16((const uint16_t*)w + LANES * k) : f_load((const float*)w + LANES * k);
        for (int t = 0; t < T; t++) acc[t] = f_fma(column, f_set(x[t * stride + k]), acc[t]);
    }
    for (int t = 0; t < T; t++) out[t] = acc[t];
}

inline bool is_dense(int kind) { return kind == SL_F32 || kind == SL_BF16; }

inline int64_t tile_bytes(const sl_matrix& m) {
    int64_t n = m.num_in;
    switch (m.kind) {
        case SL_F32: return n * LANES * 4;
        case SL_BF16: return n * LANES * 2;
        case SL_Q4_HALF: return n / 32 * BlockShape<Half, true, 32, 4>::bytes;
        case SL_Q4_FLOAT: return n / 32 * BlockShape<Single, true, 32, 4>::bytes;
        case SL_Q8_HALF: return n / 32 * BlockShape<Half, false, 32, 8>::bytes;
        case SL_Q8_HALF_MIN: return n / 32 * BlockShape<Half, true, 32, 8>::bytes;
        default: return n / 16 * BlockShape<Single, false, 16, 8>::bytes;
    }
}

// Activations of a step in the form a matrix wants: quantised rows, or floats for dense ones.
struct Rows {
    QuantRows quant;
    const float* dense;
    int64_t stride;
};

template <int T>
inline void tile_rows(const sl_matrix& m, const uint8_t* w, const Rows& x, int64_t row, F16* out) {
    switch (m.kind) {
        case SL_F32: return tile_dense<false, T>(w, m.num_in, x.dense + row * x.stride, x.stride, out);
        case SL_BF16: return tile_dense<true, T>(w, m.num_in, x.dense + row * x.stride, x.stride, out);
        case SL_Q4_HALF: return tile_quantised<Half, true, 32, 4, T>(w, m.num_in, x.quant, row, out);
        case SL_Q4_FLOAT: return tile_quantised<Single, true, 32, 4, T>(w, m.num_in, x.quant, row, out);
        case SL_Q8_HALF: return tile_quantised<Half, false, 32, 8, T>(w, m.num_in, x.quant, row, out);
        case SL_Q8_HALF_MIN: return tile_quantised<Half, true, 32, 8, T>(w, m.num_in, x.quant, row, out);
        default: return tile_quantised<Single, false, 16, 8, T>(w, m.num_in, x.quant, row, out);
    }
}

// As many rows as the registers hold beside the unpacked weights: these are unpacked once for all of them.
constexpr int TOGETHER = SL_LEVEL == 2 ? 8 : 4;

inline void tile_some(const sl_matrix& m, const uint8_t* w, const Rows& x, int64_t row, int count, F16* out) {
    switch (count) {
        case 1: return tile_rows<1>(m, w, x, row, out);
        case 2: return tile_rows<2>(m, w, x, row, out);
        case 3: return tile_rows<3>(m, w, x, row, out);
#if SL_LEVEL == 2
        case 4: return tile_rows<4>(m, w, x, row, out);
        case 5: return tile_rows<5>(m, w, x, row, out);
        case 6: return tile_rows<6>(m, w, x, row, out);
        case 7: return tile_rows<7>(m, w, x, row, out);
#endif
        default: return tile_rows<TOGETHER>(m, w, x, row, out);
    }
}

// Tile number `tile` times rows [row, row + count), count at most MAX_TOKENS; the bias is added.
inline void tile(const sl_matrix& m, int64_t tile, const Rows& x, int64_t row, int count, F16* out) {
    const uint8_t* w = (const uint8_t*)m.data + tile * tile_bytes(m);
    for (int done = 0; done < count; done += TOGETHER)
        tile_some(m, w, x, row + done, (int)(count - done < TOGETHER ? count - done : TOGETHER), out + done);
    if (m.bias)
        for (int t = 0; t < count; t++) out[t] = out[t] + f_load(m.bias + tile * LANES);
}

// One row of a packed matrix as floats, for embeddings.
inline void unpack_row(const sl_matrix& m, int64_t index, int64_t size, float* out) {
    const uint8_t* w = (const uint8_t*)m.data + index / LANES * tile_bytes(m);
    int lane = (int)(index % LANES);
    if (m.kind == SL_F32) {
        for (int64_t k = 0; k < size; k++) out[k] = ((const float*)w)[LANES * k + lane];
        return;
    }
    if (m.kind == SL_BF16) {
        for (int64_t k = 0; k < size; k++) out[k] = from_bf16(((const uint16_t*)w)[LANES * k + lane]);
        return;
    }
    int inputs = m.kind == SL_Q8_FLOAT16 ? 16 : 32;
    bool is_half = m.kind == SL_Q4_HALF || m.kind == SL_Q8_HALF || m.kind == SL_Q8_HALF_MIN;
    bool is_q4 = m.kind == SL_Q4_HALF || m.kind == SL_Q4_FLOAT;
    bool has_min = is_q4 || m.kind == SL_Q8_HALF_MIN;
    int scale_bytes = is_half ? 32 : 64;
    int quants_at = has_min ? 2 * scale_bytes : scale_bytes;
    int bytes = quants_at + (is_q4 ? 256 : 16 * inputs);
    for (int64_t start = 0; start < size; start += inputs, w += bytes) {
        float scales[LANES], minima[LANES] = {};
        f_store(scales, is_half ? Half::load(w) : Single::load(w));
        if (has_min) f_store(minima, is_half ? Half::load(w + scale_bytes) : Single::load(w + scale_bytes));
        for (int i = 0; i < inputs && start + i < size; i++) {
            int at = is_q4 ? i % 16 : i;
            uint8_t packed = w[quants_at + 64 * (at / 4) + 4 * lane + at % 4];
            int quant = is_q4 ? (i < 16 ? packed & 15 : packed >> 4) : packed - 128;
            out[start + i] = std::fma(scales[lane], (float)quant, minima[lane]);
        }
    }
}

}  // namespace SL_NS
