// Causal grouped-query attention over the paged cache, decode rows and prefill chunks alike.
//
// Keys are visited in tiles of 64 that start at position 0, so a row's online softmax takes the same steps however the
// prompt was chunked. A tile of keys is transposed once and then serves all rows of a KV head.
#pragma once
#include <algorithm>
#include <vector>

#include "linear.hpp"

namespace tandem {

inline constexpr int kTileKeys = 64;
inline constexpr int kTileRows = 32;   // query rows that share a transposed tile, if the group is not larger
inline constexpr int kScoreVecs = 4;   // accumulators per row
inline constexpr int kRowBlock = kLanes == 16 ? 4 : 2;

// One layer of the arena: [num_blocks, 2, block_size, kv_heads, head_dim], blocks `block_stride` elements apart.
struct KvLayer {
  void* base;
  int64_t block_stride;
  int block_size, kv_heads, head_dim;
  Type type;

  int64_t offset(int64_t block, int is_value, int slot, int head) const {
    return block * block_stride + ((static_cast<int64_t>(is_value) * block_size + slot) * kv_heads + head) * head_dim;
  }
};

struct Batch {
  int num_tokens, num_sequences, table_width;
  const int64_t *positions, *slots;
  const int32_t *tables, *query_start, *seq_lens;
};

TANDEM_INLINE void write_head(const KvLayer& kv, int64_t slot, int is_value, int head, const float* from) {
  int64_t at = kv.offset(slot / kv.block_size, is_value, static_cast<int>(slot % kv.block_size), head);
  for (int d = 0; d < kv.head_dim; d++) {
    if (kv.type == Type::f32)
      static_cast<float*>(kv.base)[at + d] = from[d];
    else
      static_cast<uint16_t*>(kv.base)[at + d] = to_bf16(from[d]);
  }
}

// Rows of one KV head, one run of query tokens. Owned by a thread and reused.
struct AttentionScratch {
  std::vector<float> query, keys, scores, values, out, peak, total;

  void reserve(int rows, int head_dim) {
    size_t dim = (head_dim + kLanes - 1) / kLanes * kLanes;
    query.resize(rows * dim);
    out.resize(rows * dim);
    keys.resize(kTileKeys * dim);
    values.resize(kTileKeys * dim);
    scores.resize(static_cast<size_t>(rows) * kTileKeys);
    peak.resize(rows);
    total.resize(rows);
  }
};

template <typename T>
TANDEM_INLINE void copy_head(const T* from, int head_dim, float* to) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load_wide(from + d));
  for (; d < head_dim; d++) to[d] = widen(from[d]);
}

// Keys become [dim][64], values [64][dim], float32; a tile's missing keys repeat its last one and are masked.
template <typename T>
static void load_tile(const KvLayer& kv, const int32_t* table, int head, int first, int count, int dim,
                      AttentionScratch& s) {
  const T* base = static_cast<const T*>(kv.base);
  float rows[kLanes * 512];
  for (int group = 0; group < count; group += kLanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      int key = group + lane < count ? group + lane : count - 1;
      int position = first + key, block = position / kv.block_size, slot = position % kv.block_size;
      copy_head(base + kv.offset(table[block], 0, slot, head), kv.head_dim, rows + lane * dim);
      if (group + lane < count)
        copy_head(base + kv.offset(table[block], 1, slot, head), kv.head_dim, &s.values[static_cast<size_t>(key) * dim]);
    }
    for (int d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
      for (int lane = 0; lane < kLanes; lane++) square[lane] = load(rows + lane * dim + d);
      transpose(square);
      for (int i = 0; i < kLanes; i++) store(&s.keys[static_cast<size_t>(d + i) * kTileKeys + group], square[i]);
    }
  }
}

template <int kRows>
static void score_rows(const float* query, const float* keys, int head_dim, int dim, float* scores) {
  for (int column = 0; column < kTileKeys; column += kScoreVecs * kLanes) {
    Vec acc[kRows][kScoreVecs] = {};
    for (int d = 0; d < head_dim; d++)
      for (int v = 0; v < kScoreVecs; v++) {
        Vec key = load(keys + d * kTileKeys + column + v * kLanes);
        for (int m = 0; m < kRows; m++) acc[m][v] += key * query[m * dim + d];
      }
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kScoreVecs; v++) store(scores + m * kTileKeys + column + v * kLanes, acc[m][v]);
  }
}

// Turns a row's scores into weights relative to the new peak and rescales what was summed so far.
TANDEM_INLINE void soften(AttentionScratch& s, int row, int visible, int dim) {
  float* scores = &s.scores[static_cast<size_t>(row) * kTileKeys];
  for (int j = visible > 0 ? visible : 0; j < kTileKeys; j++) scores[j] = -INFINITY;
  if (visible <= 0) {
    std::memset(scores, 0, sizeof(float) * kTileKeys);
    return;
  }
  Vec top = load(scores);
  for (int j = kLanes; j < kTileKeys; j += kLanes) top = max(top, load(scores + j));
  float before = s.peak[row], peak = largest(top);
  peak = peak > before ? peak : before;
  Vec sums{};
  for (int j = 0; j < kTileKeys; j += kLanes) {
    Vec score = load(scores + j);
    Vec weight = exp(score - peak);
    weight = score > splat(-INFINITY) ? weight : Vec{};
    store(scores + j, weight);
    sums += weight;
  }
  if (peak != before) {
    float shrink = exp(splat(before - peak))[0];
    s.total[row] *= shrink;
    float* out = &s.out[static_cast<size_t>(row) * dim];
    for (int d = 0; d < dim; d += kLanes) store(out + d, load(out + d) * shrink);
  }
  s.peak[row] = peak;
  s.total[row] += sum(sums);
}

template <int kRows>
static void weigh_rows(const float* weights, const float* values, int count, int dim, float* out) {
  for (int d = 0; d < dim; d += kLanes) {
    Vec acc[kRows];
    for (int m = 0; m < kRows; m++) acc[m] = load(out + m * dim + d);
    for (int j = 0; j < count; j++) {
      Vec value = load(values + static_cast<size_t>(j) * dim + d);
      for (int m = 0; m < kRows; m++) acc[m] += value * weights[m * kTileKeys + j];
    }
    for (int m = 0; m < kRows; m++) store(out + m * dim + d, acc[m]);
  }
}

// `rows` rows of query, [tokens][group]; the first token sits at `position`. Leaves normalised rows in s.out.
template <typename T>
static void attend(const KvLayer& kv, const int32_t* table, int head, int rows, int group, int position, int dim,
                   AttentionScratch& s) {
  std::fill(s.out.begin(), s.out.end(), 0.0f);
  std::fill(s.peak.begin(), s.peak.end(), -INFINITY);
  std::fill(s.total.begin(), s.total.end(), 0.0f);
  int length = position + (rows - 1) / group + 1;
  for (int first = 0; first < length; first += kTileKeys) {
    int count = length - first < kTileKeys ? length - first : kTileKeys;
    load_tile<T>(kv, table, head, first, count, dim, s);
    auto each_block = [&](auto whole, auto single) {
      int row = 0;
      for (; row + kRowBlock <= rows; row += kRowBlock) whole(row);
      for (; row < rows; row++) single(row);
    };
    float *query = s.query.data(), *scores = s.scores.data(), *out = s.out.data();
    const float *keys = s.keys.data(), *values = s.values.data();
    each_block(
        [&](int r) { score_rows<kRowBlock>(query + r * dim, keys, kv.head_dim, dim, scores + r * kTileKeys); },
        [&](int r) { score_rows<1>(query + r * dim, keys, kv.head_dim, dim, scores + r * kTileKeys); });
    for (int row = 0; row < rows; row++) {
      int visible = position + row / group + 1 - first;
      soften(s, row, visible < count ? visible : count, dim);
    }
    each_block([&](int r) { weigh_rows<kRowBlock>(scores + r * kTileKeys, values, count, dim, out + r * dim); },
               [&](int r) { weigh_rows<1>(scores + r * kTileKeys, values, count, dim, out + r * dim); });
  }
  for (int row = 0; row < rows; row++) {
    float inverse = 1.0f / s.total[row];
    for (int d = 0; d < kv.head_dim; d++) s.out[static_cast<size_t>(row) * dim + d] *= inverse;
  }
}

// This rank's share of the batch. `query` is [T] rows `query_stride` apart of [heads][head_dim] float32;
// `out` [T][heads][head_dim].
static void paged_attention(const KvLayer& kv, const Batch& batch, const float* query, int64_t query_stride,
                            int num_heads, float scale, float* out, int rank, int size, AttentionScratch& s) {
  int group = num_heads / kv.kv_heads, dim = (kv.head_dim + kLanes - 1) / kLanes * kLanes;
  int run = kTileRows / group > 0 ? kTileRows / group : 1, item = 0;
  s.reserve(run * group, kv.head_dim);
  for (int seq = 0; seq < batch.num_sequences; seq++) {
    int begin = batch.query_start[seq], end = batch.query_start[seq + 1];
    for (int token = begin; token < end; token += run)
      for (int head = 0; head < kv.kv_heads; head++) {
        if (item++ % size != rank) continue;
        int tokens = end - token < run ? end - token : run;
        for (int r = 0; r < tokens * group; r++) {
          const float* from = query + (token + r / group) * query_stride + (head * group + r % group) * kv.head_dim;
          for (int d = 0; d < kv.head_dim; d++) s.query[static_cast<size_t>(r) * dim + d] = from[d] * scale;
        }
        const int32_t* table = batch.tables + static_cast<int64_t>(seq) * batch.table_width;
        int position = batch.seq_lens[seq] - (end - token);
        if (kv.type == Type::f32)
          attend<float>(kv, table, head, tokens * group, group, position, dim, s);
        else
          attend<uint16_t>(kv, table, head, tokens * group, group, position, dim, s);
        for (int r = 0; r < tokens * group; r++)
          std::memcpy(out + (static_cast<int64_t>(token + r / group) * num_heads + head * group + r % group) * kv.head_dim,
                      &s.out[static_cast<size_t>(r) * dim], sizeof(float) * kv.head_dim);
      }
  }
}

}  // namespace tandem
