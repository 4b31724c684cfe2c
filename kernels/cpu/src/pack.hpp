// Packs weights once, at load.
#pragma once
#include <algorithm>

#include "formats.hpp"
#include "team.hpp"

namespace tandem {

// What is packed, row-major [outputs, inputs]: float32, bfloat16, or the int8 codes of int8 and int4.
struct Source {
  const void* weight;
  const float* scales;  // int8 [outputs], int4 [outputs, groups], else null
  const float* bias;    // [outputs] or null
};

template <typename T, int kPerWord>
static void pack_words(const Geometry& shape, const T* weight, int panel, int bits_added, uint32_t* out) {
  const int bits = 32 / kPerWord;
  for (int lane = 0; lane < kPanel; lane++) {
    const int n = panel * kPanel + lane;
    const T* row = weight + static_cast<size_t>(n) * shape.inputs;
    for (int u = 0; u < shape.units; u++) {
      uint32_t word = 0;
      for (int e = 0; e < kPerWord; e++) {
        const int i = u * kPerWord + e;
        uint32_t element = 0;
        if (n < shape.outputs && i < shape.inputs) std::memcpy(&element, row + i, sizeof(T));
        element = kPerWord == 4 ? (element + bits_added) & 0xff : element;
        word |= kPerWord == 1 ? element : element << (e * bits % 32);
      }
      out[static_cast<size_t>(u) * kPanel + lane] = word;
    }
  }
}

static void pack_int4_panel(const Geometry& shape, const Source& source, int panel, uint32_t* codes, uint32_t* out) {
  pack_words<int8_t, 4>(shape, static_cast<const int8_t*>(source.weight), panel, 8, codes);
  for (int g = 0; g < shape.groups; g++, codes += kGroupUnits * kPanel, out += kInt4GroupWords) {
    for (int i = 0; i < kInt4Words; i++) out[i] = codes[i] | codes[kInt4Words + i] << 4;
    uint16_t scales[kPanel];
    for (int lane = 0; lane < kPanel; lane++) {
      const int n = panel * kPanel + lane;
      scales[lane] = n < shape.outputs ? to_bf16(source.scales[static_cast<size_t>(n) * shape.groups + g]) : 0;
    }
    std::memcpy(out + kInt4Words, scales, sizeof(scales));
  }
}

static void pack_panel(const Geometry& shape, const Source& source, int panel, uint32_t* words, uint32_t* scratch) {
  uint32_t* out = words + shape.panel_words * panel;
  switch (shape.format) {
    case Format::f32:
      return pack_words<float, 1>(shape, static_cast<const float*>(source.weight), panel, 0, out);
    case Format::bf16:
      return pack_words<uint16_t, 2>(shape, static_cast<const uint16_t*>(source.weight), panel, 0, out);
    case Format::int8:
      return pack_words<int8_t, 4>(shape, static_cast<const int8_t*>(source.weight), panel, 128, out);
    case Format::int4:
      return pack_int4_panel(shape, source, panel, scratch, out);
  }
}

// Fills `words` [total_words] by all threads.
inline void pack_weight(Team& team, const Geometry& shape, const Source& source, uint32_t* words) {
  team.run([&](int rank) {
    std::vector<uint32_t> scratch(shape.format == Format::int4 ? static_cast<size_t>(shape.units) * kPanel : 0);
    const Range mine = part_of(shape.panels, rank, team.size());
    for (int panel = mine.begin; panel < mine.end; panel++) pack_panel(shape, source, panel, words, scratch.data());
  });
  float* scales = reinterpret_cast<float*>(words + shape.scales_at());
  float* bias = reinterpret_cast<float*>(words + shape.bias_at());
  for (int n = 0; n < shape.panels * kPanel; n++) {
    if (shape.format == Format::int8) scales[n] = n < shape.outputs ? source.scales[n] : 0;
    bias[n] = source.bias && n < shape.outputs ? source.bias[n] : 0;
  }
}

}  // namespace tandem
