// Matrix multiplication by a packed weight.
//
// Layout: panels of 32 outputs; a panel is [units][32] words of 4 bytes, a unit being one float32 or two neighbouring
// bfloat16 of the input dimension. A row of the input is packed the same way: [units] words.
//
// Every output is one chain of fused multiply-adds over the units in order, whatever the number of rows, the tile or
// the thread: hence equal bits in every batch.
#pragma once
#include <memory>
#include <new>

#include "team.hpp"

namespace tandem {

inline constexpr int kPanel = 32;
inline constexpr int kPanelVecs = kPanel / kLanes;
inline constexpr int kMaxRows = kLanes == 16 ? 8 : 2;
inline constexpr int kPrefetchWords = 1024;

enum class Type : int { f32 = 0, bf16 = 1 };

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Free> allocate(size_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64))));
}

TANDEM_INLINE int units_of(Type type, int inputs) { return type == Type::f32 ? inputs : (inputs + 1) / 2; }

TANDEM_INLINE void pack_row(Type type, const float* row, int inputs, uint32_t* out) {
  if (type == Type::f32) {
    std::memcpy(out, row, sizeof(float) * inputs);
    return;
  }
  for (int i = 0; i < inputs / 2; i++)
    out[i] = to_bf16(row[2 * i]) | static_cast<uint32_t>(to_bf16(row[2 * i + 1])) << 16;
  if (inputs % 2) out[inputs / 2] = to_bf16(row[inputs - 1]);
}

template <Type type>
TANDEM_INLINE Vec multiply_add(Vec sum, VecBits weight, uint32_t x) {
  if constexpr (type == Type::f32) {
    float factor;
    std::memcpy(&factor, &x, 4);
    return sum + (Vec)weight * factor;
  } else {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weight);
#else
    VecBits both = VecBits{} + x;
    sum = sum + (Vec)(weight << 16) * (Vec)(both << 16);
    return sum + (Vec)(weight & 0xffff0000u) * (Vec)(both & 0xffff0000u);
#endif
  }
}

struct Linear {
  Type type;
  int outputs, inputs, units, panels;
  std::unique_ptr<uint32_t[], Free> words;
  std::unique_ptr<float[], Free> bias;  // [panels * 32]

  // `weight` is row-major [outputs, inputs] of `type`; `bias_in` likewise [outputs] or null.
  Linear(Type type_in, int outputs_in, int inputs_in, const void* weight, const void* bias_in)
      : type(type_in),
        outputs(outputs_in),
        inputs(inputs_in),
        units(units_of(type_in, inputs_in)),
        panels((outputs_in + kPanel - 1) / kPanel),
        words(allocate<uint32_t>(static_cast<size_t>(panels) * kPanel * units)),
        bias(allocate<float>(static_cast<size_t>(panels) * kPanel)) {
    for (int n = 0; n < panels * kPanel; n++) {
      bias[n] = 0;
      if (bias_in && n < outputs)
        bias[n] = type == Type::f32 ? static_cast<const float*>(bias_in)[n]
                                    : widen(static_cast<const uint16_t*>(bias_in)[n]);
    }
    for (int panel = 0; panel < panels; panel++)
      for (int lane = 0; lane < kPanel; lane++) pack_output(panel, lane, weight);
  }

 private:
  void pack_output(int panel, int lane, const void* weight) {
    uint32_t* out = &words[static_cast<size_t>(panel) * kPanel * units + lane];
    int n = panel * kPanel + lane;
    for (int u = 0; u < units; u++) {
      uint32_t word = 0;
      if (n < outputs && type == Type::f32) {
        std::memcpy(&word, static_cast<const float*>(weight) + static_cast<size_t>(n) * inputs + u, 4);
      } else if (n < outputs) {
        const uint16_t* row = static_cast<const uint16_t*>(weight) + static_cast<size_t>(n) * inputs;
        word = row[2 * u] | (2 * u + 1 < inputs ? static_cast<uint32_t>(row[2 * u + 1]) << 16 : 0);
      }
      out[static_cast<size_t>(u) * kPanel] = word;
    }
  }
};

// kRows rows times one panel; `sums` is [kRows][32].
template <Type type, int kRows>
static void multiply_tile(const uint32_t* x, const uint32_t* words, int units, float* sums) {
  Vec acc[kRows][kPanelVecs] = {};
  for (int u = 0; u < units; u++, words += kPanel) {
    __builtin_prefetch(words + kPrefetchWords);
    __builtin_prefetch(words + kPrefetchWords + 16);
    for (int v = 0; v < kPanelVecs; v++) {
      VecBits weight = load_bits(words + v * kLanes);
      for (int m = 0; m < kRows; m++)
        acc[m][v] = multiply_add<type>(acc[m][v], weight, x[static_cast<size_t>(m) * units + u]);
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int v = 0; v < kPanelVecs; v++) store(sums + m * kPanel + v * kLanes, acc[m][v]);
}

template <Type type, int kRows>
static void multiply_rows(int rows, const uint32_t* x, const uint32_t* words, int units, float* sums) {
  if (rows == kRows) return multiply_tile<type, kRows>(x, words, units, sums);
  if constexpr (kRows > 1) multiply_rows<type, kRows - 1>(rows, x, words, units, sums);
}

// This rank's panels of x @ weight.T + bias, or of out += that; x is packed [rows][units], out [rows][outputs].
TANDEM_INLINE void multiply(const Linear& linear, const uint32_t* x, int rows, float* out, bool add, int rank, int size) {
  Range mine = part_of(linear.panels, rank, size);
  alignas(64) float sums[kMaxRows * kPanel];
  for (int panel = mine.begin; panel < mine.end; panel++) {
    const uint32_t* words = &linear.words[static_cast<size_t>(panel) * kPanel * linear.units];
    int first = panel * kPanel, width = linear.outputs - first < kPanel ? linear.outputs - first : kPanel;
    for (int row = 0; row < rows; row += kMaxRows) {
      int count = rows - row < kMaxRows ? rows - row : kMaxRows;
      const uint32_t* x_rows = x + static_cast<size_t>(row) * linear.units;
      if (linear.type == Type::f32)
        multiply_rows<Type::f32, kMaxRows>(count, x_rows, words, linear.units, sums);
      else
        multiply_rows<Type::bf16, kMaxRows>(count, x_rows, words, linear.units, sums);
      for (int m = 0; m < count; m++) {
        float* to = out + static_cast<size_t>(row + m) * linear.outputs + first;
        for (int n = 0; n < width; n++) {
          float value = sums[m * kPanel + n] + linear.bias[first + n];
          to[n] = add ? to[n] + value : value;
        }
      }
    }
  }
}

}  // namespace tandem
