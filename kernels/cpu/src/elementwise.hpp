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

TANDEM_INLINE Vec silu_times(Vec gate, Vec up) { return gate / (exp(-gate) + 1.0f) * up; }

// silu(x[0:width]) * x[width:2*width]; a short tail is padded, so that every element sees the same arithmetic.
TANDEM_INLINE void silu_and_mul(const float* x, int width, float* out) {
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, silu_times(load(x + i), load(x + width + i)));
  if (i == width) return;
  float gate[kLanes] = {}, up[kLanes] = {}, result[kLanes];
  std::memcpy(gate, x + i, sizeof(float) * (width - i));
  std::memcpy(up, x + width + i, sizeof(float) * (width - i));
  store(result, silu_times(load(gate), load(up)));
  std::memcpy(out + i, result, sizeof(float) * (width - i));
}

// Half-split order, in place; `cos_sin` is the position's row: cosines, then sines.
TANDEM_INLINE void rotate(float* head, const float* cos_sin, int head_dim) {
  int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    float a = head[i], b = head[half + i], c = cos_sin[i], s = cos_sin[half + i];
    head[i] = a * c - b * s;
    head[half + i] = b * c + a * s;
  }
}

}  // namespace tandem
