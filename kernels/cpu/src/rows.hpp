// Packs rows of the input as `formats.hpp` says; int8 codes are made here, a scale per token and group of 64 inputs.
#pragma once
#include "dot.hpp"

namespace tandem {

inline constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
inline constexpr float kLeastPeak = 1e-30f;     // below, a group counts as zero: 127 / peak must stay finite

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
    VecInt code = (VecInt)(load(x + i) * factor + kRounder) - 0x4b400000;
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

static void quantize_row(const Geometry& shape, const float* row, uint32_t* out) {
  int8_t* codes = reinterpret_cast<int8_t*>(out);
  float* scales = reinterpret_cast<float*>(out + shape.units);
  uint32_t* begins = out + shape.units + shape.groups;
  for (int g = 0; g < shape.groups; g++) {
    const int count = std::min(kGroup, shape.inputs - g * kGroup);
    float padded[kGroup] = {};
    const float* x = row + g * kGroup;
    if (count < kGroup) x = static_cast<float*>(std::memcpy(padded, x, sizeof(float) * count));
    const GroupCodes group = quantize_group(x, codes + g * kGroup);
    scales[g] = group.scale;
    begins[g] = group_begin(shape.format, group.sums);
  }
}

#if defined(__AVX512BF16__)
static void narrow_row(const Geometry& shape, const float* row, uint32_t* out) {
  int i = 0;
  for (; i + 32 <= shape.inputs; i += 32) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(row + i + 16), (__m512)load(row + i));
    std::memcpy(out + i / 2, &both, 64);
  }
  for (; i + 2 <= shape.inputs; i += 2) out[i / 2] = to_bf16(row[i]) | static_cast<uint32_t>(to_bf16(row[i + 1])) << 16;
  if (i < shape.inputs) out[i / 2] = to_bf16(row[i]);
  for (int u = (shape.inputs + 1) / 2; u < shape.units; u++) out[u] = 0;
}
#else
static void narrow_row(const Geometry& shape, const float* row, uint32_t* out) {
  float* to = reinterpret_cast<float*>(out);
  int i = 0;
  for (; i + kLanes <= shape.inputs; i += kLanes) store(to + i, round_to_bf16(load(row + i)));
  for (; i < shape.inputs; i++) to[i] = widen(to_bf16(row[i]));
  for (; i < shape.row_words; i++) to[i] = 0;
}
#endif

// [inputs] -> [row_words]
TANDEM_INLINE void pack_row(const Geometry& shape, const float* row, uint32_t* out) {
  if (shape.format == Format::f32)
    std::memcpy(out, row, sizeof(float) * shape.inputs);
  else if (shape.format == Format::bf16)
    narrow_row(shape, row, out);
  else
    quantize_row(shape, row, out);
}

}  // namespace tandem
