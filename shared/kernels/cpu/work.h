// What every stage of one step sees: the model, the step, the threads and the step's memory.
#pragma once

#include "plan.h"
#include "team.h"

namespace SL_NS {

using slipstream::Team;

// Arrays of one step, [rows][...]. A stage reads what the stages before it wrote; nobody writes what another thread reads.
struct Arrays {
    float *hidden, *normed, *qkv, *attended, *inner;
    QuantRows input, inner_quant;
    float *partial_acc, *partial_top, *partial_total;  // attention whose splits several threads compute
};

struct Work {
    const sl_model& model;
    const Shape& shape;
    const sl_step& step;
    const AttentionPlan& plan;
    Team& team;
    Arrays arrays;
};

class Scratch {
  public:
    // Room for a step; false when there is no memory.
    bool take(const sl_model& model, const Shape& shape, const sl_step& step, const AttentionPlan& plan, Arrays& out) {
        const int64_t rows = step.num_tokens, most = larger(rows, step.num_logit_rows), partials = plan.num_partials();
        out.hidden = hidden_.floats(rows * model.hidden_size);
        out.normed = normed_.floats(most * model.hidden_size);
        out.qkv = qkv_.floats(larger(rows * shape.qkv_size, (int64_t)step.num_logit_rows * model.hidden_size));
        out.attended = attended_.floats(rows * shape.attention_size);
        out.inner = shape.has_dense_out ? inner_.floats(rows * shape.inner_size) : nullptr;
        if (!out.hidden || !out.normed || !out.qkv || !out.attended || (shape.has_dense_out && !out.inner)) return false;
        if (!input_.take(most, larger(model.hidden_size, shape.attention_size))) return false;
        if (!inner_quant_.take(rows, shape.inner_size)) return false;
        out.input = input_.rows();
        out.inner_quant = inner_quant_.rows();
        out.partial_acc = partial_acc_.floats(partials * model.head_dim);
        out.partial_top = partial_top_.floats(2 * partials);
        out.partial_total = partials ? out.partial_top + partials : nullptr;
        return !partials || (out.partial_acc && out.partial_top);
    }

  private:
    Buffer hidden_, normed_, qkv_, attended_, inner_, partial_acc_, partial_top_;
    QuantBuffer input_, inner_quant_;
};

}  // namespace SL_NS
