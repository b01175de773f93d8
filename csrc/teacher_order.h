// The teacher's side of the count: the position of every pair in teacher order, cut into buckets. Students share it.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "counts.h"

namespace jasper_fast {

struct TeacherOrder {
  Buffer<uint32_t> code;           // (P,) bucket << kBucketBits | local position, by pair
  std::vector<uint32_t> start, lower, upper;  // see Buckets
  std::vector<uint8_t> tied;                  // (buckets,) 1 if some pairs in it have equal scores
  std::vector<uint8_t> one_group;             // (buckets,) 1 if all pairs in it have the same score
  Buffer<uint16_t> tied_lower;     // (P,) by teacher position, set in tied buckets only
  Buffer<uint16_t> tied_upper;

  Buckets buckets() const { return {(uint32_t)lower.size(), start.data(), lower.data(), upper.data()}; }
};

// Orders teacher scores (P,). Pairs with a NaN in teacher or in `skip` come last. `skip` may be null. `sorted` and
// `spare` are scratch, (P,) each.
TeacherOrder order_teacher(const float* teacher, const float* skip, uint64_t pairs, bool exclude_ties, int threads,
                           uint64_t* sorted, uint64_t* spare);

}  // namespace jasper_fast
