// Conversion between square score matrices and their strict upper triangle, stored row by row.
#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kGrain = 1 << 15;  // minimum number of elements per thread

// Pair (i, j), i < j, of B rows has index row_offset(i) + j.
inline int64_t row_offset(int64_t i, int64_t rows) { return i * (2 * rows - i - 1) / 2 - i - 1; }

}  // namespace

// Packs matrix (B, B) fp32 into (P,) fp32.
Tensor pack_pairs(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1), "pack_pairs: expected a square matrix");
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Float && matrix.is_contiguous(),
                  "pack_pairs: expected a contiguous float32 matrix");
  const int64_t rows = matrix.size(0);
  const Tensor packed = torch::stable::new_empty(matrix, {rows * (rows - 1) / 2});
  const auto* from = (const float*)matrix.const_data_ptr();
  auto* to = (float*)packed.mutable_data_ptr();
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(rows, 1)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      std::copy(from + i * rows + i + 1, from + (i + 1) * rows, to + row_offset(i, rows) + i + 1);
    }
  });
  return packed;
}

// Unpacks counts (P,) int32 into (B, B) fp32, with scale * counts on both sides of a zero diagonal.
Tensor unpack_pairs(const Tensor& counts, int64_t rows, double scale) {
  STD_TORCH_CHECK(counts.dim() == 1 && counts.size(0) == rows * (rows - 1) / 2, "unpack_pairs: expected (P,) counts");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Int && counts.is_contiguous(),
                  "unpack_pairs: expected contiguous int32 counts");
  const Tensor matrix = torch::stable::new_empty(counts, {rows, rows}, ScalarType::Float);
  const auto* from = (const int32_t*)counts.const_data_ptr();
  auto* to = (float*)matrix.mutable_data_ptr();
  const int64_t tiles = (rows + kTile - 1) / kTile;
  parallel_for(0, tiles * tiles, kGrain / (kTile * kTile), [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t row = tile / tiles * kTile, column = tile % tiles * kTile;
      if (column < row) continue;
      for (int64_t i = row; i < std::min(row + kTile, rows); ++i) {
        const int32_t* own = from + row_offset(i, rows);
        for (int64_t j = std::max(column, i + 1); j < std::min(column + kTile, rows); ++j) {
          const float value = (float)(own[j] * scale);
          to[i * rows + j] = value;
          to[j * rows + i] = value;
        }
        if (column == row) to[i * rows + i] = 0.0f;
      }
    }
  });
  return matrix;
}

}  // namespace jasper_fast
