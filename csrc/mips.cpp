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

// Returns the widest kernels that this processor supports. JASPER_FAST_ISA=avx512, avx2 or generic selects narrower
// ones, for tests and comparison.
const MipsKernels& choose_kernels() {
#if defined(__x86_64__)
  const char* given = std::getenv("JASPER_FAST_ISA");
  const auto allowed = [&](const char* name) { return !given || std::strcmp(given, name) == 0; };
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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

// Returns an upper bound of the norms of a bin's rows, or NaN if a row contains NaN or infinity.
double bin_norm(const Rows& rows, int64_t bin, float* space) {
  const double rounding = 1.0 + (double)(rows.width + 4) * 0x1p-23;
  double highest = 0.0;
  for (int64_t row = bin * kBin; row < std::min(rows.count, (bin + 1) * kBin); ++row) {
    const float* values = as_floats(rows, row, space);
    float fast;
    kernels().dots_float(values, 1, rows.width, values, &fast);
    double square = fast;
    if (!(fast > 1e-30f && fast < 1e37f)) {  // fp32 may lose precision or overflow here, or it is NaN
      square = 0.0;
      for (int64_t d = 0; d < rows.width; ++d) square += (double)values[d] * values[d];
      if (!std::isfinite(square)) return std::numeric_limits<double>::quiet_NaN();
    }
    const double norm = std::sqrt(square * rounding) * (rows.scales ? (double)rows.scales[row] : 1.0);
    if (!std::isfinite(norm)) return std::numeric_limits<double>::quiet_NaN();
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
        const Tensor& best_, const Tensor& best_counts_, const Tensor& cutoffs_, const Tensor& broken_)
      : rows(rows_of(rows_, scales)), first_id(first_id_), proven(proven_) {
    size = queries_.size(0);
    k = best_.size(1);
    const auto is = [&](const Tensor& t, ScalarType type, int64_t numel) {
      return t.is_contiguous() && t.scalar_type() == type && t.numel() == numel;
    };
    STD_TORCH_CHECK(is(queries_, ScalarType::Double, size * rows.width), "mips: queries must be float64 (Q, D)");
    STD_TORCH_CHECK(is(norms_, ScalarType::Double, bins_of(rows.count)), "mips: norms must be float64 (bins,)");
    STD_TORCH_CHECK(is(bounds_, ScalarType::Double, size * 2), "mips: bounds must be float64 (Q, 2)");
    STD_TORCH_CHECK(k > 0 && is(best_, ScalarType::Long, size * k * 2), "mips: best must be int64 (Q, k, 2)");
    STD_TORCH_CHECK(is(best_counts_, ScalarType::Long, size) && is(cutoffs_, ScalarType::Double, size) &&
                        is(broken_, ScalarType::Bool, size),
                    "mips: expected int64 best_counts, float64 cutoffs and bool broken, (Q,) each");
    STD_TORCH_CHECK(valid_.numel() == 0 || is(valid_, ScalarType::Bool, rows.count) ||
                        is(valid_, ScalarType::Bool, size * rows.count),
                    "mips: valid must be bool (N,) or (Q, N)");
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

// Searches the given rows (n,) of a segment only, by exact scores of all of them.
void mips_rows(const Tensor& numbers, const Tensor& queries, const Tensor& rows_tensor, const Tensor& scales,
               int64_t first_id, const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs) {
  const Rows rows = rows_of(rows_tensor, scales);
  const int64_t size = queries.size(0), count = numbers.numel(), k = best.size(1);
  STD_TORCH_CHECK(numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Long && queries.is_contiguous() &&
                      queries.scalar_type() == ScalarType::Double && queries.numel() == size * rows.width,
                  "mips: expected int64 row numbers (n,) and float64 queries (Q, D)");
  STD_TORCH_CHECK(best.is_contiguous() && best.numel() == size * k * 2 && best_counts.is_contiguous() &&
                      best_counts.numel() == size && cutoffs.is_contiguous() && cutoffs.numel() == size,
                  "mips: expected best (Q, k, 2), best_counts (Q,) and cutoffs (Q,)");
  const auto* given = (const int64_t*)numbers.const_data_ptr();
  const auto* exact = (const double*)queries.const_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(given[i] >= 0 && given[i] < rows.count, "mips: expected row numbers inside the segment");
  }
  constexpr int64_t kPart = 64, kEarlier = 4, kTogether = 4;
  const int64_t bytes = rows_tensor.element_size() * rows.width;
  const auto found = make_buffer<Best>(size * count);
  parallel_for(0, (count + kPart - 1) / kPart, 1, [&](int64_t first, int64_t last) {
    double scores[kTogether];
    for (int64_t part = first; part < last; ++part) {
      const int64_t end = std::min(count, (part + 1) * kPart);
      for (int64_t q = 0; q < size; q += kTogether) {  // The rows and a few queries stay in the caches.
        const int64_t group = std::min(kTogether, size - q);
        for (int64_t i = part * kPart; i < end; ++i) {
          if (!q && i + kEarlier < end) prefetch((const char*)rows.data + given[i + kEarlier] * bytes, bytes);
          rows.exact(kernels(), given[i], exact + q * rows.width, group, scores);
          for (int64_t own = 0; own < group; ++own) found[(q + own) * count + i] = {scores[own], first_id + given[i]};
        }
      }
    }
  });
  parallel_for(0, size, 1, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      TopK top = {(Best*)best.mutable_data_ptr() + q * k, k, (int64_t*)best_counts.mutable_data_ptr() + q,
                  (double*)cutoffs.mutable_data_ptr() + q};
      top.merge(found.get() + q * count, count);
    }
  });
}

// Returns the places of a mask's true elements, ascending, and two numbers: of true elements, and of bins that have any.
// The places are left out if there are more than `limit`.
std::tuple<Tensor, Tensor> mips_chosen(const Tensor& mask, int64_t limit) {
  const int64_t size = mask.numel();
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool, "mips: expected a bool mask (N,)");
  const auto* given = (const uint8_t*)mask.const_data_ptr();
  const auto eight = [&](int64_t begin) {  // one bit in each byte that is not zero
    uint64_t bytes = 0;
    std::memcpy(&bytes, given + begin, size - begin < 8 ? size - begin : 8);
    return (((bytes & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | bytes) >> 7 & 0x0101010101010101ull;
  };
  int64_t count = 0, touched = 0;
  for (int64_t begin = 0; begin < size; begin += kBin) {
    uint64_t sums = 0;  // one in each byte
    for (int64_t i = begin; i < std::min(size, begin + kBin); i += 8) sums += eight(i);
    count += (int64_t)(sums * 0x0101010101010101ull >> 56);
    touched += sums != 0;
  }
  const Tensor places = torch::stable::new_empty(mask, {count <= limit ? count : 0}, ScalarType::Long);
  const Tensor numbers = torch::stable::new_empty(mask, {2}, ScalarType::Long);
  ((int64_t*)numbers.mutable_data_ptr())[0] = count;
  ((int64_t*)numbers.mutable_data_ptr())[1] = touched;
  auto* out = (int64_t*)places.mutable_data_ptr();
  for (int64_t begin = 0; count <= limit && begin < size; begin += 8) {
    for (uint64_t left = eight(begin); left; left &= left - 1) *out++ = begin + __builtin_ctzll(left) / 8;
  }
  return {places, numbers};
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

// Searches a segment for few queries and reads the rows once. `scan_queries` are int16 with `query_scales` for int8
// rows, else float32. `fill_norms` also computes the norms of the bins.
void mips_few(const Tensor& scan_queries, const Tensor& query_scales, bool fill_norms, const Tensor& queries,
              const Tensor& rows, const Tensor& scales, const Tensor& norms, const Tensor& bounds, const Tensor& valid,
              int64_t first_id, bool proven, int64_t capacity, const Tensor& best, const Tensor& best_counts,
              const Tensor& cutoffs, const Tensor& broken) {
  const State state(queries, rows, scales, norms, bounds, valid, first_id, proven, best, best_counts,
                    cutoffs, broken);
  const int64_t size = state.size, width = state.rows.width, bins = bins_of(state.rows.count), k = state.k;
  const bool integers = state.rows.kind == Stored::kInt8;
  STD_TORCH_CHECK(capacity > kBin, "mips: expected capacity > 64");
  STD_TORCH_CHECK(scan_queries.is_contiguous() && scan_queries.numel() == size * width &&
                      scan_queries.scalar_type() == (integers ? ScalarType::Short : ScalarType::Float),
                  "mips: expected int16 queries for int8 rows, else float32 queries, (Q, D)");
  STD_TORCH_CHECK(!integers || (query_scales.is_contiguous() && query_scales.numel() == size &&
                                query_scales.scalar_type() == ScalarType::Float),
                  "mips: expected float32 query scales (Q,)");
  const int64_t shards = std::max<int64_t>(1, std::min<int64_t>(bins / 16, torch::stable::get_num_threads()));
  auto* norms_out = (double*)norms.mutable_data_ptr();
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
      std::vector<float> space(width);
      float scores[kBin];
      int32_t sums[kBin];
      for (int64_t bin = bins * s / shards; bin < bins * (s + 1) / shards; ++bin) {
        const int64_t row = bin * kBin, in_bin = std::min(kBin, state.rows.count - row);
        if (fill_norms) norms_out[bin] = bin_norm(state.rows, bin, space.data());
        for (int64_t q = 0; q < size; ++q) {
          if (integers) {
            kernels().dots_int8((const int8_t*)state.rows.data + row * width, in_bin, width,
                                (const int16_t*)scan_queries.const_data_ptr() + q * width, sums);
            const float query_scale = ((const float*)query_scales.const_data_ptr())[q];
            const float* row_scales = state.rows.scales + row;
            for (int64_t r = 0; r < in_bin; ++r) scores[r] = (float)sums[r] * (row_scales[r] * query_scale);
          } else {
            const auto* query = (const float*)scan_queries.const_data_ptr() + q * width;
            if (state.rows.kind == Stored::kFloat) {
              kernels().dots_float((const float*)state.rows.data + row * width, in_bin, width, query, scores);
            } else {
              kernels().dots_bfloat16((const uint16_t*)state.rows.data + row * width, in_bin, width, query, scores);
            }
          }
          selections[q].offer(scores, row, in_bin);
        }
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

}  // namespace jasper_fast
