// The cache: how keys and values lie, and which block holds a position.
//
// The cache of one layer is a pool of blocks. A block holds, for each KV head, its keys and then its values:
//
//     keys    [hd][PLACES]    a dimension's numbers of all places side by side: a vector is one dimension of WIDTH keys
//     values  [B][HD]         a place's value as it is
//
// where PLACES is B rounded up to whole vectors and HD is hd rounded up so. Padding is never read into a result.
#pragma once

#include <algorithm>

#include "interface.h"
#include "team.hpp"
#include "vectors.hpp"

namespace tramontane {

/// Where a block's keys and values are, in numbers.
struct CacheLayout {
    int64_t places, padded_dim, head, block;

    CacheLayout(const Shape& shape, int32_t positions)
        : places(rounded_up(positions, WIDTH)), padded_dim(rounded_up(shape.head_dim, WIDTH)),
          head(rounded_up(shape.head_dim * places + positions * padded_dim, WIDTH)),
          block(head * shape.kv_heads) {}

    template <class Value>
    Value* keys(Value* cache, int64_t block_id, int kv_head) const { return cache + block_id * block + kv_head * head; }
    template <class Value>
    Value* values(Value* cache, int64_t block_id, int kv_head, int head_dim) const {
        return keys(cache, block_id, kv_head) + head_dim * places;
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

/// Keys and values of a row into the cache, at its position.
template <class Value>
void write_row(Value* cache, const CacheLayout& layout, const Shape& shape, int32_t block, int32_t place,
               const float* keys, const float* values) {
    const int head_dim = shape.head_dim;
    for (int head = 0; head < shape.kv_heads; ++head, keys += head_dim, values += head_dim) {
        Value* key = layout.keys(cache, block, head) + place;
        for (int dim = 0; dim < head_dim; ++dim) set(key[dim * layout.places], keys[dim]);
        Value* value = layout.values(cache, block, head, head_dim) + place * layout.padded_dim;
        for (int dim = 0; dim < head_dim; ++dim) set(value[dim], values[dim]);
    }
}

}  // namespace tramontane
