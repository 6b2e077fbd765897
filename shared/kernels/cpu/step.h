// One step of a model on all threads: rows in, hidden rows, logits and sampled tokens out.
//
// The order of stages is the model's; between two stages all threads meet. Work items are sized so that each thread gets
// several; which thread computes what never matters for the result.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "sampling.h"
#include "team.h"

namespace SL_NS {

using slipstream::Team;

constexpr int STAGES_PER_LAYER = 10;
constexpr int STAGES_PER_STEP = 8;
constexpr int TOKEN_BLOCK = 64;  // rows a piece of weights is used for before the next rows are read
constexpr int ITEMS_PER_THREAD = 6;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of one step, 64-byte aligned, never shrunk.
class Buffer {
  public:
    ~Buffer() { std::free(data_); }
    // At least `bytes`, or null when there is no memory. The content is lost when it grows.
    void* take(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            int64_t rounded = ceil_div(bytes + bytes / 4, 64) * 64;
            data_ = std::aligned_alloc(64, (size_t)rounded);
            if (!data_) return nullptr;
            size_ = rounded;
        }
        return data_;
    }
    float* floats(int64_t count) { return (float*)take(4 * count); }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Quantised rows and the memory they live in.
class QuantBuffer {
  public:
    bool take(int64_t rows, int64_t stride) {
        QuantRows& r = rows_;
        r.stride = stride;
        r.q = (int8_t*)q_.take(rows * stride);
        r.scale = scale_.floats(rows * stride / GROUP);
        r.scaled_sum = scaled_sum_.floats(rows * stride / GROUP);
        r.sum = (int32_t*)sum_.take(rows * stride / 16 * 4);
        r.pairs = SL_PAIRS ? (int16_t*)pairs_.take(rows * stride * 2) : nullptr;
        return r.q && r.scale && r.scaled_sum && r.sum && (r.pairs || !SL_PAIRS);
    }
    const QuantRows& rows() const { return rows_; }

  private:
    Buffer q_, scale_, scaled_sum_, sum_, pairs_;
    QuantRows rows_ = {};
};

// A run of query tokens of one sequence whose heads are attended together, and which splits it covers.
struct AttentionItem {
    int32_t seq, kv_head, token, count;
    int32_t first_split, end_split;
    int64_t partial;  // index of the first split's partial rows, or -1: merge at once
    int32_t num_splits;
};

class Engine {
  public:
    Engine(const sl_model& model, int num_threads)
        : m_(model), team_(num_threads, model.num_layers * STAGES_PER_LAYER + STAGES_PER_STEP) {
        group_ = m_.num_heads / m_.num_kv_heads;
        attention_size_ = m_.num_heads * m_.head_dim;
        qkv_size_ = (m_.num_heads + 2 * m_.num_kv_heads) * m_.head_dim;
        for (int i = 0; i < m_.num_layers; i++) has_dense_out_ |= is_dense(m_.layers[i].out.kind);
    }

    int run(const sl_step& step) {
        s_ = &step;
        if (!prepare()) return -1;
        team_.run([this](Team::Member& me) { forward(me); });
        return 0;
    }

    const float* hidden() const { return normed_; }

    int matmul(const sl_matrix& matrix, const float* rows, int num_rows, float* out) {
        if (!test_rows_.take(num_rows, matrix.num_in)) return -1;
        Rows x{test_rows_.rows(), rows, matrix.num_in};
        if (!is_dense(matrix.kind))
            for (int r = 0; r < num_rows; r++) quantise(rows + (int64_t)r * matrix.num_in, x.quant, r, 0, matrix.num_in);
        team_.run([&](Team::Member& me) {
            multiply(me, &matrix, 1, x, num_rows, [&](int64_t row, int64_t at, int count, const F16* values) {
                for (int t = 0; t < count; t++) f_store(out + (row + t) * matrix.num_out + at, values[t]);
            });
        });
        return 0;
    }

  private:
    // Lay out the step's memory and attention items, on the calling thread.
    bool prepare() {
        int64_t rows = s_->num_tokens, logit_rows = s_->num_logit_rows;
        int64_t most = larger(rows, logit_rows), inner = m_.layers[0].out.num_in;
        hidden_ = hidden_buffer_.floats(rows * m_.hidden_size);
        normed_ = normed_buffer_.floats(most * m_.hidden_size);
        fused_ = fused_buffer_.floats(larger(rows * qkv_size_, logit_rows * m_.hidden_size));
        attended_ = attended_buffer_.floats(rows * attention_size_);
        inner_ = has_dense_out_ ? inner_buffer_.floats(rows * inner) : nullptr;
        if (!hidden_ || !normed_ || !fused_ || !attended_ || (has_dense_out_ && !inner_)) return false;
        if (!input_rows_.take(most, larger(m_.hidden_size, attention_size_)) || !inner_rows_.take(rows, inner)) return false;
        plan_attention();
        if (num_partials_) {
            partial_acc_ = partial_acc_buffer_.floats(num_partials_ * m_.head_dim);
            partial_top_ = partial_top_buffer_.floats(2 * num_partials_);
            if (!partial_acc_ || !partial_top_) return false;
            partial_total_ = partial_top_ + num_partials_;
        }
        return true;
    }

    void plan_attention() {
        items_.clear();
        num_partials_ = 0;
        int tokens_per_tile = (int)larger(1, MAX_QUERY_ROWS / group_);
        int64_t whole = 0;
        for (int seq = 0; seq < s_->num_seqs; seq++)
            whole += ceil_div(s_->starts[seq + 1] - s_->starts[seq], tokens_per_tile) * m_.num_kv_heads;
        // Few tiles: give the splits of one to several threads.
        int64_t pieces = whole ? ceil_div(2 * team_.size(), whole) : 1;
        for (int seq = 0; seq < s_->num_seqs; seq++)
            for (int token = s_->starts[seq]; token < s_->starts[seq + 1]; token += tokens_per_tile) {
                int count = (int)smaller(tokens_per_tile, s_->starts[seq + 1] - token);
                for (int head = 0; head < m_.num_kv_heads; head++) add_items(seq, head, token, count, pieces);
            }
    }

    void add_items(int seq, int head, int token, int count, int64_t pieces) {
        int last = s_->positions[token + count - 1], end = last / SPLIT + 1;
        int begin = 0;
        if (m_.sliding_window) begin = (int)larger(0, s_->positions[token] + 1 - m_.sliding_window) / SPLIT;
        int splits = end - begin;
        int64_t each = ceil_div(splits, smaller(pieces, splits));
        bool in_parts = each < splits;
        for (int first = begin; first < end; first += (int)each) {
            AttentionItem item{seq, head, token, count, first, (int)smaller(end, first + each), -1, splits};
            if (in_parts) item.partial = num_partials_ + (int64_t)(first - begin) * count * group_;
            items_.push_back(item);
        }
        if (in_parts) num_partials_ += (int64_t)splits * count * group_;
    }

    void forward(Team::Member& me) {
        embed(me);
        for (int i = 0; i < m_.num_layers; i++) {
            const sl_layer& layer = m_.layers[i];
            bool is_quantised = false;  // in any part
            for (int part = 0; part < layer.num_qkv; part++) is_quantised |= !is_dense(layer.qkv[part].kind);
            normalise_rows(me, layer.attn_norm, is_quantised);
            project(me, layer);
            append(me, layer, i);
            attend(me, i);
            quantise_attended(me, layer.attn_out.kind);
            multiply_onto(me, layer.attn_out, Rows{input_rows_.rows(), attended_, attention_size_});
            normalise_rows(me, layer.mlp_norm, !is_dense(layer.into.kind));
            feed_forward(me, layer);
            multiply_onto(me, layer.out, Rows{inner_rows_.rows(), inner_, layer.out.num_in});
        }
        finish(me);
    }

    void embed(Team::Member& me) {
        team_.each(me, s_->num_tokens, [&](int64_t row) {
            float* out = hidden_ + row * m_.hidden_size;
            unpack_row(m_.embedding, s_->token_ids[row], m_.hidden_size, out);
            if (!m_.positions) return;
            const float* position = m_.positions + (int64_t)s_->positions[row] * m_.hidden_size;
            for (int i = 0; i < m_.hidden_size; i++) out[i] += position[i];
        });
    }

    // The normed rows as floats, and quantised where a matrix that comes next reads them so.
    void normalise_rows(Team::Member& me, const sl_norm_weights& weights, bool is_quantised) {
        team_.each(me, s_->num_tokens, [&](int64_t row) {
            float* out = normed_ + row * m_.hidden_size;
            normalise(hidden_ + row * m_.hidden_size, weights, m_.norm, m_.norm_eps, m_.hidden_size, out);
            if (is_quantised) quantise(out, input_rows_.rows(), row, 0, m_.hidden_size);
        });
    }

    // All tiles of `parts` below each other times `num_rows` rows; store(row, first output, rows, values) takes each result.
    template <typename Store>
    void multiply(Team::Member& me, const sl_matrix* parts, int num_parts, const Rows& x, int64_t num_rows, const Store& store) {
        int64_t tiles = 0, blocks = ceil_div(num_rows, TOKEN_BLOCK);
        for (int i = 0; i < num_parts; i++) tiles += parts[i].num_out / LANES;
        int64_t grain = larger(1, tiles * blocks / (team_.size() * ITEMS_PER_THREAD));
        grain = smaller(grain, larger(1, tiles / team_.size()));
        int64_t chunks = ceil_div(tiles, grain);
        team_.each(me, chunks * blocks, [&](int64_t item) {
            int64_t first = item % chunks * grain, begin = item / chunks * TOKEN_BLOCK;
            int64_t end = smaller(num_rows, begin + TOKEN_BLOCK);
            for (int64_t at = first; at < smaller(tiles, first + grain); at++)
                for (int64_t row = begin; row < end; row += MAX_TOKENS) {
                    F16 values[MAX_TOKENS];
                    int count = (int)smaller(MAX_TOKENS, end - row);
                    const sl_matrix* part = parts;
                    int64_t inside = at;
                    for (; inside >= part->num_out / LANES; part++) inside -= part->num_out / LANES;
                    tile(*part, inside, x, row, count, values);
                    store(row, at * LANES, count, values);
                }
        });
    }

    // Queries, keys and values of every token.
    void project(Team::Member& me, const sl_layer& layer) {
        Rows x{input_rows_.rows(), normed_, m_.hidden_size};
        multiply(me, layer.qkv, layer.num_qkv, x, s_->num_tokens, [&](int64_t row, int64_t at, int count, const F16* values) {
            for (int t = 0; t < count; t++) f_store(fused_ + (row + t) * qkv_size_ + at, values[t]);
        });
    }

    // Adds the product to the hidden rows.
    void multiply_onto(Team::Member& me, const sl_matrix& matrix, const Rows& x) {
        multiply(me, &matrix, 1, x, s_->num_tokens, [&](int64_t row, int64_t at, int count, const F16* values) {
            for (int t = 0; t < count; t++) {
                float* out = hidden_ + (row + t) * m_.hidden_size + at;
                f_store(out, f_load(out) + values[t]);
            }
        });
    }

    // Rotate queries and keys, then write keys and values into the cache.
    void append(Team::Member& me, const sl_layer& layer, int index) {
        team_.each(me, s_->num_tokens, [&](int64_t row) {
            float* heads = fused_ + row * qkv_size_;
            for (int head = 0; head < m_.num_heads + m_.num_kv_heads; head++) {
                float* at = heads + head * m_.head_dim;
                const float* norm = head < m_.num_heads ? layer.q_norm : layer.k_norm;
                if (norm) normalise(at, sl_norm_weights{norm, nullptr}, SL_NORM_RMS, m_.norm_eps, m_.head_dim, at);
                if (m_.rotations)
                    rotate(at, m_.rotations + (int64_t)s_->positions[row] * m_.head_dim, m_.head_dim);
                if (head < m_.num_heads)
                    for (int d = 0; d < m_.head_dim; d++) at[d] *= m_.attention_scale;
            }
            int64_t block = s_->slots[row] / m_.block_size, slot = s_->slots[row] % m_.block_size;
            const float* keys = heads + attention_size_;
            for (int head = 0; head < m_.num_kv_heads; head++) {
                int64_t k = kv_at(index, block, 0, head) + slot, v = kv_at(index, block, 1, head) + slot * m_.head_dim;
                for (int d = 0; d < m_.head_dim; d++) {
                    put(k + (int64_t)d * m_.block_size, keys[head * m_.head_dim + d]);
                    put(v + d, keys[(m_.num_kv_heads + head) * m_.head_dim + d]);
                }
            }
        });
    }

    // Offset in values of one head's keys (side 0) or values (side 1) in one block.
    int64_t kv_at(int64_t layer, int64_t block, int side, int head) const {
        return (((layer * s_->num_blocks + block) * 2 + side) * m_.num_kv_heads + head) * m_.block_size * m_.head_dim;
    }

    void put(int64_t at, float value) {
        if (m_.kv_dtype == SL_KV_BF16)
            ((uint16_t*)s_->kv)[at] = to_bf16(value);
        else
            ((float*)s_->kv)[at] = value;
    }

    void attend(Team::Member& me, int layer) {
        team_.each(me, (int64_t)items_.size(), [&](int64_t i) {
            if (m_.kv_dtype == SL_KV_BF16)
                attend_item<true>(items_[i], layer);
            else
                attend_item<false>(items_[i], layer);
        });
    }

    template <bool BF16>
    void attend_item(const AttentionItem& item, int layer) {
        const int hd = m_.head_dim, rows = item.count * group_;
        constexpr int64_t width = BF16 ? 2 : 4;
        const char* base = (const char*)s_->kv;
        KvView kv{base + width * kv_at(layer, 0, 0, item.kv_head), base + width * kv_at(layer, 0, 1, item.kv_head),
                  (int64_t)2 * m_.num_kv_heads * m_.block_size * hd, m_.block_size, hd, BF16};
        float queries[MAX_QUERY_ROWS * MAX_HEAD_DIM], acc[MAX_QUERY_ROWS * MAX_HEAD_DIM];
        float tops[MAX_QUERY_ROWS], totals[MAX_QUERY_ROWS];
        int32_t positions[MAX_QUERY_ROWS];
        for (int r = 0; r < rows; r++) {
            int64_t token = item.token + r / group_, head = item.kv_head * group_ + r % group_;
            std::memcpy(queries + r * hd, fused_ + token * qkv_size_ + head * hd, sizeof(float) * hd);
            positions[r] = s_->positions[token];
        }
        QueryTile tile{queries, positions, rows, m_.sliding_window};
        const int32_t* table = s_->block_tables + (int64_t)item.seq * s_->table_width;
        int last = positions[rows - 1];
        float result[MAX_QUERY_ROWS * MAX_HEAD_DIM], result_top[MAX_QUERY_ROWS], result_total[MAX_QUERY_ROWS];
        for (int split = item.first_split; split < item.end_split; split++) {
            Partial partial{acc, tops, totals};
            if (item.partial >= 0) {
                int64_t at = item.partial + (int64_t)(split - item.first_split) * rows;
                partial = Partial{partial_acc_ + at * hd, partial_top_ + at, partial_total_ + at};
            } else if (split == item.first_split) {
                partial = Partial{result, result_top, result_total};
            }
            attend_split<BF16>(kv, table, split, last, tile, partial);
            if (item.partial >= 0 || split == item.first_split) continue;
            for (int r = 0; r < rows; r++)
                merge_row(acc + r * hd, tops[r], totals[r], result + r * hd, result_top + r, result_total + r, hd);
        }
        if (item.partial < 0) write_rows(item, result, result_total);
    }

    // Divide by the sums and put the rows where the next matrix reads them.
    void write_rows(const AttentionItem& item, const float* result, const float* totals) {
        for (int r = 0; r < item.count * group_; r++) {
            int64_t token = item.token + r / group_, head = item.kv_head * group_ + r % group_;
            float* out = attended_ + token * attention_size_ + head * m_.head_dim;
            for (int d = 0; d < m_.head_dim; d += LANES)
                f_store(out + d, f_load(result + r * m_.head_dim + d) / f_set(totals[r]));
        }
    }

    // Merge partial results where splits were given to several threads, then quantise.
    void quantise_attended(Team::Member& me, int kind) {
        if (num_partials_)
            team_.each(me, (int64_t)items_.size(), [&](int64_t i) {
                const AttentionItem& item = items_[i];
                bool is_first = item.partial >= 0 && (i == 0 || items_[i - 1].kv_head != item.kv_head ||
                                                      items_[i - 1].token != item.token);
                if (is_first) merge_item(item);
            });
        if (is_dense(kind)) return;
        team_.each(me, s_->num_tokens, [&](int64_t row) {
            quantise(attended_ + row * attention_size_, input_rows_.rows(), row, 0, attention_size_);
        });
    }

    void merge_item(const AttentionItem& item) {
        const int hd = m_.head_dim, rows = item.count * group_;
        for (int split = 1; split < item.num_splits; split++)
            for (int r = 0; r < rows; r++) {
                int64_t at = item.partial + (int64_t)split * rows + r, into = item.partial + r;
                merge_row(partial_acc_ + at * hd, partial_top_[at], partial_total_[at], partial_acc_ + into * hd,
                          partial_top_ + into, partial_total_ + into, hd);
            }
        write_rows(item, partial_acc_ + item.partial * hd, partial_total_ + item.partial);
    }

    // Activation of the first matrix's outputs, 32 at a time, quantised for the second one.
    void feed_forward(Team::Member& me, const sl_layer& layer) {
        const Rows x{input_rows_.rows(), normed_, m_.hidden_size};
        const int tiles_per_group = m_.gated ? 4 : 2;
        int64_t groups = layer.into.num_out / LANES / tiles_per_group, blocks = ceil_div(s_->num_tokens, TOKEN_BLOCK);
        team_.each(me, groups * blocks, [&](int64_t item) {
            int64_t group = item % groups, begin = item / groups * TOKEN_BLOCK;
            int64_t end = smaller(s_->num_tokens, begin + TOKEN_BLOCK);
            for (int64_t row = begin; row < end; row += MAX_TOKENS) {
                int count = (int)smaller(MAX_TOKENS, end - row);
                F16 values[4][MAX_TOKENS];
                for (int i = 0; i < tiles_per_group; i++)
                    tile(layer.into, group * tiles_per_group + i, x, row, count, values[i]);
                for (int t = 0; t < count; t++) {
                    alignas(64) float inner[GROUP];
                    for (int half = 0; half < 2; half++) {
                        F16 v = m_.gated ? activate(values[2 * half][t], m_.activation) * values[2 * half + 1][t]
                                         : activate(values[half][t], m_.activation);
                        f_store(inner + LANES * half, v);
                    }
                    if (is_dense(layer.out.kind))
                        std::memcpy(inner_ + (row + t) * layer.out.num_in + group * GROUP, inner, sizeof inner);
                    else
                        quantise_group(inner, inner_rows_.rows(), row + t, group);
                }
            }
        });
    }

    void finish(Team::Member& me) {
        team_.each(me, s_->num_tokens, [&](int64_t row) {
            normalise(hidden_ + row * m_.hidden_size, m_.final_norm, m_.norm, m_.norm_eps, m_.hidden_size,
                      normed_ + row * m_.hidden_size);
        });
        int64_t rows = s_->num_logit_rows;
        if (!rows) return;
        float* picked = fused_;  // free by now, and as wide as a hidden row
        team_.each(me, rows, [&](int64_t i) {
            const float* row = normed_ + (int64_t)s_->logit_rows[i] * m_.hidden_size;
            std::memcpy(picked + i * m_.hidden_size, row, sizeof(float) * m_.hidden_size);
            if (!is_dense(m_.lm_head.kind)) quantise(row, input_rows_.rows(), i, 0, m_.hidden_size);
        });
        Rows x{input_rows_.rows(), picked, m_.hidden_size};
        multiply(me, &m_.lm_head, 1, x, rows, [&](int64_t row, int64_t at, int count, const F16* values) {
            for (int t = 0; t < count; t++) store_logits(s_->logits + (row + t) * m_.vocab_size, at, values[t]);
        });
        if (s_->sample) team_.each(me, rows, [&](int64_t row) { s_->sampled[row] = draw(*s_, row, m_.vocab_size); });
    }

    void store_logits(float* row, int64_t at, F16 values) {
        if (at + LANES <= m_.vocab_size) {
            f_store(row + at, values);
            return;
        }
        float tail[LANES];
        f_store(tail, values);
        for (int64_t i = at; i < m_.vocab_size; i++) row[i] = tail[i - at];
    }

    static constexpr int MAX_HEAD_DIM = 256;

    const sl_model m_;
    Team team_;
    const sl_step* s_ = nullptr;
    int group_, attention_size_, qkv_size_;
    Buffer hidden_buffer_, normed_buffer_, fused_buffer_, attended_buffer_, inner_buffer_, partial_acc_buffer_, partial_top_buffer_;
    QuantBuffer input_rows_, inner_rows_, test_rows_;
    float *hidden_ = nullptr, *normed_ = nullptr, *fused_ = nullptr, *attended_ = nullptr, *inner_ = nullptr;
    float *partial_acc_ = nullptr, *partial_top_ = nullptr, *partial_total_ = nullptr;
    std::vector<AttentionItem> items_;
    int64_t num_partials_ = 0;
    bool has_dense_out_ = false;  // in any layer: files mix kinds
};

}  // namespace SL_NS

namespace slipstream {

// What api.cpp needs of one instruction set.
struct Kernels {
    void* (*create)(const sl_model*, int);
    void (*destroy)(void*);
    int (*run)(void*, const sl_step*);
    const float* (*hidden)(void*);
    int (*matmul)(void*, const sl_matrix*, const float*, int, float*);
    void (*draw)(const sl_step*, int32_t);
};

}  // namespace slipstream

namespace SL_NS {

inline slipstream::Kernels kernels() {
    return {[](const sl_model* model, int threads) -> void* { return new Engine(*model, threads); },
            [](void* engine) { delete (Engine*)engine; },
            [](void* engine, const sl_step* step) { return ((Engine*)engine)->run(*step); },
            [](void* engine) { return ((Engine*)engine)->hidden(); },
            [](void* engine, const sl_matrix* matrix, const float* rows, int n, float* out) {
                return ((Engine*)engine)->matmul(*matrix, rows, n, out);
            },
            [](const sl_step* step, int32_t vocab_size) {
                for (int64_t row = 0; row < step->num_logit_rows; row++) step->sampled[row] = draw(*step, row, vocab_size);
            }};
}

}  // namespace SL_NS
