// Attention of a few query rows of one sequence over its cached positions.
//
// A query walks over its visible positions in tiles of TILE absolute positions and keeps the largest score, the sum and
// the weighted values so far (online softmax; Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018). The order of every sum is decided by absolute positions and dimensions alone (in bfloat16 by the block's size
// as well, where that is odd: a word holds neighbouring places of a block), and a position out of sight adds nothing,
// its value being left out or replaced by 0: a row's bits depend on its own sequence only, and no NaN can come from
// places that it does not see.
//
// Keys and values are read where they lie, and multiplied as a weight's words are: queries, and the weights e^score,
// are a product's operands. With the instructions for it both are bfloat16, as in Flash Attention (Dao et al., 2022);
// the sum that divides is of the rounded weights. What the next tile has, or the next unit's first, is fetched
// meanwhile.
#pragma once

#include <limits>
#include <type_traits>

#include "cache.hpp"
#include "tiles.hpp"

namespace tramontane {

/// Positions of a tile: sums go to memory and back once in each. Longer ones would not stay in the first cache.
constexpr int TILE = 8 * WIDTH;

/// How words of the cache are multiplied.
template <class Value>
using Cached = std::conditional_t<sizeof(Value) == sizeof(float), Float32, BFloat16>;

/// The query rows of one unit: `rows` positions of one piece times the `group` query heads of one KV head.
struct Queries {
    int piece, kv_head, group;
    int32_t first_row, rows;

    int count() const { return rows * group; }
    int32_t row(int query) const { return first_row + query / group; }
    int head(int query) const { return kv_head * group + query % group; }
};

/// What a thread needs for one unit of attention.
template <class Value>
struct Workspace {
    using Operand = typename Cached<Value>::Operand;

    /// Scores have room for a vector that begins at the tile's last place, weights for a place before and one after.
    static constexpr int STRIDE = TILE + WIDTH;

    int64_t head_dim, padded_dim;
    Operand *queries, *weights;             // [queries, hd], [ROWS, STRIDE]
    int32_t *first_visible, *last;          // visible positions of each query. [queries]
    float *scores;                          // of the queries of one pass. [ROWS, STRIDE]
    float *most, *sums;                     // the largest score so far, and lanes that add up to the sum of weights.
                                            // [queries], [queries, WIDTH]
    float *weighted;                        // values weighted by e^(score - most). [queries, HD]

    Workspace(Arena& arena, int queries, int head_dim)
        : head_dim(head_dim), padded_dim(rounded_up(head_dim, WIDTH)), queries(arena.take<Operand>(queries * head_dim)),
          weights(arena.take<Operand>(ROWS * STRIDE)), first_visible(arena.take<int32_t>(queries)),
          last(arena.take<int32_t>(queries)), scores(arena.take<float>(ROWS * STRIDE)),
          most(arena.take<float>(queries)), sums(arena.take<float>(queries * WIDTH)),
          weighted(arena.take<float>(queries * padded_dim)) {}

    Operand* query(int number) const { return queries + number * head_dim; }
    Operand* weights_of(int row) const { return weights + row * STRIDE + 1; }
    float* scores_of(int row) const { return scores + row * STRIDE; }
    float* sums_of(int query) const { return sums + query * WIDTH; }
    float* weighted_of(int query) const { return weighted + query * padded_dim; }
};

/// Ask for what lies `distance` words beyond V vectors of words, where there is one.
template <int V>
inline void fetch(const uint32_t* words, int64_t distance) {
    if (distance)
        for (int word = 0; word < V * WIDTH; word += LINE / 4) __builtin_prefetch(words + distance + word);
}

/// Products of N queries with the keys of V vectors of places. `keys` are words [hd / n][places], n numbers a word;
/// those that lie `ahead` words further on are fetched.
template <class Value, int N, int V>
inline void score(float* const (&to)[N], const typename Cached<Value>::Operand* const (&queries)[N],
                  const uint32_t* keys, int64_t places, int head_dim, int64_t ahead) {
    Floats sums[N][V] = {};
    for (int word = 0; word < head_dim / PER_WORD<Value>; ++word, keys += places) {
        fetch<V>(keys, ahead);
        Cached<Value>::step(sums, keys, queries, word);
    }
    for (int row = 0; row < N; ++row)
        for (int vector = 0; vector < V; ++vector) store(to[row] + vector * WIDTH, sums[row][vector]);
}

/// Absolute positions [low, high).
struct Range {
    int32_t low, high;

    Range within(Range other) const { return {std::max(low, other.low), std::min(high, other.high)}; }
    bool empty() const { return low >= high; }
};

/// The part of a tile that lies in one block.
struct Part {
    Range range;
    int32_t start;           // the position of the block's first place
    const uint32_t *keys, *values;
    int64_t ahead;           // words from here to the keys, and so to the values, that are wanted next: the next
                             // tile's, or the next unit's first; 0 where they are these
};

/// Add the values of the positions `seen` of some parts, weighted, to V vectors of N queries' sums. `weights` begin
/// with the position `tile`. Values are words [places / n][stride], n places a word.
template <class Value, int N, int V>
void weigh(float* const (&to)[N], const typename Cached<Value>::Operand* const (&weights)[N], int32_t tile,
           const Part* parts, int count, int64_t vector, int64_t stride, Range seen, bool fetches) {
    constexpr int PER = PER_WORD<Value>;
    Floats sums[N][V];
    alignas(64) uint32_t visible[V * WIDTH];
    for (int row = 0; row < N; ++row)
        for (int number = 0; number < V; ++number) sums[row][number] = load(to[row] + number * WIDTH);
    for (const Part* part = parts; part < parts + count; ++part) {
        const Range mine = part->range.within(seen);
        if (mine.empty()) continue;
        const int begin = mine.low - part->start, end = mine.high - part->start;
        const typename Cached<Value>::Operand* of_place[N];
        for (int row = 0; row < N; ++row) of_place[row] = weights[row] + part->start - tile;
        const uint32_t* words = part->values + begin / PER * stride + vector;
        const int64_t ahead = fetches ? part->ahead : 0;
        for (int word = begin / PER; word * PER < end; ++word, words += stride) {
            const uint32_t* some = words;
            fetch<V>(words, ahead);
            if (word * PER < begin || (word + 1) * PER > end) {
                // One place of the word is out of sight: 0 takes the place of its value, which may be NaN.
                const uint32_t mask = word * PER < begin ? 0xffff0000u : 0x0000ffffu;
                for (int number = 0; number < V * WIDTH; ++number) visible[number] = words[number] & mask;
                some = visible;
            }
            Cached<Value>::step(sums, some, of_place, word);
        }
    }
    for (int row = 0; row < N; ++row)
        for (int number = 0; number < V; ++number) store(to[row] + number * WIDTH, sums[row][number]);
}

/// Call body(vector, V) for groups of V vectors that cover `vectors`: of MOST, then of half as many, and so on.
template <int MOST, class Body>
inline void by_vectors(int vectors, Body&& body, int vector = 0) {
    for (; vector + MOST <= vectors; vector += MOST) body(vector, std::integral_constant<int, MOST>());
    if constexpr (MOST > 1) by_vectors<MOST / 2>(vectors, body, vector);
}

template <class Value>
class Attention {
public:
    Attention(const Shape& shape, const Pieces& pieces, const CacheLayout& layout, Value* cache, const float* qkv,
              int64_t qkv_stride, float* attended, int64_t attended_stride)
        : shape_(shape), pieces_(pieces), layout_(layout), cache_(cache), qkv_(qkv), qkv_stride_(qkv_stride),
          attended_(attended), attended_stride_(attended_stride), scale_(1.0f / std::sqrt(float(shape.head_dim))) {}

    /// `next` is what this thread is likely to work on next: with the last tile of `queries`, what it begins with is
    /// fetched, in as many parts as that tile has.
    void operator()(const Queries& queries, const Queries& next, const Workspace<Value>& space) const {
        const int count = queries.count();
        const auto [begin, end] = positions_of(queries);
        for (int query = 0; query < count; ++query) {
            const int32_t row = queries.row(query), position = pieces_.position_of(row, queries.piece);
            const float* from = qkv_ + row * qkv_stride_ + queries.head(query) * shape_.head_dim;
            for (int dim = 0; dim < shape_.head_dim; ++dim) set(space.query(query)[dim], from[dim]);
            space.first_visible[query] = pieces_.first_visible(position);
            space.last[query] = position;
            space.most[query] = -std::numeric_limits<float>::infinity();
            store(space.sums_of(query), Floats{});
        }
        std::memset(space.weighted, 0, count * space.padded_dim * sizeof(float));
        // What a word reads beside the tile is weighted by 0.
        for (int row = 0; row < ROWS; ++row) {
            set(space.weights_of(row)[-1], 0);
            set(space.weights_of(row)[TILE], 0);
        }
        Part parts[TILE];
        for (int32_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
            const Range range{std::max(begin, tile), std::min(end, tile + TILE)};
            const bool last = tile + TILE >= end;
            const Range coming = last ? positions_of(next) : Range{tile + TILE, end};
            const int found = find_parts(queries, range, last ? next : queries, coming, parts);
            // A pass at a time, so that scores and weights stay in the first cache, as the tile does between passes.
            by_tiles<ROWS>(count, [&](int first, auto rows) {
                constexpr int N = decltype(rows)::value;
                for (const Part* part = parts; part < parts + found; ++part) score_pass<N>(space, first, tile, *part);
                for (int row = 0; row < N; ++row) soften(space, first + row, row, tile);
                weigh_pass<N>(space, first, tile, range, parts, found);
            });
        }
        for (int query = 0; query < count; ++query) {
            float* to = attended_ + queries.row(query) * attended_stride_ + queries.head(query) * shape_.head_dim;
            const float *from = space.weighted_of(query), sum = sum_of_lanes(load(space.sums_of(query)));
            for (int dim = 0; dim < shape_.head_dim; ++dim) to[dim] = from[dim] / sum;
        }
    }

private:
    using Operand = typename Cached<Value>::Operand;

    /// The positions that any of the queries sees.
    Range positions_of(const Queries& queries) const {
        const int32_t position = pieces_.position_of(queries.first_row, queries.piece);
        return {pieces_.first_visible(position), position + queries.rows};
    }

    /// The parts of a range within a tile, and how many there are. Their `ahead` leads to `next`'s positions `coming`.
    int find_parts(const Queries& queries, Range range, const Queries& next, Range coming, Part* parts) const {
        const int32_t size = pieces_.plan.block, coming_tile = coming.low / TILE * TILE;
        int count = 0;
        for (int32_t low = range.low; low < range.high; low = parts[count++].range.high) {
            const int32_t start = low / size * size, block = pieces_.block_of(queries.piece, low);
            // The next block would be too late to ask for, since its keys are wanted at once: the next tile's is.
            const int32_t position = std::clamp(coming_tile + low % TILE, coming.low, coming.high - 1);
            const int32_t then = pieces_.block_of(next.piece, position);
            const Value* keys = layout_.keys(cache_, block, queries.kv_head);
            const Value* values = layout_.values(cache_, block, queries.kv_head);
            parts[count] = {{low, std::min(range.high, start + size)}, start, reinterpret_cast<const uint32_t*>(keys),
                            reinterpret_cast<const uint32_t*>(values),
                            (layout_.keys(cache_, then, next.kv_head) - keys) / PER_WORD<Value>};
        }
        return count;
    }

    /// Raw scores of a part. A vector may run over the end of a block or of what is seen; what it leaves there is
    /// overwritten by the next block's or left out by `soften`.
    template <int N>
    void score_pass(const Workspace<Value>& space, int first, int32_t tile, const Part& part) const {
        const int vectors = (part.range.high - part.range.low + WIDTH - 1) / WIDTH;
        const Operand* queries[N];
        for (int row = 0; row < N; ++row) queries[row] = space.query(first + row);
        by_vectors<span_of(N)>(vectors, [&](int vector, auto several) {
            const int place = part.range.low - part.start + vector * WIDTH;
            float* scores[N];
            for (int row = 0; row < N; ++row) scores[row] = space.scores_of(row) + part.start - tile + place;
            score<Value, N, decltype(several)::value>(scores, queries, part.keys + place, layout_.places,
                                                      shape_.head_dim, first ? 0 : part.ahead);
        });
    }

    template <int N>
    void weigh_pass(const Workspace<Value>& space, int first, int32_t tile, Range range, const Part* parts,
                    int count) const {
        by_sight<N>(space, first, range, [&](int query, auto several, Range seen) {
            constexpr int M = decltype(several)::value;
            const Operand* weights[M];
            for (int row = 0; row < M; ++row) weights[row] = space.weights_of(query - first + row);
            by_vectors<span_of(M)>(int(layout_.padded_dim / WIDTH), [&](int vector, auto vectors) {
                float* sums[M];
                for (int row = 0; row < M; ++row) sums[row] = space.weighted_of(query + row) + vector * WIDTH;
                weigh<Value, M, decltype(vectors)::value>(sums, weights, tile, parts, count, vector * WIDTH,
                                                          layout_.padded_dim, seen, query == 0);
            });
        });
    }

    /// body(first query, how many, positions) for what N queries see of a range: what all of them do together, and what
    /// only some do, before and after that, one by one. A query's positions come in order, and no word of values is
    /// cut: the two products of a word make other bits one after the other.
    template <int N, class Body>
    void by_sight(const Workspace<Value>& space, int query, Range range, Body&& body) const {
        const auto seen_by = [&](int row) {
            return Range{space.first_visible[query + row], space.last[query + row] + 1};
        };
        Range shared = range;
        for (int row = 0; row < N; ++row) shared = shared.within(seen_by(row));
        shared = {shared.low + in_word(shared.low), shared.high - in_word(shared.high)};
        const auto alone = [&](Range part) {
            for (int row = 0; row < N; ++row) {
                const Range seen = part.within(seen_by(row));
                if (!seen.empty()) body(query + row, std::integral_constant<int, 1>(), seen);
            }
        };
        if (shared.empty()) return alone(range);
        alone({range.low, shared.low});
        body(query, std::integral_constant<int, N>(), shared);
        alone({shared.high, range.high});
    }

    /// Which place of a word of values a position has.
    int32_t in_word(int32_t position) const { return position % pieces_.plan.block % PER_WORD<Value>; }

    /// Turn a query's scores of a tile, those of `row`, into weights e^(score - most); what it does not see is too
    /// small for the sum, and left out when values are weighed.
    void soften(const Workspace<Value>& space, int query, int row, int32_t tile) const {
        const int32_t low = space.first_visible[query] - tile, high = space.last[query] + 1 - tile;
        if (low >= TILE || high <= 0) return;
        const Floats hidden = all(-std::numeric_limits<float>::infinity());
        Floats scores[TILE / WIDTH], most = hidden;
        for (int vector = 0; vector < TILE / WIDTH; ++vector)
            scores[vector] = load(space.scores_of(row) + vector * WIDTH);
        if (low > 0 || high < TILE)
            for (int vector = 0; vector < TILE / WIDTH; ++vector) {
                const Ints place = lane_numbers() + vector * WIDTH;
                scores[vector] = (place >= low) & (place < high) ? scores[vector] : hidden;
            }
        for (int vector = 0; vector < TILE / WIDTH; ++vector) most = larger(most, scores[vector]);
        Floats sum = load(space.sums_of(query));
        if (any_larger(most, space.most[query])) {
            const float before = space.most[query], now = largest_lane(most);
            const float shrink = exponential((before - now) * scale_);
            float* weighted = space.weighted_of(query);
            for (int64_t dim = 0; dim < space.padded_dim; dim += WIDTH)
                store(weighted + dim, load(weighted + dim) * shrink);
            sum *= shrink;
            space.most[query] = now;
        }
        store(space.sums_of(query), sum + exponentials(space.weights_of(row), scores, space.most[query]));
    }

    /// Weights e^(scale x (score - most)), and what they add to each lane's sum.
    Floats exponentials(float* weights, const Floats (&scores)[TILE / WIDTH], float most) const {
        Floats sum{};
        for (int vector = 0; vector < TILE / WIDTH; ++vector) {
            const Floats weight = exponential((scores[vector] - most) * scale_);
            store(weights + vector * WIDTH, weight);
            sum += weight;
        }
        return sum;
    }

#if defined(__AVX512BF16__)
    /// The same in bfloat16. The sum is of the rounded weights.
    Floats exponentials(bfloat16* weights, const Floats (&scores)[TILE / WIDTH], float most) const {
        constexpr float LOG2_E = 1.44269504f;
        const Floats factor = all(scale_ * LOG2_E), offset = all(-most * scale_ * LOG2_E);
        const auto ones = same_bits<__m512bh>(Words{} + 0x3f803f80u);
        __m512 sum{};
        for (int vector = 0; vector < TILE / WIDTH; vector += 2) {
            const Floats first = rough_power_of_two(fma(scores[vector], factor, offset));
            const Floats second = rough_power_of_two(fma(scores[vector + 1], factor, offset));
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
            std::memcpy(weights + vector * WIDTH, &both, sizeof both);
            sum = _mm512_dpbf16_ps(sum, both, ones);
        }
        return (Floats)sum;
    }
#endif

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
