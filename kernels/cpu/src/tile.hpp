// Tiles of a few rows by one panel, in vectors. The sums of a group are exact; everything else is one chain per output.
#pragma once
#include "dot.hpp"
#include "rows.hpp"

namespace tandem {

inline constexpr int kMaxRows = kLanes == 16 ? 8 : 2;  // of a tile: as many as the registers hold
inline constexpr int kPrefetchWords = 1024;

TANDEM_INLINE void prefetch_unit(const uint32_t* words) {
  __builtin_prefetch(words + kPrefetchWords);
  __builtin_prefetch(words + kPrefetchWords + 16);
}

// kRows rows times one panel; `sums` is [kRows][32]. Rows of x are `row_words` apart.
template <Format format, int kRows>
struct Tile {
  static void multiply(const Geometry& shape, const uint32_t* x, const uint32_t* words, float* sums) {
    Vec acc[kRows][kPanelVecs] = {};
    for (int u = 0; u < shape.units; u++, words += kPanel) {
      prefetch_unit(words);
      for (int v = 0; v < kPanelVecs; v++) {
        VecBits weight = load_bits(words + v * kLanes);
        for (int m = 0; m < kRows; m++)
          acc[m][v] = multiply_add<format>(acc[m][v], weight, x[static_cast<size_t>(m) * shape.row_words + u]);
      }
    }
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kPanelVecs; v++) store(sums + m * kPanel + v * kLanes, acc[m][v]);
  }
};

template <Format format>
inline constexpr int kOffset = format == Format::int8 ? kInt8Offset : kInt4Offset;

TANDEM_INLINE float group_scale(const Geometry& shape, const uint32_t* row, int group) {
  float scale;
  std::memcpy(&scale, row + shape.units + group, 4);
  return scale;
}
TANDEM_INLINE int32_t group_sum(const Geometry& shape, const uint32_t* row, int group) {
  return static_cast<int32_t>(row[shape.units + shape.groups + group]);
}

template <Format format>
inline constexpr int kGroupWords = format == Format::int8 ? kGroupUnits * kPanel : kInt4GroupWords;

// The weights' scales of a group, where a format has them.
template <Format format>
TANDEM_INLINE Vec group_weights(const uint32_t* words, int v) {
  if constexpr (format == Format::int4)
    return load_wide(reinterpret_cast<const uint16_t*>(words + kInt4Words) + v * kLanes);
  return splat(1.0f);
}

// Adds a group's exact sums to the total of a row; `factor` is the scale of its activations.
template <Format format>
TANDEM_INLINE void add_group(float* total, VecInt exact, float factor, Vec weights) {
  Vec scaled = __builtin_convertvector(exact, Vec);
  if constexpr (format == Format::int4)
    store(total, fused(scaled * factor, weights, load(total)));
  else
    store(total, fused(scaled, splat(factor), load(total)));
}

// The exact sums of one group for kRows rows.
template <Format format, int kRows>
TANDEM_INLINE void multiply_group(const uint32_t* x, size_t row_words, const uint32_t* words,
                                  VecInt (&acc)[kRows][kPanelVecs]) {
  constexpr int kUnits = format == Format::int8 ? kGroupUnits : kGroupUnits / 2;
  for (int u = 0; u < kUnits; u++, words += kPanel) {
    prefetch_unit(words);
    for (int v = 0; v < kPanelVecs; v++) {
      VecBits weight = load_bits(words + v * kLanes);
      for (int m = 0; m < kRows; m++) {
        const uint32_t* row = x + m * row_words + u;
        if constexpr (format == Format::int8) {
          acc[m][v] = dot_bytes<false>(acc[m][v], weight, row[0]);
        } else {
          acc[m][v] = dot_bytes<true>(acc[m][v], weight & 0x0f0f0f0fu, row[0]);
          acc[m][v] = dot_bytes<true>(acc[m][v], (weight >> 4) & 0x0f0f0f0fu, row[kGroupUnits / 2]);
        }
      }
    }
  }
}

template <Format format, int kRows>
static void multiply_groups(const Geometry& shape, const uint32_t* x, const uint32_t* words, float* sums) {
  for (int i = 0; i < kRows * kPanel; i += kLanes) store(sums + i, Vec{});
  for (int g = 0; g < shape.groups; g++, words += kGroupWords<format>) {
    VecInt acc[kRows][kPanelVecs];
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kPanelVecs; v++)
        acc[m][v] = VecInt{} - kOffset<format> * group_sum(shape, x + static_cast<size_t>(m) * shape.row_words, g);
    multiply_group<format, kRows>(x + g * kGroupUnits, shape.row_words, words, acc);
    for (int v = 0; v < kPanelVecs; v++) {
      const Vec weights = group_weights<format>(words, v);
      for (int m = 0; m < kRows; m++) {
        const uint32_t* row = x + static_cast<size_t>(m) * shape.row_words;
        add_group<format>(sums + m * kPanel + v * kLanes, acc[m][v], group_scale(shape, row, g), weights);
      }
    }
  }
}

template <int kRows>
struct Tile<Format::int8, kRows> {
  static constexpr auto multiply = multiply_groups<Format::int8, kRows>;
};
template <int kRows>
struct Tile<Format::int4, kRows> {
  static constexpr auto multiply = multiply_groups<Format::int4, kRows>;
};

template <Format format, int kRows = kMaxRows>
static void multiply_rows(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, float* sums) {
  if (rows == kRows) return Tile<format, kRows>::multiply(shape, x, words, sums);
  if constexpr (kRows > 1) multiply_rows<format, kRows - 1>(shape, rows, x, words, sums);
}

}  // namespace tandem
