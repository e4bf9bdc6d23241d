// What Python sees: plain structs and functions, called through ctypes. `interface.py` mirrors the structs.
//
// Letters: T rows, S pieces, D dim, H query heads, K KV heads, hd head_dim, F ffn_dim, E experts, V vocabulary.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How weights are held.
enum { WEIGHTS_FLOAT32 = 0, WEIGHTS_BFLOAT16 = 1, WEIGHTS_INT8 = 2 };

// Of the model, the same in all calls.
typedef struct {
    int32_t dim, heads, kv_heads, head_dim, ffn_dim, experts, experts_per_token;
    int32_t weights;    // one of WEIGHTS_*, of all matrices; the gate is float32
    int32_t bfloat16;   // 1: rows, keys and values hold values of bfloat16
    float norm_eps;
    const float* frequency;  // RoPE's angle of one position, of each pair. [hd / 2]
} Shape;

// A weight [outputs, inputs], laid out in panels by `tramontane_pack`.
typedef struct {
    const void* panels;
    int32_t outputs, inputs;
} Matrix;

typedef struct {
    const float* attention_norm;  // [D]
    const float* ffn_norm;        // [D]
    const float* gate;            // [E, D] as it is; null in a dense model
    Matrix qkv;                   // [(H + 2K) x hd, D]
    Matrix o;                     // [D, H x hd]
    const Matrix* gate_up;        // each [2F, D], gate and up interleaved; one an expert, one in a dense model
    const Matrix* down;           // each [D, F]
} Layer;

// One window class in one step.
typedef struct {
    int32_t rows, pieces;
    const int32_t* first;   // position of each piece's first row. [S]
    const int32_t* length;  // rows of each piece. [S]
    const int32_t* blocks;  // the pieces' rings, one after another. [sum(held)]
    const int32_t* held;    // blocks of each piece's ring. [S]
    int32_t block;          // positions of a block
    int32_t ring;           // blocks of a full ring
    int32_t window;         // positions that a query sees, its own included; 0 is all
} Plan;

// One block of one layer: the layer's weights, its plan, and its keys and values (see cache.hpp).
typedef struct {
    const Layer* layer;
    const Plan* plan;
    void* cache;
} Block;

// How rows of logits are sampled; unset options have their neutral value (temperature 0 is greedy, top_k 0, top_p 1).
typedef struct {
    int32_t rows, ids, vocabulary;  // M; how many ids may be sampled, and of how many
    int64_t stride;                 // numbers from one row of logits to the next
    const float* temperature;       // [M] each
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const double* noise;            // in [0, 1)
    const int32_t* banned;          // ids that must not be chosen, row by row. [sum(banned_count)]
    const int32_t* banned_count;
} Sampling;

// What is chosen. [M] each
typedef struct {
    int32_t* token;
    float* log_probability;
    uint8_t* finite;                // 0 where there is no token to choose
} Sampled;

typedef struct Engine Engine;

int32_t tramontane_panel_columns(void);
const char* tramontane_variant(void);
Engine* tramontane_create(void);
void tramontane_destroy(Engine* engine);

// Bytes of a packed matrix, and packing it. `second` is null, or a matrix of the same shape whose outputs are
// interleaved with the first's: `outputs` and `inputs` are those of one of them.
int64_t tramontane_packed_bytes(int32_t weights, int32_t outputs, int32_t inputs, int32_t interleaved);
void tramontane_pack(int32_t weights, const float* first, const float* second, int32_t outputs, int32_t inputs,
                     void* panels);

// Null where every row of a plan has a place, else why not: the pieces must have `rows` rows in all, each ring be as
// long as its piece needs, the rings hold `blocks` ids in all, and each id be in 0 .. `pool` - 1.
const char* tramontane_plan_flaw(const Plan* plan, int64_t blocks, int32_t pool);

// Numbers that a block of one layer takes in the cache.
int64_t tramontane_cache_block(const Shape* shape, int32_t block);

// Rows [T, D] are float32 that hold values of the model's dtype, before and after; `from` and `to` may be the same.
// `attention` and `experts` do one half of one block; `blocks` does some blocks, both halves each.
void tramontane_attention(Engine* engine, int32_t threads, const Shape* shape, const Block* block, const float* from,
                          float* to);
void tramontane_experts(Engine* engine, int32_t threads, const Shape* shape, const Layer* layer, int32_t rows,
                        const float* from, float* to);
void tramontane_blocks(Engine* engine, int32_t threads, const Shape* shape, const Block* blocks, int32_t count,
                       const float* from, float* to);

// Rows [T, D] as float32, from and to the model's dtype: row i is number `numbers[i]` of `from`, or i where that is
// null. `widen` returns 1; or 0, and nothing done, where one of `numbers` is not in 0 .. `from_rows` - 1.
int32_t tramontane_widen(Engine* engine, int32_t threads, int32_t is_bfloat16, const void* from, int32_t from_rows,
                         const int32_t* numbers, int32_t rows, int32_t dim, float* to);

// The final norm and the output head: logits [M, V] of the rows `numbers` [M] of `from`, or of the first M. Returns
// as `widen`.
int32_t tramontane_head(Engine* engine, int32_t threads, const Shape* shape, const float* norm, const Matrix* head,
                        int32_t rows, const float* from, int32_t from_rows, const int32_t* numbers, float* logits);

void tramontane_sample(Engine* engine, int32_t threads, const Sampling* sampling, const float* logits,
                       const Sampled* to);

// Log probability of each row's target, an id below `ids`, among the ids.
void tramontane_score(Engine* engine, int32_t threads, int32_t rows, int32_t ids, int64_t stride, const float* logits,
                      const int32_t* target, float* score);

#ifdef __cplusplus
}
#endif
