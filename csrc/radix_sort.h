// Stable parallel radix sort of (key << 32 | payload) by key, and the order-preserving map from fp32 to keys.
#pragma once
#include <cstdint>
#include <cstring>

namespace jasper_fast {

constexpr uint32_t kNaNKey = 0xFFFFFFFFu;  // above +inf's key, so NaN sorts last

// Keys compare like the floats, and -0.0 and 0.0 have the same key. NaN is not supported.
inline uint32_t key_of(float value) {
  uint32_t bits;
  value += 0.0f;  // -0.0 becomes 0.0
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

inline float value_of(uint32_t key) {
  const uint32_t bits = key ^ ((uint32_t)((int32_t)~key >> 31) | 0x80000000u);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Sorts `data` (n,) in place with `spare` (n,) as scratch, on up to `threads` threads.
void radix_sort(uint64_t* data, uint64_t* spare, uint64_t n, int threads);

}  // namespace jasper_fast
