// Attention's inner loops over a tile of keys and values.
#pragma once
#include "kv_tile.hpp"
#include "unroll.hpp"

namespace tandem {

inline constexpr int kScoreVecs = 4;  // vectors that accumulate a row's scores, or a part of its output
inline constexpr int kRowBlock = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;

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

// The products of so many rows of a head, from `row` on, with the tile that `s` holds, which has `count` keys.
template <bool paired>
struct TileProducts {
  AttentionScratch& s;
  int rows, head_dim;

  // query times keys -> scores
  void score(int row, int count) {
    constexpr int kStep = kScoreVecs * kLanes;
    const int units = paired ? (head_dim + 1) / 2 : head_dim, columns = (count + kStep - 1) / kStep * kStep;
    for_row_blocks(rows, [&](auto count_of, int r) {
      score_rows<paired, count_of()>(&s.query[(row + r) * s.dim], s.dim, s.keys.data(), units, columns,
                                     &s.scores[r * kTileKeys]);
    });
  }

  // out += weights times values
  void weigh(int row, int count) {
    const int units = paired ? (count + 1) / 2 : count;
    for_row_blocks(rows, [&](auto count_of, int r) {
      weigh_rows<paired, count_of()>(&s.scores[r * kTileKeys], s.values.data(), units, s.dim, &s.out[(row + r) * s.dim]);
    });
  }
};

}  // namespace tandem
