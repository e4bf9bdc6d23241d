// Choosing the next token of rows of logits, and scoring given ones. `stages/sampler.py` states the order of the
// filters and is what this is tested against.
//
// A row is one thread's: sums run over the ids in the same order whoever computes them, in float64, so that a token far
// behind the decimals of float32 keeps its share.
//
// Ranking a whole vocabulary costs many times what the draw costs. Ids are counted into BUCKETS of equal width in
// logits instead; only those of the bucket in which top-k or top-p end are ranked.
#pragma once

#include <algorithm>
#include <limits>

#include "interface.h"
#include "team.hpp"
#include "vectors.hpp"

namespace tramontane {

constexpr int BUCKETS = 1024;

/// Ids whose probabilities are added up together before the draw looks for its id among them.
constexpr int STRETCH = 256;

/// Logits this far below the largest have no weight: e^-87 is float32's smallest.
constexpr float FARTHEST = 87.0f;

constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef double Doubles __attribute__((vector_size(8 * WIDTH)));

/// The largest number of a row, and the first place that holds it.
struct Peak {
    float most = NONE;
    int32_t place = 0;

    Peak(const float* row, int32_t ids) {
        Floats largest = all(NONE);
        Ints places{}, here = lane_numbers();
        int32_t id = 0;
        for (; id + WIDTH <= ids; id += WIDTH, here += WIDTH) {
            const Floats values = load(row + id);
            const Ints above = values > largest;
            largest = above ? values : largest;
            places = above ? here : places;
        }
        for (int lane = 0; lane < WIDTH; ++lane) take(largest[lane], places[lane]);
        for (; id < ids; ++id) take(row[id], id);
    }

private:
    void take(float value, int32_t at) {
        if (value > most || (value == most && at < place)) most = value, place = at;
    }
};

inline bool all_finite(const float* row, int32_t ids) {
    const Floats infinity = all(std::numeric_limits<float>::infinity());
    Ints finite = ~Ints{};
    int32_t id = 0;
    for (; id + WIDTH <= ids; id += WIDTH) finite &= magnitude(load(row + id)) < infinity;
    bool every = true;
    for (int lane = 0; lane < WIDTH; ++lane) every &= finite[lane] != 0;
    for (; id < ids; ++id) every &= std::isfinite(row[id]);
    return every;
}

/// The sum of a function of the numbers of a row. `weight` takes and gives vectors.
template <class Weight>
inline double sum_over(const float* row, int32_t ids, Weight&& weight) {
    Doubles sums{};
    int32_t id = 0;
    for (; id + WIDTH <= ids; id += WIDTH) sums += __builtin_convertvector(weight(load(row + id)), Doubles);
    double sum = 0;
    for (int lane = 0; lane < WIDTH; ++lane) sum += sums[lane];
    if (id < ids) {
        const Floats last = weight(load_within(row, id, ids));
        for (int lane = 0; lane < ids - id; ++lane) sum += last[lane];
    }
    return sum;
}

/// Natural logarithm of the sum of e^logit, given the largest logit.
inline double log_sum(const float* logits, int32_t ids, float most) {
    return most + std::log(sum_over(logits, ids, [&](Floats values) { return exponential(values - most); }));
}

/// How one row is sampled.
struct Choice {
    float temperature, top_p, min_p;
    int32_t top_k;
    double noise;

    bool ranks(int32_t ids) const { return (top_k > 0 && top_k < ids) || top_p < 1; }
};

/// One thread's memory for drawing from a row.
struct Urn {
    float *scaled, *weight;     // logits less the largest, over the temperature; e^that. [ids], and a vector's room
    int32_t *bucket, *ranked;   // each id's bucket; ids of one bucket. [ids], and a vector's room
    int32_t *count;             // ids of each bucket. [BUCKETS]
    double *mass;               // their weights. [BUCKETS]

    Urn(Arena& arena, int32_t ids)
        : scaled(arena.take<float>(ids + WIDTH)), weight(arena.take<float>(ids + WIDTH)),
          bucket(arena.take<int32_t>(ids + WIDTH)), ranked(arena.take<int32_t>(ids)),
          count(arena.take<int32_t>(BUCKETS)), mass(arena.take<double>(BUCKETS)) {}

    /// The id of a row of logits, minus infinity where an id is banned, whose largest is `most`.
    int32_t draw(const float* logits, int32_t ids, float most, const Choice& choice) const {
        const Floats temperature = all(choice.temperature), farthest = all(-FARTHEST);
        for (int32_t id = 0; id < ids; id += WIDTH) {
            const Floats below = (load_within(logits, id, ids) - most) / temperature;
            store(scaled + id, below);
            store(weight + id, below >= farthest ? exponential(below) : Floats{});
        }
        if (choice.ranks(ids)) drop_behind(last_kept(ids, choice), ids);
        if (choice.min_p > 0) drop([&](int32_t id) { return load(weight + id) < choice.min_p; }, ids);
        return pick(ids, choice.noise);
    }

private:
    static Floats itself(Floats values) { return values; }

    /// Whether an id comes before another: the likelier first, of equal ones the lower.
    bool before(int32_t one, int32_t other) const {
        return scaled[one] > scaled[other] || (scaled[one] == scaled[other] && one < other);
    }

    /// The last id that top-k and top-p leave; an id stays while those before it have not reached p.
    int32_t last_kept(int32_t ids, const Choice& choice) const {
        const int64_t most = choice.top_k > 0 ? choice.top_k : ids;
        const double enough = choice.top_p < 1 ? choice.top_p * sum_over(weight, ids, itself)
                                               : std::numeric_limits<double>::infinity();
        Floats lowest{};
        for (int32_t id = 0; id < ids; id += WIDTH) lowest = smaller(lowest, load(scaled + id));
        const float span = std::min(largest_lane(magnitude(lowest)), FARTHEST);
        const float per_unit = std::min((BUCKETS - 1) / span, std::numeric_limits<float>::max());
        for (int32_t id = 0; id < ids; id += WIDTH) {
            const Floats below = smaller(-load(scaled + id), all(span));
            const Ints number = __builtin_convertvector(below * per_unit, Ints);
            std::memcpy(bucket + id, &number, sizeof number);
        }
        std::fill(count, count + BUCKETS, 0);
        std::fill(mass, mass + BUCKETS, 0.0);
        for (int32_t id = 0; id < ids; ++id) {
            ++count[bucket[id]];
            mass[bucket[id]] += weight[id];
        }
        int64_t kept = 0;
        double reached = 0;
        int32_t deepest = 0;  // the largest logit is in it, so it is not empty
        for (int32_t next; kept + count[deepest] < most && reached + mass[deepest] < enough &&
                           (next = filled_after(deepest)) < BUCKETS; deepest = next) {
            kept += count[deepest];
            reached += mass[deepest];
        }
        int32_t size = 0;
        for (int32_t id = 0; id < ids; ++id)
            if (bucket[id] == deepest) ranked[size++] = id;
        std::sort(ranked, ranked + size, [&](int32_t one, int32_t other) { return before(one, other); });
        int32_t rank = 0;
        while (rank < size - 1 && ++kept < most && (reached += weight[ranked[rank]]) < enough) ++rank;
        return ranked[rank];
    }

    int32_t filled_after(int32_t number) const {
        do ++number;
        while (number < BUCKETS && !count[number]);
        return number;
    }

    void drop_behind(int32_t last, int32_t ids) const {
        const Floats cut = all(scaled[last]);
        drop([&](int32_t id) {
            const Floats value = load(scaled + id);
            return (value < cut) | ((value == cut) & (lane_numbers() + id > last));
        }, ids);
    }

    /// Take the weights of ids away for which `which(id)`, a vector of ids, says so.
    template <class Which>
    void drop(Which&& which, int32_t ids) const {
        for (int32_t id = 0; id < ids; id += WIDTH) store(weight + id, which(id) ? Floats{} : load(weight + id));
    }

    /// The first id at which the running sum of the weights passes its share `noise` of the whole.
    int32_t pick(int32_t ids, double noise) const {
        const auto stretch = [&](int32_t first) { return std::min(STRETCH, ids - first); };
        const auto sum_of = [&](int32_t first) { return sum_over(weight + first, stretch(first), itself); };
        double total = 0;
        for (int32_t first = 0; first < ids; first += STRETCH) total += sum_of(first);
        const double target = noise * total;
        double passed = 0;
        int32_t last = 0;
        for (int32_t first = 0; first < ids; first += STRETCH) {
            const double sum = sum_of(first);
            if (passed + sum > target) {
                double running = passed;
                for (int32_t id = first; id < first + stretch(first); ++id) {
                    if (weight[id] == 0) continue;  // taken away: whatever rounding does to the sums, it is not drawn
                    running += weight[id];
                    last = id;
                    if (running > target) return id;
                }
            }
            passed += sum;
        }
        return last;  // rounding alone kept the sum from passing the target
    }
};

/// Choose a row's token; `allowed` is memory for its logits. [ids]
inline void sample_row(const Sampling& sampling, int32_t row, int32_t first_banned, const float* logits, const Urn& urn,
                       float* allowed, const Sampled& to) {
    const int32_t ids = sampling.ids, vocabulary = sampling.vocabulary;
    to.token[row] = 0, to.log_probability[row] = 0, to.finite[row] = 0;
    if (!all_finite(logits, vocabulary)) return;
    Peak best(logits, ids);
    const float most = ids == vocabulary ? best.most : Peak(logits, vocabulary).most;
    const float* from = logits;
    if (sampling.banned_count[row]) {
        std::memcpy(allowed, logits, ids * sizeof(float));
        for (int32_t index = first_banned; index < first_banned + sampling.banned_count[row]; ++index)
            if (sampling.banned[index] < ids) allowed[sampling.banned[index]] = NONE;
        from = allowed;
        best = Peak(allowed, ids);
        if (best.most == NONE) return;
    }
    int32_t token = best.place;
    if (sampling.temperature[row] > 0)
        token = urn.draw(from, ids, best.most,
                         {sampling.temperature[row], sampling.top_p[row], sampling.min_p[row], sampling.top_k[row],
                          sampling.noise[row]});
    to.token[row] = token;
    to.log_probability[row] = float(logits[token] - log_sum(logits, vocabulary, most));
    to.finite[row] = 1;
}

}  // namespace tramontane
