// The two ends of a step: rows of the embedding before the layers; norm, logits and draws after them.
#pragma once

#include "products.h"
#include "sampling.h"

namespace SL_NS {

// Rows of a model that goes on from another one's: each is made of a hidden row of that one and the token after it.
inline void fuse(const Work& work, Team::Member& me) {
    const sl_model& m = work.model;
    const sl_step& s = work.step;
    const int64_t size = m.hidden_size, width = m.fuse.num_in;
    const Rows x = work.inputs(me, s.num_tokens, width, [&](int64_t row, const RowSet& set) {
        float* out = set.dense + row * width;
        std::memcpy(out, s.states + row * size, sizeof(float) * size);
        unpack_row(m.embedding, s.token_ids[row], size, out + size);
        if (!is_dense(m.fuse.kind)) quantise(out, set.quant, row, 0, width);
    });
    multiply(work.team, me, &m.fuse, 1, x, s.num_tokens, [&](int64_t row, int64_t at, int count, const F16* values) {
        for (int t = 0; t < count; t++) f_store(work.arrays.hidden + (row + t) * size + at, values[t]);
    });
}

inline void embed(const Work& work, Team::Member& me) {
    const sl_model& m = work.model;
    if (m.fuse.data) return fuse(work, me);
    work.team.each(me, work.step.num_tokens, [&](int64_t row) {
        float* out = work.arrays.hidden + row * m.hidden_size;
        unpack_row(m.embedding, work.step.token_ids[row], m.hidden_size, out);
        if (!m.positions) return;
        const float* position = m.positions + (int64_t)work.step.positions[row] * m.hidden_size;
        for (int i = 0; i < m.hidden_size; i++) out[i] += position[i];
    });
}

inline void store_logits(float* row, int64_t at, int64_t vocab_size, F16 values) {
    if (at + LANES <= vocab_size) {
        f_store(row + at, values);
        return;
    }
    float tail[LANES];
    f_store(tail, values);
    for (int64_t i = at; i < vocab_size; i++) row[i] = tail[i - at];
}

inline void finish(const Work& work, Team::Member& me) {
    const sl_model& m = work.model;
    const sl_step& s = work.step;
    const Arrays& a = work.arrays;
    const int64_t rows = s.num_logit_rows, size = m.hidden_size;
    if (!rows) return;
    const Rows x = work.inputs(me, rows, size, [&](int64_t row, const RowSet& set) {
        float* out = set.dense + row * size;
        normalise(a.hidden + (int64_t)s.logit_rows[row] * size, m.final_norm, m.norm, m.norm_eps, size, out);
        if (s.hidden && (me.index == 0 || !a.has_own_inputs)) std::memcpy(s.hidden + row * size, out, sizeof(float) * size);
        if (!is_dense(m.lm_head.kind)) quantise(out, set.quant, row, 0, size);
    });
    multiply(work.team, me, &m.lm_head, 1, x, rows,
             [&](int64_t row, int64_t at, int count, const F16* values) {
                 for (int t = 0; t < count; t++)
                     store_logits(s.logits + (row + t) * m.vocab_size, at, m.vocab_size, values[t]);
             });
    const Vocabulary words{m.vocab_size, m.head_ids};
    if (s.sample) work.team.each(me, rows, [&](int64_t row) { s.sampled[row] = draw(s, row, words); });
}

}  // namespace SL_NS
