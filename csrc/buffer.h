// Uninitialised scratch memory. Large buffers request huge pages, because the sorts scatter to thousands of addresses.
// With small pages, first touch and address translation cost as much as the work.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jasper_fast {

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> make_buffer(size_t size) {
  constexpr size_t kHugePage = 2u << 20;
  const size_t alignment = size * sizeof(T) >= kHugePage ? kHugePage : 64;
  const size_t bytes = (size * sizeof(T) + alignment) / alignment * alignment;
  void* pointer = std::aligned_alloc(alignment, bytes);
  if (!pointer) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(pointer, bytes, MADV_HUGEPAGE);  // a hint that may fail
#endif
  return Buffer<T>(static_cast<T*>(pointer));
}

}  // namespace jasper_fast
