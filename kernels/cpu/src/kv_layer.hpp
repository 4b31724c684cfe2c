// One layer of the KV arena and how a head's keys or values are stored in it.
//
//     row of one head:   float32 [head_dim]  |  bfloat16 [head_dim]  |  int8 [head_dim], float32 scale
//
// The scale of an 8-bit row lies in the row, so a block stays one contiguous run of bytes with everything in it.
#pragma once
#include "vec.hpp"

namespace tandem {

enum class KvType : int { f32 = 0, bf16 = 1, i8 = 2 };

// [num_blocks, 2, block_size, kv_heads, row_bytes], blocks `block_stride` bytes apart.
struct KvLayer {
  uint8_t* base;
  int64_t block_stride;
  int block_size, kv_heads, head_dim;
  KvType type;

  int64_t row_bytes() const {
    return type == KvType::f32 ? 4 * head_dim : type == KvType::bf16 ? 2 * head_dim : head_dim + 4;
  }
  uint8_t* row(int64_t block, int is_value, int slot, int head) const {
    return base + block * block_stride +
           ((static_cast<int64_t>(is_value) * block_size + slot) * kv_heads + head) * row_bytes();
  }
};

// q = round(x * (127 / max |x|)), the scale max |x| / 127; a row of zeros has scale 0.
TANDEM_INLINE void quantise_row(const float* from, int head_dim, uint8_t* to) {
  Vec peaks{};
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) peaks = max(max(load(from + d), -load(from + d)), peaks);  // 0 of zeros, not -0
  float peak = largest(peaks);
  for (; d < head_dim; d++) peak = std::fmax(peak, std::fabs(from[d]));
  const float scale = peak / 127.0f, inverse = peak > 0 ? 127.0f / peak : 0.0f;
  int8_t* codes = reinterpret_cast<int8_t*>(to);
  for (d = 0; d + kLanes <= head_dim; d += kLanes)
    store_bytes(codes + d, nearest(load(from + d) * inverse));
  for (; d < head_dim; d++) codes[d] = static_cast<int8_t>(std::rint(from[d] * inverse));
  std::memcpy(to + head_dim, &scale, 4);
}

TANDEM_INLINE void write_head(const KvLayer& kv, int64_t slot, int is_value, int head, const float* from) {
  uint8_t* to = kv.row(slot / kv.block_size, is_value, static_cast<int>(slot % kv.block_size), head);
  if (kv.type == KvType::f32) {
    std::memcpy(to, from, sizeof(float) * kv.head_dim);
  } else if (kv.type == KvType::bf16) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    int d = 0;
    for (; d + kLanes <= kv.head_dim; d += kLanes) store_bf16(halves + d, load(from + d));
    for (; d < kv.head_dim; d++) halves[d] = to_bf16(from[d]);
  } else {
    quantise_row(from, kv.head_dim, to);
  }
}

TANDEM_INLINE float row_scale(const uint8_t* row, int head_dim) {
  float scale;
  std::memcpy(&scale, row + head_dim, 4);
  return scale;
}

// A stored row as float32; the tail up to a multiple of kLanes is left alone.
template <KvType type>
TANDEM_INLINE void read_row(const uint8_t* row, int head_dim, float* to) {
  if constexpr (type == KvType::f32) {
    std::memcpy(to, row, sizeof(float) * head_dim);
  } else if constexpr (type == KvType::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row);
    int d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load_wide(from + d));
    for (; d < head_dim; d++) to[d] = widen(from[d]);
  } else {
    float scale = row_scale(row, head_dim);
    for (int d = 0; d < head_dim; d++) to[d] = static_cast<float>(static_cast<int8_t>(row[d])) * scale;
  }
}

}  // namespace tandem
