// Chains of guesses: place after place of a model that goes on from its own rows, in one call.
#pragma once

#include "sampling.h"

namespace SL_NS {

// What the softmax over a row gives to one of its logits.
inline float probability(const float* logits, int32_t size, int32_t at) {
    const float most = largest(logits, size);
    const int32_t whole = size / LANES * LANES;
    float tail[LANES];
    for (int i = 0; i < LANES; i++) tail[i] = whole + i < size ? logits[whole + i] : -INFINITY;
    F16 sum = f_exp(f_load(tail) - f_set(most));
    for (int32_t i = 0; i < whole; i += LANES) sum = sum + f_exp(f_load(logits + i) - f_set(most));
    return std::exp(logits[at] - most) / f_sum(sum);
}

// The chains of one call that are still guessed on, as the rows of a step.
class Chains {
  public:
    void begin(const sl_model& model, const sl_chains& wanted) {
        const sl_step& first = *wanted.first;
        const int64_t rows = first.num_tokens;
        wanted_ = wanted;
        words_ = Vocabulary{model.vocab_size, model.head_ids};
        size_ = model.hidden_size;
        place_ = 0;
        chains_.resize(rows);
        for (int64_t row = 0; row < rows; row++) chains_[row] = row;
        token_ids_.assign(first.token_ids, first.token_ids + rows);
        ways_.assign(first.sample, first.sample + rows);
        seeds_.assign(first.seeds, first.seeds + rows);
        ordinals_.assign(first.ordinals, first.ordinals + rows);
        choices_.assign(first.choices, first.choices + rows);
        temperatures_.assign(first.temperatures, first.temperatures + rows);
        top_ks_.assign(first.top_ks, first.top_ks + rows);
        top_ps_.assign(first.top_ps, first.top_ps + rows);
        min_ps_.assign(first.min_ps, first.min_ps + rows);
        states_.assign(wanted.states, wanted.states + rows * size_);
        hidden_.resize(rows * size_);
        sampled_.resize(rows);
        nothing_.assign(rows + 1, 0);
        std::fill_n(wanted.tokens, rows * wanted.max_places, -1);
    }

    int64_t count() const { return (int64_t)chains_.size(); }

    // The step that makes the next guess of each.
    sl_step place() {
        sl_step step = *wanted_.first;
        step.num_tokens = step.num_seqs = step.num_logit_rows = (int32_t)count();
        if (count() == 1) {  // waking another thread takes as long as it would save
            step.num_threads = 1;
            step.cores = nullptr;
        }
        step.token_ids = token_ids_.data();
        step.sample = ways_.data();
        step.seeds = seeds_.data();
        step.ordinals = ordinals_.data();
        step.choices = choices_.data();
        step.temperatures = temperatures_.data();
        step.top_ks = top_ks_.data();
        step.top_ps = top_ps_.data();
        step.min_ps = min_ps_.data();
        if (place_) step.adjust_starts = nothing_.data();
        step.states = states_.data();
        step.hidden = hidden_.data();
        step.sampled = sampled_.data();
        return step;
    }

    // Note what the step has guessed, and leave out the chains that end with it.
    void advance() {
        int64_t kept = 0;
        for (int64_t row = 0; row < count(); row++)
            if (note(row)) keep(row, kept++);
        chains_.resize(kept);
        place_++;
    }

  private:
    // Whether the chain of this row goes on.
    bool note(int64_t row) {
        const int64_t chain = chains_[row], at = chain * wanted_.max_places + place_;
        const int32_t token = sampled_[row];
        if (token < 0) return false;  // there was no memory to draw it
        const float sureness = probability(wanted_.first->logits + row * words_.size, words_.size, words_.place(token));
        wanted_.tokens[at] = token;
        wanted_.sureness[at] = sureness;
        wanted_.reach[chain] *= sureness;
        std::memcpy(wanted_.states + chain * size_, hidden_.data() + row * size_, sizeof(float) * size_);
        return place_ + 1 < wanted_.num_places[chain] && wanted_.reach[chain] > wanted_.least_reach;
    }

    void keep(int64_t row, int64_t to) {
        chains_[to] = chains_[row];
        token_ids_[to] = sampled_[row];
        ways_[to] = ways_[row];
        seeds_[to] = seeds_[row];
        ordinals_[to] = ordinals_[row] + 1;
        choices_[to] = choices_[row];
        temperatures_[to] = temperatures_[row];
        top_ks_[to] = top_ks_[row];
        top_ps_[to] = top_ps_[row];
        min_ps_[to] = min_ps_[row];
        std::memcpy(states_.data() + to * size_, hidden_.data() + row * size_, sizeof(float) * size_);
    }

    sl_chains wanted_ = {};
    Vocabulary words_ = {};
    int64_t size_ = 0;
    int32_t place_ = 0;
    std::vector<int64_t> chains_;  // which chain a row belongs to
    std::vector<int32_t> token_ids_, ways_, top_ks_, sampled_;
    std::vector<uint64_t> seeds_;
    std::vector<uint32_t> ordinals_, choices_;
    std::vector<double> temperatures_, top_ps_, min_ps_;
    std::vector<int64_t> nothing_;
    std::vector<float> states_, hidden_;
};

}  // namespace SL_NS
