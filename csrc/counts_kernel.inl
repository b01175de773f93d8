// The two counting kernels, included inside a namespace by one translation unit per instruction set.
//
// Both walk the merged order of scores x and thresholds y, with x first if they are equal. For each kind they keep the
// number of entries before each teacher position. A score counts the earlier thresholds above its teacher position
// (up). A threshold counts the later scores below its position (low). The kind selects an array instead of a branch.

typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr uint32_t kGroup = 16;

struct alignas(32) StepTables {
  uint16_t u16[16][16];  // u16[l][k] = k > l
  int32_t i32[16][16];
};

constexpr StepTables make_steps() {
  StepTables tables{};
  for (int l = 0; l < 16; ++l) {
    for (int k = 0; k < 16; ++k) {
      tables.u16[l][k] = k > l;
      tables.i32[l][k] = k > l;
    }
  }
  return tables;
}

alignas(32) constexpr StepTables kSteps = make_steps();

// Layout of the merge workspace for each kind: prefix counts inside each group of 16 buckets, then those of the groups.
inline uint32_t groups_of(uint32_t buckets) { return buckets / kGroup + 1; }  // covers one past the last bucket
inline uint32_t top_vectors_of(uint32_t buckets) { return (groups_of(buckets) + 7) / 8; }

// Writes the merged order of a single bucket, which needs no counts at this level.
static int64_t merge_one_bucket(MergeRun run, Event* events) {
  uint64_t score = run.score, threshold = run.threshold;
  Event* to = events + run.cursor[0];
  for (uint64_t e = run.event_begin; e < run.event_end; ++e) {
    const uint64_t from_score = run.sorted[score];
    const uint64_t kind = run.thresholds[threshold] < (uint32_t)(from_score >> 32);
    const uint64_t code = kind ? run.sorted[threshold] : from_score;
    *to++ = Event{0, (uint16_t)(code & (kBucketSize - 1)), (uint16_t)kind};
    score += kind ^ 1;
    threshold += kind;
  }
  return 0;
}

template <int TOP_VECTORS>  // 0: known at run time only
static int64_t merge_run_impl(MergeRun run, Buckets buckets, int32_t* workspace, Event* events) {
  const uint32_t groups = groups_of(buckets.count);
  const uint32_t top_vectors = TOP_VECTORS ? TOP_VECTORS : top_vectors_of(buckets.count);
  const uint64_t stride = (uint64_t)groups * kGroup + (uint64_t)top_vectors * 8;
  const uint64_t top_offset = (uint64_t)groups * kGroup;
  for (int kind = 0; kind < 2; ++kind) {
    int32_t* inside = workspace + kind * stride;
    int32_t* top = inside + top_offset;
    int32_t total = 0;
    for (uint32_t g = 0; g < groups; ++g) {
      top[g] = total;
      int32_t within = 0;
      for (uint32_t l = 0; l < kGroup; ++l) {
        const uint32_t b = g * kGroup + l;
        inside[b] = within;
        if (b < buckets.count) within += (int32_t)run.seen[kind][b];
      }
      total += within;
    }
  }
  const uint32_t* edges[2] = {buckets.upper, buckets.lower};
  const i32x8 iota = {0, 1, 2, 3, 4, 5, 6, 7};
  uint64_t score = run.score, threshold = run.threshold;
  int64_t low = 0;
  for (uint64_t e = run.event_begin; e < run.event_end; ++e) {
    const uint64_t from_score = run.sorted[score];
    const uint32_t kind = run.thresholds[threshold] < (uint32_t)(from_score >> 32);
    const uint32_t code = (uint32_t)(kind ? run.sorted[threshold] : from_score);
    const uint32_t bucket = code >> kBucketBits;
    const uint32_t edge = edges[kind][bucket];
    const int32_t* asked = workspace + (kind ^ 1) * stride;
    const int32_t before = asked[edge] + asked[top_offset + edge / kGroup];
    // kind 0: earlier thresholds above. kind 1: minus the later scores below.
    const int32_t count = kind ? before - (int32_t)buckets.start[edge] : (int32_t)threshold - before;
    low -= kind ? count : 0;
    const uint64_t slot = run.cursor[bucket]++;
    events[slot] = Event{count, (uint16_t)(code & (kBucketSize - 1)), (uint16_t)kind};
    score += kind ^ 1;
    threshold += kind;

    int32_t* own = workspace + kind * stride;
    const uint32_t group = bucket / kGroup;
    i32x8* inside = (i32x8*)(own + group * kGroup);
    const i32x8* step = (const i32x8*)kSteps.i32[bucket % kGroup];
    inside[0] += step[0];
    inside[1] += step[1];
    i32x8* top = (i32x8*)(own + top_offset);
    for (uint32_t v = 0; v < top_vectors; ++v) top[v] -= (i32x8)(iota > (int32_t)(group - v * 8));
  }
  return low;
}

static int64_t merge_run(const MergeRun& run, const Buckets& buckets, int32_t* workspace, Event* events) {
  if (buckets.count == 1) return merge_one_bucket(run, events);
  switch (top_vectors_of(buckets.count)) {
    case 1: return merge_run_impl<1>(run, buckets, workspace, events);
    case 2: return merge_run_impl<2>(run, buckets, workspace, events);
    default: return merge_run_impl<0>(run, buckets, workspace, events);
  }
}

struct alignas(64) BucketState {
  uint16_t top[2][16];         // entries in earlier groups of 1024 positions
  uint16_t inside[2][16][16];  // entries of the group in earlier words
  uint64_t bits[2][256];       // positions that have entered
};

template <bool TIES>
static int64_t count_bucket_impl(const Event* events, uint64_t n, const uint16_t* tied_lower,
                                 const uint16_t* tied_upper, int32_t* counts) {
  BucketState state;
  __builtin_memset(&state, 0, sizeof(state));
  const uint16_t* tied[2] = {tied_upper, tied_lower};
  int32_t thresholds = 0;
  int64_t low = 0;
  for (uint64_t e = 0; e < n; ++e) {
    const Event event = events[e];
    const uint32_t kind = event.kind, own = event.local, other = kind ^ 1;
    const uint32_t asked = TIES ? tied[kind][own] : own;
    // A score counts thresholds strictly above its position, a threshold counts scores strictly below its position.
    const uint64_t mask = ((uint64_t)(2 - kind) << (asked & 63)) - 1;
    const int32_t before = (int32_t)state.top[other][asked >> 10] + state.inside[other][asked >> 10][(asked >> 6) & 15] +
                           __builtin_popcountll(state.bits[other][asked >> 6] & mask);
    const int32_t count = kind ? before - (int32_t)asked : thresholds - before;
    low -= kind ? count : 0;
    counts[own] += event.count + count;
    thresholds += (int32_t)kind;
    state.bits[kind][own >> 6] |= 1ull << (own & 63);
    *(u16x16*)state.inside[kind][own >> 10] += *(const u16x16*)kSteps.u16[(own >> 6) & 15];
    *(u16x16*)state.top[kind] += *(const u16x16*)kSteps.u16[own >> 10];
  }
  return low;
}

static int64_t count_bucket(const Event* events, uint64_t n, const uint16_t* tied_lower, const uint16_t* tied_upper,
                            int32_t* counts) {
  return tied_lower ? count_bucket_impl<true>(events, n, tied_lower, tied_upper, counts)
                    : count_bucket_impl<false>(events, n, tied_lower, tied_upper, counts);
}
