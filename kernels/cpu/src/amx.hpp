// The matrix unit of Intel processors (AMX): the shapes of its tiles, and the step that every product here is made of.
//
// A step multiplies up to 32 rows by a tile's depth of 16 words of them and adds to 32 columns of sums. It is the same
// chain of steps for one row as for 32, so rows keep their bits in every batch; the order within a step is the unit's own.
#pragma once
#include <algorithm>

#include "vec.hpp"

namespace tandem {

inline constexpr int kAmxRows = 16;
inline constexpr int kAmxBlock = 2 * kAmxRows;  // rows, and columns, of a step
inline constexpr int kAmxUnits = 16;            // of a step: words of bfloat16 pairs or int8 quadruples
inline constexpr int kAmxTileWords = kAmxRows * kAmxUnits;

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Shapes of the thread's tiles: 0 1 / 2 3 sums of the upper and lower rows by both halves of the columns, 4 / 5 rows of
// x, 6 7 halves of the columns. Released with the object, so that an idle thread carries no tile state.
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

// Tile instructions do not tell the compiler what they read and write.
TANDEM_INLINE void amx_fence() { asm volatile("" : : : "memory"); }

// Sums are [rows][pitch] floats or int32; `both`: there are lower rows.
TANDEM_INLINE void amx_zero(bool both) {
  amx_fence();
  _tile_zero(0);
  _tile_zero(1);
  if (!both) return;
  _tile_zero(2);
  _tile_zero(3);
}

TANDEM_INLINE void amx_resume(const float* sums, long pitch, bool both) {
  amx_fence();
  _tile_loadd(0, sums, pitch * 4);
  _tile_loadd(1, sums + 16, pitch * 4);
  if (!both) return;
  _tile_loadd(2, sums + kAmxRows * pitch, pitch * 4);
  _tile_loadd(3, sums + kAmxRows * pitch + 16, pitch * 4);
}

TANDEM_INLINE void amx_store(void* sums, long pitch, bool both) {
  float* at = static_cast<float*>(sums);
  _tile_stored(0, at, pitch * 4);
  _tile_stored(1, at + 16, pitch * 4);
  if (both) {
    _tile_stored(2, at + kAmxRows * pitch, pitch * 4);
    _tile_stored(3, at + kAmxRows * pitch + 16, pitch * 4);
  }
  amx_fence();
}

// A step: 16 words each of upper and lower rows by 16 rows of 32 columns of words. Loads stand among products, so that the
// unit is not idle while tiles come from the second cache; `meanwhile(i)` is called four times, i from 0 on, where the
// core has time for requests to memory: all at once they would take the loads' places. A model's step of 32 rows takes
// 0.88 of the time, of 512 0.94 to 1.01 (Xeon, 2 cores).
enum class AmxProduct { bf16, int8 };  // int8: rows signed, columns not
template <AmxProduct product>
TANDEM_INLINE void amx_step(const void* upper, const void* lower, long x_pitch, const void* columns, long pitch, bool both,
                            auto meanwhile) {
#define TANDEM_AMX_ADD(sums, x, columns)        \
  if constexpr (product == AmxProduct::int8)    \
    _tile_dpbsud(sums, x, columns);             \
  else                                          \
    _tile_dpbf16ps(sums, x, columns)
  _tile_loadd(6, columns, pitch * 4);
  _tile_loadd(4, upper, x_pitch * 4);
  TANDEM_AMX_ADD(0, 4, 6);
  meanwhile(0);
  if (both) {
    _tile_loadd(5, lower, x_pitch * 4);
    TANDEM_AMX_ADD(2, 5, 6);
  }
  meanwhile(1);
  _tile_loadd(7, static_cast<const uint32_t*>(columns) + 16, pitch * 4);
  TANDEM_AMX_ADD(1, 4, 7);
  meanwhile(2);
  if (both) {
    TANDEM_AMX_ADD(3, 5, 7);
  }
  meanwhile(3);
#undef TANDEM_AMX_ADD
}
#endif

}  // namespace tandem
