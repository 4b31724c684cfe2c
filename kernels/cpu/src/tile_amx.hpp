// Tiles of up to 32 rows by the matrix unit of Intel processors (AMX).
//
// bfloat16: a step of the chain is a tile of 16 units, for one row as for 32, so rows keep their bits in every batch. The
// order is not that of AVX-512, and serves a single row too, which costs nothing: 5.65 ms instead of 5.85 for a decode
// step of a 135M model (Xeon, 8 cores). int8 and int4: exact sums of a group, so the bits are those of every other tile.
#pragma once
#include "tile.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
namespace tandem {

inline constexpr int kAmxRows = 16;
inline constexpr int kAmxBlock = 2 * kAmxRows;
inline constexpr int kAmxUnits = 16;  // of a tile, bfloat16 pairs or int8 quadruples
inline constexpr int kAmxWords = kAmxUnits * kPanel;
inline constexpr int kAmxAheadWords = 2048;
inline constexpr int kAmxLeastRows = 4;  // int8 and int4: fewer are faster without

// Shapes of the thread's tiles: 0 1 / 2 3 sums of the upper and lower rows by both halves of a panel, 4 / 5 rows of x,
// 6 7 halves of the panel. Released with the object, so that an idle thread carries no tile state.
class AmxTiles {
 public:
  ~AmxTiles() { _tile_release(); }

  void shape(int rows) {
    const int upper = std::min(rows, kAmxRows), lower = rows > kAmxRows ? rows - kAmxRows : kAmxRows;
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
      const uint16_t bytes = 64;
      std::memcpy(config + 16 + 2 * tile, &bytes, 2);
      const bool is_lower = tile == 2 || tile == 3 || tile == 5;
      config[48 + tile] = static_cast<uint8_t>(tile >= 6 ? kAmxUnits : is_lower ? lower : upper);
    }
    asm volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }

 private:
  int upper_ = 0, lower_ = 0;
};

TANDEM_INLINE void amx_zero(bool both) {
  _tile_zero(0);
  _tile_zero(1);
  if (!both) return;
  _tile_zero(2);
  _tile_zero(3);
}

TANDEM_INLINE void amx_store(void* sums, bool both) {
  constexpr long kStride = kPanel * 4;
  float* at = static_cast<float*>(sums);
  _tile_stored(0, at, kStride);
  _tile_stored(1, at + 16, kStride);
  if (!both) return;
  _tile_stored(2, at + kAmxRows * kPanel, kStride);
  _tile_stored(3, at + kAmxRows * kPanel + 16, kStride);
}

TANDEM_INLINE void amx_load(const uint32_t* x, size_t row_words, const uint32_t* words, bool both) {
  _tile_loadd(4, x, row_words * 4);
  if (both) _tile_loadd(5, x + kAmxRows * row_words, row_words * 4);
  _tile_loadd(6, words, kPanel * 4);
  _tile_loadd(7, words + 16, kPanel * 4);
}

static void amx_multiply_bf16(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, bool stream,
                              AmxTiles& tiles, float* sums) {
  const bool both = rows > kAmxRows;
  tiles.shape(rows);
  amx_zero(both);
  for (int u = 0; u < shape.units; u += kAmxUnits, words += kAmxWords) {
    if (stream)
      for (int line = 0; line < kAmxWords; line += 16) __builtin_prefetch(words + kAmxAheadWords + line);
    amx_load(x + u, shape.row_words, words, both);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) continue;
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  amx_store(sums, both);
}

TANDEM_INLINE void amx_unpack_int4(const uint32_t* words, uint32_t* codes) {
  for (int i = 0; i < kInt4Words; i += kLanes) {
    VecBits both = load_bits(words + i), low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
    std::memcpy(codes + i, &low, sizeof(low));
    std::memcpy(codes + kInt4Words + i, &high, sizeof(high));
  }
}

template <Format format>
static void amx_multiply_groups(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, bool stream,
                                AmxTiles& tiles, float* sums) {
  constexpr int kWords = kGroupWords<format>;
  const bool both = rows > kAmxRows;
  alignas(64) int32_t exact[kAmxBlock * kPanel];
  alignas(64) uint32_t codes[kAmxWords];
  tiles.shape(rows);
  for (int i = 0; i < rows * kPanel; i += kLanes) store(sums + i, Vec{});
  for (int g = 0; g < shape.groups; g++, words += kWords) {
    if (stream)
      for (int line = 0; line < kWords; line += 16) __builtin_prefetch(words + kAmxAheadWords + line);
    if constexpr (format == Format::int4) amx_unpack_int4(words, codes);
    asm volatile("" : : : "memory");  // tile instructions do not tell the compiler what they read
    amx_zero(both);
    amx_load(x + g * kGroupUnits, shape.row_words, format == Format::int4 ? codes : words, both);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (both) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    amx_store(exact, both);
    for (int m = 0; m < rows; m++) {
      const uint32_t* row = x + static_cast<size_t>(m) * shape.row_words;
      const VecInt begin = (VecInt)splat_bits(row[shape.units + shape.groups + g]);
      const Vec scale = (Vec)splat_bits(row[shape.units + g]);
      for (int v = 0; v < kPanelVecs; v++) {
        VecInt sum;
        std::memcpy(&sum, exact + m * kPanel + v * kLanes, sizeof(sum));
        add_group<format>(sums + m * kPanel + v * kLanes, sum + begin, scale,
                          group_weights<format>(words, v));
      }
    }
  }
}

}  // namespace tandem
#endif
