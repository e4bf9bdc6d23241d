// Panels of weights, and the tile: the innermost loop of every product. Attention shares its `step`.
//
// A matrix [outputs, inputs] lies in panels of COLUMNS outputs. Within a panel the inputs follow one another in words
// of 4 bytes: a word holds 1 float32 or 2 bfloat16 inputs of one output. (8 bits lie otherwise: groups.hpp.)
//
//                      output 0   output 1        output COLUMNS - 1
//     inputs 0 .. n-1  [word]     [word]    ...   [word]              one step of the tile reads such a row
//     inputs n .. 2n-1 [word]     [word]    ...   [word]
//     ...
//
// Outputs and inputs that fill no panel or word are padded with zeros.
//
// A tile is up to ROWS rows times one panel. Each of its sums stays in one lane of one register and runs over the
// inputs in order, so its bits depend on its own row and output alone: not on the rows beside it, nor on their number.
#pragma once

#include <type_traits>

#include "interface.h"
#include "vectors.hpp"

namespace tramontane {

/// Registers of a panel's width, and rows of a full tile.
constexpr int VECTORS = 4;
constexpr int COLUMNS = VECTORS * WIDTH;
#if defined(__AVX512F__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 5;
#endif

/// Rows of a tile that takes a panel whole. Each row and vector has a sum, and a register is needed for each vector of
/// weights, for an input and for a constant: AVX512 has 32 registers; AVX2 has 16, so that a tile of more rows takes a
/// panel half after half. (3 rows and whole panels had to fetch weights from memory and widen them anew for every 3
/// rows: 62 against 83 GFLOP/s in bfloat16, where the CPU's peak was 88.)
#if defined(__AVX512F__)
constexpr int WHOLE_ROWS = ROWS;
#else
constexpr int WHOLE_ROWS = 2;
#endif

/// Vectors of a panel that a tile of so many rows takes at once.
constexpr int span_of(int rows) { return rows > WHOLE_ROWS ? VECTORS / 2 : VECTORS; }

/// Rows of the next tile when so many are left: as even as can be, since a tile of one row waits for its own sums.
inline int tile_rows(int left, int most) {
    const int tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

/// Call body(std::integral_constant<int, value>) for a value of 1 .. MOST.
template <int MOST, class Body>
inline void with_constant(int value, Body&& body) {
    if constexpr (MOST > 1)
        if (value < MOST) return with_constant<MOST - 1>(value, body);
    body(std::integral_constant<int, MOST>());
}

/// Call body(first row, N) for tiles of at most MOST rows that cover `count` rows; N is a constant.
template <int MOST, class Body>
inline void by_tiles(int count, Body&& body) {
    for (int row = 0, rows; row < count; row += rows) {
        rows = tile_rows(count - row, MOST);
        with_constant<MOST>(rows, [&](auto constant) { body(row, constant); });
    }
}

/// Words of a panel that are computed for all rows before the next: 64 KiB, with AVX512 128. They come from the second
/// cache then, which is quick enough; fewer pieces mean that sums go to memory and back less often.
constexpr int DEPTH = 512;

/// The same for rows so few that reading bounds them, where they are more than one tile: memory is read steadily then,
/// not in bursts (43 against 46 GB/s of 49 for 8 rows in bfloat16 with AVX512, which AVX2 is too slow to notice).
#if defined(__AVX512F__)
constexpr int FEW_ROWS = 16, FEW_DEPTH = 64;
#else
constexpr int FEW_ROWS = 0, FEW_DEPTH = DEPTH;
#endif

/// A step of weights that multiply a word's inputs all at once.
template <class Weights, int N, int SPAN>
void step_by_words(typename Weights::Sums (&sums)[N][SPAN], const uint32_t* words,
                   const typename Weights::Operand* const (&rows)[N], int64_t word) {
    Words weights[SPAN];
    for (int vector = 0; vector < SPAN; ++vector) weights[vector] = load_bits<Words>(words + vector * WIDTH);
    for (int row = 0; row < N; ++row) {
        const Words inputs = Words{} + load_bits<uint32_t>(rows[row] + Weights::PER_WORD * word);
        for (int vector = 0; vector < SPAN; ++vector)
            sums[row][vector] = Weights::add_products(sums[row][vector], inputs, weights[vector]);
    }
}

struct Float32 {
    static constexpr int KIND = WEIGHTS_FLOAT32, PER_WORD = 1;
    using Operand = float;
    using Sums = Floats;

    template <int N, int SPAN>
    static void step(Sums (&sums)[N][SPAN], const uint32_t* words, const Operand* const (&rows)[N], int64_t word) {
        Floats weights[SPAN];
        for (int vector = 0; vector < SPAN; ++vector) weights[vector] = load_bits<Floats>(words + vector * WIDTH);
        for (int row = 0; row < N; ++row)
            for (int vector = 0; vector < SPAN; ++vector)
                sums[row][vector] = fma(all(rows[row][word]), weights[vector], sums[row][vector]);
    }

    static void prepare(Operand* operand, const float* row, int64_t inputs) {
        std::memcpy(operand, row, inputs * sizeof(float));
    }
};

struct BFloat16 {
    static constexpr int KIND = WEIGHTS_BFLOAT16, PER_WORD = 2;
    using Sums = Floats;
#if defined(__AVX512BF16__)
    // One instruction multiplies both inputs of a word and adds them.
    using Operand = bfloat16;

    static Floats add_products(Floats sums, Words inputs, Words weights) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, same_bits<__m512bh>(inputs), same_bits<__m512bh>(weights));
    }

    template <int N, int SPAN>
    static void step(Sums (&sums)[N][SPAN], const uint32_t* words, const Operand* const (&rows)[N], int64_t word) {
        step_by_words<BFloat16>(sums, words, rows, word);
    }
#else
    // A bfloat16 is the upper half of a float32: the two inputs of a word are widened one after the other.
    using Operand = float;

    template <int N, int SPAN>
    static void step(Sums (&sums)[N][SPAN], const uint32_t* words, const Operand* const (&rows)[N], int64_t word) {
        for (int number = 0; number < 2; ++number) {
            Floats weights[SPAN];
            for (int vector = 0; vector < SPAN; ++vector)
                weights[vector] = number_of(load_bits<Words>(words + vector * WIDTH), number);
            for (int row = 0; row < N; ++row)
                for (int vector = 0; vector < SPAN; ++vector)
                    sums[row][vector] = fma(all(rows[row][2 * word + number]), weights[vector], sums[row][vector]);
        }
    }
#endif

    static void prepare(Operand* operand, const float* row, int64_t inputs) {
        // Operands have room for whole vectors, which end with zeros.
        for (int64_t input = 0; input < inputs; input += WIDTH)
            store(operand + input, rounded_to_bfloat16(load_within(row, input, inputs)));
    }
};

/// Bytes of a line of the caches, and of what a step of the tile reads: a word of each of a panel's outputs.
constexpr int LINE = 64, STEP_BYTES = COLUMNS * 4;

/// Memory to bring into the caches meanwhile: from `place` on, `step` bytes further with each word.
struct Fetch {
    const char* place;
    int64_t step;
};

/// Add the products of `count` words to the sums of N rows, VECTORS apart, for SPAN of the panel's vectors. With each
/// word LINES lines are fetched.
template <class Weights, int N, int SPAN, int LINES>
inline void tile(typename Weights::Sums* sums, const uint32_t* words,
                 const typename Weights::Operand* const (&rows)[N], int64_t count, Fetch fetch) {
    // A local copy, so that the compiler keeps the sums in registers.
    typename Weights::Sums local[N][SPAN];
    for (int row = 0; row < N; ++row) std::memcpy(local[row], sums + row * VECTORS, sizeof local[row]);
    for (int64_t word = 0; word < count; ++word, words += COLUMNS) {
        for (int line = 0; line < LINES; ++line) __builtin_prefetch(fetch.place + line * LINE);
        // Half of a panel is read with gaps, which the CPU does not foresee.
        if constexpr (SPAN < VECTORS) __builtin_prefetch(words + 8 * COLUMNS);
        fetch.place += fetch.step;
        Weights::step(local, words, rows, word);
    }
    for (int row = 0; row < N; ++row) std::memcpy(sums + row * VECTORS, local[row], sizeof local[row]);
}

}  // namespace tramontane
