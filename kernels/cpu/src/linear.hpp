// Matrix multiplication by a packed weight.
//
// A row's result has the same bits whatever shares its batch, whichever tile or thread computes it. float32 and bfloat16:
// every output is one chain of fused multiply-adds over the units in order (AMX: over tiles of 16 units). int8 and int4:
// the sum of a group is exact, and groups are added in order, scaled, in float32.
#pragma once
#include <memory>
#include <new>

#include "dot.hpp"
#include "rows.hpp"
#include "team.hpp"

namespace tandem {

inline constexpr int kMaxRows = kLanes == 16 ? 8 : 2;  // of a tile: as many as the registers hold
inline constexpr int kPrefetchWords = 1024;

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Free> allocate(size_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64))));
}

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
  constexpr int kWords = format == Format::int8 ? kGroupUnits * kPanel : kInt4GroupWords;
  for (int i = 0; i < kRows * kPanel; i += kLanes) store(sums + i, Vec{});
  for (int g = 0; g < shape.groups; g++, words += kWords) {
    VecInt acc[kRows][kPanelVecs];
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kPanelVecs; v++)
        acc[m][v] = VecInt{} - kOffset<format> * group_sum(shape, x + static_cast<size_t>(m) * shape.row_words, g);
    multiply_group<format, kRows>(x + g * kGroupUnits, shape.row_words, words, acc);
    for (int v = 0; v < kPanelVecs; v++) {
      Vec scale = splat(1.0f);
      if constexpr (format == Format::int4)
        scale = load_wide(reinterpret_cast<const uint16_t*>(words + kInt4Words) + v * kLanes);
      for (int m = 0; m < kRows; m++) {
        float* sum = sums + m * kPanel + v * kLanes;
        Vec scaled = __builtin_convertvector(acc[m][v], Vec);
        const float factor = group_scale(shape, x + static_cast<size_t>(m) * shape.row_words, g);
        if constexpr (format == Format::int4)
          store(sum, load(sum) + scaled * factor * scale);
        else
          store(sum, load(sum) + scaled * factor);
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

// Scale, bias and residual of `count` rows of one panel.
TANDEM_INLINE void finish(const Linear& linear, int panel, int count, float* sums, float* out, bool add) {
  const int first = panel * kPanel, width = std::min(kPanel, linear.outputs - first);
  const float *scales = linear.scales() + first, *bias = linear.bias() + first;
  for (int m = 0; m < count; m++, sums += kPanel) {
    float* to = out + static_cast<size_t>(m) * linear.outputs + first;
    for (int n = 0; n < kPanel; n += kLanes) {
      Vec value = load(sums + n);
      value = linear.format == Format::int8 ? value * load(scales + n) + load(bias + n) : value + load(bias + n);
      if (n + kLanes <= width)
        store(to + n, add ? load(to + n) + value : value);
      else
        store(sums + n, value);
    }
    for (int n = width / kLanes * kLanes; n < width; n++) to[n] = add ? to[n] + sums[n] : sums[n];
  }
}

template <Format format>
static void multiply_panels(const Linear& linear, const uint32_t* x, int rows, float* out, bool add, Range panels) {
  alignas(64) float sums[kMaxRows * kPanel];
  for (int panel = panels.begin; panel < panels.end; panel++)
    for (int row = 0; row < rows; row += kMaxRows) {
      const int count = std::min(kMaxRows, rows - row);
      multiply_rows<format>(linear, count, x + static_cast<size_t>(row) * linear.row_words, linear.panel(panel), sums);
      finish(linear, panel, count, sums, out + static_cast<size_t>(row) * linear.outputs, add);
    }
}

// This rank's panels of x @ weight.T + bias, or of out += that; x is packed [rows][row_words], out [rows][outputs].
inline void multiply(const Linear& linear, const uint32_t* x, int rows, float* out, bool add, int rank, int size) {
  const Range mine = part_of(linear.panels, rank, size);
  switch (linear.format) {
    case Format::f32:
      return multiply_panels<Format::f32>(linear, x, rows, out, add, mine);
    case Format::bf16:
      return multiply_panels<Format::bf16>(linear, x, rows, out, add, mine);
    case Format::int8:
      return multiply_panels<Format::int8>(linear, x, rows, out, add, mine);
    case Format::int4:
      return multiply_panels<Format::int4>(linear, x, rows, out, add, mine);
  }
}

}  // namespace tandem
