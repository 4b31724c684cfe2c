// Vectors of the instruction set this library is compiled for, and bfloat16. Everything above is written once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tandem {

#if defined(__AVX512F__) && defined(__AVX512BW__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef float VecAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBitsAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

#define TANDEM_INLINE static inline __attribute__((always_inline))

TANDEM_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
TANDEM_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }
TANDEM_INLINE VecBits load_bits(const uint32_t* p) { return *reinterpret_cast<const VecBitsAt*>(p); }
template <int... I>
TANDEM_INLINE Vec splat_lanes(float x, std::integer_sequence<int, I...>) {
  return Vec{((void)I, x)...};
}
// Not `Vec{} + x`: a compiler that minds negative zeros adds.
TANDEM_INLINE Vec splat(float x) { return splat_lanes(x, std::make_integer_sequence<int, kLanes>{}); }
TANDEM_INLINE VecBits splat_bits(uint32_t x) { return VecBits{} + x; }
// a > b ? a : b, written out because GCC makes two instructions of that where `b` is a constant.
TANDEM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
TANDEM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
// a * b + c, rounded once where the instruction set can. Written out, and nothing is contracted by the compiler (see
// FLAGS in build.py): it would fuse one loop and not another, and a row's bits would depend on the batch.
TANDEM_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
// 1 / x of lanes from 1 to 1e37, to a unit in the last place.
TANDEM_INLINE Vec inverse(Vec x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)  // a division takes 16 cycles there
  const Vec near = (Vec)_mm512_rcp14_ps((__m512)x);
  return fused(near, fused(-x, near, splat(1.0f)), near);
#else
  return 1.0f / x;
#endif
}
// sum = fused(a, b, sum), in the register where the sum is: left to itself, GCC moves sums about and spills some.
TANDEM_INLINE void add_product(Vec& sum, Vec a, Vec b) {
#if defined(__FMA__) && defined(__AVX2__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fused(a, b, sum);
#endif
}
// Lanes within int8.
TANDEM_INLINE void store_bytes(int8_t* p, VecInt v) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // the conversion below takes a lane at a time there
  const __m256i first_bytes = _mm256_set1_epi32(0x0c080400);
  const __m256i picked = _mm256_shuffle_epi8((__m256i)v, first_bytes);
  const __m128i low = _mm256_castsi256_si128(picked), high = _mm256_extracti128_si256(picked, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
#else
  typedef int8_t VecBytes __attribute__((vector_size(kLanes)));
  VecBytes bytes = __builtin_convertvector(v, VecBytes);
  std::memcpy(p, &bytes, kLanes);
#endif
}

TANDEM_INLINE float widen(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
TANDEM_INLINE float widen(float x) { return x; }

// Round to nearest even; a NaN stays one.
TANDEM_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
// The same, of every lane, widened again.
TANDEM_INLINE Vec round_to_bf16(Vec x) {
  const VecBits bits = (VecBits)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (Vec)((x == x ? rounded : bits | 0x400000u) & 0xffff0000u);
}

TANDEM_INLINE Vec load_wide(const float* p) { return load(p); }
TANDEM_INLINE Vec load_wide(const uint16_t* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  VecBits bits;
  for (int i = 0; i < kLanes; i++) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  return (Vec)bits;
#endif
}

inline constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
// The nearest integers, halves to even; of lanes below 2^22.
TANDEM_INLINE VecInt nearest(Vec x) { return (VecInt)(x + kRounder) - 0x4b400000; }

// Rounded to bfloat16.
TANDEM_INLINE void store_bf16(uint16_t* p, Vec v) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  const Halves halves = __builtin_convertvector((VecBits)round_to_bf16(v) >> 16, Halves);
  std::memcpy(p, &halves, sizeof(halves));
}
#if defined(__AVX512BF16__)
// 32 values as 16 words of pairs.
TANDEM_INLINE void store_pairs(void* p, Vec low, Vec high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif
// The lanes of a vector.
template <int... I>
TANDEM_INLINE VecInt lane_numbers(std::integer_sequence<int, I...>) {
  return VecInt{I...};
}
TANDEM_INLINE VecInt lane_numbers() { return lane_numbers(std::make_integer_sequence<int, kLanes>{}); }

// Every lane's with the one `kSpan` away.
template <int kSpan, int... I>
TANDEM_INLINE Vec swapped(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ kSpan)...);
}
// Halves are put together by `join` until every lane holds the result: one order for every width of input.
template <int kSpan = kLanes / 2, typename Join>
TANDEM_INLINE Vec over_lanes(Vec v, Join join) {
  v = join(v, swapped<kSpan>(v, std::make_integer_sequence<int, kLanes>{}));
  if constexpr (kSpan > 1) return over_lanes<kSpan / 2>(v, join);
  return v;
}
TANDEM_INLINE float sum(Vec v) {
  return over_lanes(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; })[0];
}
TANDEM_INLINE float largest(Vec v) {
  return over_lanes(v, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); })[0];
}

// e^x for x <= 88 and 2^x for x <= 127, no less than e^-87 and 2^-125: results too small to be normal numbers cost a
// processor hundreds of cycles. Relative error about 3e-7; exactly 1 at 0.
inline constexpr float kLog2E = 1.44269504f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
// 2^t, of which instructions take the integer part; `fraction` is t - floor(t).
TANDEM_INLINE Vec scaled_exp2(Vec fraction, Vec t) {
  Vec p = fused(fraction, splat(1.8671300869e-3f), splat(9.0170302752e-3f));
  p = fused(p, fraction, splat(5.5799913150e-2f));
  p = fused(p, fraction, splat(2.4016445014e-1f));
  p = fused(p, fraction, splat(6.9315131181e-1f));
  p = fused(p, fraction, splat(1.0f));
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t);
}
TANDEM_INLINE Vec exp(Vec x) {
  x = max(x, splat(-87.0f));
  const Vec t = x * kLog2E;
  const Vec lost = fused(x, splat(1.925963033500e-8f), fused(x, splat(kLog2E), -t));  // by rounding t
  return scaled_exp2((Vec)_mm512_reduce_ps((__m512)t, 1) + lost, t);
}
TANDEM_INLINE Vec exp2(Vec x) {
  x = max(x, splat(-125.0f));
  return scaled_exp2((Vec)_mm512_reduce_ps((__m512)x, 1), x);
}
#else
// e^f, of f within ln 2 / 2 of 0, times 2^n; n is in the low bits of `shifted`.
TANDEM_INLINE Vec scaled_exp(Vec f, Vec shifted) {
  Vec p = fused(f, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fused(p, f, splat(8.3334519073e-3f));
  p = fused(p, f, splat(4.1665795894e-2f));
  p = fused(p, f, splat(1.6666665459e-1f));
  p = fused(p, f, splat(5.0000001201e-1f));
  p = fused(p * f, f, f) + 1.0f;
  return (Vec)((VecInt)p + ((VecInt)shifted << 23));
}
TANDEM_INLINE Vec exp(Vec x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  const Vec shifted = x * kLog2E + kRounder, whole = shifted - kRounder;
  return scaled_exp(fused(whole, splat(2.12194440e-4f), fused(whole, splat(-0.693359375f), x)), shifted);
}
TANDEM_INLINE Vec exp2(Vec x) {
  x = max(x, splat(-125.0f));
  const Vec shifted = x + kRounder, whole = shifted - kRounder;
  return scaled_exp((x - whole) * 0.693147181f, shifted);
}
#endif

template <int kSpan, int... I>
TANDEM_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  Vec low = __builtin_shufflevector(a, b, ((I & kSpan) ? kLanes + I - kSpan : I)...);
  b = __builtin_shufflevector(a, b, ((I & kSpan) ? kLanes + I : I + kSpan)...);
  a = low;
}
// A square of kLanes vectors, in place.
template <int kSpan = 1>
TANDEM_INLINE void transpose(Vec* rows) {
  if constexpr (kSpan < kLanes) {
    for (int i = 0; i < kLanes; i++)
      if (!(i & kSpan)) exchange<kSpan>(rows[i], rows[i + kSpan], std::make_integer_sequence<int, kLanes>{});
    transpose<2 * kSpan>(rows);
  }
}

// Joins the lanes of each of kCount vectors, which are lost, as `over_lanes` does, to the bit: lane i holds the i-th's.
template <int kCount, int kSpan = kLanes / 2, typename Join>
TANDEM_INLINE Vec over_lanes_of(Vec* rows, Join join) {
  constexpr auto kNumbers = std::make_integer_sequence<int, kLanes>{};
  if constexpr (kSpan >= kCount)
    for (int i = 0; i < kCount; i++) rows[i] = join(rows[i], swapped<kSpan>(rows[i], kNumbers));
  else
    for (int i = 0; i < kSpan; i++) {
      exchange<kSpan>(rows[i], rows[i + kSpan], kNumbers);
      rows[i] = join(rows[i], rows[i + kSpan]);
    }
  if constexpr (kSpan > 1) return over_lanes_of<kCount, kSpan / 2>(rows, join);
  return rows[0];
}
template <int kCount>
TANDEM_INLINE Vec sums_of(Vec* rows) {
  return over_lanes_of<kCount>(rows, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}
template <int kCount>
TANDEM_INLINE Vec largest_of(Vec* rows) {
  return over_lanes_of<kCount>(rows, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
}

}  // namespace tandem
