// What happens to one row at a time: normalisation, gated activation, rotary embedding.
#pragma once
#include "vec.hpp"

namespace tandem {

// x / sqrt(mean(x^2) + eps) * weight
TANDEM_INLINE void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
  Vec squares{};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec v = load(x + i);
    squares = fused(v, v, squares);
  }
  float total = sum(squares);
  for (; i < width; i++) total += x[i] * x[i];
  float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for (i = 0; i + kLanes <= width; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < width; i++) out[i] = x[i] * scale * weight[i];
}

// Below -80 a gate lets less than 1e-32 through.
TANDEM_INLINE Vec silu_times(Vec gate, Vec up) { return gate * inverse(exp(min(-gate, splat(80.0f))) + 1.0f) * up; }

// silu(gate) * up; a short tail is padded, so that every element sees the same arithmetic. `out` may be `gate`.
TANDEM_INLINE void silu_and_mul(const float* gate, const float* up, int width, float* out) {
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, silu_times(load(gate + i), load(up + i)));
  if (i == width) return;
  float rest[kLanes] = {}, factors[kLanes] = {}, result[kLanes];
  std::memcpy(rest, gate + i, sizeof(float) * (width - i));
  std::memcpy(factors, up + i, sizeof(float) * (width - i));
  store(result, silu_times(load(rest), load(factors)));
  std::memcpy(out + i, result, sizeof(float) * (width - i));
}

// Half-split order, in place; `cos_sin` is the position's row: cosines, then sines.
TANDEM_INLINE void rotate(float* head, const float* cos_sin, int head_dim) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(head + i), b = load(head + half + i), c = load(cos_sin + i), s = load(cos_sin + half + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = head[i], b = head[half + i], c = cos_sin[i], s = cos_sin[half + i];
    head[i] = a * c - b * s;
    head[half + i] = b * c + a * s;
  }
}

}  // namespace tandem
