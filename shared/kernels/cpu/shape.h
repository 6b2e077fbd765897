// Sizes that follow from a model, and where its cache keeps things.
#pragma once

#include "gemm.h"

namespace SL_NS {

struct Shape {
    explicit Shape(const sl_model& model)
        : group(model.num_heads / model.num_kv_heads),
          attention_size(model.num_heads * model.head_dim),
          qkv_size((model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
          inner_size(model.layers[0].out.num_in) {
        for (int i = 0; i < model.num_layers; i++) has_dense_out |= is_dense(model.layers[i].out.kind);
    }

    int group;  // query heads of one KV head
    int attention_size, qkv_size, inner_size;
    bool has_dense_out = false;  // in any layer: files mix kinds
};

// Whether any part of queries, keys and values is read with quantised rows.
inline bool has_quantised_qkv(const sl_layer& layer) {
    for (int part = 0; part < layer.num_qkv; part++)
        if (!is_dense(layer.qkv[part].kind)) return true;
    return false;
}

}  // namespace SL_NS
