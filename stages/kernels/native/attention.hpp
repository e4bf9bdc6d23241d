// The first half of a block: norm, queries, keys and values, RoPE, the cache, attention, output product, residual.
#pragma once

#include "attend.hpp"
#include "products.hpp"

namespace tramontane {

/// Query rows (positions x query heads of a KV head) of one unit of attention at most, about: a tile's keys and values
/// come to the first cache once for all of them.
constexpr int UNIT_QUERIES = 192;

/// Units that there should be for each thread at least, about: of few rows they are smaller.
constexpr int UNITS_OF_A_THREAD = 2;

/// Turn each head's pairs (i, i + hd / 2) by the row's angles.
inline void rotate(float* heads, int count, const float* cosines, const float* sines, int head_dim) {
    const int half = head_dim / 2;
    for (int head = 0; head < count; ++head, heads += head_dim)
        for (int pair = 0; pair < half; ++pair) {
            const float first = heads[pair], second = heads[pair + half];
            heads[pair] = first * cosines[pair] - second * sines[pair];
            heads[pair + half] = second * cosines[pair] + first * sines[pair];
        }
}

/// cos and sin of each row's angles. [T, hd / 2] each
struct Rotation {
    float *cosines, *sines;
    int half;

    Rotation(Arena& arena, const Shape& shape, int32_t rows)
        : cosines(arena.take<float>(int64_t(rows) * shape.head_dim / 2)),
          sines(arena.take<float>(int64_t(rows) * shape.head_dim / 2)), half(shape.head_dim / 2) {}

    /// The angle is float32, as in torch; its cosine is rounded from float64, where C libraries differ least.
    void turn_to(int32_t row, int32_t position, const float* frequency) const {
        for (int pair = 0; pair < half; ++pair) {
            const double angle = float(position) * frequency[pair];
            cosines[row * half + pair] = float(std::cos(angle));
            sines[row * half + pair] = float(std::sin(angle));
        }
    }
};

/// The memory that attention needs for any layer of a shape and some rows.
template <class Weights>
struct AttentionMemory {
    Operands<Weights> normed, attended_operands;
    int64_t width, stride;
    float *normed_rows, *qkv, *attended;

    AttentionMemory(Arena& arena, const Shape& shape, int32_t rows)
        : normed(arena, rows, shape.dim), attended_operands(arena, rows, shape.heads * shape.head_dim),
          width(int64_t(shape.heads) * shape.head_dim),
          stride(rounded_up((shape.heads + 2 * shape.kv_heads) * shape.head_dim, COLUMNS)),
          normed_rows(arena.take<float>(int64_t(rows) * shape.dim)), qkv(arena.take<float>(rows * stride)),
          attended(arena.take<float>(rows * width)) {}
};

/// The units of attention of one plan, each of some rows of a piece.
template <class Value>
struct AttentionUnits {
    int32_t *piece, *first_row, *rows;
    int count = 0;
    int group;
    std::vector<Workspace<Value>> spaces;  // one a thread

    AttentionUnits(Arena& arena, const Shape& shape, const Pieces& pieces, int threads)
        : piece(arena.take<int32_t>(pieces.plan.rows)), first_row(arena.take<int32_t>(pieces.plan.rows)),
          rows(arena.take<int32_t>(pieces.plan.rows)), group(shape.heads / shape.kv_heads) {
        const int32_t share = pieces.plan.rows * shape.heads / (UNITS_OF_A_THREAD * threads);
        const int32_t most = std::max(1, std::min(UNIT_QUERIES, share) / group);
        for (int number = 0; number < pieces.plan.pieces; ++number)
            for (int32_t row = pieces.start[number]; row < pieces.start[number + 1]; row += most, ++count) {
                piece[count] = number;
                first_row[count] = row;
                rows[count] = std::min(most, pieces.start[number + 1] - row);
            }
        for (int thread = 0; thread < threads; ++thread)
            spaces.emplace_back(arena, most * group, shape.head_dim);
    }
};

/// Everything of one window class in one step.
template <class Value>
struct Step {
    Pieces pieces;
    CacheLayout layout;
    AttentionUnits<Value> units;

    Step(Arena& arena, const Shape& shape, const Plan& plan, int threads)
        : pieces(arena, plan), layout(shape, plan.block), units(arena, shape, pieces, threads) {}
};

template <class Weights, class Value>
void attention(Team& team, const Shape& shape, const Layer& layer, const Step<Value>& step, const Rotation& rotation,
               Value* cache, const AttentionMemory<Weights>& memory, const float* from, float* to) {
    const int32_t rows = step.pieces.plan.rows, dim = shape.dim;
    const int32_t keys_at = int32_t(memory.width), kv_width = shape.kv_heads * shape.head_dim;
    team.share(rows, [&](int row) {
        float* normed = memory.normed_rows + int64_t(row) * dim;
        norm(normed, from + int64_t(row) * dim, layer.attention_norm, dim, shape.norm_eps);
        memory.normed.prepare(row, normed);
    });
    product(team, layer.qkv, memory.normed, rows, [&](int32_t row, int32_t first, const Floats(&values)[VECTORS]) {
        std::memcpy(memory.qkv + row * memory.stride + first, values, sizeof values);
    });
    // The ring has room for window and chunk, so writing first and reading after is exact.
    team.share(rows, [&](int row) {
        float* qkv = memory.qkv + row * memory.stride;
        const int piece = step.pieces.piece_of(row);
        const int32_t position = step.pieces.position_of(row, piece);
        rotate(qkv, shape.heads + shape.kv_heads, rotation.cosines + int64_t(row) * rotation.half,
                      rotation.sines + int64_t(row) * rotation.half, shape.head_dim);
        write_row(cache, step.layout, shape, step.pieces.block_of(piece, position), position % step.pieces.plan.block,
                  qkv + keys_at, qkv + keys_at + kv_width);
    });
    const Attention<Value> attend(shape, step.pieces, step.layout, cache, memory.qkv, memory.stride, memory.attended,
                                  memory.width);
    // A prompt's later rows see more positions and take longer: they begin, so that the end is even.
    const int units = step.units.count * shape.kv_heads;
    const auto queries_of = [&](int unit) {
        const int reversed = units - 1 - unit, number = reversed / shape.kv_heads;
        return Queries{step.units.piece[number], reversed % shape.kv_heads, step.units.group,
                       step.units.first_row[number], step.units.rows[number]};
    };
    team.share(units, [&](int unit) {
        attend(queries_of(unit), queries_of(team.likely_next(unit, units)), step.units.spaces[team.member()]);
    });
    team.share(rows, [&](int row) { memory.attended_operands.prepare(row, memory.attended + row * memory.width); });
    product(team, layer.o, memory.attended_operands, rows,
            [&](int32_t row, int32_t first, const Floats(&values)[VECTORS]) {
                const float* residual = from + int64_t(row) * dim;
                for (int vector = 0; vector < VECTORS && first + vector * WIDTH < dim; ++vector) {
                    const int32_t place = first + vector * WIDTH;
                    store_within(to + int64_t(row) * dim, place, dim, values[vector] + load_within(residual, place, dim));
                }
            });
}

}  // namespace tramontane
