// Products by AMX: one instruction adds the products of 16 rows x 32 inputs with 32 inputs x 16 outputs to 16 x 16 sums.
//
// A panel's words lie as the instruction takes them: 16 words x WIDTH outputs, a word of 4 bytes holding 2 inputs. The
// sums of a row run over its inputs in order, 32 at a time, whatever is computed beside them; rows behind the last are
// computed with what lies there, and nobody looks at them.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>

#include "tiles.hpp"

namespace tramontane {

/// Rows of a tile of rows, words (of 2 inputs) of a tile of weights.
constexpr int TILE_ROWS = 16, TILE_WORDS = 16;

/// The shapes of the eight tiles: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights of so many words.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int words) {
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = tile == 4 || tile == 5 ? words * 4 : 64;
            rows[tile] = tile >= 6 ? words : TILE_ROWS;
        }
    }
};

/// The tiles belong to this thread while this lives.
class Tiles {
public:
    Tiles() { shape(TILE_WORDS); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

    /// Weights of so many words from here on; what the tiles hold is lost.
    void shape(int words) {
        const TileShapes shapes(words);
        asm volatile("" ::"r"(&shapes) : "memory");  // GCC thinks that the next line reads eight bytes of it
        _tile_loadconfig(&shapes);
    }
};

/// Memory to bring into the second cache meanwhile: so many lines with each step, from `place` on.
struct Lines {
    const char* place;
    int64_t a_step;

    void fetch() {
        for (int64_t line = 0; line < a_step; ++line, place += LINE) __builtin_prefetch(place, 0, 2);
    }
};

/// Operands of neighbouring rows.
struct TileRows {
    const bfloat16* values;
    int64_t stride;

    const bfloat16* at(int64_t row, int64_t word) const { return values + row * stride + 2 * word; }
    int64_t bytes() const { return stride * int64_t(sizeof(bfloat16)); }
};

/// Bytes from one row's sums to the next row's.
constexpr int SUMS_BYTES = VECTORS * sizeof(Floats);

/// Add to the sums of 16 rows the products with `steps` tiles of a whole panel's words.
inline void add_tiles_of_panel(Floats* sums, const uint32_t* words, const bfloat16* rows, int64_t row_bytes,
                               int64_t steps, Lines& lines) {
    _tile_loadd(0, sums + 0, SUMS_BYTES);
    _tile_loadd(1, sums + 1, SUMS_BYTES);
    _tile_loadd(2, sums + 2, SUMS_BYTES);
    _tile_loadd(3, sums + 3, SUMS_BYTES);
    for (; steps; --steps, rows += 2 * TILE_WORDS, words += TILE_WORDS * COLUMNS) {
        lines.fetch();
        _tile_loadd(4, rows, row_bytes);
        _tile_loadd(6, words, STEP_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, words + WIDTH, STEP_BYTES);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, words + 2 * WIDTH, STEP_BYTES);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, words + 3 * WIDTH, STEP_BYTES);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums + 0, SUMS_BYTES);
    _tile_stored(1, sums + 1, SUMS_BYTES);
    _tile_stored(2, sums + 2, SUMS_BYTES);
    _tile_stored(3, sums + 3, SUMS_BYTES);
}

/// The same for 32 rows and half of a panel: each tile that is loaded is multiplied twice.
inline void add_tiles_of_half(Floats* sums, const uint32_t* words, const bfloat16* rows, int64_t row_bytes,
                              int64_t steps, Lines& lines) {
    Floats* below = sums + TILE_ROWS * VECTORS;
    _tile_loadd(0, sums, SUMS_BYTES);
    _tile_loadd(1, sums + 1, SUMS_BYTES);
    _tile_loadd(2, below, SUMS_BYTES);
    _tile_loadd(3, below + 1, SUMS_BYTES);
    for (; steps; --steps, rows += 2 * TILE_WORDS, words += TILE_WORDS * COLUMNS) {
        lines.fetch();
        _tile_loadd(6, words, STEP_BYTES);
        _tile_loadd(4, rows, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, words + WIDTH, STEP_BYTES);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, reinterpret_cast<const char*>(rows) + TILE_ROWS * row_bytes, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, SUMS_BYTES);
    _tile_stored(1, sums + 1, SUMS_BYTES);
    _tile_stored(2, below, SUMS_BYTES);
    _tile_stored(3, below + 1, SUMS_BYTES);
}

/// Words of a panel that are multiplied with all rows before the next: half of them, for many rows, or all of them, for
/// few, stay in the first cache.
constexpr int64_t DEEP = 256, SHALLOW = 64;

/// Add a panel's products with `count` rows to their sums. What is wanted next, the panel's own words and at its end
/// those from `next` on, is fetched meanwhile.
inline void add_panel_by_tiles(Floats (*sums)[VECTORS], const uint32_t* panel, int64_t words, const TileRows& rows,
                               int count, const uint32_t* next) {
    constexpr int64_t STEP_LINES = TILE_WORDS * STEP_BYTES / LINE;
    Tiles tiles;
    const int64_t whole = words / TILE_WORDS * TILE_WORDS;
    const int64_t depth = count > 2 * TILE_ROWS ? DEEP : SHALLOW;
    for (int64_t word = 0, some; word < whole; word += some) {
        some = std::min(depth, whole - word);
        const int64_t steps = some / TILE_WORDS;
        const uint32_t* here = panel + word * COLUMNS;
        const uint32_t* coming = word + some < whole ? here + some * COLUMNS : next;
        const int tiles_down = (count + TILE_ROWS - 1) / TILE_ROWS;
        Lines lines{reinterpret_cast<const char*>(coming), (STEP_LINES + tiles_down - 1) / tiles_down};
        if (count <= 2 * TILE_ROWS) {
            for (int row = 0; row < count; row += TILE_ROWS)
                add_tiles_of_panel(sums[row], here, rows.at(row, word), rows.bytes(), steps, lines);
            continue;
        }
        for (int vector = 0; vector < VECTORS; vector += VECTORS / 2)
            for (int row = 0; row < count; row += 2 * TILE_ROWS)
                add_tiles_of_half(sums[row] + vector, here + vector * WIDTH, rows.at(row, word), rows.bytes(), steps,
                                  lines);
    }
    if (whole < words) {
        tiles.shape(int(words - whole));
        Lines none{nullptr, 0};
        for (int row = 0; row < count; row += TILE_ROWS)
            add_tiles_of_panel(sums[row], panel + whole * COLUMNS, rows.at(row, whole), rows.bytes(), 1, none);
    }
}

}  // namespace tramontane

#endif
