// Paged attention over fixed splits of 128 keys.
//
// Each split gives every query row a partial result (maximum, sum, weighted values) that depends on the row's own position
// only; partial results are merged in the order of the splits. So chunking, batching and threads cannot change a bit.
// Query heads that share a KV head are rows of one tile: row = token * group + head.
#pragma once

#include <limits>

#include "rows.h"

namespace SL_NS {

constexpr int SPLIT = 128;
constexpr int MAX_QUERY_ROWS = 32;

// Rows that are computed together, and up to how many the registers hold sums of 64 dimensions at once.
#if SL_LEVEL == 2
constexpr int ROW_CHUNK = 8, MAX_WIDE_ROWS = 5;
#elif SL_LEVEL == 1
constexpr int ROW_CHUNK = 4, MAX_WIDE_ROWS = 1;
#else
constexpr int ROW_CHUNK = 4, MAX_WIDE_ROWS = 1;
#endif

struct KvView {
    const void* k;        // this layer and KV head of block 0: [row_width][slot]
    const void* v;        // [slot][row_width]
    int64_t block_stride;  // in values
    int block_size, head_dim, row_width;
};

// Query rows of one sequence and KV head; `queries` are scaled already.
struct QueryTile {
    const float* queries;  // [rows][head_dim]
    const int32_t* position;  // of each row
    int rows;
    int window;  // 0: none
    int end;  // behind the largest position
};

struct Partial {
    float* acc;   // [rows][head_dim]
    float* top;   // [rows]
    float* total;  // [rows]
};

// Where 16 neighbouring keys lie in `k`, and what is fetched while they are scored.
struct KeyPlace {
    int64_t keys;
    int64_t next;    // of the keys that are scored after them
    int64_t values;  // theirs in `v`, read when all keys of the split have been scored
    int column;      // of the first one's score
};

constexpr int kv_bytes(int kv) { return kv == SL_KV_F32 ? 4 : kv == SL_KV_BF16 ? 2 : 1; }

// Into the second cache: the first is too small for a split, and what is in use there would have to go.
template <int KV>
inline void kv_fetch(const void* base, int64_t at) {
    __builtin_prefetch((const char*)base + at * kv_bytes(KV), 0, 2);
}

template <int KV>
inline F16 kv_load(const void* base, int64_t at) {
    if (KV == SL_KV_INT8) return f_load_i8((const int8_t*)base + at);
    return KV == SL_KV_BF16 ? f_load_bf16((const uint16_t*)base + at) : f_load((const float*)base + at);
}

// Scales of 16 neighbouring keys, whose bytes lie as the keys do: one row for each byte.
inline F16 key_scales(const KvView& kv, int64_t place) {
    const uint8_t* bytes = (const uint8_t*)kv.k + place + (int64_t)kv.head_dim * kv.block_size;
    uint32_t bits[LANES];
    for (int i = 0; i < LANES; i++) {
        bits[i] = 0;
        for (int byte = 0; byte < 4; byte++) bits[i] |= (uint32_t)bytes[byte * kv.block_size + i] << 8 * byte;
    }
    float scales[LANES];
    std::memcpy(scales, bits, sizeof scales);
    return f_load(scales);
}

inline float value_scale(const KvView& kv, int64_t place) {
    float scale;
    std::memcpy(&scale, (const int8_t*)kv.v + place + kv.head_dim, sizeof scale);
    return scale;
}

// Dot products of R rows with the keys of KEYS places; out is [row][score column]. Blocks lie scattered in memory, so the
// processor does not guess what comes next: the line at the same distance into it is asked for beside each line that is read.
template <int KV, int R, int KEYS>
inline void score(const KvView& kv, const KeyPlace* place, const float* q, float* out) {
    constexpr int LINE = 64 / (LANES * kv_bytes(KV));  // rows of 16 keys in a line of the cache
    F16 acc[R][KEYS];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < KEYS; n++) acc[r][n] = f_set(0.0f);
    for (int line = 0; line < kv.head_dim; line += LINE) {
        for (int n = 0; n < KEYS; n++) {
            kv_fetch<KV>(kv.k, place[n].next + (int64_t)line * kv.block_size);
            kv_fetch<KV>(kv.v, place[n].values + (int64_t)line * LANES);
        }
        for (int d = line; d < line + LINE; d++)
            for (int n = 0; n < KEYS; n++) {
                F16 key = kv_load<KV>(kv.k, place[n].keys + (int64_t)d * kv.block_size);
                for (int r = 0; r < R; r++) acc[r][n] = f_fma(key, f_set(q[r * kv.head_dim + d]), acc[r][n]);
            }
    }
    if (KV == SL_KV_INT8)
        for (int n = 0; n < KEYS; n++) {
            F16 scales = key_scales(kv, place[n].keys);
            for (int r = 0; r < R; r++) acc[r][n] = acc[r][n] * scales;
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < KEYS; n++) f_store(out + r * SPLIT + place[n].column, acc[r][n]);
}

// Scores of R rows with keys [first, first + count); `values` are the places of their values.
template <int KV, int R>
inline void score_rows(const KvView& kv, const int32_t* table, const int64_t* values, int first, int count, int end,
                       const float* q, float* out) {
    auto keys = [&](int at) { return (int64_t)table[at / kv.block_size] * kv.block_stride + at % kv.block_size; };
    auto place = [&](int key) {
        int at = first + key, next = at + 2 * LANES;
        return KeyPlace{keys(at), keys(next < end ? next : at), values[key], key};
    };
    int key = 0;
    for (; key + 2 * LANES <= count; key += 2 * LANES) {
        KeyPlace both[2] = {place(key), place(key + LANES)};
        score<KV, R, 2>(kv, both, q, out);
    }
    if (key < count) {
        KeyPlace one = place(key);
        score<KV, R, 1>(kv, &one, q, out);
    }
}

// Weighted sums of VECTORS * 16 dimensions of values from `d` on for R rows; weights are [row][SPLIT].
template <int KV, int R, int VECTORS>
inline void weigh_dims(const KvView& kv, const int64_t* place, int count, const float* weights, int d, float* acc) {
    F16 sum[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++) sum[r][n] = f_set(0.0f);
    for (int key = 0; key < count; key++) {
        F16 value[VECTORS];
        for (int n = 0; n < VECTORS; n++) value[n] = kv_load<KV>(kv.v, place[key] + d + LANES * n);
        for (int r = 0; r < R; r++) {
            F16 weight = f_set(weights[r * SPLIT + key]);
            for (int n = 0; n < VECTORS; n++) sum[r][n] = f_fma(value[n], weight, sum[r][n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++) f_store(acc + r * kv.head_dim + d + LANES * n, sum[r][n]);
}

// Weighted sums of values for R rows, as many dimensions at a time as there are registers for.
template <int KV, int R>
inline void weigh(const KvView& kv, const int64_t* place, int count, const float* weights, float* acc) {
    constexpr int WIDE = R <= MAX_WIDE_ROWS ? 4 : 2;
    int d = 0;
    for (; d + WIDE * LANES <= kv.head_dim; d += WIDE * LANES) weigh_dims<KV, R, WIDE>(kv, place, count, weights, d, acc);
    for (; d < kv.head_dim; d += LANES) weigh_dims<KV, R, 1>(kv, place, count, weights, d, acc);
}

// Softmax weights of one row in place; keys the row may not see weigh nothing. Returns through top and total.
inline void soften(float* scores, int first, int count, int position, int window, float* top, float* total) {
    const float nothing = -std::numeric_limits<float>::infinity();
    int end = position + 1 - first, begin = window ? position + 1 - window - first : 0;
    for (int i = end < 0 ? 0 : end; i < count; i++) scores[i] = nothing;
    for (int i = 0; i < begin && i < count; i++) scores[i] = nothing;
    F16 most = f_set(nothing);
    for (int i = 0; i < count; i += LANES) most = f_max(most, f_load(scores + i));
    *top = f_top(most);
    F16 sum = f_set(0.0f);
    for (int i = 0; i < count; i += LANES) {
        F16 weight = f_exp(f_load(scores + i) - f_set(*top));
        f_store(scores + i, weight);
        sum = sum + weight;
    }
    *total = f_sum(sum);
}

template <int KV, int R>
inline void split_rows(const KvView& kv, const int32_t* table, const int64_t* place, int first, int count,
                       const QueryTile& tile, int row, const Partial& out) {
    alignas(64) float scores[R * SPLIT];
    score_rows<KV, R>(kv, table, place, first, count, tile.end, tile.queries + row * kv.head_dim, scores);
    for (int r = 0; r < R; r++)
        soften(scores + r * SPLIT, first, count, tile.position[row + r], tile.window, out.top + row + r, out.total + row + r);
    if (KV == SL_KV_INT8)
        for (int key = 0; key < count; key++) {
            float scale = value_scale(kv, place[key]);
            for (int r = 0; r < R; r++) scores[r * SPLIT + key] *= scale;
        }
    weigh<KV, R>(kv, place, count, scores, out.acc + row * kv.head_dim);
}

// Partial results of all rows over split number `split`.
template <int KV>
inline void attend_split(const KvView& kv, const int32_t* table, int split, const QueryTile& tile, const Partial& out) {
    int first = split * SPLIT;
    int count = tile.end - first;
    count = count > SPLIT ? SPLIT : (count + LANES - 1) / LANES * LANES;
    int64_t place[SPLIT];
    for (int key = 0; key < count; key++) {
        int at = first + key;
        place[key] = (int64_t)table[at / kv.block_size] * kv.block_stride + (int64_t)(at % kv.block_size) * kv.row_width;
    }
    int row = 0;
    for (; row + ROW_CHUNK <= tile.rows; row += ROW_CHUNK)
        split_rows<KV, ROW_CHUNK>(kv, table, place, first, count, tile, row, out);
    switch (tile.rows - row) {
        case 7: split_rows<KV, 7>(kv, table, place, first, count, tile, row, out); break;
        case 6: split_rows<KV, 6>(kv, table, place, first, count, tile, row, out); break;
        case 5: split_rows<KV, 5>(kv, table, place, first, count, tile, row, out); break;
        case 4: split_rows<KV, 4>(kv, table, place, first, count, tile, row, out); break;
        case 3: split_rows<KV, 3>(kv, table, place, first, count, tile, row, out); break;
        case 2: split_rows<KV, 2>(kv, table, place, first, count, tile, row, out); break;
        case 1: split_rows<KV, 1>(kv, table, place, first, count, tile, row, out); break;
        default: break;
    }
}

// Merge the next split's partial result of one row into the result so far.
inline void merge_row(const float* acc, float top, float total, float* into, float* into_top, float* into_total, int head_dim) {
    if (total == 0.0f) return;  // the row sees nothing of this split
    float highest = *into_top > top ? *into_top : top;
    float factors[LANES] = {*into_top - highest, top - highest};
    f_store(factors, f_exp(f_load(factors)));
    float keep = *into_total == 0.0f ? 0.0f : factors[0], add = factors[1];
    *into_total = std::fma(*into_total, keep, total * add);
    *into_top = highest;
    for (int d = 0; d < head_dim; d += LANES)
        f_store(into + d, f_fma(f_load(into + d), f_set(keep), f_load(acc + d) * f_set(add)));
}

}  // namespace SL_NS
