// Interface between the counting driver and its kernels, which are compiled once per instruction set.
// This header uses C types alone. A kernel's translation unit must not emit inline functions of the STL or of torch,
// because the linker could then choose a copy that older processors cannot run.
#pragma once
#include <stdint.h>

namespace jasper_fast {

// Teacher positions are cut into buckets of at most this many pairs. Every count inside a bucket then fits 16 bits.
// A bucket's state (two sets of bitmaps and prefix counts) stays in the L1 cache.
constexpr uint32_t kBucketBits = 14;
constexpr uint32_t kBucketSize = 1u << kBucketBits;

// One step of the merged student order, as its bucket sees it. kind 0: a score x enters. kind 1: a threshold y enters.
struct Event {
  int32_t count;    // contribution of the other buckets to up - low
  uint16_t local;   // teacher position inside the bucket
  uint16_t kind;
};

// The teacher's buckets. lower[b] and upper[b] are b and b + 1. If one group of tied teacher scores fills several
// buckets, they are the first and the one-past-last of these, so tied pairs never count.
struct Buckets {
  uint32_t count;
  const uint32_t* start;     // (count + 1,) first teacher position
  const uint32_t* lower;     // (count,)
  const uint32_t* upper;     // (count,)
};

// A range [event_begin, event_end) of the merged order, and the state at its beginning.
struct MergeRun {
  // (n + 1,) student key << 32 | bucket << kBucketBits | local, ascending, ending in a sentinel
  const uint64_t* sorted;
  const uint32_t* thresholds;    // (n + 1,) key of fl(x - margin) in the same order, ending in a sentinel
  uint64_t event_begin, event_end;
  uint64_t score, threshold;     // next index of each sequence
  uint32_t* seen[2];             // (count,) each: scores and thresholds that each bucket has received
  uint64_t* cursor;              // (count,) index of each bucket's next event
};

struct Kernels {
  // Distributes the events of a range to their buckets, and returns this level's part of sum(low). `workspace` is
  // merge_workspace(count) int32, set to zero.
  int64_t (*merge_run)(const MergeRun& run, const Buckets& buckets, int32_t* workspace, Event* events);
  // Adds the counts inside one bucket to `counts`, indexed by local position, and returns this level's part of
  // sum(low). `tied_lower` and `tied_upper` hold each position's first and last tied position. They are null without
  // ties.
  int64_t (*count_bucket)(const Event* events, uint64_t n, const uint16_t* tied_lower, const uint16_t* tied_upper,
                          int32_t* counts);
};

uint64_t merge_workspace(uint32_t buckets);

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
#endif

}  // namespace jasper_fast
