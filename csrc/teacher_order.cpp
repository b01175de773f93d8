#include "teacher_order.h"

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/ops.h>

#include "radix_sort.h"

namespace jasper_fast {

namespace {

inline uint32_t key_at(const uint64_t* sorted, uint64_t i) { return (uint32_t)(sorted[i] >> 32); }

// Cuts [0, pairs) into buckets so that a group of equal keys is in one bucket. A group larger than a bucket gets
// several buckets of its own, which `lower` and `upper` join.
void cut_buckets(const uint64_t* sorted, uint64_t pairs, bool exclude_ties, TeacherOrder& order) {
  const auto add = [&](uint64_t begin, bool one_group) {
    order.start.push_back((uint32_t)begin);
    order.lower.push_back((uint32_t)order.lower.size());
    order.upper.push_back((uint32_t)order.upper.size() + 1);
    order.one_group.push_back(one_group);
  };
  uint64_t begin = 0;
  while (begin < pairs) {
    uint64_t end = std::min<uint64_t>(begin + kBucketSize, pairs);
    if (exclude_ties && end < pairs) {
      while (end > begin && key_at(sorted, end) == key_at(sorted, end - 1)) --end;
    }
    if (end > begin) {
      add(begin, false);
      begin = end;
      continue;
    }
    const uint32_t key = key_at(sorted, begin);
    const uint64_t group_end =
        std::upper_bound(sorted + begin, sorted + pairs, key,
                         [](uint32_t value, uint64_t element) { return value < (uint32_t)(element >> 32); }) - sorted;
    const uint32_t first = (uint32_t)order.lower.size();
    for (; begin < group_end; begin += kBucketSize) add(begin, true);
    begin = group_end;
    const uint32_t last = (uint32_t)order.lower.size();
    std::fill(order.lower.begin() + first, order.lower.end(), first);
    std::fill(order.upper.begin() + first, order.upper.end(), last);
  }
  order.start.push_back((uint32_t)pairs);
}

// Writes each position's first and last tied position. Returns true if any two positions are tied.
bool find_ties(const uint64_t* sorted, uint32_t count, uint16_t* lower, uint16_t* upper) {
  bool tied = false;
  uint32_t group = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (i == 0 || key_at(sorted, i) != key_at(sorted, i - 1)) group = i;
    lower[i] = (uint16_t)group;
    tied |= group != i;
  }
  if (!tied) return false;
  for (uint32_t i = count; i-- > 0;) {
    upper[i] = (i + 1 < count && lower[i + 1] == lower[i]) ? upper[i + 1] : (uint16_t)i;
  }
  return true;
}

}  // namespace

TeacherOrder order_teacher(const float* teacher, const float* skip, uint64_t pairs, bool exclude_ties, int threads,
                           uint64_t* sorted, uint64_t* spare) {
  torch::stable::parallel_for(0, (int64_t)pairs, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool nan = std::isnan(teacher[i]) || (skip && std::isnan(skip[i]));
      sorted[i] = (uint64_t)(nan ? kNaNKey : key_of(teacher[i])) << 32 | (uint64_t)i;
    }
  });
  radix_sort(sorted, spare, pairs, threads);

  TeacherOrder order;
  cut_buckets(sorted, pairs, exclude_ties, order);
  const int64_t buckets = (int64_t)order.lower.size();
  order.tied.assign(buckets, 0);
  order.code = make_buffer<uint32_t>(pairs);
  if (exclude_ties) {
    order.tied_lower = make_buffer<uint16_t>(pairs);
    order.tied_upper = make_buffer<uint16_t>(pairs);
  }
  torch::stable::parallel_for(0, buckets, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const uint32_t begin = order.start[b], count = order.start[b + 1] - begin;
      const uint64_t* own = sorted + begin;
      for (uint32_t i = 0; i < count; ++i) order.code[(uint32_t)own[i]] = (uint32_t)b << kBucketBits | i;
      if (exclude_ties && !order.one_group[b]) {
        order.tied[b] = find_ties(own, count, order.tied_lower.get() + begin, order.tied_upper.get() + begin);
      }
    }
  });
  return order;
}

}  // namespace jasper_fast
