// Up to 32 rows by a panel, in the matrix unit of Intel processors.
//
// bfloat16: one chain of steps, whose order is not that of AVX-512, so single rows take it too, which costs nothing: 5.65
// ms instead of 5.85 for a decode step of a 135M model (Xeon, 8 cores). int8 and int4: exact sums of a group, so the
// bits are those of every other tile.
#pragma once
#include "amx.hpp"
#include "tile.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
namespace tandem {

inline constexpr int kAmxAheadWords = 2048;
inline constexpr int kAmxWords = kAmxUnits * kPanel;  // of a panel in a step
inline constexpr int kAmxLeastRows = 4;  // int8 and int4: fewer are faster without

// Fetches the weights that come next, a part in every step: a single block of rows those a little ahead, of several each
// its share of the panel that comes next.
class AmxFetch {
 public:
  AmxFetch(const Geometry& shape, int rows, const uint32_t* words, const Pass& pass, int step_words)
      : ahead_(pass.blocks == 1 ? words + kAmxAheadWords : pass.next + shape.panel_words / pass.blocks * pass.block),
        lines_((step_words / 16 + pass.blocks - 1) / pass.blocks),
        is_near_(pass.blocks == 1 && rows > kAmxRows) {}

  // A quarter of a step's. To the first cache if it is used soon and steps are long: 3 % faster for 32 rows, 5 % slower
  // for 8.
  __attribute__((always_inline)) void quarter(int i) {
    for (int end = lines_ * (i + 1) / 4; line_ < end; line_++, ahead_ += 16)
      is_near_ ? __builtin_prefetch(ahead_, 0, 3) : __builtin_prefetch(ahead_, 0, 2);
    if (i == 3) line_ = 0;
  }

 private:
  const uint32_t* ahead_;
  const int lines_;
  const bool is_near_;
  int line_ = 0;
};

// Rows in tiles (rows.hpp) times a panel, to `sums` [rows][32].
//
// Where a thread has a core to itself loads and products overlap: a step takes 27 ns, 36 with both operands in the second
// cache (Xeon of 2.7 GHz). Elsewhere a product takes 16 ns and a load 11 to 20, one after the other in every order.
static void amx_multiply_bf16(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words,
                              const Pass& pass, AmxTiles& tiles, float* sums) {
  const bool both = rows > kAmxRows;
  const uint32_t* lower = x + static_cast<size_t>(kAmxRows) * shape.row_words;
  AmxFetch fetch(shape, rows, words, pass, kAmxWords);
  const auto meanwhile = [&](int i) __attribute__((always_inline)) { fetch.quarter(i); };
  tiles.shape(rows);
  amx_zero(both);
  for (int u = 0; u < shape.units; u += kAmxUnits) {
    amx_step<AmxProduct::bf16>(x, lower, kAmxUnits, words, kPanel, both, meanwhile);
    x += kAmxTileWords;
    lower += kAmxTileWords;
    words += kAmxWords;
  }
  amx_store(sums, kPanel, both);
}

TANDEM_INLINE void amx_unpack_int4(const uint32_t* words, uint32_t* codes) {
  for (int i = 0; i < kInt4Words; i += kLanes) {
    VecBits both = load_bits(words + i), low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
    std::memcpy(codes + i, &low, sizeof(low));
    std::memcpy(codes + kInt4Words + i, &high, sizeof(high));
  }
}

// Groups whose exact sums are kept until they are added. Four at a time int8 takes 0.86 to 0.98 of the time that it takes
// one by one, int4, whose codes are unpacked besides, 1.1 to 1.3.
template <Format format>
inline constexpr int kAmxGroups = format == Format::int8 ? 4 : 1;

// Adds the exact sums [count][rows][32] of groups from `first` on to `sums` [rows][32], in order.
template <Format format>
static void amx_add_groups(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, int first, int count,
                           const int32_t* exact, float* sums) {
  for (int v = 0; v < kPanelVecs; v++, exact += kLanes, sums += kLanes) {
    Vec weights[kAmxGroups<format>];
    for (int g = 0; g < count; g++) weights[g] = group_weights<format>(words + g * kGroupWords<format>, v);
    const uint32_t *scale = x + shape.units + first, *begin = scale + shape.groups;
    for (int m = 0; m < rows; m++, scale += shape.row_words, begin += shape.row_words) {
      Vec total = first == 0 ? Vec{} : load(sums + m * kPanel);
      for (int g = 0; g < count; g++) {
        VecInt sum;
        std::memcpy(&sum, exact + (g * kAmxBlock + m) * kPanel, sizeof(sum));
        total = add_group<format>(total, sum + (VecInt)splat_bits(begin[g]), (Vec)splat_bits(scale[g]), weights[g]);
      }
      store(sums + m * kPanel, total);
    }
  }
}

template <Format format>
static void amx_multiply_groups(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words,
                                const Pass& pass, AmxTiles& tiles, float* sums) {
  constexpr int kWords = kGroupWords<format>;
  const bool both = rows > kAmxRows;
  alignas(64) int32_t exact[kAmxGroups<format>][kAmxBlock * kPanel];
  alignas(64) uint32_t codes[kAmxWords];
  AmxFetch fetch(shape, rows, words, pass, kWords);
  const auto meanwhile = [&](int i) __attribute__((always_inline)) { fetch.quarter(i); };
  tiles.shape(rows);
  for (int first = 0; first < shape.groups; first += kAmxGroups<format>) {
    const int count = std::min(kAmxGroups<format>, shape.groups - first);
    const uint32_t* block = words + first * kWords;
    for (int g = 0; g < count; g++) {
      const uint32_t *group = block + g * kWords, *upper = x + (first + g) * kGroupUnits;
      if constexpr (format == Format::int4) amx_unpack_int4(group, codes);
      amx_zero(both);
      amx_step<AmxProduct::int8>(upper, upper + kAmxRows * shape.row_words, shape.row_words,
                                 format == Format::int4 ? codes : group, kPanel, both, meanwhile);
      amx_store(exact[g], kPanel, both);
    }
    amx_add_groups<format>(shape, rows, x, block, first, count, exact[0], sums);
  }
}

}  // namespace tandem
#endif
