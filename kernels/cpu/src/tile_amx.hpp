// Up to 32 rows by a panel, in the matrix unit of Intel processors.
//
// bfloat16: one chain of steps, whose order is not that of AVX-512, so single rows take it too, which costs nothing: 5.65
// ms instead of 5.85 for a decode step of a 135M model (Xeon, 8 cores). int8 and int4: exact sums of a group, so the
// bits are those of every other tile.
#pragma once
#include "amx.hpp"
#include "tile.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
namespace tandem {

inline constexpr int kAmxAheadWords = 2048;
inline constexpr int kAmxWords = kAmxUnits * kPanel;  // of a panel in a step
inline constexpr int kAmxLeastRows = 4;  // int8 and int4: fewer are faster without
// Rows in tiles (rows.hpp) times a panel, to `sums` [rows][32]. A single block of rows fetches a little ahead, several
// share the fetching of the panel that comes next.
//
// A step takes 45 ns where the unit needs 28, because both operands come from the second cache (Xeon of 2.7 GHz); 42 with
// half of a panel at a time, which the first cache keeps, and more when rows are asked for ahead. Where another thread
// has the core's other half it is 130, of which the unit needs 65.
static void amx_multiply_bf16(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words,
                              const Pass& pass, AmxTiles& tiles, float* sums) {
  const bool both = rows > kAmxRows;
  const uint32_t* lower = x + static_cast<size_t>(kAmxRows) * shape.row_words;
  const uint32_t* ahead = pass.blocks == 1 ? words + kAmxAheadWords
                                           : pass.next + shape.panel_words / pass.blocks * pass.block;
  const int lines = (kAmxWords / 16 + pass.blocks - 1) / pass.blocks;
  tiles.shape(rows);
  amx_zero(both);
  for (int u = 0; u < shape.units; u += kAmxUnits) {
    for (int line = 0; line < lines; line++, ahead += 16) __builtin_prefetch(ahead, 0, 2);
    amx_load(x, lower, kAmxUnits, words, kPanel, both);
    amx_add_bf16(both);
    x += kAmxTileWords;
    lower += kAmxTileWords;
    words += kAmxWords;
  }
  amx_store(sums, kPanel, both);
}

TANDEM_INLINE void amx_unpack_int4(const uint32_t* words, uint32_t* codes) {
  for (int i = 0; i < kInt4Words; i += kLanes) {
    VecBits both = load_bits(words + i), low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
    std::memcpy(codes + i, &low, sizeof(low));
    std::memcpy(codes + kInt4Words + i, &high, sizeof(high));
  }
}

template <Format format>
static void amx_multiply_groups(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, bool stream,
                                AmxTiles& tiles, float* sums) {
  constexpr int kWords = kGroupWords<format>;
  const bool both = rows > kAmxRows;
  alignas(64) int32_t exact[kAmxBlock * kPanel];
  alignas(64) uint32_t codes[kAmxWords];
  tiles.shape(rows);
  for (int i = 0; i < rows * kPanel; i += kLanes) store(sums + i, Vec{});
  for (int g = 0; g < shape.groups; g++, words += kWords) {
    if (stream)
      for (int line = 0; line < kWords; line += 16) __builtin_prefetch(words + kAmxAheadWords + line);
    if constexpr (format == Format::int4) amx_unpack_int4(words, codes);
    const uint32_t* upper = x + g * kGroupUnits;
    amx_zero(both);
    amx_load(upper, upper + kAmxRows * shape.row_words, shape.row_words, format == Format::int4 ? codes : words, kPanel,
             both);
    amx_add_int8(both);
    amx_store(exact, kPanel, both);
    for (int m = 0; m < rows; m++) {
      const uint32_t* row = x + static_cast<size_t>(m) * shape.row_words;
      const VecInt begin = (VecInt)splat_bits(row[shape.units + shape.groups + g]);
      const Vec scale = (Vec)splat_bits(row[shape.units + g]);
      for (int v = 0; v < kPanelVecs; v++) {
        VecInt sum;
        std::memcpy(&sum, exact + m * kPanel + v * kLanes, sizeof(sum));
        add_group<format>(sums + m * kPanel + v * kLanes, sum + begin, scale,
                          group_weights<format>(words, v));
      }
    }
  }
}

}  // namespace tandem
#endif
