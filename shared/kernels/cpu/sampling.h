// Drawing one token from a row of logits: the largest logit, or Gumbel-max with keyed noise over the whole vocabulary.
// The noise is that of shared/engine/noise.py: Philox4x32-10 (Salmon et al. 2011) keyed by seed, ordinal, choice and token id.
#pragma once

#include "simd.h"

namespace SL_NS {

constexpr int COUNTERS = 16;

// Random bits of 4 * COUNTERS neighbouring token ids, the first of which is 4 * counter.
inline void philox(uint32_t counter, uint64_t seed, uint32_t ordinal, uint32_t choice, uint32_t* bits) {
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
    for (int i = 0; i < COUNTERS; i++) {
        c0[i] = counter + (uint32_t)i;
        c1[i] = ordinal;
        c2[i] = choice;
        c3[i] = 0;  // the domain of the target's own samples
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < COUNTERS; i++) {
            uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
            uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c0[i] = n0;
            c1[i] = (uint32_t)p1;
            c2[i] = n2;
            c3[i] = (uint32_t)p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < COUNTERS; i++) {
        bits[4 * i] = c0[i];
        bits[4 * i + 1] = c1[i];
        bits[4 * i + 2] = c2[i];
        bits[4 * i + 3] = c3[i];
    }
}

inline float gumbel(uint32_t bits) {
    double u = ((double)bits + 0.5) * 0x1p-32;
    return (float)-std::log(-std::log1p(-u));
}

// Never below gumbel(bits): -log u with u rounded down to a power of two, plus a little for rounding.
inline float gumbel_bound(uint32_t bits) {
    int length = bits ? 32 - __builtin_clz(bits) : 0;
    return (float)((33 - length) * 0.6931471805599453 + 1e-5);
}

inline int32_t draw_greedy(const float* logits, int32_t size) {
    float most = logits[0];
    int32_t whole = size / LANES * LANES;
    F16 top = f_set(logits[0]);
    for (int32_t i = 0; i < whole; i += LANES) top = f_max(top, f_load(logits + i));
    most = f_top(top);
    for (int32_t i = whole; i < size; i++) most = logits[i] > most ? logits[i] : most;
    for (int32_t i = 0; i < size; i++)
        if (logits[i] == most) return i;  // ties go to the lowest id
    return 0;
}

struct Drawn {
    float score;
    int32_t token;
};

// The best of part number `part` of `num_parts` of the vocabulary. The best of all is the first with the largest score.
inline Drawn draw_gumbel(const float* logits, int32_t size, int64_t part, int64_t num_parts, double temperature, uint64_t seed,
                         uint32_t ordinal, uint32_t choice) {
    const int64_t blocks = (size + 4 * COUNTERS - 1) / (4 * COUNTERS);
    const int32_t begin = (int32_t)(blocks * part / num_parts * 4 * COUNTERS);
    const int32_t whole_end = (int32_t)(blocks * (part + 1) / num_parts * 4 * COUNTERS), end = whole_end < size ? whole_end : size;
    float bounds[33];
    for (int length = 0; length <= 32; length++) bounds[length] = gumbel_bound(length ? 1u << (length - 1) : 0u);
    Drawn best{-INFINITY, begin};
    uint32_t bits[4 * COUNTERS];
    for (int32_t first = begin; first < end; first += 4 * COUNTERS) {
        philox((uint32_t)first / 4, seed, ordinal, choice, bits);
        int32_t count = end - first < 4 * COUNTERS ? end - first : 4 * COUNTERS;
        for (int32_t i = 0; i < count; i++) {
            float scaled = (float)((double)logits[first + i] / temperature);
            if (scaled + bounds[bits[i] ? 32 - __builtin_clz(bits[i]) : 0] < best.score) continue;
            float score = scaled + gumbel(bits[i]);
            if (score > best.score) best = Drawn{score, first + i};
        }
    }
    return best;
}

}  // namespace SL_NS
