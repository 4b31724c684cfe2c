// Multiply-add of one word of 32 outputs: the innermost operation of every format.
#pragma once
#include "formats.hpp"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace tandem {

// Words of an input row that go with one unit of the weights.
template <Format format>
inline constexpr int kUnitWords = format == Format::bf16 ? kBf16Words : 1;

// sum += weight * x, where `x` is word `part` of those that go with the unit.
template <Format format, int part>
TANDEM_INLINE void multiply_add(Vec& sum, VecBits weight, uint32_t x) {
#if defined(__AVX512BF16__)
  if constexpr (format == Format::bf16) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(x));
    return;
  }
#endif
  if constexpr (format == Format::bf16) weight = part == 0 ? weight << 16 : weight & 0xffff0000u;
  float factor;
  std::memcpy(&factor, &x, 4);
  add_product(sum, (Vec)weight, splat(factor));
}

// What instructions add to a code because they want one side unsigned: a group's sum begins with -offset * sum(x).
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline constexpr int kInt8Offset = 128, kInt4Offset = 8;
#else
inline constexpr int kInt8Offset = 0, kInt4Offset = 8;
#endif
template <Format format>
inline constexpr int kOffset = format == Format::int8 ? kInt8Offset : kInt4Offset;

// int4 sums of a group are kept in 16 bits, two to an output, and may wrap on the way: in the end each is of 32 products,
// at most 8 * 127 each, which fit.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
inline constexpr bool kShortSums = true;
#else
inline constexpr bool kShortSums = false;
#endif

// sum += w0 * x0 + .. + w3 * x3 of unsigned bytes and signed bytes; `kSmall`: the unsigned ones are at most 15. Exact.
template <bool kSmall>
TANDEM_INLINE void dot_bytes(VecInt& sum, VecBits weight, uint32_t x) {
#if defined(__AVX512VNNI__)
  sum = (VecInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
  sum = (VecInt)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weight, _mm256_set1_epi32(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  VecBits codes = kSmall ? weight : weight ^ 0x80808080u;
  sum = (VecInt)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, vreinterpretq_s8_u32(vdupq_n_u32(x)));
#elif defined(__AVX512BW__)
  __m512i codes = (__m512i)weight, factors = _mm512_set1_epi32(x);
  if constexpr (!kSmall) {  // neither side fits the unsigned operand: |w| * (x with w's sign)
    codes = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    factors = _mm512_mask_sub_epi8(factors, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), factors);
    codes = _mm512_abs_epi8(codes);
  }
  sum += (VecInt)_mm512_madd_epi16(_mm512_maddubs_epi16(codes, factors), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  // Written out as in `add_product`.
  __m256i codes = (__m256i)weight, factors = _mm256_set1_epi32(x);
  if constexpr (kSmall) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(codes, factors)));
  } else {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    factors = _mm256_sign_epi8(factors, codes);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), factors);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
#else
  VecInt codes = (VecInt)(kSmall ? weight : weight ^ 0x80808080u);
  for (int e = 0; e < 4; e++)
    sum += ((codes << (24 - 8 * e)) >> 24) * static_cast<int8_t>(x >> (8 * e));
#endif
}

// A finished sum of `dot_bytes` in 32 bits.
template <bool kSmall>
TANDEM_INLINE VecInt whole_sum(VecInt sum) {
#if defined(__AVX2__)
  if constexpr (kSmall && kShortSums) return (VecInt)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#endif
  return sum;
}

}  // namespace tandem
