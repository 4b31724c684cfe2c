// Rounds weights to int8 or int4 while they are packed, bit for bit as kernels/quantization.py specifies.
#pragma once
#include "rows.hpp"

namespace tandem {

// Wide copy of `count` weights of a row, zeros behind them up to whole groups.
TANDEM_INLINE void widen_row(const void* weight, Type type, int64_t at, int count, float* out) {
  int i = 0;
  if (type == Type::f32) {
    std::memcpy(out, static_cast<const float*>(weight) + at, sizeof(float) * count);
    i = count;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(weight) + at;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load_wide(from + i));
    for (; i < count; i++) out[i] = widen(from[i]);
  }
  for (; i % kGroup; i++) out[i] = 0;
}

// round(x / scale), clamped to [-most - 1, most].
TANDEM_INLINE void round_codes(const float* x, int count, float scale, int most, int8_t* codes) {
  const float divisor = scale == 0 ? 1.0f : scale;
  for (int i = 0; i < count; i += kLanes) {
    VecInt code = nearest(load(x + i) / divisor);
    code = code > most ? VecInt{} + most : code;
    code = code < -most - 1 ? VecInt{} - most - 1 : code;
    store_bytes(codes + i, code);
  }
}

// One output of int8: codes [groups * 64] and its scale.
TANDEM_INLINE float quantize_int8(const float* x, int padded, int8_t* codes) {
  Vec peaks{};
  for (int i = 0; i < padded; i += kLanes) {
    Vec v = load(x + i);
    peaks = max(peaks, max(v, -v));
  }
  const float scale = largest(peaks) / 127.0f;
  round_codes(x, padded, scale, 127, codes);
  return scale;
}

// One group of int4; the first weight of the largest magnitude lands on -8.
TANDEM_INLINE uint16_t quantize_int4(const float* x, int8_t* codes) {
  float peak = 0;
  for (int i = 0; i < kGroup; i++) peak = std::fabs(x[i]) > std::fabs(peak) ? x[i] : peak;
  const uint16_t scale = to_bf16(peak / -8.0f);
  round_codes(x, kGroup, widen(scale), 7, codes);
  return scale;
}

}  // namespace tandem
