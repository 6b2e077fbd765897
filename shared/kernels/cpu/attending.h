// The attention of a layer: rotate, append, attend over the cache, merge.
#pragma once

#include "cache.h"
#include "work.h"

namespace SL_NS {

constexpr int MAX_HEAD_DIM = 256;

class Attending {
  public:
    Attending(const Work& work, const sl_layer& layer, int index)
        : work_(work), m_(work.model), s_(work.step), a_(work.arrays), layer_(layer), cache_(m_, s_, index),
          group_(work.shape.group) {}

    // Keys and values of all new tokens into the cache, where items do not append their own.
    void append(Team::Member& me) const {
        if (work_.plan.is_decode()) return;
        work_.team.each(me, s_.num_tokens, [&](int64_t row) {
            for (int head = 0; head < m_.num_kv_heads; head++) append_head(row, head);
        });
    }

    void attend(Team::Member& me) const {
        const auto& items = work_.plan.items();
        work_.team.each(me, (int64_t)items.size(), [&](int64_t i) {
            switch (m_.kv_dtype) {
                case SL_KV_INT8: attend_item<SL_KV_INT8>(items[i]); break;
                case SL_KV_BF16: attend_item<SL_KV_BF16>(items[i]); break;
                default: attend_item<SL_KV_F32>(items[i]); break;
            }
        });
    }

    // What attention gave, as rows for the next matrix.
    Rows attended(Team::Member& me) const {
        const int64_t size = work_.shape.attention_size;
        return work_.inputs(me, s_.num_tokens, size, [&](int64_t row, const RowSet& set) {
            float* out = set.dense + row * size;
            for (int head = 0; head < m_.num_kv_heads; head++) gather(row, head, out + (int64_t)head * group_ * m_.head_dim);
            if (!is_dense(layer_.attn_out.kind)) quantise(out, set.quant, row, 0, size);
        });
    }

  private:
    // Norm, rotation and scale of one head of queries or keys, in place.
    void turn(float* at, int head, int64_t row) const {
        const float* norm = head < m_.num_heads ? layer_.q_norm : layer_.k_norm;
        if (norm) normalise(at, sl_norm_weights{norm, nullptr}, SL_NORM_RMS, m_.norm_eps, m_.head_dim, at);
        if (m_.rotations) rotate(at, m_.rotations + (int64_t)s_.positions[row] * m_.head_dim, m_.head_dim);
        if (head < m_.num_heads)
            for (int d = 0; d < m_.head_dim; d++) at[d] *= m_.attention_scale;
    }

    // One head's key, rotated, and value into the row's slot of the cache.
    void append_head(int64_t row, int head) const {
        const float* projected = a_.qkv + row * work_.shape.qkv_size + work_.shape.attention_size + head * m_.head_dim;
        float key[MAX_HEAD_DIM];
        std::memcpy(key, projected, sizeof(float) * m_.head_dim);
        turn(key, m_.num_heads + head, row);
        cache_.write(row, head, key, projected + m_.num_kv_heads * m_.head_dim);
    }

    template <int KV>
    void attend_item(const AttentionItem& item) const {
        if (item.appends) append_head(item.token, item.kv_head);
        const int hd = m_.head_dim, rows = item.count * group_;
        const KvView kv = cache_.view(item.kv_head);
        float queries[MAX_QUERY_ROWS * MAX_HEAD_DIM], acc[MAX_QUERY_ROWS * MAX_HEAD_DIM];
        float tops[MAX_QUERY_ROWS], totals[MAX_QUERY_ROWS];
        int32_t positions[MAX_QUERY_ROWS];
        for (int r = 0; r < rows; r++) {
            int64_t token = item.token + r / group_, head = item.kv_head * group_ + r % group_;
            std::memcpy(queries + r * hd, a_.qkv + token * work_.shape.qkv_size + head * hd, sizeof(float) * hd);
            turn(queries + r * hd, (int)head, token);
            positions[r] = s_.positions[token];
        }
        QueryTile tile{queries, positions, rows, m_.sliding_window, positions[rows - 1] + 1};
        const int32_t* table = s_.block_tables + (int64_t)item.seq * s_.table_width;
        float result[MAX_QUERY_ROWS * MAX_HEAD_DIM], result_top[MAX_QUERY_ROWS], result_total[MAX_QUERY_ROWS];
        for (int split = item.first_split; split < item.end_split; split++) {
            Partial partial{acc, tops, totals};
            if (item.partial >= 0) {
                int64_t at = item.partial + (int64_t)(split - item.first_split) * rows;
                partial = Partial{a_.partial_acc + at * hd, a_.partial_top + at, a_.partial_total + at};
            } else if (split == item.first_split) {
                partial = Partial{result, result_top, result_total};
            }
            attend_split<KV>(kv, table, split, tile, partial);
            if (item.partial >= 0 || split == item.first_split) continue;
            for (int r = 0; r < rows; r++)
                merge_row(acc + r * hd, tops[r], totals[r], result + r * hd, result_top + r, result_total + r, hd);
        }
        if (item.partial < 0) write_rows(item, result, result_total);
    }

    // Divide by the sums and put the rows where the next matrix reads them.
    void write_rows(const AttentionItem& item, const float* result, const float* totals) const {
        for (int r = 0; r < item.count * group_; r++) {
            int64_t token = item.token + r / group_, head = item.kv_head * group_ + r % group_;
            float* out = a_.attended + token * work_.shape.attention_size + head * m_.head_dim;
            for (int d = 0; d < m_.head_dim; d += LANES)
                f_store(out + d, f_load(result + r * m_.head_dim + d) / f_set(totals[r]));
        }
    }

    // The query heads of one KV head of one token, merged where several threads computed their splits.
    void gather(int64_t row, int kv_head, float* out) const {
        const int hd = m_.head_dim;
        const Partials& parts = work_.plan.partials(row, kv_head);
        if (parts.first < 0) {
            const float* whole = a_.attended + row * work_.shape.attention_size + (int64_t)kv_head * group_ * hd;
            std::memcpy(out, whole, sizeof(float) * group_ * hd);
            return;
        }
        for (int r = 0; r < group_; r++, out += hd) {
            int64_t at = parts.first + r;
            std::memcpy(out, a_.partial_acc + at * hd, sizeof(float) * hd);
            float top = a_.partial_top[at], total = a_.partial_total[at];
            for (int split = 1; split < parts.num_splits; split++) {
                at += parts.stride;
                merge_row(a_.partial_acc + at * hd, a_.partial_top[at], a_.partial_total[at], out, &top, &total, hd);
            }
            for (int d = 0; d < hd; d += LANES) f_store(out + d, f_load(out + d) / f_set(total));
        }
    }

    const Work& work_;
    const sl_model& m_;
    const sl_step& s_;
    const Arrays& a_;
    const sl_layer& layer_;
    const Cache cache_;
    int group_;
};

}  // namespace SL_NS
