// Sixteen floats or integers at once, with the same result in every bit on every instruction set.
//
// Every operation is either exact, correctly rounded by IEEE 754, or a fixed sequence of such operations; `fma` is always
// fused. So AVX-512, AVX2 and the plain loops differ in speed only, and workers on unlike machines agree.
// The file is compiled once for each instruction set: `SL_LEVEL` is 0 for plain loops, 1 for AVX2 with FMA and F16C, 2 for
// AVX-512 with VNNI; `SL_NS` is that one's namespace. isa_*.cpp set both, after including everything of the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace SL_NS {

constexpr int LANES = 16;

#if SL_LEVEL == 2

struct F16 {
    __m512 v;
};
struct I16 {
    __m512i v;
};

inline F16 f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F16 f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 f_fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 f_max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 f_min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 f_abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline uint32_t f_at_least(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }  // a bit for each lane
inline I16 i_round(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F16 f_from(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I16 i_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void i_store(uint32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 operator^(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I16 i_shl(I16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline I16 i_shr(I16 a, int n) { return {_mm512_srli_epi32(a.v, n)}; }  // zeros come in
// Both halves of the 64-bit products of unsigned lanes.
inline void i_multiply(I16 a, uint32_t b, I16& high, I16& low) {
    const __m512i factor = _mm512_set1_epi64(b);
    __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    high.v = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
    low.v = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
inline F16 f_bits(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I16 i_bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline F16 f_load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F16 f_load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F16 f_load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline void i_store_i8(int8_t* p, I16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }

#elif SL_LEVEL == 1

struct F16 {
    __m256 a, b;
};
struct I16 {
    __m256i a, b;
};

inline F16 f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 f_fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 f_max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 f_min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 f_abs(F16 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline uint32_t f_at_least(F16 x, F16 y) {
    int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)), high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ));
    return (uint32_t)(low | high << 8);
}
inline I16 i_round(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F16 f_from(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I16 i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 i_load(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline void i_store(uint32_t* p, I16 x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
inline I16 operator+(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I16 operator^(I16 x, I16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline I16 i_shl(I16 x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline I16 i_shr(I16 x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline void i_multiply_8(__m256i a, uint32_t b, __m256i& high, __m256i& low) {
    const __m256i factor = _mm256_set1_epi64x(b);
    __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline void i_multiply(I16 x, uint32_t y, I16& high, I16& low) {
    i_multiply_8(x.a, y, high.a, low.a);
    i_multiply_8(x.b, y, high.b, low.b);
}
inline F16 f_bits(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I16 i_bits(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F16 f_load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F16 f_load_bf16(const uint16_t* p) {
    __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
inline F16 f_load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline void i_store_i8(int8_t* p, I16 x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}

#else

struct F16 {
    float v[LANES];
};
struct I16 {
    int32_t v[LANES];
};

#define SL_EACH(T, expression)                    \
    T out;                                        \
    for (int i = 0; i < LANES; i++) out.v[i] = expression; \
    return out

inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | (fraction << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        float value = (float)fraction * 5.9604644775390625e-8f;  // subnormal: fraction * 2^-24, exact
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline F16 f_set(float x) { SL_EACH(F16, x); }
inline F16 f_load(const float* p) { SL_EACH(F16, p[i]); }
inline void f_store(float* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F16 operator+(F16 a, F16 b) { SL_EACH(F16, a.v[i] + b.v[i]); }
inline F16 operator-(F16 a, F16 b) { SL_EACH(F16, a.v[i] - b.v[i]); }
inline F16 operator*(F16 a, F16 b) { SL_EACH(F16, a.v[i] * b.v[i]); }
inline F16 operator/(F16 a, F16 b) { SL_EACH(F16, a.v[i] / b.v[i]); }
inline F16 f_fma(F16 a, F16 b, F16 c) { SL_EACH(F16, std::fma(a.v[i], b.v[i], c.v[i])); }
inline F16 f_max(F16 a, F16 b) { SL_EACH(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 f_min(F16 a, F16 b) { SL_EACH(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F16 f_abs(F16 a) { SL_EACH(F16, std::fabs(a.v[i])); }
inline uint32_t f_at_least(F16 a, F16 b) {
    uint32_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (uint32_t)(a.v[i] >= b.v[i]) << i;
    return mask;
}
inline I16 i_round(F16 a) { SL_EACH(I16, (int32_t)std::lrint(a.v[i])); }
inline F16 f_from(I16 a) { SL_EACH(F16, (float)a.v[i]); }
inline I16 i_set(int32_t x) { SL_EACH(I16, x); }
inline I16 i_load(const int32_t* p) { SL_EACH(I16, p[i]); }
inline void i_store(uint32_t* p, I16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline I16 operator+(I16 a, I16 b) { SL_EACH(I16, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
inline I16 operator^(I16 a, I16 b) { SL_EACH(I16, a.v[i] ^ b.v[i]); }
inline I16 i_shl(I16 a, int n) { SL_EACH(I16, (int32_t)((uint32_t)a.v[i] << n)); }
inline I16 i_shr(I16 a, int n) { SL_EACH(I16, (int32_t)((uint32_t)a.v[i] >> n)); }
inline void i_multiply(I16 a, uint32_t b, I16& high, I16& low) {
    for (int i = 0; i < LANES; i++) {
        uint64_t product = (uint64_t)(uint32_t)a.v[i] * b;
        high.v[i] = (int32_t)(product >> 32);
        low.v[i] = (int32_t)product;
    }
}
inline F16 f_bits(I16 a) {
    F16 out;
    std::memcpy(out.v, a.v, sizeof out.v);
    return out;
}
inline I16 i_bits(F16 a) {
    I16 out;
    std::memcpy(out.v, a.v, sizeof out.v);
    return out;
}
inline F16 f_load_half(const uint16_t* p) { SL_EACH(F16, half_to_float(p[i])); }
inline F16 f_load_bf16(const uint16_t* p) {
    I16 bits;
    for (int i = 0; i < LANES; i++) bits.v[i] = (int32_t)((uint32_t)p[i] << 16);
    return f_bits(bits);
}
inline F16 f_load_i8(const int8_t* p) { SL_EACH(F16, (float)p[i]); }
inline void i_store_i8(int8_t* p, I16 a) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}

#undef SL_EACH
#endif

// bfloat16 of a float, rounded to nearest even, as torch does; a NaN stays one.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Sum and maximum over the lanes, always in the same order: halves onto each other.
#if SL_LEVEL == 0
inline float f_sum(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
    return a.v[0];
}

inline float f_top(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
}
#else
#if SL_LEVEL == 2
inline __m256 low_half(F16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(F16 a) { return _mm512_extractf32x8_ps(a.v, 1); }
#else
inline __m256 low_half(F16 a) { return a.a; }
inline __m256 high_half(F16 a) { return a.b; }
#endif

inline float f_sum(F16 a) {
    __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

inline float f_top(F16 a) {
    __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
#endif

// e^x with a relative error below 2e-7 for x in [-87, 88]; below that it is 0, as softmax wants it.
// Cody and Waite's reduction by ln 2 in two parts, then a polynomial (minimax on [-ln2/2, ln2/2]).
inline F16 f_exp(F16 x) {
    const F16 low = f_set(-87.0f);
    F16 clamped = f_min(f_max(x, low), f_set(88.0f));
    I16 n = i_round(clamped * f_set(1.44269504088896341f));
    F16 k = f_from(n);
    F16 r = f_fma(k, f_set(-0.693145751953125f), clamped);
    r = f_fma(k, f_set(-1.42860677e-6f), r);
    F16 p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_fma(p, r * r, r) + f_set(1.0f);
    F16 power = f_bits(i_shl(n + i_set(127), 23));
    F16 result = p * power;
#if SL_LEVEL == 2
    return {_mm512_mask_mov_ps(_mm512_setzero_ps(), _mm512_cmp_ps_mask(x.v, low.v, _CMP_GE_OQ), result.v)};
#elif SL_LEVEL == 1
    return {_mm256_and_ps(result.a, _mm256_cmp_ps(x.a, low.a, _CMP_GE_OQ)),
            _mm256_and_ps(result.b, _mm256_cmp_ps(x.b, low.b, _CMP_GE_OQ))};
#else
    for (int i = 0; i < LANES; i++)
        if (!(x.v[i] >= low.v[i])) result.v[i] = 0.0f;
    return result;
#endif
}

}  // namespace SL_NS
