// How the attention of a step is cut into items for threads.
#pragma once

#include "attention.h"
#include "memory.h"
#include "shape.h"

namespace SL_NS {

// A run of query tokens of one sequence whose heads are attended together, and which splits it covers.
struct AttentionItem {
    int32_t seq, kv_head, token, count;
    int32_t first_split, end_split;
    int64_t partial;  // index of the first split's partial rows, or -1: merge at once
    int32_t num_splits;
};

class AttentionPlan {
  public:
    void make(const sl_model& model, const Shape& shape, const sl_step& step, int num_threads) {
        items_.clear();
        num_partials_ = 0;
        int tokens_per_tile = (int)larger(1, MAX_QUERY_ROWS / shape.group);
        int64_t whole = 0;
        for (int seq = 0; seq < step.num_seqs; seq++)
            whole += ceil_div(step.starts[seq + 1] - step.starts[seq], tokens_per_tile) * model.num_kv_heads;
        // Few tiles: give the splits of one to several threads.
        int64_t pieces = whole ? ceil_div(2 * num_threads, whole) : 1;
        for (int seq = 0; seq < step.num_seqs; seq++)
            for (int token = step.starts[seq]; token < step.starts[seq + 1]; token += tokens_per_tile) {
                int count = (int)smaller(tokens_per_tile, step.starts[seq + 1] - token);
                AttentionItem item{seq, 0, token, count, first_split(model, step.positions[token]),
                                   step.positions[token + count - 1] / SPLIT + 1, -1, 0};
                item.num_splits = item.end_split - item.first_split;
                for (; item.kv_head < model.num_kv_heads; item.kv_head++) add(item, shape.group, pieces);
            }
    }

    const std::vector<AttentionItem>& items() const { return items_; }

    // Rows of partial results that several threads give; 0: every item merges its own.
    int64_t num_partials() const { return num_partials_; }

  private:
    static int first_split(const sl_model& model, int position) {
        return model.sliding_window ? (int)larger(0, position + 1 - model.sliding_window) / SPLIT : 0;
    }

    void add(AttentionItem item, int group, int64_t pieces) {
        const int begin = item.first_split, end = item.end_split;
        int64_t each = ceil_div(item.num_splits, smaller(pieces, item.num_splits));
        bool in_parts = each < item.num_splits;
        for (int first = begin; first < end; first += (int)each) {
            item.first_split = first;
            item.end_split = (int)smaller(end, first + each);
            if (in_parts) item.partial = num_partials_ + (int64_t)(first - begin) * item.count * group;
            items_.push_back(item);
        }
        if (in_parts) num_partials_ += (int64_t)item.num_splits * item.count * group;
    }

    std::vector<AttentionItem> items_;
    int64_t num_partials_ = 0;
};

}  // namespace SL_NS
