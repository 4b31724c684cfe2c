// Choosing tokens: greedy, or a draw from the softmax, whole or cut by top-k, top-p and min-p.
//
// The noise is that of shared/engine/noise.py: SplitMix64 over (seed, choice, position, token), its top 31 bits as Gumbel
// noise, so a draw is the argmax of logit + noise. Logarithms differ from torch's in the last bits, nothing else does.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "logprobs.hpp"

namespace tandem {

// Mirrored by `SampleRow` in token_sampler.py.
struct SampleRow {
  uint64_t seed, choice, position;
  double top_p;               // 1: off
  float temperature, min_p;   // temperature 0: greedy; min_p 0: off
  int64_t top_k;              // 0: off
};

inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kFirst = 0xBF58476D1CE4E5B9u, kSecond = 0x94D049BB133111EBu;
inline constexpr float kMinTemperature = 1e-6f;
inline constexpr float kLargestNoise = 22.5f;   // of 31 bits: -log(2^-32), about 22.2
inline constexpr float kNear[] = {4.0f, 8.0f, 16.0f};  // candidates looked at first: so far below the likeliest
inline constexpr size_t kMaxNear = 4096;
inline constexpr size_t kFewCandidates = 256;

TANDEM_INLINE uint64_t scramble(uint64_t state) {
  uint64_t z = state + kGolden;
  z = (z ^ z >> 30) * kFirst;
  z = (z ^ z >> 27) * kSecond;
  return z ^ z >> 31;
}

TANDEM_INLINE uint64_t noise_key(const SampleRow& row) {
  return scramble(scramble(scramble(row.seed) + row.choice) + row.position);
}

// Uniform in (0, 1) from the top 31 bits of token `token`'s output.
TANDEM_INLINE float uniform(uint64_t key, int64_t token) {
  uint64_t z = key + (static_cast<uint64_t>(token) + 1) * kGolden;
  z = (z ^ z >> 30) * kFirst;
  z = (z ^ z >> 27) * kSecond;
  float value = (static_cast<float>(static_cast<int32_t>(z >> 33)) + 0.5f) * 0x1p-31f;
  return value < 1.0f - 0x1p-24f ? value : 1.0f - 0x1p-24f;
}

TANDEM_INLINE float gumbel(uint64_t key, int64_t token) { return -std::log(-std::log1p(-uniform(key, token))); }

// The first of the largest, 0 if nothing is more than -infinity. Only the block that holds it is searched one by one.
TANDEM_INLINE int64_t largest_index(const float* x, int64_t count) {
  constexpr int64_t kBlock = 1024;
  float peak = -INFINITY;
  int64_t at = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    Vec top = splat(-INFINITY);
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) top = max(top, load(x + i));
    float highest = largest(top);
    for (; i < end; i++) highest = x[i] > highest ? x[i] : highest;
    if (highest > peak) peak = highest, at = first;
  }
  for (int64_t i = at; i < count; i++)
    if (x[i] == peak) return i;
  return 0;
}

struct Candidate {
  float value;
  int32_t token;
};

// One thread's working memory.
class TokenSampler {
 public:
  // `logits` [vocab] is overwritten by its quotient with the temperature.
  int64_t sample(const SampleRow& row, float* logits, int64_t vocab) {
    if (row.temperature == 0.0f) return largest_index(logits, vocab);
    const float temperature = std::max(row.temperature, kMinTemperature);
    for (int64_t i = 0; i < vocab; i++) logits[i] /= temperature;
    const int64_t likeliest = largest_index(logits, vocab);
    const uint64_t key = noise_key(row);
    if (row.top_k <= 0 && row.top_p >= 1.0 && row.min_p <= 0.0f) return draw(logits, vocab, likeliest, key);
    return draw_cut(row, logits, vocab, logits[likeliest], key);
  }

 private:
  // A token's noise reaches d only if its uniform number is at most e^-d (u <= -log(1 - u)), which is quickly seen; the
  // few that pass are computed in full.
  static int64_t draw(const float* logits, int64_t vocab, int64_t likeliest, uint64_t key) {
    constexpr int64_t kBlock = 64;
    int64_t best = likeliest;
    float best_score = logits[best] + gumbel(key, best);
    alignas(64) float numbers[kBlock], bounds[kBlock];
    for (int64_t first = 0; first < vocab; first += kBlock) {
      const int count = static_cast<int>(std::min(kBlock, vocab - first));
      Vec top = splat(-INFINITY);
      std::memcpy(bounds, logits + first, sizeof(float) * count);
      for (int i = count; i < kBlock; i++) bounds[i] = -INFINITY;
      for (int i = 0; i < kBlock; i += kLanes) top = max(top, load(bounds + i));
      if (largest(top) + kLargestNoise < best_score) continue;
      for (int i = 0; i < kBlock; i++) numbers[i] = uniform(key, first + i);
      for (int i = 0; i < kBlock; i += kLanes) store(bounds + i, exp(load(bounds + i) - best_score) * 1.001f);
      for (int i = 0; i < count; i++) {
        if (numbers[i] > bounds[i]) continue;
        float score = logits[first + i] + gumbel(key, first + i);
        if (score > best_score || (score == best_score && first + i < best)) best = first + i, best_score = score;
      }
    }
    return best;
  }

  int64_t draw_cut(const SampleRow& row, const float* logits, int64_t vocab, float likeliest, uint64_t key) {
    const double everything = exp_sum(logits, vocab, likeliest);
    float threshold;
    for (float distance : kNear) {
      if (!collect(logits, vocab, likeliest - distance)) break;
      if (settled(row, everything, likeliest - distance, threshold, false)) return best_of(threshold, key);
    }
    if (near_.size() > kMaxNear && vocab > static_cast<int64_t>(kFewCandidates)) {
      take_all(logits, vocab);
      std::nth_element(near_.begin(), near_.begin() + kFewCandidates, near_.end(), likelier);
      near_.resize(kFewCandidates);
      float least = near_[0].value;
      for (const Candidate& c : near_) least = std::min(least, c.value);
      if (settled(row, everything, least, threshold, true)) return best_of(threshold, key);
    }
    take_all(logits, vocab);
    settled(row, everything, -INFINITY, threshold, false);
    return best_of(threshold, key);
  }

  // All tokens of `floor` or more; false if there are too many.
  bool collect(const float* logits, int64_t vocab, float floor) {
    near_.clear();
    int64_t first = 0;
    for (; first < vocab && near_.size() <= kMaxNear; first += 64) {
      int64_t end = std::min<int64_t>(first + 64, vocab), i = first;
      Vec top = splat(-INFINITY);
      for (; i + kLanes <= end; i += kLanes) top = max(top, load(logits + i));
      float peak = largest(top);
      for (; i < end; i++) peak = std::max(peak, logits[i]);
      if (peak < floor) continue;
      for (i = first; i < end; i++)
        if (logits[i] >= floor) near_.push_back({logits[i], static_cast<int32_t>(i)});
    }
    return near_.size() <= kMaxNear;
  }

  void take_all(const float* logits, int64_t vocab) {
    near_.resize(vocab);
    for (int64_t i = 0; i < vocab; i++) near_[i] = {logits[i], static_cast<int32_t>(i)};
  }

  static bool likelier(const Candidate& a, const Candidate& b) { return a.value > b.value; }

  // Finds the smallest logit kept. False if it may lie below `near_`, which holds every token of `floor` or more (of
  // more than `floor`, if `is_open`).
  bool settled(const SampleRow& row, double everything, float floor, float& threshold, bool is_open) {
    std::sort(near_.begin(), near_.end(), likelier);
    const int64_t count = static_cast<int64_t>(near_.size());
    if (floor != -INFINITY && row.top_k > count) return false;
    const float likeliest = near_[0].value;
    float by_count = row.top_k > 0 ? near_[std::min(row.top_k, count) - 1].value : -INFINITY;
    float by_ratio = likeliest + std::log(row.min_p), by_mass = -INFINITY;
    if (row.top_p < 1.0) {
      double total = everything, mass = 0;
      if (row.top_k > 0) {
        total = 0;
        for (const Candidate& c : near_)
          if (c.value >= by_count) total += std::exp(static_cast<double>(c.value - likeliest));
      }
      size_t kept = 0;
      for (; kept < near_.size() && near_[kept].value >= by_count; kept++) {
        if (kept > 0 && mass >= row.top_p * total) break;
        mass += std::exp(static_cast<double>(near_[kept].value - likeliest));
      }
      // Else the nucleus may go on below. Where it is just `near_`, it does not: a confident model's is one token.
      if (kept < near_.size() || mass >= row.top_p * total) by_mass = near_[kept - 1].value;
    }
    threshold = std::max({by_count, by_mass, by_ratio});
    return floor == -INFINITY || (is_open ? threshold > floor : threshold >= floor);
  }

  int64_t best_of(float threshold, uint64_t key) const {
    int64_t best = near_[0].token;
    float best_score = -INFINITY;
    for (const Candidate& c : near_) {
      if (c.value < threshold) break;
      float score = c.value + gumbel(key, c.token);
      if (score > best_score) best = c.token, best_score = score;
    }
    return best;
  }

  std::vector<Candidate> near_;
};

}  // namespace tandem
