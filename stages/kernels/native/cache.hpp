// The cache: how keys and values lie, and which block holds a position.
//
// The cache of one layer is a pool of blocks. A block holds, for each KV head, its keys and then its values, in words
// of 4 bytes that hold 1 float32 or 2 bfloat16. A word of keys holds neighbouring dimensions of one place, a word of
// values neighbouring places of one dimension, so that a vector of words widens to vectors of one dimension or place:
//
//               place 0        place 1                            dim 0         dim 1
//     keys      [dims 0, 1]    [dims 0, 1]   ..     values        [places 0, 1] [places 0, 1]  ..
//               [dims 2, 3]    [dims 2, 3]   ..                   [places 2, 3] [places 2, 3]  ..
//               ..                                                ..
//               hd / 2 rows of PLACES words                       PLACES / 2 rows of HD words
//
// PLACES is the block's positions and HD hd, both rounded up to whole vectors. Padding is never read into a result.
#pragma once

#include <algorithm>

#include "interface.h"
#include "team.hpp"
#include "vectors.hpp"

namespace tramontane {

/// Where a block's keys and values are, in numbers of the cache's type.
struct CacheLayout {
    int64_t places, padded_dim, all_keys, head, block;

    CacheLayout(const Shape& shape, int32_t positions)
        : places(rounded_up(positions, WIDTH)), padded_dim(rounded_up(shape.head_dim, WIDTH)),
          all_keys(shape.head_dim * places), head(all_keys + places * padded_dim), block(head * shape.kv_heads) {}

    template <class Value>
    Value* keys(Value* cache, int64_t block_id, int kv_head) const { return cache + block_id * block + kv_head * head; }
    template <class Value>
    Value* values(Value* cache, int64_t block_id, int kv_head) const {
        return keys(cache, block_id, kv_head) + all_keys;
    }
};

/// The rings of a plan's pieces.
struct Pieces {
    const Plan& plan;
    const int32_t** ring;   // each piece's blocks
    int32_t* start;         // each piece's first row; one entry more than pieces

    Pieces(Arena& arena, const Plan& plan)
        : plan(plan), ring(arena.take<const int32_t*>(plan.pieces)), start(arena.take<int32_t>(plan.pieces + 1)) {
        const int32_t* blocks = plan.blocks;
        start[0] = 0;
        for (int piece = 0; piece < plan.pieces; ++piece) {
            ring[piece] = blocks;
            blocks += plan.held[piece];
            start[piece + 1] = start[piece] + plan.length[piece];
        }
    }

    int32_t block_of(int piece, int32_t position) const { return ring[piece][(position / plan.block) % plan.ring]; }
    int piece_of(int32_t row) const {
        return int(std::upper_bound(start, start + plan.pieces + 1, row) - start) - 1;
    }
    int32_t position_of(int32_t row, int piece) const { return plan.first[piece] + row - start[piece]; }
    int32_t first_visible(int32_t position) const {
        return plan.window ? std::max(0, position - plan.window + 1) : 0;
    }
};

/// Keys and values of a row into the cache, at its place in a block.
template <class Value>
void write_row(Value* cache, const CacheLayout& layout, const Shape& shape, int32_t block, int32_t place,
               const float* keys, const float* values) {
    constexpr int PER = PER_WORD<Value>;
    const int head_dim = shape.head_dim;
    for (int head = 0; head < shape.kv_heads; ++head, keys += head_dim, values += head_dim) {
        Value* key = layout.keys(cache, block, head) + place * PER;
        for (int dim = 0; dim < head_dim; ++dim) set(key[dim / PER * layout.places * PER + dim % PER], keys[dim]);
        Value* value = layout.values(cache, block, head) + place / PER * layout.padded_dim * PER + place % PER;
        for (int dim = 0; dim < head_dim; ++dim) set(value[dim * PER], values[dim]);
    }
}

}  // namespace tramontane
