// One layer: the order of its stages, its norms and its feed-forward half.
#pragma once

#include "attending.h"
#include "products.h"

namespace SL_NS {

// The normed rows as floats, and quantised where a matrix that comes next reads them so.
inline Rows normed(const Work& work, Team::Member& me, const sl_norm_weights& weights, bool is_quantised) {
    const sl_model& m = work.model;
    const int64_t size = m.hidden_size;
    return work.inputs(me, work.step.num_tokens, size, [&](int64_t row, const RowSet& set) {
        float* out = set.dense + row * size;
        normalise(work.arrays.hidden + row * size, weights, m.norm, m.norm_eps, size, out);
        if (is_quantised) quantise(out, set.quant, row, 0, size);
    });
}

// Queries, keys and values of every token.
inline void project(const Work& work, Team::Member& me, const sl_layer& layer, const Rows& x) {
    float* out = work.arrays.qkv;
    const int64_t width = work.shape.qkv_size;
    multiply(work.team, me, layer.qkv, layer.num_qkv, x, work.step.num_tokens,
             [&](int64_t row, int64_t at, int count, const F16* values) {
                 for (int t = 0; t < count; t++) f_store(out + (row + t) * width + at, values[t]);
             });
}

// Activation of `count` rows of one group of 32 inner values; `tiles` are its outputs of the first matrix.
inline void activate_group(const Work& work, const sl_layer& layer, int64_t row, int64_t group, int count,
                           const F16 (*tiles)[MAX_TOKENS]) {
    const sl_model& m = work.model;
    for (int t = 0; t < count; t++) {
        alignas(64) float inner[GROUP];
        for (int half = 0; half < 2; half++) {
            F16 v = m.gated ? activate(tiles[2 * half][t], m.activation) * tiles[2 * half + 1][t]
                            : activate(tiles[half][t], m.activation);
            f_store(inner + LANES * half, v);
        }
        if (is_dense(layer.out.kind))
            std::memcpy(work.arrays.inner + (row + t) * layer.out.num_in + group * GROUP, inner, sizeof inner);
        else
            quantise_group(inner, work.arrays.inner_quant, row + t, group);
    }
}

// Activation of the first matrix's outputs, 32 at a time, quantised for the second one.
inline void feed_forward(const Work& work, Team::Member& me, const sl_layer& layer, const Rows& x) {
    const int tiles_per_group = work.model.gated ? 4 : 2;
    const int64_t num_tokens = work.step.num_tokens, groups = layer.into.num_out / LANES / tiles_per_group;
    work.team.each(me, groups * ceil_div(num_tokens, TOKEN_BLOCK), [&](int64_t item) {
        int64_t group = item % groups, begin = item / groups * TOKEN_BLOCK;
        int64_t end = smaller(num_tokens, begin + TOKEN_BLOCK);
        for (int64_t row = begin; row < end; row += MAX_TOKENS) {
            int count = (int)smaller(MAX_TOKENS, end - row);
            F16 values[4][MAX_TOKENS];
            for (int i = 0; i < tiles_per_group; i++) tile(layer.into, group * tiles_per_group + i, x, row, count, values[i]);
            activate_group(work, layer, row, group, count, values);
        }
    });
}

inline void attention_half(const Work& work, Team::Member& me, const sl_layer& layer, int index) {
    const Attending attending(work, layer, index);
    expect(work.team, me, layer.attn_out);
    project(work, me, layer, normed(work, me, layer.attn_norm, has_quantised_qkv(layer)));
    attending.append(me);
    attending.attend(me);
    expect(work.team, me, layer.into);
    multiply_onto_hidden(work, me, layer.attn_out, attending.attended(me));
}

// What a step reads first behind this layer.
inline const sl_matrix& matrix_after(const sl_model& model, int index) {
    if (index + 1 == model.num_layers) return model.lm_head;
    const sl_layer& next = model.layers[index + 1];
    return next.num_qkv ? next.qkv[0] : next.into;
}

inline void forward_layer(const Work& work, Team::Member& me, int index) {
    const sl_layer& layer = work.model.layers[index];
    if (layer.num_qkv) attention_half(work, me, layer, index);
    expect(work.team, me, layer.out);
    feed_forward(work, me, layer, normed(work, me, layer.mlp_norm, !is_dense(layer.into.kind)));
    expect(work.team, me, matrix_after(work.model, index));
    multiply_onto_hidden(work, me, layer.out, Rows{work.arrays.inner_quant, work.arrays.inner, layer.out.num_in});
}

}  // namespace SL_NS
