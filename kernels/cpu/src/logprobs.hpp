// Log-probabilities of a row of logits: of one token, and the likeliest ones.
//
// The sum is of float32 exponentials, added in float32 over a few hundred tokens and in float64 beyond: its error does not
// grow with the vocabulary. A row's bits depend on nothing but its logits.
#pragma once
#include <algorithm>
#include <cstring>

#include "vec.hpp"

namespace tandem {

inline constexpr int64_t kSumBlock = 512;
inline constexpr int64_t kTopBlock = 64;

// Sum of e^(x - peak), where `peak` is the largest.
inline double exp_sum(const float* x, int64_t count, float peak) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kSumBlock) {
    const int64_t end = std::min(first + kSumBlock, count);
    Vec sums{};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) sums += exp(load(x + i) - peak);
    if (i < end) {
      alignas(64) float rest[kLanes];
      for (int lane = 0; lane < kLanes; lane++) rest[lane] = i + lane < end ? x[i + lane] - peak : -INFINITY;
      const Vec last = exp(load(rest));
      for (int lane = 0; i + lane < end; lane++) sums[lane] += last[lane];
    }
    total += sum(sums);
  }
  return total;
}

// The `wanted` largest in falling order, the lower index first where some are equal; fills what there is if that is less.
inline void take_largest(const float* x, int64_t count, int wanted, int32_t* indices, float* values) {
  int found = 0;
  float least = -INFINITY;  // of those taken, once all places are
  auto look_at = [&](int64_t i) {
    if (found == wanted && !(x[i] > least)) return;
    int at = found < wanted ? found++ : wanted - 1;
    for (; at > 0 && x[i] > values[at - 1]; at--) values[at] = values[at - 1], indices[at] = indices[at - 1];
    values[at] = x[i], indices[at] = static_cast<int32_t>(i);
    if (found == wanted) least = values[wanted - 1];
  };
  if (wanted <= 0) return;
  for (int64_t first = 0; first < count; first += kTopBlock) {
    const int64_t end = std::min(first + kTopBlock, count);
    if (found == wanted && end - first == kTopBlock) {
      Vec top = load(x + first);
      for (int i = kLanes; i < kTopBlock; i += kLanes) top = max(top, load(x + first + i));
      if (!(largest(top) > least)) continue;
    }
    for (int64_t i = first; i < end; i++) look_at(i);
  }
}

// `chosen` receives token `token`'s log-probability, `ids` and `tops` those of the `wanted` likeliest, falling.
inline void log_probabilities(const float* logits, int64_t vocab, int64_t token, int wanted, float* chosen, int32_t* ids,
                              float* tops) {
  int32_t likeliest;
  float peak;
  take_largest(logits, vocab, 1, &likeliest, &peak);
  take_largest(logits, vocab, wanted, ids, tops);
  const float total = peak + static_cast<float>(std::log(exp_sum(logits, vocab, peak)));
  *chosen = logits[token] - total;
  for (int i = 0; i < wanted; i++) tops[i] -= total;
}

}  // namespace tandem
