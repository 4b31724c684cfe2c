// What this machine's cores can do at best: reading memory, and dot products from registers.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "dot.hpp"

using namespace tandem;

inline constexpr int kChains = 12;  // independent sums: more than an instruction's latency in cycles

static double on_threads(int threads, const auto& work) {
  std::atomic<int> waiting{threads};
  std::vector<std::thread> others;
  auto together = [&](int rank) {
    for (waiting.fetch_sub(1); waiting.load() > 0;) continue;
    work(rank);
  };
  for (int rank = 1; rank < threads; rank++) others.emplace_back(together, rank);
  auto start = std::chrono::steady_clock::now();
  together(0);
  for (auto& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <Format format>
static double dot_seconds(int threads, int repeats) {
  return on_threads(threads, [=](int) {
    Vec sums[kChains] = {};
    VecInt counts[kChains] = {};
    VecBits weight = VecBits{} + 0x01010101u;
    uint32_t x = 0x3f803f80u;
    for (int j = 0; j < kChains; j++) asm volatile("" : "+m"(sums[j]), "+m"(counts[j]));  // the compiler sees no equals
    for (int i = 0; i < repeats; i++) {
      asm volatile("" : "+r"(x));  // nothing is folded over the repeats
#pragma GCC unroll 16
      for (int j = 0; j < kChains; j++) {
        if constexpr (format == Format::int8 || format == Format::int4)
          dot_bytes<format == Format::int4>(counts[j], weight, x);
        else
          multiply_add<format, 0>(sums[j], weight, x);
      }
    }
    for (int j = 0; j < kChains; j++) asm volatile("" : : "m"(sums[j]), "m"(counts[j]));
  });
}

extern "C" {

// Seconds to read `words` once by all threads.
double roof_read(const uint32_t* words, int64_t count, int threads) {
  return on_threads(threads, [=](int rank) {
    VecBits seen[4] = {};
    const int64_t part = count / threads / (4 * kLanes) * (4 * kLanes);
    for (const uint32_t *at = words + part * rank, *end = at + part; at < end; at += 4 * kLanes)
      for (int j = 0; j < 4; j++) seen[j] |= load_bits(at + j * kLanes);
    for (int j = 0; j < 4; j++) asm volatile("" : : "m"(seen[j]));
  });
}

// Multiply-adds per second of all threads together.
double roof_dot(int format, int threads) {
  constexpr int kRepeats = 2000000;
  const double per_word[] = {1, 2.0 / kBf16Words, 4, 4};
  double seconds = 0;
  switch (static_cast<Format>(format)) {
    case Format::f32: seconds = dot_seconds<Format::f32>(threads, kRepeats); break;
    case Format::bf16: seconds = dot_seconds<Format::bf16>(threads, kRepeats); break;
    case Format::int8: seconds = dot_seconds<Format::int8>(threads, kRepeats); break;
    case Format::int4: seconds = dot_seconds<Format::int4>(threads, kRepeats); break;
  }
  return threads * 1.0 * kChains * kLanes * kRepeats * per_word[format] / seconds;
}

}  // extern "C"
