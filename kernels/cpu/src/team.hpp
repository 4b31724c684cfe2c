// A team of threads that runs one function together, with barriers inside it.
//
// Waits spin for some microseconds, then sleep on a futex: a step's phases are shorter than a wake-up, and an idle
// worker or a busy machine must not lose a core to polling.
#pragma once
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "vec.hpp"

namespace tandem {

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int rank = 1; rank < size; rank++) threads_.emplace_back([this, rank] { serve(rank); });
  }
  ~Team() {
    stopping_ = true;
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Binds the helpers to a core each if there is one for every thread, the first being the caller's, else to all of
  // them. `spins` false: waits sleep at once, because whoever is waited for may need this core. Between runs only.
  void place(const int* cpus, int count, bool spins) {
    spins_ = spins ? kSpins : 0;
#if defined(__linux__)
    for (int rank = 1; rank < size_; rank++) {
      cpu_set_t set;
      CPU_ZERO(&set);
      for (int i = 0; i < count; i++)
        if (count < size_ || i == rank) CPU_SET(cpus[i], &set);
      pthread_setaffinity_np(threads_[rank - 1].native_handle(), sizeof(set), &set);
    }
#endif
  }

  // Runs `work(rank)` on every thread, the caller being rank 0. Calls from several threads queue up.
  void run(const std::function<void(int)>& work) {
    std::lock_guard lock(mutex_);
    work_ = &work;
    generation_.fetch_add(1, std::memory_order_release);
    if (size_ > 1) generation_.notify_all();
    work(0);
    barrier();
  }

  // Every thread of the team arrives before any leaves.
  void barrier() {
    if (size_ == 1) return;
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      await(phase_, phase);
    }
  }

 private:
  static constexpr int kSpins = 4000;

  void await(const std::atomic<uint32_t>& value, uint32_t old) const {
    for (int i = spins_.load(std::memory_order_relaxed); i > 0; i--) {
      if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }

  void serve(int rank) {
    for (uint32_t seen = 0;; seen++) {
      await(generation_, seen);
      if (stopping_) return;
      (*work_)(rank);
      barrier();
    }
  }

  const int size_;
  std::mutex mutex_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> spins_{kSpins};
  std::atomic<bool> stopping_{false};
  std::atomic<uint32_t> generation_{0}, phase_{0};
  std::atomic<int> arrived_{0};
  std::vector<std::thread> threads_;
};

struct Range {
  int begin, end;
};
// The part of [0, count) that is `rank`'s. Every item is computed alike wherever it falls.
TANDEM_INLINE Range part_of(int count, int rank, int size) {
  return {static_cast<int>(static_cast<int64_t>(count) * rank / size),
          static_cast<int>(static_cast<int64_t>(count) * (rank + 1) / size)};
}

}  // namespace tandem
