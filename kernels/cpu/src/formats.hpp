// How packed weights and packed input rows lie in memory. One layout for every instruction set, so that a packed file
// serves them all.
//
// A weight is cut into panels of 32 outputs. A panel is a run of units in input order, a unit being one 4-byte word for
// each of the 32 outputs: one float32, two bfloat16 or four int8 neighbours of the input dimension. int8 and int4 come in
// groups of 64 inputs (16 units), the last one padded with zeros:
//
//   f32, bf16   panel  [units][32] words
//   int8        panel  [groups][16][32] words of four codes + 128; after all panels [outputs] float32 scales
//   int4        panel  [groups]( [8][32] words: unit i in the low nibbles, unit i + 8 in the high ones, of four codes + 8;
//                                [32] bfloat16 scales )
//
// After the panels (and scales) of every format: [outputs] float32 bias, outputs padded to whole panels.
//
// An input row is packed to match: [units] words (bf16: where the processor does not multiply pairs, two float32 words of
// rounded values per unit), and for int8 and int4, behind them, each group's float32 scale and then what each group's sum
// begins with (`group_begin` in rows.hpp).
#pragma once
#include <algorithm>
#include <cstddef>

#include "vec.hpp"

namespace tandem {

inline constexpr int kPanel = 32;
inline constexpr int kPanelVecs = kPanel / kLanes;
inline constexpr int kGroup = 64;       // inputs
inline constexpr int kGroupUnits = 16;  // of four int8 codes each
inline constexpr int kInt4Words = kGroupUnits / 2 * kPanel;
inline constexpr int kInt4GroupWords = kInt4Words + kPanel / 2;

#if defined(__AVX512BF16__)
inline constexpr int kBf16Words = 1;  // of an input row for each unit
#else
inline constexpr int kBf16Words = 2;
#endif

enum class Type : int { f32 = 0, bf16 = 1 };  // of the embedding
enum class Format : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

// Calls `work` with the format as a constant.
TANDEM_INLINE void with_format(Format format, auto work) {
  switch (format) {
    case Format::f32:
      return work(std::integral_constant<Format, Format::f32>{});
    case Format::bf16:
      return work(std::integral_constant<Format, Format::bf16>{});
    case Format::int8:
      return work(std::integral_constant<Format, Format::int8>{});
    case Format::int4:
      return work(std::integral_constant<Format, Format::int4>{});
  }
}

struct Geometry {
  Format format;
  int outputs, inputs;
  int panels, groups, units;
  int row_words;        // of a packed input row
  size_t panel_words;   // of a weight's panel

  Geometry(Format format_in, int outputs_in, int inputs_in)
      : format(format_in),
        outputs(outputs_in),
        inputs(inputs_in),
        panels((outputs_in + kPanel - 1) / kPanel),
        groups((inputs_in + kGroup - 1) / kGroup) {
    if (format == Format::f32) {
      units = row_words = inputs;
    } else if (format == Format::bf16) {
      units = (inputs + 31) / 32 * 16;  // whole tiles of AMX
      row_words = units * kBf16Words;
    } else {
      units = groups * kGroupUnits;
      row_words = (units + 2 * groups + 15) / 16 * 16;
    }
    panel_words = format == Format::int4 ? static_cast<size_t>(groups) * kInt4GroupWords
                                         : static_cast<size_t>(units) * kPanel;
  }

  size_t scales_at() const { return panel_words * panels; }  // words from the start
  size_t bias_at() const { return scales_at() + (format == Format::int8 ? static_cast<size_t>(panels) * kPanel : 0); }
  size_t total_words() const { return bias_at() + static_cast<size_t>(panels) * kPanel; }
};

// A packed weight; the words belong to the caller.
struct Linear : Geometry {
  const uint32_t* words;

  Linear(Format format, int outputs, int inputs, const uint32_t* words_in)
      : Geometry(format, outputs, inputs), words(words_in) {}

  const uint32_t* panel(int index) const { return words + panel_words * index; }
  const float* scales() const { return reinterpret_cast<const float*>(words + scales_at()); }
  const float* bias() const { return reinterpret_cast<const float*>(words + bias_at()); }
};

}  // namespace tandem
