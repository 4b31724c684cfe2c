// Packs weights once, at load, and rounds those that are to be quantized.
#pragma once
#include <vector>

#include "quantize.hpp"
#include "team.hpp"

namespace tandem {

inline constexpr int kPackUnits = 32;  // of a panel at a time: its lines stay in the first cache while lanes fill them

// What is packed: row-major [outputs, inputs] of `type`, which is the format's own unless that is int8 or int4.
struct Source {
  const void* weight;
  Type type;
  const float* bias;  // [outputs] or null
};

// Rows of T, `stride` apart, of which `rows` and `inputs` exist.
template <typename T>
static void pack_words(const Geometry& shape, const T* from, int64_t stride, int rows, uint32_t* out) {
  constexpr int kPerWord = 4 / sizeof(T);
  const int whole = shape.inputs / kPerWord;
  for (int first = 0; first < shape.units; first += kPackUnits)
    for (int lane = 0; lane < kPanel; lane++) {
      const int end = std::min(first + kPackUnits, shape.units);
      const T* row = from + stride * lane;
      for (int line = 0; line < kPackUnits; line += 16)  // as many rows as streams: the processor foresees none of them
        __builtin_prefetch(row + (first + kPackUnits + line) * kPerWord);
      for (int u = first; u < end; u++) {
        uint32_t word = 0;
        if (lane < rows && u < whole)
          std::memcpy(&word, row + u * kPerWord, 4);
        else if (lane < rows && u == whole)
          std::memcpy(&word, row + u * kPerWord, sizeof(T) * (shape.inputs % kPerWord));
        out[static_cast<size_t>(u) * kPanel + lane] = word;
      }
    }
}

// What a thread rounds a panel into.
struct PackScratch {
  std::vector<float> row;
  std::vector<int8_t> codes;    // [32][groups * 64]
  std::vector<uint16_t> scales;  // [32][groups]
  std::vector<uint32_t> words;

  explicit PackScratch(const Geometry& shape)
      : row(shape.groups * kGroup),
        codes(static_cast<size_t>(kPanel) * shape.groups * kGroup),
        scales(static_cast<size_t>(kPanel) * shape.groups),
        words(static_cast<size_t>(kPanel) * shape.units) {}
};

static void pack_rounded(const Geometry& shape, const Source& source, int panel, uint32_t* packed, PackScratch& s) {
  const int padded = shape.groups * kGroup, first = panel * kPanel;
  const bool is_int8 = shape.format == Format::int8;
  float* channel_scales = reinterpret_cast<float*>(packed + shape.scales_at()) + first;
  std::fill(s.codes.begin(), s.codes.end(), 0);
  std::fill(s.scales.begin(), s.scales.end(), 0);
  for (int lane = 0; lane < kPanel; lane++) {
    int8_t* codes = &s.codes[static_cast<size_t>(lane) * padded];
    if (is_int8) channel_scales[lane] = 0;
    if (first + lane < shape.outputs) {
      widen_row(source.weight, source.type, static_cast<int64_t>(first + lane) * shape.inputs, shape.inputs,
                s.row.data());
      if (is_int8)
        channel_scales[lane] = quantize_int8(s.row.data(), padded, codes);
      else
        for (int g = 0; g < shape.groups; g++)
          s.scales[lane * shape.groups + g] = quantize_int4(&s.row[g * kGroup], codes + g * kGroup);
    }
    for (int i = 0; i < padded; i++) codes[i] = static_cast<int8_t>(codes[i] + (is_int8 ? 128 : 8));
  }
  uint32_t* out = packed + shape.panel_words * panel;
  Geometry whole(shape.format, shape.outputs, padded);
  pack_words<int8_t>(whole, s.codes.data(), padded, kPanel, is_int8 ? out : s.words.data());
  if (is_int8) return;
  for (int g = 0; g < shape.groups; g++, out += kInt4GroupWords) {
    const uint32_t* codes = &s.words[static_cast<size_t>(g) * kGroupUnits * kPanel];
    for (int i = 0; i < kInt4Words; i++) out[i] = codes[i] | codes[kInt4Words + i] << 4;
    uint16_t scales[kPanel];
    for (int lane = 0; lane < kPanel; lane++) scales[lane] = s.scales[lane * shape.groups + g];
    std::memcpy(out + kInt4Words, scales, sizeof(scales));
  }
}

static void pack_panel(const Geometry& shape, const Source& source, int panel, uint32_t* packed, PackScratch& scratch) {
  const int first = panel * kPanel, rows = std::min(kPanel, shape.outputs - first);
  const int64_t at = static_cast<int64_t>(first) * shape.inputs;
  uint32_t* out = packed + shape.panel_words * panel;
  if (shape.format == Format::f32)
    pack_words(shape, static_cast<const uint32_t*>(source.weight) + at, shape.inputs, rows, out);
  else if (shape.format == Format::bf16)
    pack_words(shape, static_cast<const uint16_t*>(source.weight) + at, shape.inputs, rows, out);
  else
    pack_rounded(shape, source, panel, packed, scratch);
  float* bias = reinterpret_cast<float*>(packed + shape.bias_at()) + first;
  for (int n = 0; n < kPanel; n++) bias[n] = source.bias && n < rows ? source.bias[first + n] : 0;
}

// Fills `packed` [total_words] by all threads.
inline void pack_weight(Team& team, const Geometry& shape, const Source& source, uint32_t* packed) {
  team.run([&](int rank) {
    PackScratch scratch(shape);
    const Range mine = part_of(shape.panels, rank, team.size());
    for (int panel = mine.begin; panel < mine.end; panel++) pack_panel(shape, source, panel, packed, scratch);
  });
}

}  // namespace tandem
