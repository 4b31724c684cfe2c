// Memory that begins on cache lines: a vector or tile that straddles two of them costs two accesses.
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "vec.hpp"

namespace tandem {

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
// Left as it comes.
template <typename T>
std::unique_ptr<T[], Free> allocate(size_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64))));
}

template <typename T>
struct LineAllocator {
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace tandem
