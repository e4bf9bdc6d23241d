// Products of some rows with a packed matrix: in units of one panel and up to UNIT_ROWS rows, for a team to share.
#pragma once

#include <algorithm>

#include "amx.hpp"
#include "groups.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace tramontane {

/// Whether products are made by AMX, which takes rows that are neighbours, PASS_ROWS of them at a time.
#if defined(__AMX_BF16__)
template <class Weights>
constexpr bool BY_TILES = std::is_same_v<Weights, BFloat16>;
constexpr int PASS_ROWS = 2 * TILE_ROWS;
#else
template <class Weights>
constexpr bool BY_TILES = false;
constexpr int PASS_ROWS = ROWS;
#endif

/// Rows of one unit of work at most: a multiple of PASS_ROWS, as `Rows::unit` rounds up to one. Their sums, UNIT_ROWS x
/// COLUMNS, stay in the second cache.
constexpr int UNIT_ROWS = 192 / PASS_ROWS * PASS_ROWS;

/// Words that a single tile fetches ahead of what it computes: what memory delivers in its time to answer.
constexpr int AHEAD = 48;

inline int panels_of(const Matrix& matrix) { return (matrix.outputs + COLUMNS - 1) / COLUMNS; }

template <class Weights>
int64_t words_of(int64_t inputs) { return (inputs + Weights::PER_WORD - 1) / Weights::PER_WORD; }

/// The words of a panel.
template <class Weights>
int64_t panel_words(int64_t inputs) {
    if constexpr (Weights::KIND == WEIGHTS_INT8)
        return group_panel_words(inputs);
    else
        return words_of<Weights>(inputs) * COLUMNS;
}

template <class Weights>
const uint32_t* panel_of(const Matrix& matrix, int number) {
    return static_cast<const uint32_t*>(matrix.panels) + number * panel_words<Weights>(matrix.inputs);
}

/// Rows as a product takes them, each padded to whole panels.
template <class Weights>
struct Operands {
    /// Whether HALF inputs of a row can be put in their place by themselves.
    static constexpr bool BY_PARTS = true;

    typename Weights::Operand* values;
    int64_t inputs, stride;

    Operands(Arena& arena, int64_t rows, int64_t inputs)
        : inputs(inputs), stride(rounded_up(inputs, COLUMNS)) {
        // AMX reads whole passes, beyond the last row too.
        values = arena.take<typename Weights::Operand>((rows + (BY_TILES<Weights> ? PASS_ROWS : 0)) * stride);
    }

    void prepare(int64_t row, const float* from) const {
        typename Weights::Operand* operand = values + row * stride;
        std::memset(operand + inputs, 0, (stride - inputs) * sizeof *operand);
        Weights::prepare(operand, from, inputs);
    }

    /// Those behind a row's last are 0.
    void put(int64_t row, int64_t input, const Floats (&some)[HALF_VECTORS]) const {
        for (int vector = 0; vector < HALF_VECTORS; ++vector)
            Weights::prepare(values + row * stride + input + vector * WIDTH,
                             reinterpret_cast<const float*>(&some[vector]), WIDTH);
    }
};

/// The same in groups.
template <>
struct Operands<Int8> {
    static constexpr bool BY_PARTS = HALF == GROUP;

    RowGroup* groups;
    int64_t inputs, stride;

    Operands(Arena& arena, int64_t rows, int64_t inputs)
        : groups(arena.take<RowGroup>(rows * groups_of(inputs))), inputs(inputs), stride(groups_of(inputs)) {}

    void prepare(int64_t row, const float* from) const {
        for (int64_t number = 0; number < stride; ++number) {
            Floats values[GROUP_VECTORS];
            Int8::load_group(values, from, number, inputs);
            Int8::prepare(groups[row * stride + number], values);
        }
    }

    void put(int64_t row, int64_t input, const Floats (&some)[GROUP_VECTORS]) const {
        Int8::prepare(groups[row * stride + input / GROUP], some);
    }
};

/// Some rows among operands: those of `numbers`, or from `first` on; for AMX without numbers.
struct Rows {
    const int32_t* numbers;
    int32_t first, count;

    int32_t operator[](int index) const { return numbers ? numbers[first + index] : first + index; }
    int units() const { return (count + UNIT_ROWS - 1) / UNIT_ROWS; }
    Rows unit(int index) const {
        const int size = int(rounded_up((count + units() - 1) / units(), PASS_ROWS)), begin = index * size;
        return {numbers, first + begin, std::min(size, count - begin)};
    }
};

/// A panel's products with so few rows that one tile takes it whole: it is read from memory once, every line of it
/// AHEAD of its use, and at the end the next panel's beginning.
template <class Weights, int N>
void stream_panel(typename Weights::Sums (*sums)[VECTORS], const uint32_t* panel, int64_t words, const auto& operands,
                  const Rows& rows, const uint32_t* next) {
    const int64_t ahead = std::min<int64_t>(words, AHEAD), most = words - ahead;
    const typename Weights::Operand *begin[N], *end[N];
    for (int row = 0; row < N; ++row) {
        begin[row] = operands.values + rows[row] * operands.stride;
        end[row] = begin[row] + most * Weights::PER_WORD;
    }
    const auto work = [&](const uint32_t* from, const auto& inputs, int64_t count, const uint32_t* coming) {
        tile<Weights, N, VECTORS, STEP_BYTES / LINE>(*sums, from, inputs, count,
                                                     {reinterpret_cast<const char*>(coming), STEP_BYTES});
    };
    work(panel, begin, most, panel + ahead * COLUMNS);
    work(panel + most * COLUMNS, end, ahead, next);
}

/// Add the products of a panel's next `count` words with the rows' inputs from `input` on to all rows' sums. Meanwhile
/// fetch `coming` words from `next` on: every tile its share of them, so that memory is read as long as rows compute.
template <class Weights>
void add_words(typename Weights::Sums (*sums)[VECTORS], const uint32_t* words, const auto& operands, const Rows& rows,
               int64_t input, int64_t count, const uint32_t* next, int64_t coming) {
    const int64_t passes = (rows.count + ROWS - 1) / ROWS * (VECTORS / span_of(ROWS));
    Fetch fetch{reinterpret_cast<const char*>(next), (coming * STEP_BYTES + passes * count - 1) / (passes * count)};
    by_tiles<ROWS>(rows.count, [&](int first, auto tile_rows) {
        // Two passes or more share what comes.
        constexpr int N = decltype(tile_rows)::value, SPAN = span_of(N), LINES = STEP_BYTES / LINE / 2;
        const typename Weights::Operand* inputs[N];
        for (int row = 0; row < N; ++row) inputs[row] = operands.values + rows[first + row] * operands.stride + input;
        for (int vector = 0; vector < VECTORS; vector += SPAN, fetch.place += fetch.step * count)
            tile<Weights, N, SPAN, LINES>(sums[first] + vector, words + vector * WIDTH, inputs, count, fetch);
    });
}

/// Add the products of a panel of words to all rows' sums.
template <class Weights>
void add_panel(typename Weights::Sums (*sums)[VECTORS], const uint32_t* panel, int64_t words,
               const Operands<Weights>& operands, const Rows& rows, const uint32_t* next) {
    if constexpr (BY_TILES<Weights>)
        return add_panel_by_tiles(sums, panel, words, {operands.values + rows.first * operands.stride, operands.stride},
                                  rows.count, next);
    if (rows.count <= WHOLE_ROWS)
        return with_constant<WHOLE_ROWS>(rows.count, [&](auto tile_rows) {
            stream_panel<Weights, decltype(tile_rows)::value>(sums, panel, words, operands, rows, next);
        });
    const int64_t depth = rows.count <= FEW_ROWS ? FEW_DEPTH : DEPTH;
    for (int64_t word = 0; word < words; word += depth) {
        const uint32_t* some = panel + word * COLUMNS;
        const int64_t count = std::min(words - word, depth), after = words - word - count;
        add_words<Weights>(sums, some, operands, rows, word * Weights::PER_WORD, count,
                           after ? some + count * COLUMNS : next, std::min(after ? after : words, depth));
    }
}

/// The same of a panel in groups.
inline void add_panel(Floats (*sums)[VECTORS], const GroupPanel& panel, const Operands<Int8>& operands, const Rows& rows,
                      const uint32_t* next) {
    const auto groups = [&](int row) { return operands.groups + rows[row] * operands.stride; };
    if (rows.count <= GROUP_ROWS)
        with_constant<GROUP_ROWS>(rows.count, [&](auto tile_rows) {
            constexpr int N = decltype(tile_rows)::value;
            const RowGroup* of_row[N];
            for (int row = 0; row < N; ++row) of_row[row] = groups(row);
            stream_groups<N>(sums, panel, of_row, next);
        });
    else
        add_groups(sums, panel, rows.count, next, groups);
    for (int row = 0; row < rows.count; ++row)
        for (int vector = 0; vector < VECTORS; ++vector) sums[row][vector] *= load(panel.units() + vector * WIDTH);
}

/// One panel's outputs of at most UNIT_ROWS rows: `finish(index in rows, values)` takes each row's COLUMNS values.
/// `next` is where the panel begins that this thread is likely to work on next.
template <class Weights, class Finish>
void panel_product(const Matrix& matrix, int number, const Operands<Weights>& operands, const Rows& rows,
                   const uint32_t* next, Finish&& finish) {
    alignas(64) Floats sums[UNIT_ROWS][VECTORS];
    std::memset(sums, 0, rows.count * sizeof sums[0]);
    const uint32_t* panel = panel_of<Weights>(matrix, number);
    if constexpr (Weights::KIND == WEIGHTS_INT8)
        add_panel(sums, GroupPanel(panel, matrix.inputs), operands, rows, next);
    else
        add_panel<Weights>(sums, panel, words_of<Weights>(matrix.inputs), operands, rows, next);
    for (int row = 0; row < rows.count; ++row) finish(row, sums[row]);
}

/// All outputs of all rows, shared by the team: `finish(row, first output, values)`.
template <class Weights, class Finish>
void product(Team& team, const Matrix& matrix, const Operands<Weights>& operands, int32_t rows, Finish&& finish) {
    const Rows every{nullptr, 0, rows};
    const int panels = panels_of(matrix), units = panels * every.units();
    team.share(units, [&](int unit) {
        const int panel = unit % panels, next = team.likely_next(unit, units) % panels;
        const Rows some = every.unit(unit / panels);
        panel_product<Weights>(matrix, panel, operands, some, panel_of<Weights>(matrix, next),
                               [&](int index, const Floats(&values)[VECTORS]) {
                                   finish(some[index], panel * COLUMNS, values);
                               });
    });
}

/// x / root mean square(x) x weight
inline void norm(float* to, const float* from, const float* weight, int32_t dim, float eps) {
    Floats squares{};
    for (int32_t place = 0; place < dim; place += WIDTH) {
        const Floats some = load_within(from, place, dim);
        squares = fma(some, some, squares);
    }
    const Floats scale = all(1.0f / std::sqrt(sum_of_lanes(squares) / float(dim) + eps));
    for (int32_t place = 0; place < dim; place += WIDTH)
        store_within(to, place, dim, load_within(from, place, dim) * scale * load_within(weight, place, dim));
}

}  // namespace tramontane
