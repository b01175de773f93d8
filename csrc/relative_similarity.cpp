// Exact relative similarity over all pairs of pairs in O(P log P).
//
// Let x be pair scores and y = fl(x - margin) thresholds, rounded once. For pairs p and q with teacher score of p below
// q's, a term is active if x_p > y_q. up[p] and low[q] count the active terms of each side. The gradient of the summed
// loss with respect to x is the integer up - low.
//
// These are two-dimensional dominance counts. Both sides are radix sorted. The merged order of x and y is distributed
// to buckets of teacher positions with running bucket counts. Bitmaps count inside each bucket. Every step streams, so
// no count depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "buffer.h"
#include "counts.h"
#include "radix_sort.h"
#include "teacher_order.h"

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kPairsPerThread = 1 << 14;
constexpr int64_t kBlock = 1 << 14;     // pairs between stored bucket histograms
constexpr int64_t kKeptPairs = 1 << 14;  // B = 181, half a megabyte
constexpr int64_t kSumBlock = 1 << 16;  // fixed, so that the fp64 sum does not depend on the number of threads

// Returns the widest kernels that this processor supports. JASPER_FAST_ISA=generic selects the generic ones, for tests
// and comparison.
const Kernels& choose_kernels() {
#if defined(__x86_64__)
  const char* given = std::getenv("JASPER_FAST_ISA");
  const bool narrow = given && std::strcmp(given, "generic") == 0;
  if (!narrow && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2")) {
    return kernels_avx2;
  }
#endif
  return kernels_generic;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

struct StudentCount {
  int64_t low;
  double dot;  // <up - low, x>
};

// Returns the numbers of scores and thresholds in the first `events` events of the merged order. Scores come first on
// ties.
std::pair<uint64_t, uint64_t> split_merge(const uint64_t* sorted, const uint32_t* thresholds, uint64_t n,
                                          uint64_t events) {
  uint64_t first = events > n ? events - n : 0, last = std::min(events, n);
  while (first < last) {
    const uint64_t middle = (first + last) / 2;
    if ((uint32_t)(sorted[middle] >> 32) <= thresholds[events - middle - 1]) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return {first, events - first};
}

// Bucket histograms of every prefix of the student order. They are stored every kBlock pairs and completed on demand.
class PrefixHistograms {
 public:
  PrefixHistograms(const uint64_t* sorted, uint64_t n, uint32_t buckets)
      : sorted_(sorted), buckets_(buckets), blocks_((n + kBlock - 1) / kBlock), counts_((blocks_ + 1) * buckets) {
    parallel_for(0, (int64_t)blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        add(counts_.data() + (b + 1) * buckets_, b * kBlock, std::min<uint64_t>((b + 1) * kBlock, n));
      }
    });
    for (size_t i = buckets_; i < counts_.size(); ++i) counts_[i] += counts_[i - buckets_];
  }

  std::vector<uint32_t> at(uint64_t position) const {
    const auto stored = counts_.begin() + (position / kBlock) * buckets_;
    std::vector<uint32_t> counts(stored, stored + buckets_);
    add(counts.data(), position / kBlock * kBlock, position);
    return counts;
  }

  uint32_t total(uint32_t bucket) const { return counts_[blocks_ * buckets_ + bucket]; }

 private:
  void add(uint32_t* counts, uint64_t begin, uint64_t end) const {
    for (uint64_t i = begin; i < end; ++i) ++counts[(uint32_t)sorted_[i] >> kBucketBits];
  }

  const uint64_t* sorted_;
  uint64_t buckets_, blocks_;
  std::vector<uint32_t> counts_;
};

// Memory that the steps share, because most of the cost of a large buffer is its first touch.
struct Scratch {
  explicit Scratch(uint64_t pairs)
      : sorted(make_buffer<uint64_t>(pairs + 1)), events(make_buffer<Event>(2 * pairs)), words(make_buffer<uint32_t>(pairs + 1)) {}

  static_assert(sizeof(Event) == sizeof(uint64_t));
  uint64_t* spare() { return reinterpret_cast<uint64_t*>(events.get()); }  // sorting ends before events begin

  Buffer<uint64_t> sorted;  // (P + 1,)
  Buffer<Event> events;     // (2 P,)
  Buffer<uint32_t> words;   // (P + 1,) thresholds, then counts by teacher position
};

// Writes one student's up - low for each pair.
StudentCount count_student(const float* scores, const float* teacher, const TeacherOrder& order, uint64_t pairs,
                           float margin, int threads, Scratch& scratch, int32_t* gradient) {
  const Buckets buckets = order.buckets();
  uint64_t* sorted = scratch.sorted.get();
  Event* events = scratch.events.get();
  parallel_for(0, (int64_t)pairs, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool nan = std::isnan(scores[i]) || std::isnan(teacher[i]);
      sorted[i] = (uint64_t)(nan ? kNaNKey : key_of(scores[i])) << 32 | order.code[i];
    }
  });
  radix_sort(sorted, scratch.spare(), pairs, threads);
  sorted[pairs] = (uint64_t)kNaNKey << 32;
  const uint64_t n = std::lower_bound(sorted, sorted + pairs, (uint64_t)kNaNKey << 32) - sorted;

  uint32_t* thresholds = scratch.words.get();
  parallel_for(0, (int64_t)n, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) thresholds[i] = key_of(value_of((uint32_t)(sorted[i] >> 32)) - margin);
  });
  thresholds[n] = kNaNKey;

  const PrefixHistograms histograms(sorted, n, buckets.count);
  std::vector<uint64_t> event_start(buckets.count + 1, 0);
  for (uint32_t b = 0; b < buckets.count; ++b) event_start[b + 1] = event_start[b] + 2 * (uint64_t)histograms.total(b);

  std::vector<int64_t> low(threads + buckets.count, 0);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    std::vector<int32_t> workspace(merge_workspace(buckets.count) + 8);
    auto* aligned = (int32_t*)(((uintptr_t)workspace.data() + 31) & ~(uintptr_t)31);
    for (int64_t t = first; t < last; ++t) {
      MergeRun run{sorted, thresholds, 2 * n * t / threads, 2 * n * (t + 1) / threads, 0, 0, {}, nullptr};
      std::tie(run.score, run.threshold) = split_merge(sorted, thresholds, n, run.event_begin);
      std::vector<uint32_t> scores_seen = histograms.at(run.score), thresholds_seen = histograms.at(run.threshold);
      std::vector<uint64_t> cursor(event_start.begin(), event_start.end() - 1);
      for (uint32_t b = 0; b < buckets.count; ++b) cursor[b] += scores_seen[b] + thresholds_seen[b];
      run.seen[0] = scores_seen.data();
      run.seen[1] = thresholds_seen.data();
      run.cursor = cursor.data();
      low[t] = kernels().merge_run(run, buckets, aligned, events);
    }
  });

  auto* counts = reinterpret_cast<int32_t*>(scratch.words.get());  // by teacher position
  parallel_for(0, buckets.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int32_t* own = counts + order.start[b];
      std::fill(own, own + (order.start[b + 1] - order.start[b]), 0);
      const Event* begin = events + event_start[b];
      const uint64_t size = event_start[b + 1] - event_start[b];
      if (order.one_group[b]) {  // tied pairs do not count against each other
        for (uint64_t e = 0; e < size; ++e) own[begin[e].local] += begin[e].count;
        continue;
      }
      const uint64_t offset = order.start[b];
      low[threads + b] = kernels().count_bucket(begin, size, order.tied[b] ? order.tied_lower.get() + offset : nullptr,
                                                order.tied[b] ? order.tied_upper.get() + offset : nullptr, own);
    }
  });

  const int64_t sums = ((int64_t)pairs + kSumBlock - 1) / kSumBlock;
  std::vector<double> dots(sums, 0.0);
  parallel_for(0, sums, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      double dot = 0.0;
      for (int64_t i = s * kSumBlock; i < std::min<int64_t>((s + 1) * kSumBlock, (int64_t)pairs); ++i) {
        const uint32_t code = order.code[i];
        const int32_t g = counts[order.start[code >> kBucketBits] + (code & (kBucketSize - 1))];
        gradient[i] = g;
        // An infinite score without active terms adds nothing. A NaN score makes the loss NaN.
        const double term = (double)g * (double)scores[i];
        dot += g != 0 || std::isnan(scores[i]) ? term : 0.0;
      }
      dots[s] = dot;
    }
  });
  StudentCount result{0, 0.0};
  for (const int64_t part : low) result.low += part;
  for (const double part : dots) result.dot += part;
  return result;
}

}  // namespace

// Counts scores (H, P) fp32 against teacher (P,) fp32. Returns up - low (H, P) int32, sum(low) (H,) int64 and
// <up - low, scores> (H,) fp64. A NaN score is in no count and makes its student's last result NaN. A NaN teacher score
// makes every student's last result NaN.
std::tuple<Tensor, Tensor, Tensor> pair_counts(const Tensor& scores, const Tensor& teacher, double margin,
                                               bool exclude_ties) {
  STD_TORCH_CHECK(scores.dim() == 2 && teacher.dim() == 1 && scores.size(1) == teacher.size(0),
                  "pair_counts: expected scores (H, P) and teacher (P,)");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && teacher.scalar_type() == ScalarType::Float,
                  "pair_counts: expected float32 scores");
  STD_TORCH_CHECK(scores.is_contiguous() && teacher.is_contiguous(), "pair_counts: expected contiguous tensors");
  STD_TORCH_CHECK(teacher.size(0) < (int64_t)1 << 31, "pair_counts: expected fewer than 2**31 pairs");
  const int64_t heads = scores.size(0), pairs = teacher.size(0);
  const Tensor gradient = torch::stable::new_empty(scores, {heads, pairs}, ScalarType::Int);
  const Tensor low = torch::stable::new_zeros(scores, {heads}, ScalarType::Long);
  const Tensor dot = torch::stable::new_zeros(scores, {heads}, ScalarType::Double);
  if (pairs == 0 || heads == 0) return {gradient, low, dot};

  const auto* x = (const float*)scores.const_data_ptr();
  const auto* t = (const float*)teacher.const_data_ptr();
  const int threads = (int)std::clamp<int64_t>(pairs / kPairsPerThread, 1, torch::stable::get_num_threads());
  const bool teacher_nan = std::any_of(t, t + pairs, [](float value) { return std::isnan(value); });
  // Small batches reuse one scratch buffer, because allocating it would take much of their time.
  thread_local Scratch kept(kKeptPairs);
  std::optional<Scratch> own_scratch;
  if (pairs > kKeptPairs) own_scratch.emplace((uint64_t)pairs);
  Scratch& scratch = own_scratch ? *own_scratch : kept;
  const auto teacher_order = [&](const float* skip) {
    return order_teacher(t, skip, (uint64_t)pairs, exclude_ties, threads, scratch.sorted.get(), scratch.spare());
  };
  const TeacherOrder order = teacher_order(nullptr);
  for (int64_t h = 0; h < heads; ++h) {
    const float* own = x + h * pairs;
    const bool nan = std::any_of(own, own + pairs, [](float value) { return std::isnan(value); });
    auto* out = (int32_t*)gradient.mutable_data_ptr() + h * pairs;
    StudentCount count{};
    if (nan) {  // pairs without a score must not have a position in the teacher's order
      const TeacherOrder reduced = teacher_order(own);
      count = count_student(own, t, reduced, (uint64_t)pairs, (float)margin, threads, scratch, out);
    } else {
      count = count_student(own, t, order, (uint64_t)pairs, (float)margin, threads, scratch, out);
    }
    ((int64_t*)low.mutable_data_ptr())[h] = count.low;
    ((double*)dot.mutable_data_ptr())[h] = teacher_nan ? std::nan("") : count.dot;
  }
  return {gradient, low, dot};
}

}  // namespace jasper_fast
