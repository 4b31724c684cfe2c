// Tiles of a few rows by a part of a panel, in vectors. The sums of a group are exact; everything else is one chain per
// output, in the order of the inputs, however rows and units are cut into tiles and blocks.
//
// A block of a panel's units stays in the first cache while all rows pass over it, a tile of rows at a time, whose sums
// stay in registers. Each fetches its share of the next block; few rows are done with a block before it could arrive, so
// their blocks are shorter, or they fetch nearer ahead.
#pragma once
#include "dot.hpp"
#include "rows.hpp"
#include "team.hpp"
#include "unroll.hpp"

namespace tandem {

// Of the blocks of rows that pass over a panel, each of which computes the whole of it.
struct Pass {
  int block, blocks;
  const uint32_t *next, *after;  // the panel that the rows come to later, and the very next one

  bool is_first() const { return block == 0; }
};

// Rows of a tile and vectors of sums that it has, by what the registers hold beside weights and inputs.
struct TileLimits {
  int rows, sums;
};
template <Format format>
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline constexpr TileLimits kTile{8, 16};
#elif defined(__AVX2__)
inline constexpr TileLimits kTile = format == Format::int8 ? TileLimits{8, 8} : TileLimits{6, 12};
#elif defined(__aarch64__)
inline constexpr TileLimits kTile{6, 24};
#else
inline constexpr TileLimits kTile{4, 8};
#endif

// Vectors of a panel that a tile of so many rows takes at a time.
template <Format format>
constexpr int tile_vecs(int rows) {
  int vecs = kPanelVecs;
  while (vecs > 1 && vecs * rows > kTile<format>.sums) vecs /= 2;
  return vecs;
}

inline constexpr int kBlockUnits = 128;
inline constexpr int kBlockGroups = kBlockUnits / kGroupUnits;
inline constexpr int kBlockRows = 96;  // share a pass over a panel
// Up to so many rows take float32 and bfloat16 in short blocks. In AVX2 8 rows of bfloat16 take 0.88 of the time that
// they take in long ones, 16 rows 0.96, 32 rows 1.02; in AVX-512 32 rows 1.09 (Zen 4).
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kShortBlockRows = 24;
#else
inline constexpr int kShortBlockRows = 0;
#endif
inline constexpr int kShortBlockUnits = 32;
// Words that few rows fetch ahead. What the processor foresees by itself ends with a page of 4 KiB: on a Zen 3, asking a
// whole page ahead reads slower than not asking (13 to 17 GB/s of one core's 17 to 21), 1 KiB ahead near the roof. In
// AVX-512 on a Zen 4 it is the same from 512 bytes to 8 KiB, but for int4's short panels: up to two rows 0.93 to 0.95 of
// the time, eight 1.04. Processors with AMX were measured with a page only.
template <Format format>
constexpr int near_words(int rows) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(__AMX_INT8__)
  return format == Format::int4 && rows <= 4 ? 256 : 1024;
#elif defined(__AVX512F__) && defined(__AVX512BW__)
  return 1024;
#else
  return 256;
#endif
}

// What a pass over units asks for: nothing, what it comes to itself a little later, or the block that comes next, of
// which other passes ask for the rest.
enum class Fetch { none, near, share };
// Of the block that comes next: where a share begins, and the words from one turn's line to that of the next.
struct Share {
  const uint32_t* at;
  int step;
};
template <Fetch kFetch, int kVecs, int kNear>
TANDEM_INLINE void prefetch_unit(const uint32_t* words, Share& share) {
  if constexpr (kFetch == Fetch::near)
    for (int line = 0; line < kVecs * kLanes; line += 16) __builtin_prefetch(words + kNear + line);
  if constexpr (kFetch == Fetch::share) {
    __builtin_prefetch(share.at);
    share.at += share.step;
  }
}

template <Format format, int part, int kRows, int kVecs>
TANDEM_INLINE void multiply_part(const uint32_t* x, size_t row_words, const uint32_t* words, Vec (&acc)[kRows][kVecs]) {
  over_tile<kRows, kVecs>(TANDEM_TILE_WORK {
    multiply_add<format, part>(acc[m][v], load_bits(words + v * kLanes), x[m * row_words + part]);
  });
}

// Adds `units` of float32 or bfloat16 to `sums` [kRows][32].
template <Format format, int kRows, int kVecs, Fetch kFetch>
static void multiply_units(const uint32_t* x, size_t row_words, const uint32_t* words, int units, Share share,
                           float* sums) {
  Vec acc[kRows][kVecs];
  over_tile<kRows, kVecs>(TANDEM_TILE_WORK { acc[m][v] = load(sums + m * kPanel + v * kLanes); });
  for (int u = 0; u < units; u++, words += kPanel, x += kUnitWords<format>) {
    prefetch_unit<kFetch, kVecs, near_words<format>(kRows)>(words, share);
    multiply_part<format, 0>(x, row_words, words, acc);
    if constexpr (kUnitWords<format> == 2) multiply_part<format, 1>(x, row_words, words, acc);
  }
  over_tile<kRows, kVecs>(TANDEM_TILE_WORK { store(sums + m * kPanel + v * kLanes, acc[m][v]); });
}

template <Format format>
inline constexpr int kGroupWords = format == Format::int8 ? kGroupUnits * kPanel : kInt4GroupWords;
template <Format format>
inline constexpr bool kIsGrouped = format == Format::int8 || format == Format::int4;
// Turns of the innermost loop for a group, or for a unit of formats that have none.
template <Format format>
inline constexpr int kTurns = format == Format::int8 ? kGroupUnits : format == Format::int4 ? kGroupUnits / 2 : 1;

// The weights' scales of a group, where a format has them.
template <Format format>
TANDEM_INLINE Vec group_weights(const uint32_t* words, int v) {
  if constexpr (format == Format::int4)
    return load_wide(reinterpret_cast<const uint16_t*>(words + kInt4Words) + v * kLanes);
  return splat(1.0f);
}

// Adds a group's exact sums to the total of a row; `factor` is the scale of its activations.
template <Format format>
TANDEM_INLINE Vec add_group(Vec total, VecInt exact, Vec factor, Vec weights) {
  Vec scaled = __builtin_convertvector(exact, Vec);
  return format == Format::int4 ? fused(scaled * factor, weights, total) : fused(scaled, factor, total);
}

// The exact sums of one group.
template <Format format, int kRows, int kVecs, Fetch kFetch>
TANDEM_INLINE void multiply_group(const uint32_t* x, size_t row_words, const uint32_t* words, Share& share,
                                  VecInt (&acc)[kRows][kVecs]) {
  constexpr bool is_int8 = format == Format::int8;
  for (int u = 0; u < kTurns<format>; u++, words += kPanel, x++) {
    prefetch_unit<kFetch, kVecs, near_words<format>(kRows)>(words, share);
    over_tile<kRows, kVecs>(TANDEM_TILE_WORK {
      VecBits weight = load_bits(words + v * kLanes);
      dot_bytes<!is_int8>(acc[m][v], is_int8 ? weight : weight & 0x0f0f0f0fu, x[m * row_words]);
    });
    if constexpr (!is_int8)
      over_tile<kRows, kVecs>(TANDEM_TILE_WORK {
        VecBits weight = (load_bits(words + v * kLanes) >> 4) & 0x0f0f0f0fu;
        dot_bytes<true>(acc[m][v], weight, x[m * row_words + kGroupUnits / 2]);
      });
  }
}

// Adds groups [first, end) of int8 or int4 to `sums` [kRows][32], of which vector `at` is the first.
template <Format format, int kRows, int kVecs, Fetch kFetch>
static void multiply_groups(const Geometry& geometry, const uint32_t* x, const uint32_t* words, int at, int first,
                            int end, Share share, float* sums) {
  const size_t row_words = geometry.row_words;
  const uint32_t *codes = x + first * kGroupUnits, *scale = x + geometry.units + first, *begin = scale + geometry.groups;
  sums += at * kLanes;
  for (int g = first; g < end; g++, words += kGroupWords<format>, codes += kGroupUnits, scale++, begin++) {
    if constexpr (format == Format::int4 && kFetch == Fetch::near)
      __builtin_prefetch(words + kInt4Words + near_words<format>(kRows));
    VecInt acc[kRows][kVecs];
    over_tile<kRows, kVecs>(TANDEM_TILE_WORK { acc[m][v] = (VecInt)splat_bits(begin[m * row_words]); });
    multiply_group<format, kRows, kVecs, kFetch>(codes, row_words, words + at * kLanes, share, acc);
    over_tile<kRows, kVecs>(TANDEM_TILE_WORK {
      float* total = sums + m * kPanel + v * kLanes;
      store(total, add_group<format>(load(total), whole_sum<format == Format::int4>(acc[m][v]),
                                     (Vec)splat_bits(scale[m * row_words]), group_weights<format>(words, at + v)));
    });
  }
}

// A block of a panel for kRows rows; its units or groups are [first, end). `share` is the tile's, of all its passes.
template <Format format, int kRows, Fetch kFetch>
static void multiply_tile(const Geometry& shape, const uint32_t* x, const uint32_t* words, int first, int end,
                          Share share, float* sums) {
  constexpr int kVecs = tile_vecs<format>(kRows), kPasses = kPanelVecs / kVecs;
  share.step = (share.step + kPasses - 1) / kPasses;
  for (int v = 0; v < kPanelVecs; v += kVecs, share.at += (end - first) * kTurns<format> * share.step) {
    if constexpr (kIsGrouped<format>)
      multiply_groups<format, kRows, kVecs, kFetch>(shape, x, words, v, first, end, share, sums);
    else
      multiply_units<format, kRows, kVecs, kFetch>(x + first * kUnitWords<format>, shape.row_words, words + v * kLanes,
                                                   end - first, share, sums + v * kLanes);
  }
}

template <Format format, Fetch kFetch, int kRows = kTile<format>.rows>
static void multiply_rows(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, int first, int end,
                          Share share, float* sums) {
  constexpr bool is_whole = tile_vecs<format>(kRows) == kPanelVecs;
  constexpr bool occurs = kFetch == Fetch::near ? is_whole : !is_whole || kRows >= kTile<format>.rows / 2;
  if constexpr (occurs)  // as `multiply_panel` calls it; what does not occur is not compiled
    if (rows == kRows) return multiply_tile<format, kRows, kFetch>(shape, x, words, first, end, share, sums);
  if constexpr (kRows > 1) multiply_rows<format, kFetch, kRows - 1>(shape, rows, x, words, first, end, share, sums);
}

// Adds to `sums` all of a panel, which has `count` units or groups, a block of `kStep` of them after the other.
template <Format format, int kStep, int kStepWords>
static void multiply_blocks(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, int count,
                            const Pass& pass, float* sums) {
  constexpr int kTurnWords = kStepWords / (kStep * kTurns<format>);
  const int tiles = (rows + kTile<format>.rows - 1) / kTile<format>.rows;
  for (int first = 0; first < count; first += kStep, words += kStepWords) {
    const uint32_t* next = first + kStep < count ? words + kStepWords : pass.after;
    for (int tile = 0; tile < tiles; tile++) {
      const Range part = part_of(rows, tile, tiles);
      const uint32_t* from = x + static_cast<size_t>(part.begin) * shape.row_words;
      const auto work = pass.is_first() ? multiply_rows<format, Fetch::share> : multiply_rows<format, Fetch::none>;
      const Share share{next + kStepWords * tile / tiles, (kTurnWords + tiles - 1) / tiles};
      const int end = std::min(first + kStep, count);
      work(shape, part.end - part.begin, from, words, first, end, share, sums + part.begin * kPanel);
    }
  }
}

// Up to kBlockRows rows, `row_words` apart, times one panel; `sums` is [rows][32].
template <Format format>
static void multiply_panel(const Geometry& shape, int rows, const uint32_t* x, const uint32_t* words, const Pass& pass,
                           float* sums) {
  const int count = kIsGrouped<format> ? shape.groups : shape.units;
  for (int i = 0; i < rows * kPanel; i += kLanes) store(sums + i, Vec{});
  if (tile_vecs<format>(rows) == kPanelVecs)
    return multiply_rows<format, Fetch::near>(shape, rows, x, words, 0, count, {}, sums);
  if constexpr (kIsGrouped<format>)
    return multiply_blocks<format, kBlockGroups, kBlockGroups * kGroupWords<format>>(  //
        shape, rows, x, words, count, pass, sums);
  if constexpr (kShortBlockRows > 0)
    if (rows <= kShortBlockRows)
      return multiply_blocks<format, kShortBlockUnits, kShortBlockUnits * kPanel>(  //
          shape, rows, x, words, count, pass, sums);
  multiply_blocks<format, kBlockUnits, kBlockUnits * kPanel>(shape, rows, x, words, count, pass, sums);
}

}  // namespace tandem
