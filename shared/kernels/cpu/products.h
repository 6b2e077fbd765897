// Products of whole matrices, their tiles given out to the threads.
#pragma once

#include "work.h"

namespace SL_NS {

constexpr int TOKEN_BLOCK = 64;  // rows a piece of weights is used for before the next rows are read
constexpr int ITEMS_PER_THREAD = 6;
constexpr int64_t LOOK_AHEAD = 32 << 10;  // bytes; a fraction of a core's own cache

// Let the thread fetch what it will read first of the next matrix while it waits for the others.
inline void expect(const Team& team, Team::Member& me, const sl_matrix& next) {
    const int64_t bytes = tile_bytes(next), tiles = next.num_out / LANES, first = team.first_item(me, tiles);
    me.ahead = (const char*)next.data + first * bytes;
    me.ahead_end = me.ahead + smaller(LOOK_AHEAD, (tiles - first) * bytes);
}

// All tiles of `parts` below each other times `num_rows` rows; store(row, first output, rows, values) takes each result.
template <typename Store>
void multiply(Team& team, Team::Member& me, const sl_matrix* parts, int num_parts, const Rows& x, int64_t num_rows,
              const Store& store) {
    int64_t tiles = 0, blocks = ceil_div(num_rows, TOKEN_BLOCK);
    for (int i = 0; i < num_parts; i++) tiles += parts[i].num_out / LANES;
    int64_t grain = larger(1, tiles * blocks / (team.size() * ITEMS_PER_THREAD));
    grain = smaller(grain, larger(1, tiles / team.size()));
    int64_t chunks = ceil_div(tiles, grain);
    team.each(me, chunks * blocks, [&](int64_t item) {
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

// Adds the product to the hidden rows.
inline void multiply_onto_hidden(const Work& work, Team::Member& me, const sl_matrix& matrix, const Rows& x) {
    const int64_t width = work.model.hidden_size;
    multiply(work.team, me, &matrix, 1, x, work.step.num_tokens, [&](int64_t row, int64_t at, int count, const F16* values) {
        for (int t = 0; t < count; t++) {
            float* out = work.arrays.hidden + (row + t) * width + at;
            f_store(out, f_load(out) + values[t]);
        }
    });
}

}  // namespace SL_NS
