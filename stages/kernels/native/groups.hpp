// Products in 8 bits: groups of 32 inputs whose whole numbers share a scale, in weights and in rows alike.
//
//     output = unit x sum over groups of (sum of products of whole numbers x the weights' scale x the row's scale)
//
// The inner sum is exact, whatever instructions make it. The outer one is float32 and runs over the groups in order, in
// one lane of one register. So a row's bits depend on its own row and output alone, and are the same on every CPU.
//
// A panel lies in two halves of HALF outputs, one behind the other, each group by group as it is read; behind both are
// the outputs' units:
//
//     a group    8 rows of HALF words: byte b of word w is 128 + the whole number of input 4 w + b, never negative
//                HALF scales in float16
//     a unit     float32, a power of two: the largest scale of the output lies in [1, 2) of it, so that float16 can
//                hold the others; NaN where a weight is not finite
//
// An instruction multiplies unsigned with signed bytes. Weights are the unsigned ones, so that what is added to them
// comes back as one number a group and *row*: 128 x the sum of the row's whole numbers, with which the sum begins. What
// else is added to a group's weights, a minimum as 4-bit formats have it, would cost as little. Blocks of GGUF's Q8_0
// (32 whole numbers and a float16) are such groups as they are, with a unit of 1.
//
// AMX would make a group's sums of 16 rows x 16 outputs at once, but they pass through memory on their way to float32:
// 256 rows of experts took 13.3 ms against 9.8 (Intel Xeon, 2 threads).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "tiles.hpp"

namespace tramontane {

/// Inputs that share a scale. With 64 a real model's KL to float32 was 1.8 times as large.
constexpr int GROUP = 32, GROUP_WORDS = GROUP / 4, GROUP_VECTORS = GROUP / WIDTH;

constexpr int HALF_VECTORS = VECTORS / 2, HALF = HALF_VECTORS * WIDTH;

/// Largest whole number of a weight or of a row.
constexpr int MOST = 127, SHIFT = 128;

/// Rows of a tile: each has two vectors of whole sums and two of float sums.
#if defined(__AVX512F__)
constexpr int GROUP_ROWS = 6;
#else
constexpr int GROUP_ROWS = 3;
#endif

/// Groups of a half panel that are computed for all rows before the next: they stay in the first cache. Fewer where
/// reading bounds, so that memory is read steadily.
constexpr int GROUP_DEPTH = 16, FEW_GROUP_DEPTH = 8;

/// Groups that are fetched ahead of what is computed: what memory delivers in its time to answer.
constexpr int GROUPS_AHEAD = 12;

/// A group of half a panel.
struct WeightGroup {
    uint32_t words[GROUP_WORDS][HALF];
    uint16_t scales[HALF];
};

/// A group of a row. `start` takes back what was added to the weights.
struct RowGroup {
    float scale;
    int32_t start;
    int8_t numbers[GROUP];
};

inline int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

/// Of float16 values that are finite and not negative.
inline Floats load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(from));
#else
    // The bits of a float32 2^112 times as small.
    const Words bits = __builtin_convertvector(load_bits<Shorts>(from), Words) << 13;
    return same_bits<Floats>(bits) * all(5192296858534827628530496329220096.0f);
#endif
}

/// The least float16 that is not below a value in 0 .. 2.
inline uint16_t to_half(float value) {
    if (value < 6.103515625e-5f) return uint16_t(std::ceil(value * 16777216.0f));  // in steps of 2^-24
    return uint16_t((same_bits<uint32_t>(value) - (112u << 23) + 0x1fffu) >> 13);
}

/// Whole numbers of -127 .. 127 on both sides.
struct Int8 {
    static constexpr int KIND = WEIGHTS_INT8;
    using Sums = Floats;

#if defined(__AVX512VNNI__)
    static Ints start_of(const RowGroup& row) { return Ints{} + row.start; }

    static Words decoded(Words weights) { return weights; }

    static Ints add_products(Ints sums, Words weights, Words inputs) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)inputs);
    }
#else
    // The sum of two products of unsigned and signed bytes has to fit 16 bits, so the weights are taken without what was
    // added, and their signs move over to the inputs: 2 x 127 x 127 does.
    static Ints start_of(const RowGroup&) { return Ints{}; }

    static Words decoded(Words weights) { return weights ^ 0x80808080u; }

    static Ints add_products(Ints sums, Words weights, Words inputs) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)weights),
                                                   _mm256_sign_epi8((__m256i)inputs, (__m256i)weights));
        return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#endif

    /// What a sum over a group is multiplied with.
    static float scale_of(float largest) { return largest / MOST; }

    /// The largest magnitude of some values; NaN if there is any. Magnitudes are ordered as their bits are, NaN last.
    template <int N>
    static float largest(const Floats (&values)[N]) {
        Ints most{};
        for (int vector = 0; vector < N; ++vector) {
            const Ints bits = same_bits<Ints>(magnitude(values[vector]));
            most = bits > most ? bits : most;
        }
        for (int step = WIDTH / 2; step; step /= 2) {
            const Ints others = __builtin_shuffle(most, lane_numbers() ^ step);
            most = others > most ? others : most;
        }
        return same_bits<float>(int32_t(most[0]));
    }

    /// The nearest whole numbers of values / scale, ties to even. Anything where the scale is not finite, which then
    /// makes what comes of them NaN.
    template <int N>
    static void quantise(int8_t* numbers, const Floats (&values)[N], float scale) {
        typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
        // Of values so small nothing is left in a sum.
        const Floats inverse = all(scale > 1e-37f ? 1 / scale : 0), shift = all(12582912.0f);
        for (int vector = 0; vector < N; ++vector) {
            // 1.5 x 2^23 leaves no bits for a fraction.
            const Ints whole = same_bits<Ints>(fma(values[vector], inverse, shift)) - same_bits<Ints>(shift);
            const Bytes bytes = __builtin_convertvector(whole, Bytes);
            std::memcpy(numbers + vector * WIDTH, &bytes, sizeof bytes);
        }
    }

    /// A group of a row's inputs, with zeros behind the last.
    static void load_group(Floats (&values)[GROUP_VECTORS], const float* row, int64_t number, int64_t inputs) {
        for (int vector = 0; vector < GROUP_VECTORS; ++vector) {
            const int64_t input = number * GROUP + vector * WIDTH;
            values[vector] = input < inputs ? load_within(row, input, inputs) : Floats{};
        }
    }

    static void prepare(RowGroup& group, const Floats (&values)[GROUP_VECTORS]) {
        group.scale = scale_of(largest(values));
        quantise(group.numbers, values, group.scale);
        // The sum of each eight bytes, SHIFT added to each.
        const __m256i shifted = load_bits<__m256i>(group.numbers) ^ _mm256_set1_epi8(char(SHIFT));
        typedef int64_t Eights __attribute__((vector_size(32)));
        const Eights sums = (Eights)_mm256_sad_epu8(shifted, __m256i{});
        group.start = -SHIFT * (int32_t(sums[0] + sums[1] + sums[2] + sums[3]) - SHIFT * GROUP);
    }
};

/// The words of a panel.
inline int64_t group_panel_words(int64_t inputs) {
    return groups_of(inputs) * int64_t(2 * sizeof(WeightGroup) / 4) + COLUMNS;
}

/// The groups of a panel's halves, one behind the other, and the outputs' units.
struct GroupPanel {
    const WeightGroup* groups;
    int64_t count;  // of a half

    GroupPanel(const uint32_t* words, int64_t inputs)
        : groups(reinterpret_cast<const WeightGroup*>(words)), count(groups_of(inputs)) {}

    const float* units() const { return reinterpret_cast<const float*>(groups + 2 * count); }
};

inline const char* address(const void* of) { return static_cast<const char*>(of); }

/// Add the products of some groups of half a panel to the sums of N rows, VECTORS apart. With each group LINES lines
/// are fetched.
template <int N, int LINES>
inline void tile_of_groups(Floats* sums, const WeightGroup* group, const RowGroup* const (&rows)[N], int64_t count,
                           Fetch fetch) {
    // A local copy, so that the compiler keeps the sums in registers.
    Floats local[N][HALF_VECTORS];
    for (int row = 0; row < N; ++row) std::memcpy(local[row], sums + row * VECTORS, sizeof local[row]);
    for (int64_t number = 0; number < count; ++number, ++group, fetch.place += fetch.step) {
        for (int line = 0; line < LINES; ++line) __builtin_prefetch(fetch.place + line * LINE);
        Ints whole[N][HALF_VECTORS];
        for (int row = 0; row < N; ++row)
            for (Ints& some : whole[row]) some = Int8::start_of(rows[row][number]);
#pragma GCC unroll 8
        for (int word = 0; word < GROUP_WORDS; ++word) {
            Words weights[HALF_VECTORS];
            for (int vector = 0; vector < HALF_VECTORS; ++vector)
                weights[vector] = Int8::decoded(load_bits<Words>(group->words[word] + vector * WIDTH));
            for (int row = 0; row < N; ++row) {
                const Words inputs = Words{} + load_bits<uint32_t>(rows[row][number].numbers + 4 * word);
                for (int vector = 0; vector < HALF_VECTORS; ++vector)
                    whole[row][vector] = Int8::add_products(whole[row][vector], weights[vector], inputs);
            }
        }
        for (int vector = 0; vector < HALF_VECTORS; ++vector) {
            const Floats scales = load_halves(group->scales + vector * WIDTH);
            for (int row = 0; row < N; ++row)
                local[row][vector] = fma(__builtin_convertvector(whole[row][vector], Floats) * scales,
                                         all(rows[row][number].scale), local[row][vector]);
        }
    }
    for (int row = 0; row < N; ++row) std::memcpy(sums + row * VECTORS, local[row], sizeof local[row]);
}

/// Add a panel's products with N rows, which one tile takes, to their sums: the panel is read from memory once, every
/// line of it GROUPS_AHEAD of its use, and at the end the next panel's beginning.
template <int N>
void stream_groups(Floats (*sums)[VECTORS], const GroupPanel& panel, const RowGroup* const (&rows)[N],
                   const uint32_t* next) {
    constexpr int64_t BYTES = sizeof(WeightGroup), LINES = (BYTES + LINE - 1) / LINE;
    const int64_t ahead = std::min<int64_t>(panel.count, GROUPS_AHEAD), most = panel.count - ahead;
    const RowGroup* end[N];
    for (int row = 0; row < N; ++row) end[row] = rows[row] + most;
    const auto *first = panel.groups, *second = first + panel.count;
    tile_of_groups<N, LINES>(sums[0], first, rows, panel.count, {address(first + ahead), BYTES});
    tile_of_groups<N, LINES>(sums[0] + HALF_VECTORS, second, rows, most, {address(second + ahead), BYTES});
    tile_of_groups<N, LINES>(sums[0] + HALF_VECTORS, second + most, end, ahead, {address(next), BYTES});
}

/// The same for any number of rows; `row(index)` are the groups of one. Some groups of a half are multiplied with all
/// rows, and meanwhile as many as come then are fetched, every tile its share of them.
template <class Row>
void add_groups(Floats (*sums)[VECTORS], const GroupPanel& panel, int count, const uint32_t* next, Row&& row) {
    constexpr int64_t BYTES = sizeof(WeightGroup), LINES = (BYTES / 2 + LINE - 1) / LINE;
    const int64_t depth = count <= FEW_ROWS ? FEW_GROUP_DEPTH : GROUP_DEPTH;
    const int64_t tiles = (count + GROUP_ROWS - 1) / GROUP_ROWS;
    for (int half = 0; half < 2; ++half)
        for (int64_t first = 0; first < panel.count; first += depth) {
            const int64_t some = std::min(panel.count - first, depth);
            const WeightGroup* groups = panel.groups + half * panel.count + first;
            const bool last = half && first + some == panel.count;
            Fetch fetch{last ? address(next) : address(groups + some), (BYTES + tiles - 1) / tiles};
            by_tiles<GROUP_ROWS>(count, [&](int number, auto tile_rows) {
                constexpr int N = decltype(tile_rows)::value;
                const RowGroup* rows[N];
                for (int index = 0; index < N; ++index) rows[index] = row(number + index) + first;
                tile_of_groups<N, LINES>(sums[number] + half * HALF_VECTORS, groups, rows, some, fetch);
                fetch.place += fetch.step * some;
            });
        }
}

/// Lay out a matrix whose output `number` is at row(number), null where it is padding.
template <class Row>
void pack_groups(int32_t outputs, int32_t inputs, Row&& row, uint32_t* to) {
    const int64_t groups = groups_of(inputs);
    for (int64_t output = 0; output < rounded_up(outputs, COLUMNS); ++output) {
        auto* panel = reinterpret_cast<WeightGroup*>(to + output / COLUMNS * group_panel_words(inputs));
        WeightGroup* half = panel + output % COLUMNS / HALF * groups;
        float& unit = reinterpret_cast<float*>(panel + 2 * groups)[output % COLUMNS];
        const float* from = row(output);
        Floats values[GROUP_VECTORS];
        float most = 0;
        for (int64_t number = 0; number < groups; ++number) {
            Int8::load_group(values, from, number, from ? inputs : 0);
            const float scale = Int8::scale_of(Int8::largest(values));
            most = most >= scale ? most : scale;  // NaN comes to stay
        }
        int exponent = 1;
        if (most > 0) std::frexp(most, &exponent);
        unit = std::isfinite(most) ? std::ldexp(1.0f, exponent - 1) : NAN;
        for (int64_t number = 0; number < groups; ++number) {
            WeightGroup& group = half[number];
            Int8::load_group(values, from, number, from ? inputs : 0);
            // Quantised by the scale as it is held, which is no less than the true one.
            uint16_t& scale = group.scales[output % HALF];
            scale = std::isfinite(most) ? to_half(Int8::scale_of(Int8::largest(values)) / unit) : 0;
            alignas(64) int8_t numbers[GROUP];
            Int8::quantise(numbers, values, load_halves(std::array<uint16_t, WIDTH>{scale}.data())[0] * unit);
            for (int input = 0; input < GROUP; ++input)
                reinterpret_cast<uint8_t*>(&group.words[input / 4][output % HALF])[input % 4] =
                    uint8_t(numbers[input] + SHIFT);
        }
    }
}

}  // namespace tramontane
