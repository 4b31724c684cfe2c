// Softmax over keys that come a tile at a time: scores become weights relative to the highest so far, and what was summed
// before is scaled to it. In powers of two; the query holds the factor that makes them of e.
#pragma once
#include "kv_tile.hpp"

namespace tandem {

inline constexpr int kFewRows = 4;  // are softened faster by themselves

// A row's scores of a tile, scaled where keys are, of which the first `visible` count.
template <KvType type, int kVecs>
TANDEM_INLINE void load_scores(const AttentionScratch& s, const float* scores, int visible, Vec (&score)[kVecs]) {
  for (int v = 0; v < kVecs; v++) score[v] = load(scores + v * kLanes);
  if constexpr (kPaired<type> && type == KvType::i8)
    for (int v = 0; v < kVecs; v++) score[v] *= load(&s.key_scales[v * kLanes]);
  if (visible < kTileKeys)
    for (int v = 0; v < kVecs; v++) score[v] = lane_numbers() < visible - v * kLanes ? score[v] : splat(-INFINITY);
}

// Turns scores [count][64], of rows `first` and following, kRows at most, into weights relative to their new peaks, and
// rescales what was summed so far; so many of the tile's keys are visible to each. Peaks and sums of all rows are found
// together.
template <KvType type, int kRows>
static void soften_rows(AttentionScratch& s, float* scores, int first, int count, const int* visible) {
  constexpr int kVecs = kTileKeys / kLanes;
  Vec score[kVecs], of_row[kRows] = {};
  for (int row = 0; row < count; row++) {
    load_scores<type>(s, scores + row * kTileKeys, visible[row], score);
    of_row[row] = score[0];
    for (int v = 1; v < kVecs; v++) of_row[row] = max(of_row[row], score[v]);
  }
  const Vec before = load(&s.peak[first]), peak = max(largest_of<kRows>(of_row), before);
  store(&s.peak[first], peak);
  for (int row = 0; row < count; row++) {
    load_scores<type>(s, scores + row * kTileKeys, visible[row], score);
    of_row[row] = Vec{};
    for (int v = 0; v < kVecs; v++) {
      const Vec weight = exp2(score[v] - s.peak[first + row]);
      score[v] = score[v] > splat(-INFINITY) ? weight : Vec{};
      of_row[row] += score[v];
      if constexpr (kPaired<type> && type == KvType::i8) score[v] *= load(&s.value_scales[v * kLanes]);
    }
#if defined(__AVX512BF16__)
    if constexpr (kPaired<type>)
      for (int v = 0; v < kVecs; v += 2)
        store_pairs(scores + row * kTileKeys + v * kLanes / 2, score[v], score[v + 1]);
#endif
    if constexpr (!kPaired<type>)
      for (int v = 0; v < kVecs; v++) store(scores + row * kTileKeys + v * kLanes, score[v]);
  }
  // Where there was no peak there is nothing to rescale.
  const Vec shrink = peak > before && before > splat(-INFINITY) ? exp2(before - peak) : splat(1.0f);
  const Vec sums = sums_of<kRows>(of_row);
  store(&s.total[first], load(&s.total[first]) * shrink + sums);
  for (int row = 0; row < count; row++) {
    if (shrink[row] == 1.0f) continue;
    float* out = &s.out[static_cast<size_t>(first + row) * s.dim];
    for (int d = 0; d < s.dim; d += kLanes) store(out + d, load(out + d) * shrink[row]);
  }
}

template <KvType type>
static void soften(AttentionScratch& s, int rows, int first) {
  for (int row = 0; row < rows; row += kLanes) {
    const int count = std::min(rows - row, kLanes);
    const auto work = count <= kFewRows ? soften_rows<type, kFewRows> : soften_rows<type, kLanes>;
    work(s, &s.scores[row * kTileKeys], first + row, count, &s.visible[row]);
  }
}

// Folds a later split into what the earlier ones gave; one function, so that all callers round alike.
__attribute__((noinline)) static void fold(float* all_out, float* all_peak, float* all_total, const float* out,
                                           float peak, float total, int dim) {
  float top = peak > *all_peak ? peak : *all_peak;
  float keep = exp2(splat(*all_peak - top))[0], add = exp2(splat(peak - top))[0];
  for (int d = 0; d < dim; d += kLanes) store(all_out + d, load(all_out + d) * keep + load(out + d) * add);
  *all_total = *all_total * keep + total * add;
  *all_peak = top;
}

}  // namespace tandem
