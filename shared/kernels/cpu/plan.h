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
    bool appends;  // writes its token's key and value first: it has the only split they are in
};

// Where the partial results of one token and KV head lie.
struct Partials {
    int64_t first = -1;  // row of the first split; -1: the item has merged its own
    int32_t stride = 0, num_splits = 0;
};

class AttentionPlan {
  public:
    void make(const sl_model& model, const Shape& shape, const sl_step& step, int num_threads) {
        items_.clear();
        num_partials_ = 0;
        num_kv_heads_ = model.num_kv_heads;
        partials_.assign((size_t)step.num_tokens * num_kv_heads_, Partials{});
        is_decode_ = true;
        for (int seq = 0; seq < step.num_seqs; seq++) is_decode_ &= step.starts[seq + 1] - step.starts[seq] == 1;
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
                                   step.positions[token + count - 1] / SPLIT + 1, -1, 0, false};
                item.num_splits = item.end_split - item.first_split;
                for (; item.kv_head < model.num_kv_heads; item.kv_head++) add(item, shape.group, pieces);
            }
    }

    const std::vector<AttentionItem>& items() const { return items_; }

    // Rows of partial results that several threads give; 0: every item merges its own.
    int64_t num_partials() const { return num_partials_; }
    const Partials& partials(int64_t token, int kv_head) const { return partials_[token * num_kv_heads_ + kv_head]; }

    // Every sequence has one new token: its key and value are needed by nobody but one item of each KV head.
    bool is_decode() const { return is_decode_; }

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
            item.appends = is_decode_ && item.end_split == end;
            if (in_parts) item.partial = num_partials_ + (int64_t)(first - begin) * item.count * group;
            items_.push_back(item);
        }
        if (!in_parts) return;
        const int32_t stride = item.count * group;
        for (int i = 0; i < item.count; i++)
            partials_[(int64_t)(item.token + i) * num_kv_heads_ + item.kv_head] =
                Partials{num_partials_ + i * group, stride, item.num_splits};
        num_partials_ += (int64_t)item.num_splits * stride;
    }

    std::vector<AttentionItem> items_;
    std::vector<Partials> partials_;  // [token][kv_head]
    int64_t num_partials_ = 0;
    int num_kv_heads_ = 0;
    bool is_decode_ = false;
};

}  // namespace SL_NS
