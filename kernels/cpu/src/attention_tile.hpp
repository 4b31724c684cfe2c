// A tile of 64 cached keys and values, in the form that the inner loops want, and those loops.
//
// Two forms. Plain: float32, keys [dim][64], values [64][dim]. Paired, where the processor multiplies pairs of bfloat16
// and the cache holds nothing wider: keys [dim / 2][64] words of two neighbouring dimensions, values [32][dim] words of
// two neighbouring keys; 8-bit integers are exact in bfloat16, their scales are applied to scores and weights.
#pragma once
#include <algorithm>

#include "kv_layer.hpp"
#include "memory.hpp"
#include "unroll.hpp"

namespace tandem {

inline constexpr int kTileKeys = 64;
inline constexpr int kScoreVecs = 4;  // vectors that accumulate a row's scores, or a part of its output
inline constexpr int kRowBlock = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;

#if defined(__AVX512BF16__)
template <KvType type>
inline constexpr bool kPaired = type != KvType::f32;
#else
template <KvType type>
inline constexpr bool kPaired = false;
#endif

// Dimensions are padded to whole tiles of registers: 32 of them are 16 pairs.
TANDEM_INLINE int padded_dim(int head_dim) { return (head_dim + 31) / 32 * 32; }

// Where the rows of up to 64 neighbouring positions lie.
struct TileRows {
  int count = 0;
  int64_t row_bytes = 0;
  const uint8_t *key[kTileKeys], *value[kTileKeys];

  void find(const KvLayer& kv, const int32_t* table, int head, int first, int keys) {
    count = keys;
    row_bytes = kv.row_bytes();
    const int64_t pitch = kv.kv_heads * row_bytes;
    for (int key_index = 0; key_index < count;) {
      int position = first + key_index, slot = position % kv.block_size;
      const uint8_t* k = kv.row(table[position / kv.block_size], 0, slot, head);
      const uint8_t* v = kv.row(table[position / kv.block_size], 1, slot, head);
      for (; slot < kv.block_size && key_index < count; slot++, key_index++, k += pitch, v += pitch) {
        key[key_index] = k;
        value[key_index] = v;
      }
    }
  }

  // Asks for rows [from, to), as far as there are any: the hardware does not foresee the blocks of a table.
  void prefetch(const uint8_t* const* rows, int from, int to) const {
    for (int i = from; i < std::min(to, count); i++)
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(rows[i] + byte, 0, 2);
  }
  void prefetch_from(int first) const {
    prefetch(key, first, kTileKeys);
    prefetch(value, first, kTileKeys);
  }
};

// Rows of one KV head, one run of query tokens. Owned by a thread and reused.
struct AttentionScratch {
  int dim = 0;                       // padded
  Lines<float> query;          // [rows][dim], or words of pairs in its first half
  Lines<float> keys, values;   // words, if paired
  Lines<float> square;         // rows to be transposed
  Lines<float> key_scales, value_scales;
  Lines<float> scores;         // [rows][64]; after softening the weights, in words of pairs if paired
  Lines<float> peak, total, out;              // of the current split
  Lines<float> all_peak, all_total, all_out;  // of all splits so far
  TileRows tiles[2], after;  // where a tile's rows are and the next one's, in turn; the first of another item
  int turn = 0;

  void reserve(int rows, int head_dim) {
    dim = padded_dim(head_dim);
    size_t flat = static_cast<size_t>(rows) * dim;
    for (auto* part : {&query, &out, &all_out}) part->resize(flat);
    for (auto* part : {&peak, &total, &all_peak, &all_total}) part->resize(rows);
    keys.resize(static_cast<size_t>(kTileKeys) * dim);
    values.resize(static_cast<size_t>(kTileKeys) * dim);
    square.resize(static_cast<size_t>(kLanes) * dim);
    key_scales.resize(kTileKeys);
    value_scales.resize(kTileKeys);
    scores.resize(static_cast<size_t>(rows) * kTileKeys);
  }
};

TANDEM_INLINE uint32_t* words(Lines<float>& floats) { return reinterpret_cast<uint32_t*>(floats.data()); }

// Missing keys are zeros; their scores are masked. A row that is taken asks for the one in its place in the tile `ahead`:
// more at once would hold up the work.
template <KvType type>
static void load_plain(const TileRows& rows, const TileRows& ahead, int head_dim, AttentionScratch& s) {
  const int dim = s.dim, count = rows.count;
  float* square = s.square.data();
  for (int group = 0; group < count; group += kLanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      int key = group + lane;
      float* to = square + lane * dim;
      ahead.prefetch(ahead.key, key, key + 1);
      ahead.prefetch(ahead.value, key, key + 1);
      if (key < count)
        read_row<type>(rows.key[key], head_dim, to), read_row<type>(rows.value[key], head_dim, &s.values[key * dim]);
      else
        std::memset(to, 0, sizeof(float) * head_dim);
    }
    for (int d = 0; d < dim; d += kLanes) {
      Vec vecs[kLanes];
      for (int lane = 0; lane < kLanes; lane++) vecs[lane] = load(square + lane * dim + d);
      transpose(vecs);
      for (int i = 0; i < kLanes; i++) store(&s.keys[static_cast<size_t>(d + i) * kTileKeys + group], vecs[i]);
    }
  }
}

#if defined(__AVX512BF16__)
// 32 elements from `d` on as bfloat16, zeros past the end.
template <KvType type>
TANDEM_INLINE __m512i load_pairs(const uint8_t* row, int d, int head_dim) {
  __mmask32 mask = d + 32 <= head_dim ? ~0u : (1u << (head_dim - d)) - 1;
  if constexpr (type == KvType::bf16) {
    return _mm512_maskz_loadu_epi16(mask, row + 2 * d);
  } else {
    __m256i raw = _mm256_maskz_loadu_epi8(mask, row + d);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(raw)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(raw, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
}

template <KvType type>
static void load_paired(const TileRows& rows, const TileRows& ahead, int head_dim, AttentionScratch& s) {
  const int dim = s.dim, count = rows.count;
  uint32_t *keys = words(s.keys), *values = words(s.values);
  for (int group = 0; group < count; group += kLanes)
    for (int d = 0; d < dim; d += 32) {
      Vec square[kLanes];
      if (d == 0) ahead.prefetch(ahead.key, group, group + kLanes);
      for (int lane = 0; lane < kLanes; lane++)
        square[lane] = group + lane < count ? (Vec)load_pairs<type>(rows.key[group + lane], d, head_dim) : Vec{};
      transpose(square);
      for (int i = 0; i < kLanes; i++) store((float*)&keys[(d / 2 + i) * kTileKeys + group], square[i]);
    }
  const __m512i low = (__m512i)(__v32hi){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int key = 0; key < count; key += 2) {
    ahead.prefetch(ahead.value, key, key + 2);
    for (int d = 0; d < dim; d += 32) {
      __m512i even = load_pairs<type>(rows.value[key], d, head_dim);
      __m512i odd = key + 1 < count ? load_pairs<type>(rows.value[key + 1], d, head_dim) : _mm512_setzero_si512();
      uint32_t* to = values + key / 2 * dim + d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
  for (int unit = (count + 1) / 2; unit % 16 != 0; unit++) std::fill_n(values + unit * dim, dim, 0);
  if constexpr (type == KvType::i8)
    for (int key = 0; key < kTileKeys; key++) {
      s.key_scales[key] = key < count ? row_scale(rows.key[key], head_dim) : 0.0f;
      s.value_scales[key] = key < count ? row_scale(rows.value[key], head_dim) : 0.0f;
    }
}
#endif

template <KvType type>
TANDEM_INLINE void load_tile(const TileRows& rows, const TileRows& ahead, int head_dim, AttentionScratch& s) {
  ahead.prefetch_from((rows.count + kLanes - 1) / kLanes * kLanes);
#if defined(__AVX512BF16__)
  if constexpr (kPaired<type>) return load_paired<type>(rows, ahead, head_dim, s);
#endif
  load_plain<type>(rows, ahead, head_dim, s);
}

// sum += a * b of float32, or of pairs of bfloat16; `b` is one word for all lanes.
template <bool paired>
TANDEM_INLINE void accumulate(Vec& sum, Vec a, float b) {
#if defined(__AVX512BF16__)
  if constexpr (paired) {
    uint32_t word;
    std::memcpy(&word, &b, 4);
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(word));
    return;
  }
#endif
  add_product(sum, a, splat(b));
}

// scores [kRows][64] of queries [kRows][query_pitch]; `units` words each.
template <bool paired, int kRows>
static void score_rows(const float* query, int query_pitch, const float* keys, int units, int columns, float* scores) {
  for (int column = 0; column < columns; column += kScoreVecs * kLanes) {
    Vec acc[kRows][kScoreVecs] = {};
    const float* key = keys + column;
    for (int u = 0; u < units; u++, key += kTileKeys)
      over_tile<kRows, kScoreVecs>(
          TANDEM_TILE_WORK { accumulate<paired>(acc[m][v], load(key + v * kLanes), query[m * query_pitch + u]); });
    over_tile<kRows, kScoreVecs>(
        TANDEM_TILE_WORK { store(scores + m * kTileKeys + column + v * kLanes, acc[m][v]); });
  }
}

// out [kRows][dim] += weights [kRows][64] times values; `units` keys or pairs of keys.
template <bool paired, int kRows, int kVecs>
TANDEM_INLINE void weigh_part(const float* weights, const float* values, int units, int dim, float* out) {
  Vec acc[kRows][kVecs];
  over_tile<kRows, kVecs>(TANDEM_TILE_WORK { acc[m][v] = load(out + m * dim + v * kLanes); });
  for (int j = 0; j < units; j++, values += dim)
    over_tile<kRows, kVecs>(
        TANDEM_TILE_WORK { accumulate<paired>(acc[m][v], load(values + v * kLanes), weights[m * kTileKeys + j]); });
  over_tile<kRows, kVecs>(TANDEM_TILE_WORK { store(out + m * dim + v * kLanes, acc[m][v]); });
}

template <bool paired, int kRows>
static void weigh_rows(const float* weights, const float* values, int units, int dim, float* out) {
  int d = 0;
  for (; d + kScoreVecs * kLanes <= dim; d += kScoreVecs * kLanes)
    weigh_part<paired, kRows, kScoreVecs>(weights, values + d, units, dim, out + d);
  for (; d < dim; d += kLanes) weigh_part<paired, kRows, 1>(weights, values + d, units, dim, out + d);
}

// Calls `work` with (number of rows as a constant, first row) for blocks of kRowBlock rows and a smaller rest.
template <int kRows = kRowBlock, typename Work>
TANDEM_INLINE void for_row_blocks(int rows, Work work, int row = 0) {
  for (; row + kRows <= rows; row += kRows) work(std::integral_constant<int, kRows>{}, row);
  if constexpr (kRows > 1) for_row_blocks<kRows - 1>(rows, work, row);
}

// The products of a run of rows with the tile that `s` holds, which has `count` keys.
template <bool paired>
struct TileProducts {
  AttentionScratch& s;
  int rows, head_dim;

  // query times keys -> scores
  void score(int count) {
    constexpr int kStep = kScoreVecs * kLanes;
    const int units = paired ? (head_dim + 1) / 2 : head_dim, columns = (count + kStep - 1) / kStep * kStep;
    for_row_blocks(rows, [&](auto count_of, int r) {
      score_rows<paired, count_of()>(&s.query[r * s.dim], s.dim, s.keys.data(), units, columns, &s.scores[r * kTileKeys]);
    });
  }

  // out += weights times values
  void weigh(int count) {
    const int units = paired ? (count + 1) / 2 : count;
    for_row_blocks(rows, [&](auto count_of, int r) {
      weigh_rows<paired, count_of()>(&s.scores[r * kTileKeys], s.values.data(), units, s.dim, &s.out[r * s.dim]);
    });
  }
};

}  // namespace tandem
