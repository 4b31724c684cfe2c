// The products of attention in the matrix unit of Intel processors, 32 rows by 32 keys or dimensions at a time.
//
// A row's sums are one chain of steps of 32 dimensions, or 32 keys, whoever shares its tiles: the bits are the same for a
// token that is decoded as for one in a long prompt.
#pragma once
#include "amx.hpp"
#include "attention_tile.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
namespace tandem {

template <>
struct TileProducts<true> {
  AttentionScratch& s;
  int rows, head_dim;
  AmxTiles tiles = {};

  void score(int first, int count) {
    over_blocks([&](int row, bool both) {
      const float* query = &s.query[(first + row) * s.dim];
      for (int key = 0; key < count; key += kAmxBlock) {
        amx_zero(both);
        for (int u = 0; u < s.dim / 2; u += kAmxUnits)
          step(query + u, s.dim, &s.keys[u * kTileKeys + key], kTileKeys, both);
        amx_store(&s.scores[row * kTileKeys + key], kTileKeys, both);
      }
    });
  }

  void weigh(int first, int count) {
    over_blocks([&](int row, bool both) {
      const float* weights = &s.scores[row * kTileKeys];
      for (int d = 0; d < s.dim; d += kAmxBlock) {
        float* out = &s.out[(first + row) * s.dim + d];
        amx_resume(out, s.dim, both);
        for (int u = 0; u < (count + 1) / 2; u += kAmxUnits)
          step(weights + u, kTileKeys, &s.values[u * s.dim + d], s.dim, both);
        amx_store(out, s.dim, both);
      }
    });
  }

 private:
  template <typename Work>
  void over_blocks(Work work) {
    for (int row = 0; row < rows; row += kAmxBlock) {
      const int count = std::min(rows - row, kAmxBlock);
      tiles.shape(count);
      work(row, count > kAmxRows);
    }
  }

  TANDEM_INLINE void step(const float* upper, long upper_pitch, const float* columns, long pitch, bool both) {
    amx_step<AmxProduct::bf16>(upper, upper + kAmxRows * upper_pitch, upper_pitch, columns, pitch, both, [](int) {});
  }
};

}  // namespace tandem
#endif
