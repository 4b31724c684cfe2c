// Loops over a tile of sums that leave no loop: sums that nothing indexes at run time are kept in registers.
#pragma once
#include <utility>

#include "vec.hpp"

namespace tandem {

template <int kRows, int kVecs, typename Work, int... I>
TANDEM_INLINE void over_tile(Work work, std::integer_sequence<int, I...>) {
  if constexpr (kVecs < kRows)  // the vectors are the fewer: what belongs to them stays in registers
    (work(std::integral_constant<int, I / kVecs>{}, std::integral_constant<int, I % kVecs>{}), ...);
  else
    (work(std::integral_constant<int, I % kRows>{}, std::integral_constant<int, I / kRows>{}), ...);
}

// Calls `work` with every row `m` and vector `v` of a tile as constants.
template <int kRows, int kVecs, typename Work>
TANDEM_INLINE void over_tile(Work work) {
  over_tile<kRows, kVecs>(work, std::make_integer_sequence<int, kRows * kVecs>{});
}
#define TANDEM_TILE_WORK [&](auto m, auto v) __attribute__((always_inline))

}  // namespace tandem
