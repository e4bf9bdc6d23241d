// The first half of a block: norm, queries, keys and values, RoPE, the cache, attention, output product, residual.
//
// A query walks over its visible positions in tiles of TILE absolute positions and keeps the largest score, the sum and
// the weighted values so far (online softmax). Every sum runs in the order of positions, and a position out of sight is
// skipped rather than weighted by zero: a row's bits depend on its own sequence only, and no NaN can come from places
// that it does not see.
#pragma once

#include <limits>

#include "cache.hpp"
#include "products.hpp"

namespace tramontane {

constexpr int TILE = 64;

/// Query rows (positions x query heads of a KV head) of one unit of attention, about.
constexpr int UNIT_QUERIES = 48;

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

template <class Value>
void round_row(float* row, int64_t count) {
    if constexpr (sizeof(Value) == sizeof(bfloat16))
        for (int64_t place = 0; place < count; ++place) row[place] = to_float(to_bfloat16(row[place]));
}

/// The query rows of one unit: `rows` positions of one piece times the `group` query heads of one KV head.
struct Queries {
    int piece, kv_head, group;
    int32_t first_row, rows;

    int count() const { return rows * group; }
    int32_t row(int query) const { return first_row + query / group; }
    int head(int query) const { return kv_head * group + query % group; }
};

/// What a thread needs for one unit of attention.
struct Workspace {
    const float** query;                    // [queries]
    int32_t *first_visible, *last;          // visible positions of each query. [queries]
    float *scores;                          // [queries, TILE + WIDTH]
    float *most, *sum;                      // the largest score and the sum of e^(score - most) so far. [queries]
    float *weighted;                        // values weighted by e^(score - most). [queries, HD]

    static constexpr int STRIDE = TILE + WIDTH;

    Workspace(Arena& arena, int queries, int64_t padded_dim)
        : query(arena.take<const float*>(queries)), first_visible(arena.take<int32_t>(queries)),
          last(arena.take<int32_t>(queries)), scores(arena.take<float>(queries * STRIDE)),
          most(arena.take<float>(queries)), sum(arena.take<float>(queries)),
          weighted(arena.take<float>(queries * padded_dim)) {}
};

/// Products of N queries with the keys of V vectors of places.
template <int N, int V, class Value>
inline void score(float* const (&to)[N], const float* const (&queries)[N], const Value* keys, int64_t places,
                  int head_dim) {
    Floats sums[N][V] = {};
    for (int dim = 0; dim < head_dim; ++dim) {
        Floats query[N];
        for (int row = 0; row < N; ++row) query[row] = all(queries[row][dim]);
        for (int vector = 0; vector < V; ++vector) {
            const Floats key = load(keys + dim * places + vector * WIDTH);
            for (int row = 0; row < N; ++row) sums[row][vector] = fma(query[row], key, sums[row][vector]);
        }
    }
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) store(to[row] + vector * WIDTH, sums[row][vector]);
}

/// Add the values of places [begin, end), weighted, to V vectors of N queries' sums.
template <int N, int V, class Value>
inline void weigh(float* const (&to)[N], const float* const (&weights)[N], const Value* values, int64_t padded_dim,
                  int begin, int end) {
    Floats sums[N][V];
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) sums[row][vector] = load(to[row] + vector * WIDTH);
    for (int place = begin; place < end; ++place) {
        Floats weight[N];
        for (int row = 0; row < N; ++row) weight[row] = all(weights[row][place]);
        for (int vector = 0; vector < V; ++vector) {
            const Floats value = load(values + place * padded_dim + vector * WIDTH);
            for (int row = 0; row < N; ++row) sums[row][vector] = fma(weight[row], value, sums[row][vector]);
        }
    }
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) store(to[row] + vector * WIDTH, sums[row][vector]);
}

/// Call `body` with the width of each group of vectors that covers `vectors`: 4, 4, .., then 1.
template <class Body>
inline void by_vectors(int vectors, Body&& body) {
    int vector = 0;
    for (; vector + 4 <= vectors; vector += 4) body(vector, std::integral_constant<int, 4>());
    for (; vector < vectors; ++vector) body(vector, std::integral_constant<int, 1>());
}

template <class Value>
class Attention {
public:
    Attention(const Shape& shape, const Pieces& pieces, const CacheLayout& layout, Value* cache, const float* qkv,
              int64_t qkv_stride, float* attended, int64_t attended_stride)
        : shape_(shape), pieces_(pieces), layout_(layout), cache_(cache), qkv_(qkv), qkv_stride_(qkv_stride),
          attended_(attended), attended_stride_(attended_stride), scale_(1.0f / std::sqrt(float(shape.head_dim))) {}

    void operator()(const Queries& queries, const Workspace& space) const {
        const int count = queries.count();
        int32_t begin = std::numeric_limits<int32_t>::max(), end = 0;
        for (int query = 0; query < count; ++query) {
            const int32_t row = queries.row(query), position = pieces_.position_of(row, queries.piece);
            space.query[query] = qkv_ + row * qkv_stride_ + queries.head(query) * shape_.head_dim;
            space.first_visible[query] = pieces_.first_visible(position);
            space.last[query] = position;
            space.most[query] = -std::numeric_limits<float>::infinity();
            space.sum[query] = 0;
            begin = std::min(begin, space.first_visible[query]);
            end = std::max(end, position + 1);
        }
        std::memset(space.weighted, 0, count * layout_.padded_dim * sizeof(float));
        for (int32_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
            const int32_t low = std::max(begin, tile), high = std::min(end, tile + TILE);
            score_tile(queries, space, tile, low, high);
            for (int query = 0; query < count; ++query) soften(space, query, tile);
            weigh_tile(queries, space, tile, low, high);
        }
        for (int query = 0; query < count; ++query) {
            float* to = attended_ + queries.row(query) * attended_stride_ + queries.head(query) * shape_.head_dim;
            const float* from = space.weighted + query * layout_.padded_dim;
            for (int dim = 0; dim < shape_.head_dim; ++dim) to[dim] = from[dim] / space.sum[query];
        }
    }

private:
    /// body(piece of the positions [low, high) that lies in one block, the block, the first one's place in it)
    template <class Body>
    void by_block(int piece, int32_t low, int32_t high, Body&& body) const {
        const int32_t size = pieces_.plan.block;
        for (int32_t position = low; position < high;) {
            const int32_t stop = std::min(high, (position / size + 1) * size);
            body(position, stop, pieces_.block_of(piece, position), position % size);
            position = stop;
        }
    }

    /// Raw scores of the positions [low, high) of the tile. A vector may run over the end of a block or of what is
    /// seen; what it leaves there is overwritten by the next block's or left out by `soften`.
    void score_tile(const Queries& queries, const Workspace& space, int32_t tile, int32_t low, int32_t high) const {
        by_block(queries.piece, low, high, [&](int32_t from, int32_t to, int32_t block, int32_t place) {
            const Value* keys = layout_.keys(cache_, block, queries.kv_head) + place;
            by_tiles(queries.count(), [&](int query, auto rows) {
                constexpr int N = decltype(rows)::value;
                const float* pointers[N];
                for (int row = 0; row < N; ++row) pointers[row] = space.query[query + row];
                by_vectors((to - from + WIDTH - 1) / WIDTH, [&](int vector, auto vectors) {
                    float* scores[N];
                    for (int row = 0; row < N; ++row)
                        scores[row] = space.scores + (query + row) * Workspace::STRIDE + from - tile + vector * WIDTH;
                    score<N, decltype(vectors)::value>(scores, pointers, keys + vector * WIDTH, layout_.places,
                                                       shape_.head_dim);
                });
            });
        });
    }

    /// Turn a query's scores of a tile into weights e^(score - most); what it does not see is too small for the sum,
    /// and left out by `weigh_tile`.
    void soften(const Workspace& space, int query, int32_t tile) const {
        const int32_t low = space.first_visible[query] - tile, high = space.last[query] + 1 - tile;
        if (low >= TILE || high <= 0) return;
        float* scores = space.scores + query * Workspace::STRIDE;
        const Floats hidden = all(-std::numeric_limits<float>::infinity());
        Floats most = hidden;
        for (int place = 0; place < TILE; place += WIDTH) {
            const Ints number = lane_numbers() + place;
            const Floats scaled = (number >= low) & (number < high) ? load(scores + place) * scale_ : hidden;
            store(scores + place, scaled);
            most = larger(most, scaled);
        }
        const float before = space.most[query], now = std::max(before, largest_lane(most));
        Floats sum{};
        for (int place = 0; place < TILE; place += WIDTH) {
            const Floats weight = exponential(load(scores + place) - now);
            store(scores + place, weight);
            sum += weight;
        }
        space.most[query] = now;
        if (before != now) {
            const float shrink = exponential(before - now);
            space.sum[query] *= shrink;
            float* weighted = space.weighted + query * layout_.padded_dim;
            for (int64_t dim = 0; dim < layout_.padded_dim; dim += WIDTH)
                store(weighted + dim, load(weighted + dim) * shrink);
        }
        space.sum[query] += sum_of_lanes(sum);
    }

    void weigh_tile(const Queries& queries, const Workspace& space, int32_t tile, int32_t low, int32_t high) const {
        by_tiles(queries.count(), [&](int query, auto rows) {
            constexpr int N = decltype(rows)::value;
            // What all N see, and what only some of them see before and after it.
            int32_t begin = low, end = high;
            for (int row = 0; row < N; ++row) {
                begin = std::max(begin, space.first_visible[query + row]);
                end = std::min(end, space.last[query + row] + 1);
            }
            if (begin >= end) {
                for (int row = 0; row < N; ++row) weigh_range<1>(queries, space, query + row, tile, low, high);
                return;
            }
            for (int row = 0; row < N; ++row) weigh_range<1>(queries, space, query + row, tile, low, begin);
            weigh_range<N>(queries, space, query, tile, begin, end);
            for (int row = 0; row < N; ++row) weigh_range<1>(queries, space, query + row, tile, end, high);
        });
    }

    /// The positions [low, high) that N queries see, all of them the same ones.
    template <int N>
    void weigh_range(const Queries& queries, const Workspace& space, int query, int32_t tile, int32_t low,
                     int32_t high) const {
        low = std::max(low, space.first_visible[query]);
        high = std::min(high, space.last[query] + 1);
        by_block(queries.piece, low, high, [&](int32_t from, int32_t to, int32_t block, int32_t place) {
            const Value* values = layout_.values(cache_, block, queries.kv_head, shape_.head_dim);
            const float* weights[N];
            for (int row = 0; row < N; ++row)
                weights[row] = space.scores + (query + row) * Workspace::STRIDE + from - tile;
            by_vectors(int(layout_.padded_dim / WIDTH), [&](int vector, auto vectors) {
                float* sums[N];
                for (int row = 0; row < N; ++row)
                    sums[row] = space.weighted + (query + row) * layout_.padded_dim + vector * WIDTH;
                weigh<N, decltype(vectors)::value>(sums, weights, values + place * layout_.padded_dim + vector * WIDTH,
                                                   layout_.padded_dim, 0, to - from);
            });
        });
    }

    const Shape& shape_;
    const Pieces& pieces_;
    const CacheLayout& layout_;
    Value* cache_;
    const float* qkv_;
    int64_t qkv_stride_;
    float* attended_;
    int64_t attended_stride_;
    float scale_;
};

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

/// The units of attention of one plan: at most about UNIT_QUERIES query rows each.
struct AttentionUnits {
    int32_t *piece, *first_row, *rows;
    int count = 0;
    int group;
    std::vector<Workspace> spaces;  // one a thread

    AttentionUnits(Arena& arena, const Shape& shape, const Pieces& pieces, int threads)
        : piece(arena.take<int32_t>(pieces.plan.rows)), first_row(arena.take<int32_t>(pieces.plan.rows)),
          rows(arena.take<int32_t>(pieces.plan.rows)), group(shape.heads / shape.kv_heads) {
        const int32_t most = std::max(1, UNIT_QUERIES / group);
        for (int number = 0; number < pieces.plan.pieces; ++number)
            for (int32_t row = pieces.start[number]; row < pieces.start[number + 1]; row += most, ++count) {
                piece[count] = number;
                first_row[count] = row;
                rows[count] = std::min(most, pieces.start[number + 1] - row);
            }
        for (int thread = 0; thread < threads; ++thread)
            spaces.emplace_back(arena, most * group, rounded_up(shape.head_dim, WIDTH));
    }
};

/// Everything of one window class in one step.
struct Step {
    Pieces pieces;
    CacheLayout layout;
    AttentionUnits units;

    Step(Arena& arena, const Shape& shape, const Plan& plan, int threads)
        : pieces(arena, plan), layout(shape, plan.block), units(arena, shape, pieces, threads) {}
};

template <class Weights, class Value>
void attention(Team& team, const Shape& shape, const Layer& layer, const Step& step, const Rotation& rotation,
               Value* cache, const AttentionMemory<Weights>& memory, const float* from, float* to) {
    const int32_t rows = step.pieces.plan.rows, dim = shape.dim;
    const int32_t keys_at = int32_t(memory.width), kv_width = shape.kv_heads * shape.head_dim;
    team.share(rows, [&](int row) {
        float* normed = memory.normed_rows + int64_t(row) * dim;
        norm<Value>(normed, from + int64_t(row) * dim, layer.attention_norm, dim, shape.norm_eps);
        memory.normed.prepare(row, normed);
    });
    product(team, layer.qkv, memory.normed, rows, [&](int32_t row, int32_t first, const Floats(&values)[VECTORS]) {
        for (int vector = 0; vector < VECTORS; ++vector)
            store(memory.qkv + row * memory.stride + first + vector * WIDTH, rounded_as<Value>(values[vector]));
    });
    // The ring has room for window and chunk, so writing first and reading after is exact.
    team.share(rows, [&](int row) {
        float* qkv = memory.qkv + row * memory.stride;
        const int piece = step.pieces.piece_of(row);
        const int32_t position = step.pieces.position_of(row, piece);
        rotate(qkv, shape.heads + shape.kv_heads, rotation.cosines + int64_t(row) * rotation.half,
                      rotation.sines + int64_t(row) * rotation.half, shape.head_dim);
        round_row<Value>(qkv, keys_at + kv_width);
        write_row(cache, step.layout, shape, step.pieces.block_of(piece, position), position % step.pieces.plan.block,
                  qkv + keys_at, qkv + keys_at + kv_width);
    });
    const Attention<Value> attend(shape, step.pieces, step.layout, cache, memory.qkv, memory.stride, memory.attended,
                                  memory.width);
    // A prompt's later rows see more positions and take longer: they begin, so that the end is even.
    const int units = step.units.count * shape.kv_heads;
    team.share(units, [&](int unit) {
        const int reversed = units - 1 - unit, number = reversed / shape.kv_heads;
        attend({step.units.piece[number], reversed % shape.kv_heads, step.units.group, step.units.first_row[number],
                step.units.rows[number]},
               step.units.spaces[team.member()]);
    });
    team.share(rows, [&](int row) { memory.attended_operands.prepare(row, memory.attended + row * memory.width); });
    product(team, layer.o, memory.attended_operands, rows,
            [&](int32_t row, int32_t first, const Floats(&values)[VECTORS]) {
                float sums[COLUMNS];
                const int32_t count = std::min(COLUMNS, dim - first);
                const float* residual = from + int64_t(row) * dim + first;
                for (int vector = 0; vector < VECTORS; ++vector)
                    store(sums + vector * WIDTH, rounded_as<Value>(values[vector]));
                for (int32_t place = 0; place < count; ++place) sums[place] += residual[place];
                round_row<Value>(sums, count);
                std::memcpy(to + int64_t(row) * dim + first, sums, count * sizeof(float));
            });
}

}  // namespace tramontane
