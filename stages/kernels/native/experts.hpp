// The second half of a block: norm, gate, the chosen experts (or the one FFN of a dense model), residual.
//
// A pair is a row and an expert that it chose: pair row x A + rank. Pairs are grouped by expert, so that an expert is
// one product over all of its rows; the results of a row are added up by rank, whatever order the experts worked in.
//
// A panel of the first product holds, side by side, COLUMNS / 2 outputs of the gate projection and the same outputs of
// the up projection, so that SiLU(gate) x up is made of one unit's registers.
#pragma once

#include "products.hpp"

namespace tramontane {

/// Pairs of a row and an expert, grouped by expert. Letters: P = T x A pairs, E experts.
///
/// Two rows that chose the experts [[2, 0], [0, 3]]:   begin = [0, 2, 2, 3, 4]   place = [2, 0, 1, 3]
/// Grouped, their rows are                             row = [0, 1, 0, 1]
struct Pairs {
    int32_t experts, chosen, rows;
    int32_t* expert;    // of each pair. [P]
    float* weight;      // of each pair. [P]
    int32_t* begin;     // where each expert's pairs begin. [E + 1]
    int32_t* place;     // of each pair among the grouped. [P]
    int32_t* row;       // of the grouped pairs. [P]

    Pairs(Arena& arena, int32_t rows, int32_t experts, int32_t chosen)
        : experts(experts), chosen(chosen), rows(rows), expert(arena.take<int32_t>(int64_t(rows) * chosen)),
          weight(arena.take<float>(int64_t(rows) * chosen)), begin(arena.take<int32_t>(experts + 1)),
          place(arena.take<int32_t>(int64_t(rows) * chosen)), row(arena.take<int32_t>(int64_t(rows) * chosen)) {}

    int32_t count() const { return rows * chosen; }

    /// The experts of the largest gate values, of equal ones the lower; weights are the softmax over the chosen.
    void choose(int32_t of_row, const float* gates) const {
        int32_t* experts_of_row = expert + of_row * chosen;
        float* weights = weight + of_row * chosen;
        for (int32_t rank = 0; rank < chosen; ++rank) {
            int32_t best = -1;
            for (int32_t candidate = 0; candidate < experts; ++candidate) {
                const bool taken = std::find(experts_of_row, experts_of_row + rank, candidate) != experts_of_row + rank;
                if (!taken && (best < 0 || gates[candidate] > gates[best])) best = candidate;
            }
            experts_of_row[rank] = best;
        }
        float sum = 0;
        for (int32_t rank = 0; rank < chosen; ++rank)
            sum += weights[rank] = exponential(gates[experts_of_row[rank]] - gates[experts_of_row[0]]);
        for (int32_t rank = 0; rank < chosen; ++rank) weights[rank] /= sum;
    }

    void group() const {
        std::fill(begin, begin + experts + 1, 0);
        for (int32_t number = 0; number < count(); ++number) ++begin[expert[number] + 1];
        for (int32_t number = 0; number < experts; ++number) begin[number + 1] += begin[number];
        for (int32_t number = 0; number < count(); ++number) {
            place[number] = begin[expert[number]]++;
            row[place[number]] = number / chosen;
        }
        // Each begin has moved on to the next one's.
        for (int32_t number = experts; number > 0; --number) begin[number] = begin[number - 1];
        begin[0] = 0;
    }
};

/// The memory that experts need for any layer of a shape and some rows.
template <class Weights>
struct ExpertsMemory {
    int64_t hidden_stride, outputs_stride;
    Pairs pairs;
    Operands<Weights> normed, hidden_operands;  // normed: of each row, or for AMX of each pair as they are grouped
    float *normed_rows, *gates, *hidden, *outputs;

    ExpertsMemory(Arena& arena, const Shape& shape, int32_t rows)
        : hidden_stride(rounded_up(shape.ffn_dim, HALF)), outputs_stride(rounded_up(shape.dim, COLUMNS)),
          pairs(arena, rows, std::max(1, shape.experts), shape.experts ? shape.experts_per_token : 1),
          normed(arena, BY_TILES<Weights> ? pairs.count() : rows, shape.dim), hidden_operands(arena, pairs.count(), shape.ffn_dim),
          normed_rows(arena.take<float>(int64_t(rows) * shape.dim)),
          gates(arena.take<float>(int64_t(rows) * pairs.experts)),
          hidden(Operands<Weights>::BY_PARTS ? nullptr : arena.take<float>(pairs.count() * hidden_stride)),
          outputs(arena.take<float>(pairs.count() * outputs_stride)) {}
};

/// One product of every expert with its own pairs. `inputs` are the operands' numbers in the order of the grouped
/// pairs, null where that is the operands' own; `finish(place of the pair in that order, panel, values)` takes the
/// results.
template <class Weights, class Finish>
void product_by_expert(Team& team, const Matrix* matrices, const Pairs& pairs, const Operands<Weights>& operands,
                       const int32_t* inputs, Finish&& finish) {
    struct Unit {
        int32_t expert;
        int panel;
        Rows rows;
    };
    const auto rows_of = [&](int32_t expert) {
        return Rows{inputs, pairs.begin[expert], pairs.begin[expert + 1] - pairs.begin[expert]};
    };
    const auto units_of = [&](int32_t expert) { return rows_of(expert).units() * panels_of(matrices[expert]); };
    const auto unit_of = [&](int number) {
        int32_t expert = 0;
        for (int units; number >= (units = units_of(expert)); ++expert) number -= units;
        const int panels = panels_of(matrices[expert]);
        return Unit{expert, number % panels, rows_of(expert).unit(number / panels)};
    };
    int units = 0;
    for (int32_t expert = 0; expert < pairs.experts; ++expert) units += units_of(expert);
    team.share(units, [&](int number) {
        const Unit unit = unit_of(number), next = unit_of(team.likely_next(number, units));
        panel_product<Weights>(matrices[unit.expert], unit.panel, operands, unit.rows,
                               panel_of<Weights>(matrices[next.expert], next.panel),
                               [&](int index, const Floats(&values)[VECTORS]) {
            finish(unit.rows.first + index, unit.panel, values);
        });
    });
}

/// A row's gate values [E], of the gate [E, D] and the row [D]: a few experts at once, since one would wait for its own
/// sum.
inline void gate_row(float* gates, const float* gate, int32_t experts, const float* row, int32_t dim) {
    by_tiles<4>(experts, [&](int first, auto some) {
        constexpr int N = decltype(some)::value;
        Floats sums[N]{};
        for (int32_t place = 0; place < dim; place += WIDTH)
            for (int expert = 0; expert < N; ++expert) {
                const float* weights = gate + int64_t(first + expert) * dim;
                sums[expert] = fma(load_within(row, place, dim), load_within(weights, place, dim), sums[expert]);
            }
        for (int expert = 0; expert < N; ++expert)
            gates[first + expert] = sum_of_lanes(sums[expert]);
    });
}

template <class Weights>
void experts(Team& team, const Shape& shape, const Layer& layer, int32_t rows,
             const ExpertsMemory<Weights>& memory, const float* from, float* to) {
    const int32_t dim = shape.dim;
    const Pairs& pairs = memory.pairs;
    team.share(
        rows,
        [&](int row) {
            float* normed = memory.normed_rows + int64_t(row) * dim;
            float* gates = memory.gates + int64_t(row) * pairs.experts;
            norm(normed, from + int64_t(row) * dim, layer.ffn_norm, dim, shape.norm_eps);
            if constexpr (!BY_TILES<Weights>) memory.normed.prepare(row, normed);
            if (layer.gate)
                gate_row(gates, layer.gate, pairs.experts, normed, dim);
            else
                gates[0] = 0;  // a dense model's one expert is chosen for all
            pairs.choose(row, gates);
        },
        [&] { pairs.group(); });
    if constexpr (BY_TILES<Weights>)
        team.share(pairs.count(), [&](int number) {
            memory.normed.prepare(number, memory.normed_rows + int64_t(pairs.row[number]) * dim);
        });
    product_by_expert(team, layer.gate_up, pairs, memory.normed, BY_TILES<Weights> ? nullptr : pairs.row,
                      [&](int32_t number, int panel, const Floats(&values)[VECTORS]) {
                          Floats hidden[HALF_VECTORS];
                          for (int vector = 0; vector < HALF_VECTORS; ++vector)
                              hidden[vector] = silu(values[vector]) * values[vector + HALF_VECTORS];
                          if constexpr (Operands<Weights>::BY_PARTS)
                              memory.hidden_operands.put(number, panel * HALF, hidden);
                          else
                              std::memcpy(memory.hidden + number * memory.hidden_stride + panel * HALF, hidden,
                                          sizeof hidden);
                      });
    if constexpr (!Operands<Weights>::BY_PARTS)
        team.share(pairs.count(), [&](int number) {
            memory.hidden_operands.prepare(number, memory.hidden + number * memory.hidden_stride);
        });
    product_by_expert(team, layer.down, pairs, memory.hidden_operands, nullptr,
                      [&](int32_t number, int panel, const Floats(&values)[VECTORS]) {
                          std::memcpy(memory.outputs + number * memory.outputs_stride + panel * COLUMNS, values,
                                      sizeof values);
                      });
    team.share(rows, [&](int row) {
        for (int32_t place = 0; place < dim; place += WIDTH) {
            Floats sum = load_within(from + int64_t(row) * dim, place, dim);
            for (int32_t pair = row * pairs.chosen; pair < (row + 1) * pairs.chosen; ++pair) {
                const float* outputs = memory.outputs + pairs.place[pair] * memory.outputs_stride;
                sum = fma(all(pairs.weight[pair]), load(outputs + place), sum);
            }
            store_within(to + int64_t(row) * dim, place, dim, sum);
        }
    });
}

}  // namespace tramontane
