// Exact inner-product search on a CPU, around the library's matrix product.
//
// With many queries, the library computes tiles of approximate scores. With few queries, this code reads the rows once.
// A bin of 64 rows is skipped if its highest score plus its error bound cannot reach the k-th best lower bound so far.
// The remaining rows are rescored in fp64 from their stored values. Results are the k best of a total order, so they do
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "buffer.h"
#include "mips_select.h"

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

// Returns the widest kernels that this processor supports. JASPER_FAST_ISA=avx512bf16, avx512vnni, avx512, avx2 or generic
// selects others, for tests and comparison. Products of bfloat16 pairs are chosen on AMD's processors alone, since they
// were not measured on others.
const MipsKernels& choose_kernels() {
#if defined(__x86_64__)
  const char* given = std::getenv("JASPER_FAST_ISA");
  const auto allowed = [&](const char* name) { return !given || std::strcmp(given, name) == 0; };
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool pairs = __builtin_cpu_supports("avx512bf16") && (given || __builtin_cpu_is("amd"));
  if (allowed("avx512bf16") && wide && __builtin_cpu_supports("avx512vnni") && pairs) return mips_avx512bf16;
  if (allowed("avx512vnni") && wide && __builtin_cpu_supports("avx512vnni")) return mips_avx512vnni;
  if (allowed("avx512") && wide) return mips_avx512;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return mips_avx2;
#endif
  return mips_generic;
}

const MipsKernels& kernels() { return mips_kernels(); }

Rows rows_of(const Tensor& rows, const Tensor& scales) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "mips: expected contiguous rows (N, D)");
  const auto type = rows.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Char,
                  "mips: expected float32, bfloat16 or int8 rows");
  STD_TORCH_CHECK(rows.size(0) < (int64_t)1 << 32, "mips: expected fewer than 2**32 rows in one segment");
  const Stored kind = type == ScalarType::Float      ? Stored::kFloat
                      : type == ScalarType::BFloat16 ? Stored::kBfloat16
                                                     : Stored::kInt8;
  STD_TORCH_CHECK(kind != Stored::kInt8 || (scales.is_contiguous() && scales.numel() == rows.size(0) &&
                                            scales.scalar_type() == ScalarType::Float),
                  "mips: int8 rows need contiguous float32 scales (N,)");
  return {kind, rows.const_data_ptr(), kind == Stored::kInt8 ? (const float*)scales.const_data_ptr() : nullptr,
          rows.size(0), rows.size(1)};
}

int64_t bins_of(int64_t rows) { return (rows + kBin - 1) / kBin; }

const float* as_floats(const Rows& rows, int64_t row, float* space) {
  if (rows.kind == Stored::kFloat) return (const float*)rows.data + row * rows.width;
  if (rows.kind == Stored::kBfloat16) {
    const auto* from = (const uint16_t*)rows.data + row * rows.width;
    for (int64_t d = 0; d < rows.width; ++d) {
      const uint32_t bits = (uint32_t)from[d] << 16;
      std::memcpy(space + d, &bits, sizeof(bits));
    }
    return space;
  }
  const auto* from = (const int8_t*)rows.data + row * rows.width;
  for (int64_t d = 0; d < rows.width; ++d) space[d] = (float)from[d];
  return space;
}

// Returns an upper bound of a row's norm, given its values as floats. It is NaN if the row contains NaN or infinity.
double row_norm(const Rows& rows, int64_t row, const float* values) {
  const double rounding = 1.0 + (double)(rows.width + 4) * 0x1p-23;
  float fast;
  kernels().dots_float(values, 1, rows.width, values, &fast);
  double square = fast;
  if (!(fast > 1e-30f && fast < 1e37f)) {  // fp32 may lose precision or overflow here, or it is NaN
    square = 0.0;
    for (int64_t d = 0; d < rows.width; ++d) square += (double)values[d] * values[d];
  }
  const double norm = std::sqrt(square * rounding) * (rows.scales ? (double)rows.scales[row] : 1.0);
  return std::isfinite(norm) ? norm : std::numeric_limits<double>::quiet_NaN();
}

// Returns an upper bound of the norms of a bin's rows, or NaN if a row contains NaN or infinity.
double bin_norm(const Rows& rows, int64_t bin, float* space) {
  double highest = 0.0;
  for (int64_t row = bin * kBin; row < std::min(rows.count, (bin + 1) * kBin); ++row) {
    const double norm = row_norm(rows, row, as_floats(rows, row, space));
    if (std::isnan(norm)) return norm;
    highest = std::max(highest, norm);
  }
  return highest;
}

// The state of all queries of one call, in tensors that Python owns.
struct State {
  Rows rows;
  const double* queries;
  const double* norms;
  const double* bounds;  // (Q, 2): relative, absolute
  const uint8_t* valid;
  int64_t valid_stride;
  const int64_t* numbers = nullptr;  // of the searched rows, in place of all rows
  int64_t first_id;
  bool proven;
  Best* best;
  int64_t k;
  int64_t* best_counts;
  double* cutoffs;
  bool* broken;
  int64_t size;

  State(const Tensor& queries_, const Tensor& rows_, const Tensor& scales, const Tensor& norms_,
        const Tensor& bounds_, const Tensor& valid_, int64_t first_id_, bool proven_,
        const Tensor& best_, const Tensor& best_counts_, const Tensor& cutoffs_, const Tensor& broken_,
        const Tensor* numbers_ = nullptr)
      : rows(rows_of(rows_, scales)), first_id(first_id_), proven(proven_) {
    size = queries_.size(0);
    k = best_.size(1);
    const auto is = [&](const Tensor& t, ScalarType type, int64_t numel) {
      return t.is_contiguous() && t.scalar_type() == type && t.numel() == numel;
    };
    STD_TORCH_CHECK(is(queries_, ScalarType::Double, size * rows.width), "mips: queries must be float64 (Q, D)");
    STD_TORCH_CHECK(is(norms_, ScalarType::Double, bins_of(numbers_ ? numbers_->numel() : rows.count)),
                    "mips: norms must be float64 (bins,)");
    STD_TORCH_CHECK(is(bounds_, ScalarType::Double, size * 2), "mips: bounds must be float64 (Q, 2)");
    STD_TORCH_CHECK(k > 0 && is(best_, ScalarType::Long, size * k * 2), "mips: best must be int64 (Q, k, 2)");
    STD_TORCH_CHECK(is(best_counts_, ScalarType::Long, size) && is(cutoffs_, ScalarType::Double, size) &&
                        is(broken_, ScalarType::Bool, size),
                    "mips: expected int64 best_counts, float64 cutoffs and bool broken, (Q,) each");
    STD_TORCH_CHECK(valid_.numel() == 0 || is(valid_, ScalarType::Bool, rows.count) ||
                        is(valid_, ScalarType::Bool, size * rows.count),
                    "mips: valid must be bool (N,) or (Q, N)");
    if (numbers_) {
      STD_TORCH_CHECK(is(*numbers_, ScalarType::Long, numbers_->numel()), "mips: row numbers must be int64 (n,)");
      numbers = (const int64_t*)numbers_->const_data_ptr();
    }
    queries = (const double*)queries_.const_data_ptr();
    norms = (const double*)norms_.const_data_ptr();
    bounds = (const double*)bounds_.const_data_ptr();
    valid = valid_.numel() ? (const uint8_t*)valid_.const_data_ptr() : nullptr;
    valid_stride = valid_.dim() == 2 && valid_.size(0) == size ? rows.count : 0;
    best = (Best*)best_.mutable_data_ptr();
    best_counts = (int64_t*)best_counts_.mutable_data_ptr();
    cutoffs = (double*)cutoffs_.mutable_data_ptr();
    broken = (bool*)broken_.mutable_data_ptr();
  }

  Selection selection(int64_t q, Candidate* candidates, int64_t capacity, int64_t* count) const {
    return {&kernels(),
            &rows,
            numbers,
            queries + q * rows.width,
            valid ? valid + q * valid_stride : nullptr,
            {norms, bounds[q * 2], bounds[q * 2 + 1]},
            first_id,
            proven,
            candidates,
            capacity,
            count,
            {best + q * k, k, best_counts + q, cutoffs + q},
            broken + q};
  }
};

// Selects rows from the scores of bins, on several threads. A thread calls make() for its own function (bin, scores),
// which sets the scores (Q, kBin) of a bin and returns its number of rows.
template <class Make>
void search_bins(const State& state, int64_t bins, int64_t shards, int64_t capacity, Make make) {
  STD_TORCH_CHECK(capacity > kBin, "mips: expected capacity > 64");
  const int64_t size = state.size, k = state.k;
  struct Shard {
    std::vector<Candidate> candidates;
    std::vector<int64_t> counts, best_counts;
    std::vector<Best> best;
    std::vector<double> cutoffs;
    std::unique_ptr<bool[]> broken;
  };
  std::vector<Shard> all(shards);
  parallel_for(0, shards, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      Shard& shard = all[s];
      shard.candidates.resize(size * capacity);
      shard.counts.assign(size, 0);
      shard.best_counts.assign(size, 0);
      shard.best.resize(size * k);
      shard.cutoffs.assign(state.cutoffs, state.cutoffs + size);
      shard.broken.reset(new bool[size]());
      std::vector<Selection> selections;
      for (int64_t q = 0; q < size; ++q) {
        Selection own = state.selection(q, shard.candidates.data() + q * capacity, capacity, &shard.counts[q]);
        own.top = {shard.best.data() + q * k, k, &shard.best_counts[q], &shard.cutoffs[q]};
        own.broken = &shard.broken[q];
        selections.push_back(own);
      }
      auto scan = make();
      std::vector<float> scores(size * kBin);
      for (int64_t bin = bins * s / shards; bin < bins * (s + 1) / shards; ++bin) {
        const int64_t in_bin = scan(bin, scores.data());
        for (int64_t q = 0; q < size; ++q) selections[q].offer(scores.data() + q * kBin, bin * kBin, in_bin);
      }
      for (Selection& own : selections) own.settle();
    }
  });
  int64_t none = 0;
  for (const Shard& shard : all) {
    for (int64_t q = 0; q < size; ++q) {
      Selection total = state.selection(q, nullptr, 0, &none);
      for (int64_t i = 0; i < shard.best_counts[q]; ++i) total.top.insert(shard.best[q * k + i]);
      *total.broken |= shard.broken[q];
    }
  }
}

}  // namespace

const MipsKernels& mips_kernels() {
  static const MipsKernels& chosen = choose_kernels();
  return chosen;
}

// Returns upper bounds of the row norms of each bin, (ceil(N / 64),) fp64. A row with NaN or infinity makes it NaN.
Tensor mips_norms(const Tensor& rows_tensor, const Tensor& scales) {
  const Rows rows = rows_of(rows_tensor, scales);
  const Tensor norms = torch::stable::new_empty(rows_tensor, {bins_of(rows.count)}, ScalarType::Double);
  auto* out = (double*)norms.mutable_data_ptr();
  parallel_for(0, bins_of(rows.count), 16, [&](int64_t first, int64_t last) {
    std::vector<float> space(rows.width);
    for (int64_t bin = first; bin < last; ++bin) out[bin] = bin_norm(rows, bin, space.data());
  });
  return norms;
}

// Processes a tile of scores (R, Q) of rows [first_row, first_row + R) of a segment. first_row is a multiple of 64.
void mips_tile(const Tensor& tile, int64_t first_row, const Tensor& queries, const Tensor& rows, const Tensor& scales,
               const Tensor& norms, const Tensor& bounds, const Tensor& valid,
               int64_t first_id, bool proven, const Tensor& candidates, const Tensor& counts, const Tensor& best,
               const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken) {
  const State state(queries, rows, scales, norms, bounds, valid, first_id, proven, best, best_counts,
                    cutoffs, broken);
  const int64_t count = tile.size(0), capacity = candidates.size(1);
  STD_TORCH_CHECK(tile.scalar_type() == ScalarType::Float && tile.size(1) == state.size && tile.stride(1) == 1,
                  "mips: expected a float32 tile (R, Q)");
  STD_TORCH_CHECK(first_row % kBin == 0 && first_row + count <= state.rows.count,
                  "mips: expected a tile inside the segment, from a multiple of 64 rows on");
  STD_TORCH_CHECK(candidates.scalar_type() == ScalarType::Long && candidates.is_contiguous() &&
                      candidates.size(0) == state.size && capacity > kBin && counts.numel() == state.size &&
                      counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
                  "mips: expected int64 candidates (Q, capacity), capacity > 64, and int64 counts (Q,)");
  const auto* scores = (const float*)tile.const_data_ptr();
  const int64_t stride = tile.stride(0);
  auto* space = (Candidate*)candidates.mutable_data_ptr();
  auto* filled = (int64_t*)counts.mutable_data_ptr();
  // The scores of a column are far apart in memory, so only the relevant eighths of a bin are gathered.
  constexpr int64_t kPart = 8, kParts = kBin / kPart;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t share = ((state.size + threads - 1) / threads + 15) / 16 * 16;  // columns of one thread
  parallel_for(0, (state.size + share - 1) / share, 1, [&](int64_t first, int64_t last) {
    std::vector<float> highest(share), thresholds(share), parts(kParts * share);
    float column[kPart];
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * share, columns = std::min(share, state.size - begin);
      const double* bounds_of = state.bounds + begin * 2;
      for (int64_t row = 0; row < count; row += kBin) {
        const int64_t in_bin = std::min(kBin, count - row), bin = (first_row + row) / kBin;
        const float* own = scores + row * stride + begin;
        const int64_t present = (in_bin + kPart - 1) / kPart;
        for (int64_t p = 0; p < present; ++p) {
          kernels().column_maxima(own + p * kPart * stride, std::min(kPart, in_bin - p * kPart), columns, stride,
                                  parts.data() + p * share);
        }
        kernels().column_maxima(parts.data(), present, columns, share, highest.data());
        const double norm = state.proven ? state.norms[bin] : 0.0, absolute = state.proven ? 1.0 : 0.0;
        for (int64_t c = 0; c < columns; ++c) {
          const double* of = bounds_of + c * 2;
          const double error = of[0] * norm + of[1] * absolute;
          thresholds[c] = float_below(state.cutoffs[begin + c] - error);
        }
        for (int64_t c = 0; c < columns; ++c) {
          if (highest[c] < thresholds[c]) continue;
          const int64_t q = begin + c;
          Selection selection = state.selection(q, space + q * capacity, capacity, filled + q);
          for (int64_t p = 0; p < present; ++p) {
            if (parts[p * share + c] < thresholds[c]) continue;
            const int64_t begin_row = p * kPart, rows_here = std::min(kPart, in_bin - begin_row);
            for (int64_t r = 0; r < rows_here; ++r) column[r] = own[(begin_row + r) * stride + c];
            selection.offer(column, first_row + row + begin_row, rows_here);
          }
        }
      }
    }
  });
}

// Rescores the remaining candidates of a segment. Must run before the next segment and at the end.
void mips_settle(const Tensor& queries, const Tensor& rows, const Tensor& scales, const Tensor& norms,
                 const Tensor& bounds, const Tensor& valid, int64_t first_id, bool proven,
                 const Tensor& candidates, const Tensor& counts, const Tensor& best, const Tensor& best_counts,
                 const Tensor& cutoffs, const Tensor& broken) {
  const State state(queries, rows, scales, norms, bounds, valid, first_id, proven, best, best_counts,
                    cutoffs, broken);
  const int64_t capacity = candidates.size(1);
  auto* space = (Candidate*)candidates.mutable_data_ptr();
  auto* filled = (int64_t*)counts.mutable_data_ptr();
  parallel_for(0, state.size, 4, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      state.selection(q, space + q * capacity, capacity, filled + q).settle();
    }
  });
}

// Searches the given rows (n,) of a segment only. `scan_queries` (Q, D) are float32. `norms` are those of mips_norms, or
// empty. Without `low`, all scores are those in fp64.
void mips_rows(const Tensor& numbers, const Tensor& scan_queries, const Tensor& queries, const Tensor& rows_tensor,
               const Tensor& scales, const Tensor& norms, int64_t first_id, bool low, int64_t capacity,
               const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken) {
  const int64_t size = queries.size(0), count = numbers.numel();
  const Tensor limits = torch::stable::new_empty(queries, {size, 2}, ScalarType::Double);
  const Tensor own_norms = torch::stable::new_empty(queries, {bins_of(count)}, ScalarType::Double);
  const Tensor all_valid = torch::stable::new_empty(queries, {0}, ScalarType::Bool);
  const State state(queries, rows_tensor, scales, own_norms, limits, all_valid, first_id, true, best, best_counts,
                    cutoffs, broken, &numbers);
  const Rows& rows = state.rows;
  const int64_t width = rows.width;
  STD_TORCH_CHECK(scan_queries.is_contiguous() && scan_queries.numel() == size * width &&
                      scan_queries.scalar_type() == ScalarType::Float,
                  "mips: expected float32 queries (Q, D)");
  STD_TORCH_CHECK(!norms.numel() || (norms.is_contiguous() && norms.numel() == bins_of(rows.count) &&
                                     norms.scalar_type() == ScalarType::Double),
                  "mips: norms must be float64 (bins,), or empty");
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(state.numbers[i] >= 0 && state.numbers[i] < rows.count,
                    "mips: expected row numbers inside the segment");
  }
  const auto* scanned = (const float*)scan_queries.const_data_ptr();
  const auto* row_norms = norms.numel() ? (const double*)norms.const_data_ptr() : nullptr;
  auto* bin_norms = (double*)own_norms.mutable_data_ptr();
  auto* bounds = (double*)limits.mutable_data_ptr();
  const double units = (double)(width + 4) * 0x1p-24, product = units / (1.0 - units);
  double longest = 0.0;
  for (int64_t q = 0; q < size; ++q) {
    double squares = 0.0, errors = 0.0;
    for (int64_t d = q * width; d < (q + 1) * width; ++d) {
      const double value = scanned[d], error = state.queries[d] - value;
      squares += value * value;
      errors += error * error;
    }
    const double relative = (std::sqrt(squares) * product + std::sqrt(errors)) * (1.0 + 1e-9);
    bounds[q * 2] = std::max(relative, std::numeric_limits<double>::min());
    bounds[q * 2 + 1] = (double)width * 0x1p-125;
    longest = std::max(longest, std::sqrt(squares));
  }
  constexpr int64_t kEarlier = 8, kGathered = 16;  // rows that stay in the first cache for all queries
  constexpr double kMaxScore = 1e37;               // a partial sum of higher scores could overflow
  const bool in_place = size == 1 && rows.kind == Stored::kFloat;
  const int64_t row_bytes = rows_tensor.element_size() * width;
  const auto make = [&] {
    return [&, space = std::vector<float>(kGathered * width)](int64_t bin, float* scores) mutable {
      const int64_t* given = state.numbers + bin * kBin;
      const int64_t in_bin = std::min(kBin, count - bin * kBin);
      double highest = 0.0;
      for (int64_t begin = 0; begin < in_bin; begin += kGathered) {
        const int64_t end = std::min(in_bin, begin + kGathered);
        for (int64_t i = begin; i < end; ++i) {
          if (bin * kBin + i + kEarlier < count) {
            prefetch((const char*)rows.data + given[i + kEarlier] * row_bytes, row_bytes);
          }
          float* own = space.data() + (i - begin) * width;
          const float* values = as_floats(rows, given[i], own);
          highest = std::max(highest, row_norms ? row_norms[given[i] / kBin] : row_norm(rows, given[i], values));
          if (in_place) {
            kernels().dots_float(values, 1, width, scanned, scores + i);
          } else if (values != own) {
            std::copy(values, values + width, own);
          }
        }
        if (!in_place) kernels().products(space.data(), end - begin, width, scanned, size, scores + begin, kBin);
      }
      const bool in_range = low && highest * longest < kMaxScore;
      bin_norms[bin] = in_range ? highest : std::numeric_limits<double>::infinity();
      for (int64_t q = 0; q < size; ++q) {
        for (int64_t i = 0; i < in_bin && (!in_range || rows.scales); ++i) {
          scores[q * kBin + i] = in_range ? scores[q * kBin + i] * rows.scales[given[i]] : 0.0f;
        }
      }
      return in_bin;
    };
  };
  const int64_t bins = bins_of(count), threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  search_bins(state, bins, std::clamp<int64_t>(bins * size / 16, 1, std::min(bins, threads)), capacity, make);
}

// Returns the places of a mask's true elements, ascending, and two numbers: of true elements, and of bins that have any.
// With more than `limit` true elements, it returns no places, and numbers that were counted so far.
std::tuple<Tensor, Tensor> mips_chosen(const Tensor& mask, int64_t limit) {
  const int64_t size = mask.numel();
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool, "mips: expected a bool mask (N,)");
  const auto* given = (const uint8_t*)mask.const_data_ptr();
  std::vector<int64_t> places;
  int64_t touched = 0;
  for (int64_t begin = 0; begin < size && (int64_t)places.size() <= limit; begin += kBin) {
    uint64_t words[kBin / 8] = {}, any = 0;
    std::memcpy(words, given + begin, std::min(kBin, size - begin));
    for (const uint64_t word : words) any |= word;
    if (!any) continue;
    ++touched;
    for (int64_t i = 0; i < kBin / 8; ++i) {  // one bit in each byte that is not zero
      uint64_t left = (((words[i] & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | words[i]) & 0x8080808080808080ull;
      for (; left; left &= left - 1) places.push_back(begin + i * 8 + __builtin_ctzll(left) / 8);
    }
  }
  const int64_t count = (int64_t)places.size();
  const Tensor found = torch::stable::new_empty(mask, {count <= limit ? count : 0}, ScalarType::Long);
  const Tensor numbers = torch::stable::new_empty(mask, {2}, ScalarType::Long);
  ((int64_t*)numbers.mutable_data_ptr())[0] = count;
  ((int64_t*)numbers.mutable_data_ptr())[1] = touched;
  if (found.numel()) std::copy(places.begin(), places.end(), (int64_t*)found.mutable_data_ptr());
  return {found, numbers};
}

// Returns queries (Q, D), scaled by powers of two to a largest element in [0.5, 1), as float64 and as float32, with the
// exponents (Q,) int32 and the norms (Q,) float64. The norm of a query with NaN or infinity is not finite.
std::tuple<Tensor, Tensor, Tensor, Tensor> mips_scaled(const Tensor& queries) {
  STD_TORCH_CHECK(queries.dim() == 2 && queries.is_contiguous() && queries.scalar_type() == ScalarType::Double,
                  "mips: expected contiguous float64 queries (Q, D)");
  const int64_t size = queries.size(0), width = queries.size(1);
  const Tensor exact = torch::stable::new_empty(queries, {size, width});
  const Tensor scan = torch::stable::new_empty(queries, {size, width}, ScalarType::Float);
  const Tensor exponents = torch::stable::new_empty(queries, {size}, ScalarType::Int);
  const Tensor norms = torch::stable::new_empty(queries, {size});
  parallel_for(0, size, 64, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      const auto* from = (const double*)queries.const_data_ptr() + q * width;
      auto* to = (double*)exact.mutable_data_ptr() + q * width;
      auto* low = (float*)scan.mutable_data_ptr() + q * width;
      double largest = 0.0, squares = 0.0;
      for (int64_t d = 0; d < width; ++d) largest = std::max(largest, std::fabs(from[d]));
      int exponent = 0;
      if (std::isfinite(largest)) std::frexp(largest, &exponent);
      const bool moderate = std::abs(exponent) < 1000;  // so that the power of two is a normal number
      const double factor = std::ldexp(1.0, moderate ? -exponent : 0);
      for (int64_t d = 0; d < width; ++d) {
        to[d] = moderate ? from[d] * factor : std::ldexp(from[d], -exponent);
        low[d] = (float)to[d];
        squares += to[d] * to[d];
      }
      ((int32_t*)exponents.mutable_data_ptr())[q] = exponent;
      ((double*)norms.mutable_data_ptr())[q] = std::sqrt(squares);
    }
  });
  return {exact, scan, exponents, norms};
}

// Returns the kind of this processor's vectors: 0 up to 32 bytes, 1 of 64 bytes, 2 with products of bfloat16 pairs.
// `rows` chooses the device alone.
int64_t mips_vectors(const Tensor&) { return kernels().products_pairs ? 2 : kernels().bytes == 64 ? 1 : 0; }

// Searches a segment for few queries and reads the rows once. `scan_queries` are int16 with `query_scales` for int8
// rows, else float32, or bfloat16 without denormals. `fill_norms` also computes the norms of the bins.
void mips_few(const Tensor& scan_queries, const Tensor& query_scales, bool fill_norms, const Tensor& queries,
              const Tensor& rows, const Tensor& scales, const Tensor& norms, const Tensor& bounds, const Tensor& valid,
              int64_t first_id, bool proven, int64_t capacity, const Tensor& best, const Tensor& best_counts,
              const Tensor& cutoffs, const Tensor& broken) {
  const State state(queries, rows, scales, norms, bounds, valid, first_id, proven, best, best_counts,
                    cutoffs, broken);
  const int64_t size = state.size, width = state.rows.width, bins = bins_of(state.rows.count);
  const bool integers = state.rows.kind == Stored::kInt8;
  const bool pairs = state.rows.kind == Stored::kBfloat16 && scan_queries.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!pairs || kernels().products_pairs, "mips: this processor has no products of bfloat16 pairs");
  STD_TORCH_CHECK(scan_queries.is_contiguous() && scan_queries.numel() == size * width &&
                      (pairs || scan_queries.scalar_type() == (integers ? ScalarType::Short : ScalarType::Float)),
                  "mips: expected int16 queries for int8 rows, else float32 or, for bfloat16 rows, bfloat16 queries, (Q, D)");
  STD_TORCH_CHECK(!integers || (query_scales.is_contiguous() && query_scales.numel() == size &&
                                query_scales.scalar_type() == ScalarType::Float),
                  "mips: expected float32 query scales (Q,)");
  auto* norms_out = (double*)norms.mutable_data_ptr();
  const auto make = [&] {
    return [&, space = std::vector<float>(width)](int64_t bin, float* out) mutable {
      int32_t sums[kBin];
      const int64_t row = bin * kBin, in_bin = std::min(kBin, state.rows.count - row);
      if (fill_norms) norms_out[bin] = bin_norm(state.rows, bin, space.data());
      if (state.rows.kind == Stored::kBfloat16 && (pairs || size >= 4)) {
        const auto* own = (const uint16_t*)state.rows.data + row * width;
        if (pairs) {
          const auto* queries = (const uint16_t*)scan_queries.const_data_ptr();
          kernels().products_pairs(own, in_bin, width, queries, size, out, kBin);
        } else {
          const auto* queries = (const float*)scan_queries.const_data_ptr();
          kernels().products_bfloat16(own, in_bin, width, queries, size, out, kBin);
        }
        return in_bin;
      }
      for (int64_t q = 0; q < size; ++q) {
        float* scores = out + q * kBin;
        if (integers) {
          kernels().dots_int8((const int8_t*)state.rows.data + row * width, in_bin, width,
                              (const int16_t*)scan_queries.const_data_ptr() + q * width, sums);
          const float query_scale = ((const float*)query_scales.const_data_ptr())[q];
          const float* row_scales = state.rows.scales + row;
          for (int64_t r = 0; r < in_bin; ++r) scores[r] = (float)sums[r] * (row_scales[r] * query_scale);
          continue;
        }
        const auto* query = (const float*)scan_queries.const_data_ptr() + q * width;
        if (state.rows.kind == Stored::kFloat) {
          kernels().dots_float((const float*)state.rows.data + row * width, in_bin, width, query, scores);
        } else {
          kernels().dots_bfloat16((const uint16_t*)state.rows.data + row * width, in_bin, width, query, scores);
        }
      }
      return in_bin;
    };
  };
  const int64_t threads = torch::stable::get_num_threads();
  search_bins(state, bins, std::max<int64_t>(1, std::min<int64_t>(bins / 16, threads)), capacity, make);
}

}  // namespace jasper_fast
