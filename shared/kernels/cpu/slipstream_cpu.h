// The C interface of the CPU kernels: plain structs and pointers, called through ctypes with the GIL released.
//
// All arrays belong to the caller and stay alive until `sl_destroy`. Nothing here allocates per step beyond a scratch area
// that grows to the largest step seen. Sizes are checked by the Python side (shared/kernels/native.py), once, at load.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever the bits of a result or a struct below change; the loader refuses another number.
#define SL_ABI 6

// How a matrix is stored. Rows are outputs. Tiles of 16 rows lie one after the other; inside a tile, blocks of 32 inputs
// (16 for SL_Q8_FLOAT16): 16 scales, 16 minima where the kind has them, then the quants, 4 inputs of each of 16 rows at a
// time. 4-bit quants: low nibbles are the first half of the block, high nibbles the second. 8-bit quants carry +128.
// Value = scale * quant (+ minimum). Dense kinds hold [input][16 rows] in each tile.
enum sl_kind {
    SL_F32 = 0,
    SL_BF16 = 1,
    SL_Q4_HALF = 2,     // float16 scale and minimum
    SL_Q4_FLOAT = 3,    // float32 scale and minimum
    SL_Q8_HALF = 4,     // float16 scale
    SL_Q8_HALF_MIN = 5, // float16 scale and minimum
    SL_Q8_FLOAT16 = 6   // float32 scale for every 16 inputs
};

enum sl_norm { SL_NORM_RMS = 0, SL_NORM_LAYER = 1 };
enum sl_activation { SL_SILU = 0, SL_GELU_TANH = 1, SL_RELU = 2 };
enum sl_kv { SL_KV_F32 = 0, SL_KV_BF16 = 1, SL_KV_INT8 = 2 };
enum sl_isa { SL_ISA_SCALAR = 0, SL_ISA_AVX2 = 1, SL_ISA_AVX512 = 2 };
enum sl_sample { SL_SAMPLE_NONE = 0, SL_SAMPLE_GREEDY = 1, SL_SAMPLE_GUMBEL = 2, SL_SAMPLE_FILTERED = 3 };
// Add the value; or divide by it what is positive and multiply by it what is not.
enum sl_adjust { SL_ADJUST_ADD = 0, SL_ADJUST_PENALISE = 1 };

// num_out and num_in are padded to multiples of 16 and 32.
typedef struct {
    int32_t kind, num_out, num_in;
    const void* data;   // 64-byte aligned
    const float* bias;  // [num_out] or null
} sl_matrix;

typedef struct {
    const float* weight;
    const float* bias;  // null for RMS norms
} sl_norm_weights;

// `qkv`: q heads, k heads, v heads, rotary pairs as neighbours, in up to three parts when they are of unlike kinds; in none
// where the layer has no attention. `into`: when gated, 16 rows of gate and 16 rows of up in turn.
typedef struct {
    sl_norm_weights attn_norm, mlp_norm;
    sl_matrix qkv[3];
    int32_t num_qkv;
    sl_matrix attn_out, into, out;
    const float* q_norm;  // [head_dim] or null
    const float* k_norm;
} sl_layer;

// `vocab_size` is the number of logits; a draft has fewer than its embedding has rows.
typedef struct {
    int32_t vocab_size, hidden_size, inner_size, num_layers, num_heads, num_kv_heads, head_dim, max_position;
    int32_t norm, activation, gated, sliding_window;  // window 0: none
    int32_t block_size, kv_dtype;
    float norm_eps, attention_scale;
    const sl_layer* layers;
    sl_matrix embedding, lm_head;  // may be the same
    const float* positions;        // [max_position][hidden_size] or null
    const float* rotations;        // [max_position][head_dim / 2][cos, sin] or null
    sl_norm_weights final_norm;
    const int32_t* head_ids;       // [vocab_size] ascending: the token of each logit; null: logit i is token i
    sl_matrix fuse;                // without data: rows begin as embeddings; else as its product with [state, embedding]
} sl_model;

// The workers of one machine that share its cores: one word for each, the largest number while it is in a step, else when its
// last one ended (monotonic nanoseconds).
typedef struct {
    const uint64_t* words;
    int32_t num_slots, slot, num_cores;
} sl_cores;

// One ragged step. Tokens of a sequence are neighbours; `starts` has num_seqs + 1 entries.
typedef struct {
    int32_t num_tokens, num_seqs, table_width, num_logit_rows;
    int32_t num_threads;          // of those the engine was made with, how many compute this step; 0: all
    const int32_t* token_ids;
    const int32_t* positions;
    const int64_t* slots;         // block * block_size + slot, where each token's K and V go
    const int32_t* starts;
    const int32_t* block_tables;  // [num_seqs][table_width]
    const int32_t* logit_rows;
    void* kv;                     // [layer][block][k|v][kv_head]; k is [row][slot], v is [slot][row]
    int64_t num_blocks;
    float* logits;                // [num_logit_rows][vocab_size]
    // Sampling of each logit row, or null: the row's way, the noise's key, and for SL_SAMPLE_FILTERED what is left out.
    const int32_t* sample;
    const uint64_t* seeds;
    const uint32_t* ordinals;
    const uint32_t* choices;
    const double* temperatures;
    const int32_t* top_ks;        // 0: off
    const double* top_ps;         // 1: off
    const double* min_ps;         // 0: off
    // Changes of single logits before a row is drawn, in this order; the logits themselves stay as they are.
    const int64_t* adjust_starts;  // [num_logit_rows + 1]
    const int32_t* adjust_ids;
    const int32_t* adjust_kinds;
    const float* adjust_values;
    const sl_cores* cores;        // null, or what says how many threads to use: before a step and before each layer of a long one
    int32_t* sampled;             // [num_logit_rows]; -1 where the row is left to the caller
    const float* states;          // [num_tokens][hidden_size], where the model has `fuse`
    float* hidden;                // [num_logit_rows][hidden_size], rows after the final norm, or null
} sl_step;

// Guesses behind each row of a step whose model has `fuse`, one after the other: each goes on from the row of the one before
// it. `first` says what rows there are (each a sequence with logits), how they are drawn at their first place, and on which
// threads. Ordinals count on from there; adjustments are those of the first place only.
typedef struct {
    const sl_step* first;
    int32_t max_places;
    float least_reach;            // a chain that is less likely right so far is not guessed on
    const int32_t* num_places;    // [num_tokens], 1 to max_places
    float* states;                // [num_tokens][hidden_size], the rows to go on from; when it returns, those behind the last guesses
    float* reach;                 // [num_tokens], how likely a chain is right up to where it begins; when it returns, to where it ends
    int32_t* tokens;              // [num_tokens][max_places]; -1 where nothing was guessed
    float* sureness;              // [num_tokens][max_places], each guess's probability at temperature 1 and before filters
} sl_chains;

int32_t sl_abi(void);
// A share of the cores: returns how many, and the number of the first; for tests.
int32_t sl_share(const sl_cores* cores, uint64_t now_ns, int32_t* first);
int32_t sl_best_isa(void);                                              // what this processor can run
void* sl_create(const sl_model* model, int32_t num_threads, int32_t isa);  // null when the isa cannot run here
void sl_destroy(void* engine);
int32_t sl_run(void* engine, const sl_step* step);                      // 0, or -1 when memory ran out
int32_t sl_guess(void* engine, const sl_chains* chains);                // as sl_run
// Hidden rows after the final norm of the last step, [num_tokens][hidden_size], or null when memory ran out; for tests.
const float* sl_hidden(void* engine);
// One product of float rows [num_rows][num_in] with a matrix, [num_rows][num_out]; for tests and benchmarks.
int32_t sl_matmul(void* engine, const sl_matrix* matrix, const float* rows, int32_t num_rows, float* out);
// Draws from the logits a step holds, of any width, on the calling thread; for tests and benchmarks.
void sl_draw(void* engine, const sl_step* step, int32_t vocab_size);

#ifdef __cplusplus
}
#endif
