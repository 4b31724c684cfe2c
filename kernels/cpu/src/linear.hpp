// Matrix multiplication by a packed weight.
//
// A row's result has the same bits whatever shares its batch, whichever tile or thread computes it. float32 and bfloat16:
// every output is one chain of fused multiply-adds over the units in order (AMX: over tiles of 16 units). int8 and int4:
// the sum of a group is exact, and groups are added in order, scaled, in float32.
#pragma once
#include <memory>
#include <new>
#include <optional>

#include "team.hpp"
#include "tile_amx.hpp"

namespace tandem {

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
inline constexpr int kMostRows = std::max(kAmxBlock, kBlockRows);
#else
inline constexpr int kMostRows = kBlockRows;
#endif

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Free> allocate(size_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64))));
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

// Rows that share a pass over a panel, and the pass.
template <Format format>
struct Passes {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  explicit Passes(int rows) : use_amx(format == Format::bf16 || (format != Format::f32 && rows >= kAmxLeastRows)) {
    if (use_amx) tiles.emplace();
  }
  int most() const { return use_amx ? kAmxBlock : kMostRows; }
  void run(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, bool stream, float* sums) {
    if constexpr (format == Format::bf16) return amx_multiply_bf16(shape, rows, x, words, stream, *tiles, sums);
    if constexpr (format == Format::int8 || format == Format::int4)
      if (use_amx) return amx_multiply_groups<format>(shape, rows, x, words, stream, *tiles, sums);
    if constexpr (format != Format::bf16) multiply_panel<format>(shape, rows, x, words, stream, sums);
  }
  const bool use_amx;
  std::optional<AmxTiles> tiles;
#else
  explicit Passes(int) {}
  static constexpr int most() { return kMostRows; }
  void run(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, bool stream, float* sums) {
    multiply_panel<format>(shape, rows, x, words, stream, sums);
  }
#endif
};

template <Format format>
static void multiply_panels(const Linear& linear, const uint32_t* x, int rows, float* out, bool add, Range panels) {
  alignas(64) float sums[kMostRows * kPanel];
  Passes<format> passes(rows);
  for (int panel = panels.begin; panel < panels.end; panel++)
    for (int row = 0; row < rows; row += passes.most()) {
      const int count = std::min(passes.most(), rows - row);
      passes.run(linear, count, x + static_cast<size_t>(row) * linear.row_words, linear.panel(panel), row == 0, sums);
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
