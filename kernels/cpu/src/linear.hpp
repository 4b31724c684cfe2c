// Matrix multiplication by a packed weight.
//
// A row's result has the same bits whatever shares its batch, whichever tile or thread computes it. float32 and bfloat16:
// every output is one chain of fused multiply-adds over the units in order (AMX: over tiles of 16 units). int8 and int4:
// the sum of a group is exact, and groups are added in order, scaled, in float32.
#pragma once
#include "epilogue.hpp"
#include "memory.hpp"
#include "tile_amx.hpp"

namespace tandem {

// How many rows pass over a panel together, and the pass.
template <Format format>
struct Passes {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  explicit Passes(int rows) : use_amx(format == Format::bf16 || (format != Format::f32 && rows >= kAmxLeastRows)) {}
  int most() const { return use_amx ? kAmxBlock : kBlockRows; }
  void run(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* panel, const Pass& pass, float* sums) {
    if constexpr (format == Format::bf16) return amx_multiply_bf16(shape, rows, x, panel, pass, tiles, sums);
    if constexpr (format == Format::int8 || format == Format::int4)
      if (use_amx) return amx_multiply_groups<format>(shape, rows, x, panel, pass, tiles, sums);
    if constexpr (format != Format::bf16) multiply_panel<format>(shape, rows, x, panel, pass, sums);
  }
  const bool use_amx;
  AmxTiles tiles;
#else
  explicit Passes(int) {}
  static constexpr int most() { return kBlockRows; }
  void run(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* panel, const Pass& pass, float* sums) {
    multiply_panel<format>(shape, rows, x, panel, pass, sums);
  }
#endif
};

// The panels that hold a group's outputs: of its first span, then of its second.
class PanelRun {
 public:
  explicit PanelRun(const Spans& spans)
      : spans_(spans), split_(panels_of(spans.first)), count_(split_ + panels_of(spans.second)) {}

  int count() const { return count_; }
  int panel(int i) const { return i < split_ ? spans_.first.begin / kPanel + i : spans_.second.begin / kPanel + i - split_; }
  // What takes the place of panel `i` in the next group.
  int later(int i) const { return panel(i) + (i < split_ ? split_ : count_ - split_); }
  // What is multiplied after panel `i`.
  int after(int i) const { return i + 1 < count_ ? panel(i + 1) : later(0); }
  // Where the spans begin in a row of all these panels.
  int first_at() const { return spans_.first.begin % kPanel; }
  int second_at() const { return split_ * kPanel + spans_.second.begin % kPanel; }

 private:
  static int panels_of(Range span) {
    return span.begin == span.end ? 0 : (span.end - 1) / kPanel - span.begin / kPanel + 1;
  }

  const Spans spans_;
  const int split_, count_;
};

inline constexpr int kFinishedRows = 8;  // at a time, so that they are in the first cache when they are handed on
inline constexpr int kBlocksToKeep = 4;

// The rows that a rank multiplies: its own, by all outputs, where it has several blocks of them, else all. Its own are
// those of the phases before and after, and what they leave stays in a core's caches: a prompt of 512 tokens takes 0.90 to
// 0.94 of the time (Xeon, 2 cores, six runs), though every core reads all weights.
inline Range rows_of(int rows, int block, int rank, int size) {
  if (rows < kBlocksToKeep * block * size) return {0, rows};
  const Range tiles = part_of((rows + kAmxRows - 1) / kAmxRows, rank, size);
  return {tiles.begin * kAmxRows, std::min(tiles.end * kAmxRows, rows)};
}

// Sums of a panel [rows][32], with scale and bias.
template <Format format>
static void finish(const Linear& linear, int panel, int rows, const float* sums, Results out) {
  const float *scales = linear.scales() + panel * kPanel, *bias = linear.bias() + panel * kPanel;
  for (int n = 0; n < kPanel; n += kLanes) {
    const Vec scale = format == Format::int8 ? load(scales + n) : Vec{}, add = load(bias + n);
    for (int m = 0; m < rows; m++) {
      const Vec value = load(sums + m * kPanel + n);
      store(out.row(m) + n, format == Format::int8 ? value * scale + add : value + add);
    }
  }
}

// A rank's part of all groups of an epilogue for all blocks of rows: a block passes over a group's panels, and its results
// are handed on. Where ranks share the rows, blocks of one group may fall to two of them, so that few groups burden many
// ranks alike.
template <Format format, typename Epilogue>
static void multiply_panels(const Linear& linear, const uint32_t* x, int rows, const Epilogue& epilogue, int rank,
                            int size) {
  static thread_local Lines<float> sums, results;
  Passes<format> passes(rows);
  const int most = passes.most(), panel_sums = most * kPanel;
  const Range own = rows_of(rows, most, rank, size);
  const bool is_shared = own.end - own.begin == rows;
  const int blocks = (own.end - own.begin + most - 1) / most, all = epilogue.groups() * blocks;
  const Range mine = is_shared ? part_of(all, rank, size) : Range{0, all};
  for (int group = mine.begin / blocks; group * blocks < mine.end; group++) {
    const PanelRun run(epilogue.spans(group));
    const int panels = run.count();
    sums.resize(std::max(sums.size(), static_cast<size_t>(panels) * panel_sums));
    results.resize(std::max(results.size(), static_cast<size_t>(panels) * kPanel * kFinishedRows));
    const Results finished{results.data(), panels * kPanel};
    const Range here{std::max(mine.begin - group * blocks, 0), std::min(mine.end - group * blocks, blocks)};
    for (int block = here.begin; block < here.end; block++) {
      const int first = own.begin + block * most, count = std::min(most, own.end - first);
      for (int i = 0; i < panels; i++)
        passes.run(linear, count, x + static_cast<size_t>(first) * linear.row_words, linear.panel(run.panel(i)),
                   {block - here.begin, here.end - here.begin, linear.panel(run.later(i)), linear.panel(run.after(i))},
                   &sums[i * panel_sums]);
      for (int m = 0; m < count; m += kFinishedRows) {
        const int few = std::min(kFinishedRows, count - m);
        for (int i = 0; i < panels; i++)
          finish<format>(linear, run.panel(i), few, &sums[i * panel_sums + m * kPanel], finished.from(i * kPanel));
        epilogue.rows(group, {first + m, first + m + few}, finished.from(run.first_at()), finished.from(run.second_at()));
      }
    }
  }
}

// This rank's part of x @ weight.T + bias; x is packed rows.
template <typename Epilogue>
void multiply(const Linear& linear, const uint32_t* x, int rows, const Epilogue& epilogue, int rank, int size) {
  if (rows == 0) return;
  with_format(linear.format,
              [&](auto format) { multiply_panels<format()>(linear, x, rows, epilogue, rank, size); });
}

}  // namespace tandem
