// Packs rows of the input as `formats.hpp` says; int8 codes are made here, a scale per token and group of 64 inputs.
#pragma once
#include "amx.hpp"
#include "dot.hpp"

namespace tandem {

inline constexpr float kLeastPeak = 1e-30f;  // below, a group counts as zero: 127 / peak must stay finite

struct GroupCodes {
  float scale;
  VecInt sums;  // of codes in every kLanes-th place
};

// 64 values -> 64 codes of -127 .. 127 with x = code * scale.
TANDEM_INLINE GroupCodes quantize_group(const float* x, int8_t* codes) {
  Vec peaks{};
  for (int i = 0; i < kGroup; i += kLanes) {
    Vec v = load(x + i);
    peaks = max(peaks, max(v, -v));
  }
  const float peak = largest(peaks), factor = peak > kLeastPeak ? 127.0f / peak : 0.0f;
  VecInt sums{};
  for (int i = 0; i < kGroup; i += kLanes) {
    VecInt code = nearest(load(x + i) * factor);
    sums += code;
    store_bytes(codes + i, code);
  }
  return {peak > kLeastPeak ? peak / 127.0f : 0.0f, sums};
}

// What a group's sum begins with, which takes the offset of the weights' codes off again; see `dot_bytes`.
TANDEM_INLINE uint32_t group_begin(Format format, VecInt sums) {
  int32_t halves[2] = {};  // of the words: 16-bit sums are of two codes each
  for (int i = 0; i < kLanes; i++) halves[i / 2 % 2] += sums[i];
  if (format == Format::int8) return static_cast<uint32_t>(-kInt8Offset * (halves[0] + halves[1]));
  if constexpr (!kShortSums) return static_cast<uint32_t>(-kInt4Offset * (halves[0] + halves[1]));
  return static_cast<uint16_t>(-kInt4Offset * halves[0]) | static_cast<uint32_t>(-kInt4Offset * halves[1]) << 16;
}

// Codes, scale and begin of a group [64] of an int8 or int4 row.
TANDEM_INLINE void quantize_to(const Geometry& shape, const float* x, int g, uint32_t* row) {
  const GroupCodes group = quantize_group(x, reinterpret_cast<int8_t*>(row + g * kGroupUnits));
  std::memcpy(row + shape.units + g, &group.scale, 4);
  row[shape.units + shape.groups + g] = group_begin(shape.format, group.sums);
}

// Rows of bfloat16 lie in the matrix unit's tiles: [rows / 16][units / 16][16][16] words instead of [rows][units].
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
inline constexpr bool kTiledRows = true;
#else
inline constexpr bool kTiledRows = false;
#endif

// Rows for which `rows` packed ones need memory.
TANDEM_INLINE size_t packed_row_places(int rows) {
  return kTiledRows ? (rows + kAmxRows - 1) / kAmxRows * kAmxRows : rows;
}

// bfloat16 values [32], which are 16 units of row `t`, the `run`th such.
TANDEM_INLINE void narrow_to(const Geometry& shape, const float* x, int t, int run, uint32_t* packed) {
#if defined(__AVX512BF16__)
  uint32_t* row = packed + static_cast<size_t>(kTiledRows ? t - t % kAmxRows : t) * shape.row_words;
  uint32_t* out = kTiledRows ? row + run * kAmxTileWords + t % kAmxRows * kAmxUnits : row + run * kAmxUnits;
  store_pairs(out, load(x), load(x + 16));
#else
  float* out = reinterpret_cast<float*>(packed + static_cast<size_t>(t) * shape.row_words) + run * 32;
  for (int i = 0; i < 32; i += kLanes) store(out + i, round_to_bf16(load(x + i)));
#endif
}

// Inputs [64 g, 64 g + count) of row `t`, a whole group but at the row's end, to their place in `packed`.
template <Format format>
TANDEM_INLINE void pack_group(const Geometry& shape, const float* x, int count, int t, int g, uint32_t* packed) {
  uint32_t* row = packed + static_cast<size_t>(t) * shape.row_words;
  if constexpr (format == Format::f32) {
    std::memcpy(row + g * kGroup, x, sizeof(float) * count);
    return;
  }
  float padded[kGroup];
  if (count < kGroup) {
    std::copy_n(x, count, padded);
    std::fill(padded + count, padded + kGroup, 0.0f);
    x = padded;
  }
  if constexpr (format == Format::int8 || format == Format::int4) return quantize_to(shape, x, g, row);
  narrow_to(shape, x, t, 2 * g, packed);
  if (count > 32) narrow_to(shape, x + 32, t, 2 * g + 1, packed);
}

// Row `t` [inputs], to its place in `packed`.
static void pack_row(const Geometry& shape, const float* row, int t, uint32_t* packed) {
  with_format(shape.format, [&](auto format) {
    for (int g = 0; g < shape.groups; g++)
      pack_group<format()>(shape, row + g * kGroup, std::min(kGroup, shape.inputs - g * kGroup), t, g, packed);
  });
}

}  // namespace tandem
