// What every stage of one step sees: the model, the step, the threads and the step's memory.
#pragma once

#include "plan.h"
#include "team.h"

namespace SL_NS {

using slipstream::Team;

constexpr int OWN_ROWS = 4;  // as many rows every thread prepares for itself

// Rows made for one product to read: as floats, and quantised where it wants them so.
struct RowSet {
    float* dense;
    QuantRows quant;
};

class RowBuffer {
  public:
    bool take(int64_t rows, int64_t width) {
        set_.dense = dense_.floats(rows * width);
        bool has_quant = quant_.take(rows, width);
        set_.quant = quant_.rows();
        return set_.dense && has_quant;
    }
    const RowSet& set() const { return set_; }

  private:
    Buffer dense_;
    QuantBuffer quant_;
    RowSet set_ = {};
};

// Arrays of one step, [rows][...]. A stage reads what the stages before it wrote; nobody writes what another thread reads.
struct Arrays {
    float *hidden, *qkv, *attended, *inner;
    QuantRows inner_quant;
    float *partial_acc, *partial_top, *partial_total;  // attention whose splits several threads compute
    const RowBuffer* inputs;  // one for all threads, or one for each
    bool has_own_inputs;
};

struct Work {
    const sl_model& model;
    const Shape& shape;
    const sl_step& step;
    const AttentionPlan& plan;
    Team& team;
    Arrays arrays;

    // Rows that the next product reads; compute(row, set) makes each. Many rows are a stage of the team. Few rows every
    // thread makes for itself, the same bits in memory of its own: that is quicker than to meet.
    template <typename Compute>
    Rows inputs(Team::Member& me, int64_t count, int64_t width, const Compute& compute) const {
        const RowSet& set = arrays.inputs[arrays.has_own_inputs ? me.index : 0].set();
        if (arrays.has_own_inputs)
            for (int64_t row = 0; row < count; row++) compute(row, set);
        else
            team.each(me, count, [&](int64_t row) { compute(row, set); });
        return Rows{set.quant, set.dense, width};
    }
};

class Scratch {
  public:
    explicit Scratch(int num_threads) : inputs_(num_threads) {}

    // Room for a step; false when there is no memory.
    bool take(const sl_model& model, const Shape& shape, const sl_step& step, const AttentionPlan& plan, Arrays& out) {
        const int64_t rows = step.num_tokens, partials = plan.num_partials();
        out.hidden = hidden_.floats(rows * model.hidden_size);
        out.qkv = qkv_.floats(rows * shape.qkv_size);
        out.attended = attended_.floats(rows * shape.attention_size);
        out.inner = shape.has_dense_out ? inner_.floats(rows * shape.inner_size) : nullptr;
        if (!out.hidden || !out.qkv || !out.attended || (shape.has_dense_out && !out.inner)) return false;
        if (!inner_quant_.take(rows, shape.inner_size)) return false;
        out.inner_quant = inner_quant_.rows();
        out.partial_acc = partial_acc_.floats(partials * model.head_dim);
        out.partial_top = partial_top_.floats(2 * partials);
        out.partial_total = partials ? out.partial_top + partials : nullptr;
        if (partials && !(out.partial_acc && out.partial_top)) return false;
        const int64_t widest = larger(larger(model.hidden_size, shape.attention_size), model.fuse.data ? model.fuse.num_in : 0);
        return take_inputs(larger(rows, step.num_logit_rows), widest, out);
    }

  private:
    bool take_inputs(int64_t rows, int64_t width, Arrays& out) {
        out.inputs = inputs_.data();
        out.has_own_inputs = rows <= OWN_ROWS;
        for (size_t i = 0; i < (out.has_own_inputs ? inputs_.size() : 1); i++)
            if (!inputs_[i].take(rows, width)) return false;
        return true;
    }

    Buffer hidden_, qkv_, attended_, inner_, partial_acc_, partial_top_;
    QuantBuffer inner_quant_;
    std::vector<RowBuffer> inputs_;
};

}  // namespace SL_NS
