// Least significant digit first, 11 bits a pass: three passes over 32-bit keys. Each thread counts and scatters its
// own contiguous chunk, so the order of equal keys is kept whatever the number of threads.
#include "radix_sort.h"

#include <vector>

#include <torch/csrc/stable/ops.h>

namespace jasper_fast {

namespace {
constexpr uint32_t kDigitBits = 11;
constexpr uint32_t kDigits = 1u << kDigitBits;
}  // namespace

void radix_sort(uint64_t* data, uint64_t* spare, uint64_t n, int threads) {
  std::vector<uint32_t> histogram((size_t)threads * kDigits);
  const auto begin_of = [&](int64_t t) { return n * (uint64_t)t / (uint64_t)threads; };
  uint64_t* from = data;
  uint64_t* to = spare;
  for (uint32_t shift = 32; shift < 64; shift += kDigitBits) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        uint32_t* own = histogram.data() + t * kDigits;
        std::memset(own, 0, kDigits * sizeof(uint32_t));
        for (uint64_t i = begin_of(t); i < begin_of(t + 1); ++i) ++own[(from[i] >> shift) & (kDigits - 1)];
      }
    });
    uint32_t total = 0;
    bool one_digit = false;
    for (uint32_t digit = 0; digit < kDigits; ++digit) {
      const uint32_t before = total;
      for (int t = 0; t < threads; ++t) {
        uint32_t& cell = histogram[(size_t)t * kDigits + digit];
        const uint32_t count = cell;
        cell = total;
        total += count;
      }
      one_digit |= total - before == n;
    }
    if (one_digit) continue;  // every key has the same digit here
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        uint32_t* next = histogram.data() + t * kDigits;
        for (uint64_t i = begin_of(t); i < begin_of(t + 1); ++i) {
          const uint64_t element = from[i];
          to[next[(element >> shift) & (kDigits - 1)]++] = element;
        }
      }
    });
    uint64_t* other = from;
    from = to;
    to = other;
  }
  if (from != data) std::memcpy(data, from, n * sizeof(uint64_t));
}

}  // namespace jasper_fast
