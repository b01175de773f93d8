// The two passes of the binned relative similarity loss over a block of rows of pair scores.
//
// A block (Strip) holds rows [b, b + h) and columns [b, B) of the student's and the teacher's score matrices. Its first
// h columns are a square on the diagonal. Pair (row, column) of the block is new if column > row. Scattered access to
// tables of about 1 MiB limits the speed of both passes. Finding a score's bin takes one multiplication.

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

// Maps scores to fractional positions in fine bins, [0, last]. NaN maps to 0, because other code makes the loss NaN.
struct Axis {
  float origin, scale, last;

  float position(float score) const {
    const float place = (score - origin) * scale;
    return std::min(place > 0.0f ? place : 0.0f, last);
  }
};

struct Strip {
  const float* teacher;
  int64_t rows, columns;
  Axis x, t;
  float centre;
};

// grid (5,) fp32: origin and fine bins per unit of the student's axis, the same of the teacher's axis, and a typical
// student score.
Strip check_strip(const Tensor& student, const Tensor& teacher, const Tensor& grid, int64_t fine) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                      student.size(1) == teacher.size(1) && student.size(0) <= student.size(1),
                  "binned: expected student and teacher scores of one shape (h, w), h <= w");
  STD_TORCH_CHECK(grid.dim() == 1 && grid.size(0) == 5, "binned: expected a grid of 5 numbers");
  for (const Tensor* tensor : {&student, &teacher, &grid}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                    "binned: expected contiguous float32 tensors");
  }
  const auto* g = (const float*)grid.const_data_ptr();
  // Keep the last position below its bin's upper end. At 2^15 bins, fp32 resolves 2^-8 of a fine bin.
  const float last = (float)fine - 1.0f / 128.0f;
  return {(const float*)teacher.const_data_ptr(), student.size(0), student.size(1),
          {g[0], g[1], last}, {g[2], g[3], last}, g[4]};
}

inline float between(const float* table, int32_t i, float part) { return table[i] + part * (table[i + 1] - table[i]); }

}  // namespace

// Adds a block's new pairs to counts (T, K, K) [teacher bin, student bin] and to the fine marginals (T, F), all int32.
// Each of up to T threads has its own table. An empty fine_teacher is not filled.
void binned_histogram(const Tensor& student, const Tensor& teacher, const Tensor& grid, Tensor counts,
                      Tensor fine_student, Tensor fine_teacher) {
  STD_TORCH_CHECK(counts.dim() == 3 && counts.size(1) == counts.size(2) && fine_student.dim() == 2 &&
                      fine_student.size(0) == counts.size(0),
                  "binned_histogram: expected counts (T, K, K) and fine marginals (T, F)");
  for (const Tensor* tensor : {&counts, &fine_student, &fine_teacher}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous(),
                    "binned_histogram: expected contiguous int32 counts");
  }
  const int64_t tables = counts.size(0), bins = counts.size(1), fine = fine_student.size(1), sub = fine / bins;
  STD_TORCH_CHECK(bins > 0 && fine % bins == 0 && (sub & (sub - 1)) == 0,
                  "binned_histogram: expected a power of two of fine bins in each bin");
  const bool with_teacher = fine_teacher.dim() == 2;
  STD_TORCH_CHECK(!with_teacher || (fine_teacher.size(0) == tables && fine_teacher.size(1) == fine),
                  "binned_histogram: expected two fine marginals of one shape");
  const int shift = __builtin_ctzll((uint64_t)sub);
  const Strip strip = check_strip(student, teacher, grid, fine);
  const auto* x = (const float*)student.const_data_ptr();
  parallel_for(0, tables, 1, [&](int64_t first, int64_t last) {
    for (int64_t table = first; table < last; ++table) {
      auto* own = (int32_t*)counts.mutable_data_ptr() + table * bins * bins;
      auto* own_x = (int32_t*)fine_student.mutable_data_ptr() + table * fine;
      auto* own_t = with_teacher ? (int32_t*)fine_teacher.mutable_data_ptr() + table * fine : nullptr;
      for (int64_t row = table; row < strip.rows; row += tables) {
        for (int64_t i = row * strip.columns + row + 1; i < (row + 1) * strip.columns; ++i) {
          const auto at_x = (int32_t)strip.x.position(x[i]), at_t = (int32_t)strip.t.position(strip.teacher[i]);
          ++own_x[at_x];
          if (own_t) ++own_t[at_t];
          ++own[(int64_t)(at_t >> shift) * bins + (at_x >> shift)];
        }
      }
    }
  });
}

// Replaces a block's student scores by their gradient coefficients, 0 on the diagonal. Returns (h,) fp64, each row's
// sum of coefficient * (score - centre) over its new pairs. nodes (K + 1, K + 1), own and rank (F + 1,) are fp32.
Tensor binned_coefficients(Tensor student, const Tensor& teacher, const Tensor& grid, const Tensor& nodes,
                           const Tensor& own, const Tensor& rank) {
  STD_TORCH_CHECK(nodes.dim() == 2 && nodes.size(0) == nodes.size(1) && own.dim() == 1 && rank.dim() == 1 &&
                      own.size(0) == rank.size(0),
                  "binned_coefficients: expected nodes (K + 1, K + 1), own and rank (F + 1,)");
  for (const Tensor* tensor : {&nodes, &own, &rank}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                    "binned_coefficients: expected contiguous float32 tables");
  }
  const int64_t stride = nodes.size(1), fine = own.size(0) - 1;
  const float to_bins = (float)(stride - 1) / (float)fine;
  const Strip strip = check_strip(student, teacher, grid, fine);
  const Tensor sums = torch::stable::new_empty(student, {strip.rows}, ScalarType::Double);
  auto* x = (float*)student.mutable_data_ptr();
  auto* to = (double*)sums.mutable_data_ptr();
  const auto* node = (const float*)nodes.const_data_ptr();
  const auto* own_table = (const float*)own.const_data_ptr();
  const auto* rank_table = (const float*)rank.const_data_ptr();
  parallel_for(0, strip.rows, std::max<int64_t>(1, (1 << 13) / strip.columns), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* scores = x + row * strip.columns;
      const float* target = strip.teacher + row * strip.columns;
      const auto replace = [&](int64_t i) {
        const float score = scores[i];
        const float at_x = strip.x.position(score), at_t = strip.t.position(target[i]);
        const auto fine_x = (int32_t)at_x, fine_t = (int32_t)at_t;
        const float u = at_x * to_bins, v = at_t * to_bins;
        const auto bin_x = (int32_t)u, bin_t = (int32_t)v;
        const float* corner = node + bin_t * stride;
        const float part = u - (float)bin_x;
        const float near = between(corner, bin_x, part), far = between(corner + stride, bin_x, part);
        const float coefficient = between(own_table, fine_x, at_x - (float)fine_x) -
                                  between(rank_table, fine_t, at_t - (float)fine_t) + near +
                                  (v - (float)bin_t) * (far - near);
        scores[i] = coefficient;
        return (double)(coefficient * (score - strip.centre));
      };
      for (int64_t i = 0; i < row; ++i) replace(i);
      scores[row] = 0.0f;
      double sum = 0.0;
      for (int64_t i = row + 1; i < strip.columns; ++i) sum += replace(i);
      to[row] = sum;
    }
  });
  return sums;
}

}  // namespace jasper_fast
