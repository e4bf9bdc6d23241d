// Attention of a few query rows of one sequence over its cached positions.
//
// A query walks over its visible positions in tiles of TILE absolute positions and keeps the largest score, the sum and
// the weighted values so far (online softmax; Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018). Every sum runs in the order of dimensions or positions, and a position out of sight is skipped rather than
// weighted by zero: a row's bits depend on its own sequence only, and no NaN can come from places that it does not see.
//
// Few queries (decode) read keys and values where they lie, and fetch the next tile meanwhile. Many (a prompt's chunk)
// share a copy of the tile as float32, so that a number is widened once for all of them:
//
//     keys    [hd][TILE]                 one dimension of all places side by side
//     values  [HD / COLUMNS][TILE][COLUMNS]   strips of a few dimensions, so that a strip stays in the first cache
#pragma once

#include <limits>

#include "cache.hpp"
#include "tiles.hpp"

namespace tramontane {

constexpr int TILE = 64;
static_assert(TILE % COLUMNS == 0);

/// From how many queries on a tile is widened, and queries of one pass over the copy: VECTORS sums each.
constexpr int MANY = 9;
#if defined(__AVX512F__)
constexpr int MANY_ROWS = 6;
#else
constexpr int MANY_ROWS = 3;
#endif

/// Queries of one pass over keys or values as they lie, where 4 bytes of registers are needed beside each sum.
constexpr int FEW_ROWS = 4;

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
    /// Scores, and a dimension of wide keys, have room for a vector that begins at the tile's last place.
    static constexpr int STRIDE = TILE + WIDTH;

    int64_t strips;                         // of COLUMNS dimensions
    const float** query;                    // [queries]
    int32_t *first_visible, *last;          // visible positions of each query. [queries]
    float *scores;                          // [queries, STRIDE]
    float *most, *sum;                      // the largest score and the sum of e^(score - most) so far. [queries]
    float *weighted;                        // values weighted by e^(score - most). [queries, strips, COLUMNS]
    float *wide_keys;                       // [hd, STRIDE]
    float *wide_values;                     // [strips, TILE, COLUMNS]

    Workspace(Arena& arena, int queries, int head_dim)
        : strips((head_dim + COLUMNS - 1) / COLUMNS), query(arena.take<const float*>(queries)),
          first_visible(arena.take<int32_t>(queries)), last(arena.take<int32_t>(queries)),
          scores(arena.take<float>(queries * STRIDE)), most(arena.take<float>(queries)),
          sum(arena.take<float>(queries)), weighted(arena.take<float>(queries * strips * COLUMNS)),
          wide_keys(arena.take<float>(head_dim * STRIDE)), wide_values(arena.take<float>(strips * TILE * COLUMNS)) {}

    float* weighted_of(int query) const { return weighted + query * strips * COLUMNS; }
};

/// Ask for what lies `distance` words beyond V vectors of words, where there is one.
template <int V>
inline void fetch(const uint32_t* words, int64_t distance) {
    constexpr int LINE = 16;
    if (distance)
        for (int word = 0; word < V * WIDTH; word += LINE) __builtin_prefetch(words + distance + word);
}

/// Products of N queries with the keys of V vectors of places. `keys` are words [HD / n][places], n numbers a word;
/// those that lie `ahead` words further on are fetched.
template <class Value, int N, int V>
inline void score(float* const (&to)[N], const float* const (&queries)[N], const uint32_t* keys, int64_t places,
                  int head_dim, int64_t ahead = 0) {
    Floats sums[N][V] = {};
    for (int dim = 0; dim < head_dim; dim += PER_WORD<Value>, keys += places) {
        fetch<V>(keys, ahead);
        Words words[V];
        for (int vector = 0; vector < V; ++vector) words[vector] = load_bits<Words>(keys + vector * WIDTH);
        for (int number = 0; number < PER_WORD<Value>; ++number)
            for (int vector = 0; vector < V; ++vector) {
                const Floats key = number_of<Value>(words[vector], number);
                for (int row = 0; row < N; ++row)
                    sums[row][vector] = fma(all(queries[row][dim + number]), key, sums[row][vector]);
            }
    }
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) store(to[row] + vector * WIDTH, sums[row][vector]);
}

/// Add the values of places [begin, end), weighted, to V vectors of N queries' sums. `values` are words
/// [places / n][stride], n places a word; those that lie `ahead` words further on are fetched.
template <class Value, int N, int V>
inline void weigh(float* const (&to)[N], const float* const (&weights)[N], const uint32_t* values, int64_t stride,
                  int begin, int end, int64_t ahead = 0) {
    Floats sums[N][V];
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) sums[row][vector] = load(to[row] + vector * WIDTH);
    const auto add = [&](const Words(&words)[V], int number, int place) {
        for (int vector = 0; vector < V; ++vector) {
            const Floats value = number_of<Value>(words[vector], number);
            for (int row = 0; row < N; ++row)
                sums[row][vector] = fma(all(weights[row][place]), value, sums[row][vector]);
        }
    };
    constexpr int PER = PER_WORD<Value>;
    for (int first = begin / PER * PER; first < end; first += PER) {
        fetch<V>(values + first / PER * stride, ahead);
        Words words[V];
        for (int vector = 0; vector < V; ++vector)
            words[vector] = load_bits<Words>(values + first / PER * stride + vector * WIDTH);
        if (first >= begin && first + PER <= end)
            for (int number = 0; number < PER; ++number) add(words, number, first + number);
        else
            for (int number = 0; number < PER; ++number)
                if (first + number >= begin && first + number < end) add(words, number, first + number);
    }
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) store(to[row] + vector * WIDTH, sums[row][vector]);
}

/// Call body(vector, V) for groups of V vectors that cover `vectors`: of MOST, then of 1.
template <int MOST, class Body>
inline void by_vectors(int vectors, Body&& body) {
    int vector = 0;
    for (; vector + MOST <= vectors; vector += MOST) body(vector, std::integral_constant<int, MOST>());
    for (; vector < vectors; ++vector) body(vector, std::integral_constant<int, 1>());
}

/// Vectors of one pass by N queries: enough sums to keep the CPU busy, few enough for its registers.
template <int N>
constexpr int FEW_VECTORS = N <= 2 ? 4 : 2;

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
        std::memset(space.weighted, 0, count * space.strips * COLUMNS * sizeof(float));
        for (int32_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
            const Range range{std::max(begin, tile), std::min(end, tile + TILE)};
            if (count < MANY) {
                score_few(queries, space, tile, range, end - 1);
                for (int query = 0; query < count; ++query) soften(space, query, tile);
                weigh_few(queries, space, tile, range, end - 1);
            } else {
                widen(queries, space, tile, range);
                score_many(queries, space);
                for (int query = 0; query < count; ++query) soften(space, query, tile);
                weigh_many(queries, space, tile, range);
            }
        }
        for (int query = 0; query < count; ++query) {
            float* to = attended_ + queries.row(query) * attended_stride_ + queries.head(query) * shape_.head_dim;
            const float *from = space.weighted_of(query), sum = space.sum[query];
            for (int dim = 0; dim < shape_.head_dim; ++dim) to[dim] = from[dim] / sum;
        }
    }

private:
    /// Absolute positions [low, high).
    struct Range {
        int32_t low, high;

        Range seen_by(const Workspace& space, int query) const {
            return {std::max(low, space.first_visible[query]), std::min(high, space.last[query] + 1)};
        }
    };

    /// body(the part of the range that lies in one block, the block, its first one's place in it)
    template <class Body>
    void by_block(int piece, Range range, Body&& body) const {
        const int32_t size = pieces_.plan.block;
        while (range.low < range.high) {
            const int32_t stop = std::min(range.high, (range.low / size + 1) * size);
            body(Range{range.low, stop}, pieces_.block_of(piece, range.low), range.low % size);
            range.low = stop;
        }
    }

    const uint32_t* keys(int32_t block, int kv_head) const {
        return reinterpret_cast<const uint32_t*>(layout_.keys(cache_, block, kv_head));
    }
    const uint32_t* values(int32_t block, int kv_head) const {
        return reinterpret_cast<const uint32_t*>(layout_.values(cache_, block, kv_head));
    }

    /// How far beyond a block's words those of the block that comes next lie; 0 behind the last position.
    int64_t ahead(const Queries& queries, Range part, int32_t block, int32_t last) const {
        const int64_t next = pieces_.block_of(queries.piece, std::min(part.high, last));
        return (next - block) * layout_.block / PER_WORD<Value>;
    }

    /// Raw scores of a range of the tile. A vector may run over the end of a block or of what is seen; what it leaves
    /// there is overwritten by the next block's or left out by `soften`.
    void score_few(const Queries& queries, const Workspace& space, int32_t tile, Range range, int32_t last) const {
        by_block(queries.piece, range, [&](Range part, int32_t block, int32_t place) {
            const uint32_t* key = keys(block, queries.kv_head) + place;
            const int64_t distance = ahead(queries, part, block, last);
            by_tiles<FEW_ROWS>(queries.count(), [&](int query, auto rows) {
                constexpr int N = decltype(rows)::value;
                const float* pointers[N];
                for (int row = 0; row < N; ++row) pointers[row] = space.query[query + row];
                const int count = (part.high - part.low + WIDTH - 1) / WIDTH;
                by_vectors<FEW_VECTORS<N>>(count, [&](int vector, auto vectors) {
                    float* scores[N];
                    for (int row = 0; row < N; ++row)
                        scores[row] =
                            space.scores + (query + row) * Workspace::STRIDE + part.low - tile + vector * WIDTH;
                    score<Value, N, decltype(vectors)::value>(scores, pointers, key + vector * WIDTH, layout_.places,
                                                              shape_.head_dim, distance);
                });
            });
        });
    }

    void weigh_few(const Queries& queries, const Workspace& space, int32_t tile, Range range, int32_t last) const {
        by_tiles<FEW_ROWS>(queries.count(), [&](int query, auto rows) {
            by_sight<decltype(rows)::value>(space, query, range, [&](int first, auto several, Range seen) {
                constexpr int N = decltype(several)::value;
                by_block(queries.piece, seen, [&](Range part, int32_t block, int32_t place) {
                    const int64_t distance = ahead(queries, part, block, last);
                    const float* weights[N];
                    for (int row = 0; row < N; ++row)
                        weights[row] = space.scores + (first + row) * Workspace::STRIDE + part.low - tile - place;
                    by_vectors<FEW_VECTORS<N>>(int(layout_.padded_dim / WIDTH), [&](int vector, auto vectors) {
                        float* sums[N];
                        for (int row = 0; row < N; ++row)
                            sums[row] = space.weighted_of(first + row) + vector * WIDTH;
                        weigh<Value, N, decltype(vectors)::value>(
                            sums, weights, values(block, queries.kv_head) + vector * WIDTH, layout_.padded_dim, place,
                            place + part.high - part.low, distance);
                    });
                });
            });
        });
    }

    /// Copy a range of the tile as float32. What lies in other places of the copy is not looked at.
    void widen(const Queries& queries, const Workspace& space, int32_t tile, Range range) const {
        constexpr int PER = PER_WORD<Value>;
        by_block(queries.piece, range, [&](Range part, int32_t block, int32_t place) {
            const int32_t first = part.low - tile, count = part.high - part.low;
            const uint32_t* key = keys(block, queries.kv_head) + place;
            for (int dim = 0; dim < shape_.head_dim; dim += PER, key += layout_.places)
                for (int number = 0; number < PER; ++number) {
                    float* to = space.wide_keys + (dim + number) * Workspace::STRIDE + first;
                    for (int32_t vector = 0; vector < count; vector += WIDTH)
                        store(to + vector, number_of<Value>(load_bits<Words>(key + vector), number));
                }
            const uint32_t* value = values(block, queries.kv_head);
            for (int32_t index = 0; index < count; ++index) {
                const int32_t of_block = place + index;
                const uint32_t* from = value + of_block / PER * layout_.padded_dim;
                for (int64_t dim = 0; dim < layout_.padded_dim; dim += WIDTH)
                    store(space.wide_values + (dim / COLUMNS * TILE + first + index) * COLUMNS + dim % COLUMNS,
                          number_of<Value>(load_bits<Words>(from + dim), of_block % PER));
            }
        });
    }

    void score_many(const Queries& queries, const Workspace& space) const {
        for (int place = 0; place < TILE; place += COLUMNS)
            by_tiles<MANY_ROWS>(queries.count(), [&](int query, auto rows) {
                constexpr int N = decltype(rows)::value;
                const float* pointers[N];
                float* scores[N];
                for (int row = 0; row < N; ++row) {
                    pointers[row] = space.query[query + row];
                    scores[row] = space.scores + (query + row) * Workspace::STRIDE + place;
                }
                const auto* keys = reinterpret_cast<const uint32_t*>(space.wide_keys + place);
                score<float, N, VECTORS>(scores, pointers, keys, Workspace::STRIDE, shape_.head_dim);
            });
    }

    void weigh_many(const Queries& queries, const Workspace& space, int32_t tile, Range range) const {
        for (int64_t strip = 0; strip < space.strips; ++strip) {
            const auto* values = reinterpret_cast<const uint32_t*>(space.wide_values + strip * TILE * COLUMNS);
            by_tiles<MANY_ROWS>(queries.count(), [&](int query, auto rows) {
                by_sight<decltype(rows)::value>(space, query, range, [&](int first, auto several, Range seen) {
                    constexpr int N = decltype(several)::value;
                    const float* weights[N];
                    float* sums[N];
                    for (int row = 0; row < N; ++row) {
                        weights[row] = space.scores + (first + row) * Workspace::STRIDE;
                        sums[row] = space.weighted_of(first + row) + strip * COLUMNS;
                    }
                    weigh<float, N, VECTORS>(sums, weights, values, COLUMNS, seen.low - tile, seen.high - tile);
                });
            });
        }
    }

    /// body(first query, how many, positions) for what N queries see of a range: what all of them do together, and what
    /// only some do, before and after that, one by one. A query's positions come in order.
    template <int N, class Body>
    void by_sight(const Workspace& space, int query, Range range, Body&& body) const {
        Range shared = range;
        for (int row = 0; row < N; ++row) {
            const Range seen = range.seen_by(space, query + row);
            shared = {std::max(shared.low, seen.low), std::min(shared.high, seen.high)};
        }
        const auto alone = [&](Range part) {
            for (int row = 0; row < N; ++row) {
                const Range seen = part.seen_by(space, query + row);
                if (seen.low < seen.high) body(query + row, std::integral_constant<int, 1>(), seen);
            }
        };
        if (shared.low >= shared.high) return alone(range);
        alone({range.low, shared.low});
        body(query, std::integral_constant<int, N>(), shared);
        alone({shared.high, range.high});
    }

    /// Turn a query's scores of a tile into weights e^(score - most); what it does not see is too small for the sum,
    /// and left out when values are weighed.
    void soften(const Workspace& space, int query, int32_t tile) const {
        const int32_t low = space.first_visible[query] - tile, high = space.last[query] + 1 - tile;
        if (low >= TILE || high <= 0) return;
        float* scores = space.scores + query * Workspace::STRIDE;
        const Floats hidden = all(-std::numeric_limits<float>::infinity());
        Floats scaled[TILE / WIDTH], most = hidden;
        for (int vector = 0; vector < TILE / WIDTH; ++vector) scaled[vector] = load(scores + vector * WIDTH) * scale_;
        if (low > 0 || high < TILE)
            for (int vector = 0; vector < TILE / WIDTH; ++vector) {
                const Ints place = lane_numbers() + vector * WIDTH;
                scaled[vector] = (place >= low) & (place < high) ? scaled[vector] : hidden;
            }
        for (int vector = 0; vector < TILE / WIDTH; ++vector) most = larger(most, scaled[vector]);
        const float before = space.most[query], now = std::max(before, largest_lane(most));
        Floats sum{};
        for (int vector = 0; vector < TILE / WIDTH; ++vector) {
            const Floats weight = exponential(scaled[vector] - now);
            store(scores + vector * WIDTH, weight);
            sum += weight;
        }
        space.most[query] = now;
        if (before != now) {
            const float shrink = exponential(before - now);
            space.sum[query] *= shrink;
            float* weighted = space.weighted_of(query);
            for (int64_t dim = 0; dim < space.strips * COLUMNS; dim += WIDTH)
                store(weighted + dim, load(weighted + dim) * shrink);
        }
        space.sum[query] += sum_of_lanes(sum);
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

}  // namespace tramontane
