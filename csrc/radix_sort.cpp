// Radix sort, least significant digit first, with three passes of 11 bits over 32-bit keys. Each thread counts and
// scatters its own contiguous chunk, so equal keys keep their order for any number of threads.
#include "radix_sort.h"

#include <vector>

#include <torch/csrc/stable/ops.h>

namespace jasper_fast {

namespace {

constexpr uint32_t kDigitBits = 11;
constexpr uint32_t kDigits = 1u << kDigitBits;

// Separate functions, so that the compiler knows that the loop does not write its own bound.
void count_digits(const uint64_t* begin, const uint64_t* end, uint32_t shift, uint32_t* counts) {
  std::memset(counts, 0, kDigits * sizeof(uint32_t));
  for (; begin != end; ++begin) ++counts[(*begin >> shift) & (kDigits - 1)];
}

void scatter(const uint64_t* begin, const uint64_t* end, uint32_t shift, uint32_t* next, uint64_t* to) {
  for (; begin != end; ++begin) to[next[(*begin >> shift) & (kDigits - 1)]++] = *begin;
}

// On one thread, one pass counts all digits, because the counts do not depend on the order.
void sort_alone(uint64_t* data, uint64_t* spare, uint64_t n) {
  constexpr uint32_t kPasses = (32 + kDigitBits - 1) / kDigitBits;
  uint32_t next[kPasses][kDigits] = {};
  for (uint64_t i = 0; i < n; ++i) {
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      ++next[pass][(data[i] >> (32 + pass * kDigitBits)) & (kDigits - 1)];
    }
  }
  uint64_t* from = data;
  uint64_t* to = spare;
  for (uint32_t pass = 0; pass < kPasses; ++pass) {
    uint32_t total = 0;
    bool one_digit = false;
    for (uint32_t& cell : next[pass]) {
      const uint32_t count = cell;
      cell = total;
      total += count;
      one_digit |= count == n;
    }
    if (one_digit) continue;
    scatter(from, from + n, 32 + pass * kDigitBits, next[pass], to);
    uint64_t* other = from;
    from = to;
    to = other;
  }
  if (from != data) std::memcpy(data, from, n * sizeof(uint64_t));
}

}  // namespace

void radix_sort(uint64_t* data, uint64_t* spare, uint64_t n, int threads) {
  if (threads == 1) return sort_alone(data, spare, n);
  std::vector<uint32_t> histogram((size_t)threads * kDigits);
  const auto begin_of = [&](int64_t t) { return n * (uint64_t)t / (uint64_t)threads; };
  uint64_t* from = data;
  uint64_t* to = spare;
  for (uint32_t shift = 32; shift < 64; shift += kDigitBits) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        count_digits(from + begin_of(t), from + begin_of(t + 1), shift, histogram.data() + t * kDigits);
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
        scatter(from + begin_of(t), from + begin_of(t + 1), shift, histogram.data() + t * kDigits, to);
      }
    });
    uint64_t* other = from;
    from = to;
    to = other;
  }
  if (from != data) std::memcpy(data, from, n * sizeof(uint64_t));
}

}  // namespace jasper_fast
