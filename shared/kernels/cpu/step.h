// One step of a model on all threads: rows in, hidden rows, logits and sampled tokens out.
//
// The order of stages is the model's; between two stages all threads meet. Work items are sized so that each thread gets
// several; which thread computes what never matters for the result.
#pragma once

#include "chains.h"
#include "cores.h"
#include "finish.h"
#include "kernels.h"
#include "layer.h"

namespace SL_NS {

constexpr int LONG_STEP = 64;  // rows from which others may well begin or end while the step runs

class Engine {
  public:
    Engine(const sl_model& model, int num_threads)
        : m_(model), shape_(model), team_(num_threads), scratch_(num_threads) {}

    int run(const sl_step& step) {
        if (step.cores)
            team_.use(share(*step.cores));
        else
            team_.use(step.num_threads);
        plan_.make(m_, shape_, step, team_.size());
        Work work{m_, shape_, step, plan_, team_, {}};
        if (!scratch_.take(m_, shape_, step, plan_, work.arrays)) return -1;
        hidden_ = work.arrays.hidden;
        num_rows_ = step.num_tokens;
        const bool is_long = step.cores && step.num_tokens >= LONG_STEP;
        const int leg = is_long ? 1 : m_.num_layers;
        for (int first = 0; first < m_.num_layers; first += leg) {
            if (is_long) team_.use(share(*step.cores));
            run_layers(work, first, first + leg);
        }
        return 0;
    }

    int guess(const sl_chains& wanted) {
        for (chains_.begin(m_, wanted); chains_.count(); chains_.advance())
            if (run(chains_.place())) return -1;
        return 0;
    }

    // The last step's rows after the final norm, or null when there is no memory.
    const float* hidden() {
        const int64_t size = m_.hidden_size;
        float* out = normed_.floats(num_rows_ * size);
        for (int64_t row = 0; out && row < num_rows_; row++)
            normalise(hidden_ + row * size, m_.final_norm, m_.norm, m_.norm_eps, size, out + row * size);
        return out;
    }

    int matmul(const sl_matrix& matrix, const float* rows, int num_rows, float* out) {
        if (!test_rows_.take(num_rows, matrix.num_in)) return -1;
        Rows x{test_rows_.rows(), rows, matrix.num_in};
        if (!is_dense(matrix.kind))
            for (int r = 0; r < num_rows; r++) quantise(rows + (int64_t)r * matrix.num_in, x.quant, r, 0, matrix.num_in);
        team_.use(0);
        team_.run([&](Team::Member& me) {
            multiply(team_, me, &matrix, 1, x, num_rows, [&](int64_t row, int64_t at, int count, const F16* values) {
                for (int t = 0; t < count; t++) f_store(out + (row + t) * matrix.num_out + at, values[t]);
            });
        });
        return 0;
    }

  private:
    static slipstream::Share share(const sl_cores& cores) { return slipstream::share_at(cores, slipstream::monotonic_ns()); }

    // With what comes before the first layer and after the last one.
    void run_layers(const Work& work, int first, int end) {
        team_.run([&](Team::Member& me) {
            if (first == 0) embed(work, me);
            for (int i = first; i < end; i++) forward_layer(work, me, i);
            if (end == m_.num_layers) finish(work, me);
        });
    }

    const sl_model m_;
    const Shape shape_;
    Team team_;
    AttentionPlan plan_;
    Scratch scratch_;
    QuantBuffer test_rows_;
    Buffer normed_;
    Chains chains_;
    const float* hidden_ = nullptr;  // of the last step
    int64_t num_rows_ = 0;
};

inline slipstream::Kernels kernels() {
    return {[](const sl_model* model, int threads) -> void* { return new Engine(*model, threads); },
            [](void* engine) { delete (Engine*)engine; },
            [](void* engine, const sl_step* step) { return ((Engine*)engine)->run(*step); },
            [](void* engine, const sl_chains* chains) { return ((Engine*)engine)->guess(*chains); },
            [](void* engine) { return ((Engine*)engine)->hidden(); },
            [](void* engine, const sl_matrix* matrix, const float* rows, int n, float* out) {
                return ((Engine*)engine)->matmul(*matrix, rows, n, out);
            },
            [](const sl_step* step, int32_t vocab_size) {
                for (int64_t row = 0; row < step->num_logit_rows; row++) step->sampled[row] = draw(*step, row, Vocabulary{vocab_size, nullptr});
            }};
}

}  // namespace SL_NS
