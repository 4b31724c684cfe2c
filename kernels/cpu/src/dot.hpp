// Multiply-add of one word of 32 outputs: the innermost operation of every format.
#pragma once
#include "formats.hpp"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace tandem {

template <Format format>
TANDEM_INLINE Vec multiply_add(Vec sum, VecBits weight, uint32_t x) {
  if constexpr (format == Format::f32) {
    float factor;
    std::memcpy(&factor, &x, 4);
    return fused((Vec)weight, splat(factor), sum);
  } else {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(x));
#else
    VecBits both = VecBits{} + x;
    sum = fused((Vec)(weight << 16), (Vec)(both << 16), sum);
    return fused((Vec)(weight & 0xffff0000u), (Vec)(both & 0xffff0000u), sum);
#endif
  }
}

// What instructions add to a code because they want one side unsigned; the caller takes offset * sum(x) off again.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline constexpr int kInt8Offset = 128, kInt4Offset = 8;
#else
inline constexpr int kInt8Offset = 0, kInt4Offset = 8;
#endif

// sum + w0 * x0 + .. + w3 * x3 of unsigned bytes and signed bytes; `kSmall`: the unsigned ones are at most 15. Exact.
template <bool kSmall>
TANDEM_INLINE VecInt dot_bytes(VecInt sum, VecBits weight, uint32_t x) {
#if defined(__AVX512VNNI__)
  return (VecInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
  return (VecInt)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weight, _mm256_set1_epi32(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  VecBits codes = kSmall ? weight : weight ^ 0x80808080u;
  return (VecInt)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, vreinterpretq_s8_u32(vdupq_n_u32(x)));
#elif defined(__AVX512BW__)
  __m512i codes = (__m512i)weight, factors = _mm512_set1_epi32(x);
  if constexpr (!kSmall) {  // neither side fits the unsigned operand: |w| * (x with w's sign)
    codes = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    factors = _mm512_mask_sub_epi8(factors, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), factors);
    codes = _mm512_abs_epi8(codes);
  }
  return sum + (VecInt)_mm512_madd_epi16(_mm512_maddubs_epi16(codes, factors), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  __m256i codes = (__m256i)weight, factors = _mm256_set1_epi32(x);
  if constexpr (!kSmall) {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    factors = _mm256_sign_epi8(factors, codes);
    codes = _mm256_abs_epi8(codes);
  }
  return sum + (VecInt)_mm256_madd_epi16(_mm256_maddubs_epi16(codes, factors), _mm256_set1_epi16(1));
#else
  VecInt codes = (VecInt)(kSmall ? weight : weight ^ 0x80808080u);
  for (int e = 0; e < 4; e++)
    sum += ((codes << (24 - 8 * e)) >> 24) * static_cast<int8_t>(x >> (8 * e));
  return sum;
#endif
}

}  // namespace tandem
