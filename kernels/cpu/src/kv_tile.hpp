// A tile of 64 cached keys and values, brought into the form that attention's inner loops want.
//
// Two forms. Plain: float32, keys [dim][64], values [64][dim]. Paired, where the processor multiplies pairs of bfloat16
// and the cache holds nothing wider: keys [dim / 2][64] words of two neighbouring dimensions, values [32][dim] words of
// two neighbouring keys; 8-bit integers are exact in bfloat16, their scales are applied to scores and weights.
#pragma once
#include <algorithm>

#include "kv_layer.hpp"
#include "memory.hpp"

namespace tandem {

inline constexpr int kTileKeys = 64;

#if defined(__AVX512BF16__)
template <KvType type>
inline constexpr bool kPaired = type != KvType::f32;
#else
template <KvType type>
inline constexpr bool kPaired = false;
#endif

// Dimensions are padded to whole tiles of registers: 32 of them are 16 pairs.
TANDEM_INLINE int padded_dim(int head_dim) { return (head_dim + 31) / 32 * 32; }

// Where the rows of up to 64 neighbouring positions lie, those of the first of some heads; the others' follow each.
struct TileRows {
  int count = 0;
  int64_t row_bytes = 0, heads_bytes = 0;
  const uint8_t *key[kTileKeys], *value[kTileKeys];

  void find(const KvLayer& kv, const int32_t* table, int head, int heads, int first, int keys) {
    count = keys;
    row_bytes = kv.row_bytes();
    heads_bytes = heads * row_bytes;
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
};

// Asks for a tile's rows in their order, little by little while another tile is worked on: the hardware does not foresee
// the blocks of a table, and all at once would hold up the work.
class Ahead {
 public:
  static constexpr int kAll = 2 * kTileKeys;

  explicit Ahead(const TileRows& tile) : tile_(tile) {}
  // Up to so many of its keys and then values.
  void ask(int rows) {
    for (; asked_ < rows; asked_++) {
      const int i = asked_ % kTileKeys;
      if (i >= tile_.count) continue;
      const uint8_t* row = asked_ < kTileKeys ? tile_.key[i] : tile_.value[i];
      for (int64_t byte = 0; byte < tile_.heads_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
  }

 private:
  const TileRows& tile_;
  int asked_ = 0;
};

// Rows of an item, heads one after the other. Owned by a thread and reused.
struct AttentionScratch {
  int dim = 0;                 // padded
  Lines<float> query;          // [rows][dim], or words of pairs in its first half
  Lines<float> keys, values;   // words, if paired
  Lines<float> key_scales, value_scales;
  Lines<float> scores;         // [rows of a head][64]; after softening the weights, in words of pairs if paired
  Lines<float> peak, total, out;              // of the current split
  Lines<float> all_peak, all_total, all_out;  // of all splits so far
  std::vector<int> visible;                   // keys of a tile to the rows of a head
  TileRows tiles[2], after;  // where a tile's rows are and the next one's, in turn; the first of another item
  int turn = 0;

  void reserve(int rows, int head_dim) {
    dim = padded_dim(head_dim);
    size_t flat = static_cast<size_t>(rows) * dim;
    for (auto* part : {&query, &out, &all_out}) part->resize(flat);
    for (auto* part : {&peak, &total, &all_peak, &all_total}) part->resize((rows + kLanes - 1) / kLanes * kLanes);
    keys.resize(static_cast<size_t>(kTileKeys) * dim);
    values.resize(static_cast<size_t>(kTileKeys) * dim);
    key_scales.resize(kTileKeys);
    value_scales.resize(kTileKeys);
    scores.resize(static_cast<size_t>(rows) * kTileKeys);
    visible.resize(rows);
  }
};

TANDEM_INLINE uint32_t* words(Lines<float>& floats) { return reinterpret_cast<uint32_t*>(floats.data()); }

template <KvType type>
inline constexpr int kElements = type == KvType::bf16 ? 2 * kLanes : kLanes;  // of a vector of `load_words`
// A vector of a row from element `d` on, zeros past its end: float32, or words of bfloat16 pairs.
template <KvType type>
TANDEM_INLINE Vec load_words(const uint8_t* row, int d, int head_dim) {
  const int rest = std::min(head_dim - d, kElements<type>);
  if constexpr (type == KvType::i8) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes codes{};
    if (rest == kLanes)  // of a size that the compiler knows
      std::memcpy(&codes, row + d, kLanes);
    else if (rest > 0)
      std::memcpy(&codes, row + d, rest);
    return __builtin_convertvector(__builtin_convertvector(codes, VecInt), Vec) * row_scale(row, head_dim);
  } else {
    constexpr int kBytes = sizeof(Vec) / kElements<type>;
    if (rest == kElements<type>) return load(reinterpret_cast<const float*>(row + kBytes * d));
    Vec words{};
    if (rest > 0) std::memcpy(&words, row + kBytes * d, kBytes * rest);
    return words;
  }
}

// Loads the rows `offset` bytes behind those of `rows`. Missing keys are zeros; their scores are masked. `on_rows` is told
// how many keys and values were loaded.
template <KvType type>
static void load_plain(const TileRows& rows, int64_t offset, int head_dim, AttentionScratch& s, auto on_rows) {
  const int dim = s.dim, count = rows.count;
  for (int group = 0; group < count; group += kLanes) {
    float* keys = &s.keys[group];
    for (int d = 0; d < dim; d += kElements<type>) {
      Vec square[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        square[lane] = group + lane < count ? load_words<type>(rows.key[group + lane] + offset, d, head_dim) : Vec{};
      transpose(square);
      for (int i = 0; i < kLanes; i++, keys += kTileKeys) {
        if constexpr (type == KvType::bf16) {
          store(keys, (Vec)((VecBits)square[i] << 16));
          keys += kTileKeys;
          square[i] = (Vec)((VecBits)square[i] & 0xffff0000u);
        }
        store(keys, square[i]);
      }
    }
    for (int key = group; key < std::min(group + kLanes, count); key++) {
      on_rows(2 * key + 2);
      read_row<type>(rows.value[key] + offset, head_dim, &s.values[key * dim]);
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
static void load_paired(const TileRows& rows, int64_t offset, int head_dim, AttentionScratch& s, auto on_rows) {
  const int dim = s.dim, count = rows.count;
  uint32_t *keys = words(s.keys), *values = words(s.values);
  for (int group = 0; group < count; group += kLanes)
    for (int d = 0; d < dim; d += 32) {
      Vec square[kLanes];
      if (d == 0) on_rows(group + kLanes);
      for (int lane = 0; lane < kLanes; lane++)
        square[lane] = group + lane < count ? (Vec)load_pairs<type>(rows.key[group + lane] + offset, d, head_dim) : Vec{};
      transpose(square);
      for (int i = 0; i < kLanes; i++) store((float*)&keys[(d / 2 + i) * kTileKeys + group], square[i]);
    }
  const __m512i low = (__m512i)(__v32hi){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int key = 0; key < count; key += 2) {
    on_rows(kTileKeys + key + 2);
    for (int d = 0; d < dim; d += 32) {
      __m512i even = load_pairs<type>(rows.value[key] + offset, d, head_dim);
      __m512i odd = key + 1 < count ? load_pairs<type>(rows.value[key + 1] + offset, d, head_dim) : _mm512_setzero_si512();
      uint32_t* to = values + key / 2 * dim + d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
  for (int unit = (count + 1) / 2; unit % 16 != 0; unit++) std::fill_n(values + unit * dim, dim, 0);
  if constexpr (type == KvType::i8)
    for (int key = 0; key < kTileKeys; key++) {
      s.key_scales[key] = key < count ? row_scale(rows.key[key] + offset, head_dim) : 0.0f;
      s.value_scales[key] = key < count ? row_scale(rows.value[key] + offset, head_dim) : 0.0f;
    }
}
#endif

// Head `head` of `heads` of a tile; with all of them all of `ahead` is asked for.
template <KvType type>
TANDEM_INLINE void load_tile(const TileRows& rows, int head, int heads, int head_dim, AttentionScratch& s, Ahead& ahead) {
  const auto on_rows = [&](int loaded) __attribute__((always_inline)) {
    ahead.ask((head * Ahead::kAll + loaded) / heads);
  };
#if defined(__AVX512BF16__)
  if constexpr (kPaired<type>)
    load_paired<type>(rows, head * rows.row_bytes, head_dim, s, on_rows);
  else
#endif
    load_plain<type>(rows, head * rows.row_bytes, head_dim, s, on_rows);
  on_rows(Ahead::kAll);
}

}  // namespace tandem
