// Interface between the counting driver and its kernels, which are compiled once per instruction set.
// Nothing but C types here: a kernel's translation unit must not emit inline functions of the STL or of torch,
// because the linker could then pick a copy that older processors cannot run.
#pragma once
#include <stdint.h>

namespace jasper_fast {

// Teacher positions are cut into buckets of at most this many pairs. Every count inside a bucket then fits 16 bits
// and a bucket's whole state (bitmaps and prefix counts, twice) stays in the first-level cache.
constexpr uint32_t kBucketBits = 14;
constexpr uint32_t kBucketSize = 1u << kBucketBits;

// One step of the merged student order, seen from its bucket. kind 0: a score x enters. kind 1: a threshold y does.
struct Event {
  int32_t count;    // what the other buckets contribute to up - low
  uint16_t local;   // teacher position inside the bucket
  uint16_t kind;
};

// The teacher's buckets. lower[b] / upper[b] are b and b + 1 except where one group of tied teacher scores fills
// several buckets: there they are the first and the one-past-last of them, so tied pairs never count.
struct Buckets {
  uint32_t count;
  const uint32_t* start;     // (count + 1,) first teacher position
  const uint32_t* lower;     // (count,)
  const uint32_t* upper;     // (count,)
};

// A run of the merged order [event_begin, event_end) and the state at its beginning.
struct MergeRun {
  const uint64_t* sorted;        // (n + 1,) student key << 32 | bucket << kBucketBits | local, ascending; a sentinel ends it
  const uint32_t* thresholds;    // (n + 1,) key of fl(x - margin) in the same order, and the sentinel
  uint64_t event_begin, event_end;
  uint64_t score, threshold;     // next element of either sequence
  uint32_t* seen[2];             // (count,) how many of either kind each bucket has taken in
  uint64_t* cursor;              // (count,) where each bucket's next event goes
};

struct Kernels {
  // Deals the events of a run out to their buckets; returns this level's part of sum(low). `workspace` holds
  // merge_workspace(count) int32, zeroed.
  int64_t (*merge_run)(const MergeRun& run, const Buckets& buckets, int32_t* workspace, Event* events);
  // Adds the counts inside one bucket to `counts`, indexed by local position; returns this level's part of sum(low).
  // `tied_lower` / `tied_upper` give each position's first and last tied position, or are null where none is tied.
  int64_t (*count_bucket)(const Event* events, uint64_t n, const uint16_t* tied_lower, const uint16_t* tied_upper,
                          int32_t* counts);
};

uint64_t merge_workspace(uint32_t buckets);

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
#endif

}  // namespace jasper_fast
