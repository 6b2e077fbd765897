// Drawing one token from a row of logits: the largest logit, or Gumbel-max with keyed noise over the whole vocabulary or over
// what filters leave of it.
// The noise is that of shared/engine/noise.py: Philox4x32-10 (Salmon et al. 2011) keyed by seed, ordinal, choice and token id.
#pragma once

#include "filters.h"

namespace SL_NS {

// The tokens of a row of logits: a whole vocabulary, or the part of one that a draft can say.
struct Vocabulary {
    int32_t size;
    const int32_t* ids;  // ascending; null: logit i is token i

    int32_t token(int32_t at) const { return ids ? ids[at] : at; }

    // The logit of a token, -1 where there is none.
    int32_t place(int32_t token) const {
        if (!ids) return token < size ? token : -1;
        const int32_t* found = std::lower_bound(ids, ids + size, token);
        return found != ids + size && *found == token ? (int32_t)(found - ids) : -1;
    }
};

// What the noise of one draw depends on beside the token id.
struct NoiseKey {
    uint64_t seed;
    uint32_t ordinal, choice;
};

// Random bits of the token ids 4 * counter + lane, for 16 counters.
inline void philox(I16 counters, const NoiseKey& key, I16 lanes[4]) {
    I16 c0 = counters, c1 = i_set((int32_t)key.ordinal), c2 = i_set((int32_t)key.choice);
    I16 c3 = i_set(0);  // the domain of the target's own samples
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < 10; round++) {
        I16 high0, low0, high1, low1;
        i_multiply(c0, 0xD2511F53u, high0, low0);
        i_multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ i_set((int32_t)k0);
        c2 = high0 ^ c3 ^ i_set((int32_t)k1);
        c1 = low1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    lanes[0] = c0, lanes[1] = c1, lanes[2] = c2, lanes[3] = c3;
}

inline float gumbel(uint32_t bits) {
    double u = ((double)bits + 0.5) * 0x1p-32;  // exact, and 1 - u too
    return (float)-logarithm(-logarithm(1.0 - u));
}

// Never below gumbel(bits): -log u with u rounded down to a power of two, plus more than rounding can take away. The 24 high
// bits are a float exactly, whose exponent is what is asked for; without any of them the bound is high.
inline F16 gumbel_bound(I16 bits) {
    F16 exponent = f_from(i_shr(i_bits(f_from(i_shr(bits, 8))), 23));
    return f_set((127 + 24) * 0.693147181f + 1e-3f) - exponent * f_set(0.693147181f);
}

// The largest score seen so far. Ids are shown in ascending order, so that ties go to the lowest one.
class Contest {
  public:
    // Up to 16 ids with their scaled logits and random bits; logarithms only for those that can still win.
    template <typename IdOf>
    void show(const float* scaled, const uint32_t* bits, int count, const IdOf& id_of) {
        uint32_t mask = f_at_least(f_load(scaled) + gumbel_bound(i_load((const int32_t*)bits)), f_set(best_));
        for (mask &= (1u << count) - 1; mask; mask &= mask - 1) {
            int i = __builtin_ctz(mask);
            float score = scaled[i] + gumbel(bits[i]);
            if (score <= best_) continue;
            best_ = score;
            winner_ = id_of(i);
        }
    }
    int32_t winner() const { return winner_; }

  private:
    float best_ = -INFINITY;
    int32_t winner_ = 0;
};

// The largest logit; what is not a number is passed over, as the second operand of `f_max` then stays.
inline float largest(const float* logits, int32_t size) {
    int32_t whole = size / LANES * LANES;
    F16 top = f_set(-INFINITY);
    for (int32_t i = 0; i < whole; i += LANES) top = f_max(f_load(logits + i), top);
    float most = f_top(top);
    for (int32_t i = whole; i < size; i++) most = logits[i] > most ? logits[i] : most;
    return most;
}

inline int32_t draw_greedy(const float* logits, int32_t size) {
    float most = largest(logits, size);
    int32_t whole = size / LANES * LANES;
    for (int32_t i = 0; i < whole; i += LANES)
        if (uint32_t mask = f_at_least(f_load(logits + i), f_set(most))) return i + __builtin_ctz(mask);  // the lowest id
    for (int32_t i = whole; i < size; i++)
        if (logits[i] == most) return i;
    return 0;
}

inline int32_t draw_gumbel(const float* logits, int32_t size, double temperature, const NoiseKey& key) {
    constexpr int IDS = 4 * LANES;
    Contest contest;
    int32_t counters[LANES];
    uint32_t lanes[4][LANES], bits[IDS];
    float scaled[IDS] = {};
    for (int32_t first = 0; first < size; first += IDS) {
        int count = size - first < IDS ? size - first : IDS;
        for (int i = 0; i < LANES; i++) counters[i] = first / 4 + i;
        I16 words[4];
        philox(i_load(counters), key, words);
        for (int lane = 0; lane < 4; lane++) i_store(lanes[lane], words[lane]);
        for (int i = 0; i < LANES; i++)
            for (int lane = 0; lane < 4; lane++) bits[4 * i + lane] = lanes[lane][i];
        for (int i = 0; i < count; i++) scaled[i] = scaled_logit(logits[first + i], temperature);
        for (int at = 0; at < count; at += LANES)
            contest.show(scaled + at, bits + at, count - at < LANES ? count - at : LANES, [&](int i) { return first + at + i; });
    }
    return contest.winner();
}

// Up to 16 tokens, in any order that ascends, with their scaled logits.
inline void show_tokens(Contest& contest, const int32_t* tokens, const float* scaled, int count, const NoiseKey& key) {
    int32_t counters[LANES] = {};
    uint32_t lanes[4][LANES], bits[LANES] = {};
    float values[LANES] = {};
    for (int i = 0; i < count; i++) counters[i] = tokens[i] / 4;
    I16 words[4];
    philox(i_load(counters), key, words);
    for (int lane = 0; lane < 4; lane++) i_store(lanes[lane], words[lane]);
    for (int i = 0; i < count; i++) bits[i] = lanes[tokens[i] % 4][i];
    for (int i = 0; i < count; i++) values[i] = scaled[i];
    contest.show(values, bits, count, [&](int i) { return tokens[i]; });
}

// Over all tokens of a part of a vocabulary, whose ids are not neighbours.
inline int32_t draw_gumbel_of(const float* logits, const Vocabulary& words, double temperature, const NoiseKey& key) {
    Contest contest;
    float scaled[LANES];
    for (int32_t first = 0; first < words.size; first += LANES) {
        int count = words.size - first < LANES ? words.size - first : LANES;
        for (int i = 0; i < count; i++) scaled[i] = scaled_logit(logits[first + i], temperature);
        show_tokens(contest, words.ids + first, scaled, count, key);
    }
    return contest.winner();
}

// -1 when there is no memory: then the draw is left to the caller.
inline int32_t draw_filtered(const float* logits, const Vocabulary& words, double temperature, const Filters& filters,
                             const NoiseKey& key) {
    static thread_local Candidates left;
    if (!left.reserve(words.size)) return -1;
    filter(logits, words.size, temperature, largest(logits, words.size), filters, left);
    Contest contest;
    for (int32_t first = 0; first < left.count; first += LANES) {
        int count = left.count - first < LANES ? left.count - first : LANES;
        int32_t tokens[LANES];
        for (int i = 0; i < count; i++) tokens[i] = words.token(left.ids[first + i]);
        show_tokens(contest, tokens, left.scaled + first, count, key);
    }
    return contest.winner();
}

// A row's logits with its adjustments made; null when there is no memory or an id is none of the vocabulary. In a part of a
// vocabulary tokens that are not there have nothing to adjust.
inline const float* adjusted(const sl_step& step, int64_t row, const Vocabulary& words) {
    const int32_t vocab_size = words.size;
    const float* logits = step.logits + row * vocab_size;
    int64_t begin = step.adjust_starts[row], end = step.adjust_starts[row + 1];
    if (begin == end) return logits;
    static thread_local std::unique_ptr<float[]> copy;
    static thread_local int32_t size = 0;
    if (size < vocab_size) {
        copy.reset(new (std::nothrow) float[vocab_size]);
        size = copy ? vocab_size : 0;
    }
    if (!copy) return nullptr;
    std::memcpy(copy.get(), logits, sizeof(float) * vocab_size);
    for (int64_t i = begin; i < end; i++) {
        int32_t place = step.adjust_ids[i] < 0 ? -1 : words.place(step.adjust_ids[i]);
        if (place < 0 && words.ids) continue;
        if (place < 0) return nullptr;
        float value = step.adjust_values[i], &logit = copy[place];
        if (step.adjust_kinds[i] == SL_ADJUST_ADD)
            logit += value;
        else
            logit = logit > 0.0f ? logit / value : logit * value;
    }
    return copy.get();
}

// One row of a step, in its way; -1 where it is left to the caller.
inline int32_t draw(const sl_step& step, int64_t row, const Vocabulary& words) {
    if (step.sample[row] == SL_SAMPLE_NONE) return -1;
    const float* logits = adjusted(step, row, words);
    if (!logits) return -1;
    const NoiseKey key{step.seeds[row], step.ordinals[row], step.choices[row]};
    switch (step.sample[row]) {
        case SL_SAMPLE_GREEDY: return words.token(draw_greedy(logits, words.size));
        case SL_SAMPLE_GUMBEL:
            if (words.ids) return draw_gumbel_of(logits, words, step.temperatures[row], key);
            return draw_gumbel(logits, words.size, step.temperatures[row], key);
    }
    const Filters filters{step.top_ks[row], step.top_ps[row], step.min_ps[row]};
    return draw_filtered(logits, words, step.temperatures[row], filters, key);
}

}  // namespace SL_NS
