// A vector of floats as wide as the CPU's registers, and the few functions of it that the kernels are made of.
//
// The types are GCC's vector extensions, so + - * / < and ?: work lane by lane; every lane is computed
// in the same way, and what a lane holds never depends on its neighbours unless a name says so (`sum_of_lanes`).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace tramontane {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(2 * WIDTH)));

/// The upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

/// The same value in every lane.
inline Floats all(float value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(value);
#else
    return (Floats)_mm256_set1_ps(value);
#endif
}

template <class To, class From>
inline To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class Vector>
inline Vector load_bits(const void* from) {
    Vector bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }

/// Each as the upper half of a word, and back.
inline Words widened(Shorts halves) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16;
#else
    return __builtin_convertvector(halves, Words) << 16;
#endif
}
inline Shorts upper_halves(Words words) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_cvtepi32_epi16((__m512i)(words >> 16));
#else
    return __builtin_convertvector(words >> 16, Shorts);
#endif
}

inline Floats load(const bfloat16* from) { return same_bits<Floats>(widened(load_bits<Shorts>(from))); }

/// The vector at a place of a row, with zeros behind the row's end.
inline Floats load_within(const float* row, int64_t place, int64_t size) {
    if (place + WIDTH <= size) return load(row + place);
    Floats values{};
    std::memcpy(&values, row + place, (size - place) * sizeof(float));
    return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

/// The vector at a place of a row, but nothing behind the row's end.
inline void store_within(float* row, int64_t place, int64_t size, Floats values) {
    if (place + WIDTH <= size)
        store(row + place, values);
    else
        std::memcpy(row + place, &values, (size - place) * sizeof(float));
}

/// Of values that are bfloat16 already.
inline void store(bfloat16* to, Floats values) {
    const Shorts upper = upper_halves(same_bits<Words>(values));
    std::memcpy(to, &upper, sizeof upper);
}

/// Numbers of a type in a word of 4 bytes.
template <class Value>
constexpr int PER_WORD = 4 / sizeof(Value);

/// The bfloat16 0 or 1 of each word as float32: number 0 lies in the lower half.
inline Floats number_of(Words words, int number) {
    return same_bits<Floats>(number ? words & 0xffff0000u : words << 16);
}

/// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

/// The larger, or the smaller, of each pair; b where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}

/// Whether any lane is larger; NaN is not.
inline bool any_larger(Floats a, float than) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(than), _CMP_GT_OQ);
#else
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(than), _CMP_GT_OQ));
#endif
}

inline Floats magnitude(Floats a) { return same_bits<Floats>(same_bits<Words>(a) & 0x7fffffffu); }

/// 0, 1, 2, ..
inline Ints lane_numbers() {
    Ints numbers;
    for (int lane = 0; lane < WIDTH; ++lane) numbers[lane] = lane;
    return numbers;
}

/// The lanes in another order: lane i gets what lane i ^ `step` had.
inline Floats swapped(Floats values, int step) { return __builtin_shuffle(values, lane_numbers() ^ step); }

/// The sum of all lanes, by halves: lanes i and i + WIDTH / 2 first.
inline float sum_of_lanes(Floats values) {
    for (int step = WIDTH / 2; step; step /= 2) values += swapped(values, step);
    return values[0];
}

inline float largest_lane(Floats values) {
    for (int step = WIDTH / 2; step; step /= 2) values = larger(values, swapped(values, step));
    return values[0];
}

/// Each value rounded to the nearest bfloat16 (ties to even), still as float32. NaN stays NaN.
inline Floats rounded_to_bfloat16(Floats values) {
#if defined(__AVX512BF16__)
    return same_bits<Floats>(widened(same_bits<Shorts>(_mm512_cvtneps_pbh((__m512)values))));
#else
    const Words bits = same_bits<Words>(values);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return values == values ? same_bits<Floats>(rounded) : values;
#endif
}

inline bfloat16 to_bfloat16(float value) {
    uint32_t bits = same_bits<uint32_t>(value);
    if (value != value) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float to_float(bfloat16 value) { return same_bits<float>(uint32_t(value.bits) << 16); }

inline void widen(float* to, const bfloat16* from, int64_t count) {
    for (int64_t place = 0; place < count; ++place) to[place] = to_float(from[place]);
}

/// How keys and values, and what is multiplied with them, hold a number.
inline void set(float& place, float value) { place = value; }
inline void set(bfloat16& place, float value) { place = to_bfloat16(value); }

/// e^x within 2 units of the last place between -87 and 88, clamped beyond; NaN stays NaN, and e^0 is exactly 1.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial gives e^r, and n is added to the exponent's bits.
inline Floats exponential(Floats x) {
    const Floats clamped = smaller(larger(x, all(-87.3f)), all(88.3f));
    // Adding 1.5 x 2^23 leaves the nearest integer in the low bits of the sum.
    const Floats shift = all(12582912.0f);
    const Floats shifted = fma(clamped, all(1.44269504f), shift);
    const Floats n = shifted - shift;
    const Floats r = fma(n, all(1.42860677e-6f), fma(n, all(-0.693148613f), clamped));
    Floats sum = all(1.38888889e-3f);
    for (float coefficient : {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
        sum = fma(sum, r, all(coefficient));
    const Floats power = same_bits<Floats>(same_bits<Words>(sum) + (same_bits<Words>(shifted) << 23));
    return x == x ? power : x;
}

inline float exponential(float x) { return exponential(all(x))[0]; }

#if defined(__AVX512BF16__)
/// 2^x within one part in 13,000 for x <= 0, as good as bfloat16 can hold it; 0 of -infinity, NaN stays NaN.
inline Floats rough_power_of_two(Floats x) {
    const __m512 r = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    __m512 sum = _mm512_set1_ps(0.07802428f);
    for (float coefficient : {0.22606726f, 0.69583362f, 0.99992520f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
    return (Floats)_mm512_scalef_ps(sum, (__m512)x);  // by 2^floor(x)
}
#endif

/// x / (1 + e^-x)
inline Floats silu(Floats x) { return x / (all(1.0f) + exponential(-x)); }

constexpr int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace tramontane
