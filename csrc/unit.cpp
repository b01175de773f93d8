// L2 normalisation of rows and its gradient, each in one pass over the rows. With tensor operations, these would cost
// more than the losses of a small batch, mostly for the first touch of temporaries.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kLanes = 16;  // independent sums that the compiler vectorises at any width

template <class Term>
float sum_over(int64_t width, Term term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  for (; i < width; ++i) lanes[i % kLanes] += term(i);
  float total = 0.0f;
  for (const float lane : lanes) total += lane;
  return total;
}

// Returns a power of two, by which scaling is exact. The squares of a row scaled this way neither overflow nor
// underflow. An infinite entry makes its row NaN.
float power_of_two_below_one_over(float largest) {
  if (largest == 0.0f) return 1.0f;
  if (std::isinf(largest)) return 0.0f;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
}

void check_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
                  "unit_rows: expected contiguous float32 rows");
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(width, 1)); }

}  // namespace

// Returns the unit rows (B, D) of embeddings (B, D), and the inverse norms (B, 1), 0 for a zero row.
std::tuple<Tensor, Tensor> unit_rows(const Tensor& embeddings) {
  check_rows(embeddings);
  const int64_t rows = embeddings.size(0), width = embeddings.size(1);
  const Tensor unit = torch::stable::new_empty(embeddings, {rows, width});
  const Tensor inverse = torch::stable::new_empty(embeddings, {rows, 1});
  const auto* from = (const float*)embeddings.const_data_ptr();
  auto* to = (float*)unit.mutable_data_ptr();
  auto* over_length = (float*)inverse.mutable_data_ptr();
  parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* x = from + row * width;
      float* u = to + row * width;
      float lanes[kLanes] = {};  // ignores NaN, which the sum of squares then propagates
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] = std::fabs(x[i + l]) > lanes[l] ? std::fabs(x[i + l]) : lanes[l];
      }
      for (; i < width; ++i) lanes[0] = std::max(lanes[0], std::fabs(x[i]));
      const float largest = *std::max_element(lanes, lanes + kLanes);
      const float scale = power_of_two_below_one_over(largest);
      const float square = sum_over(width, [&](int64_t k) { return (x[k] * scale) * (x[k] * scale); });
      const float length = std::sqrt(square);
      const float over = length == 0.0f ? 0.0f : 1.0f / length;
      for (int64_t k = 0; k < width; ++k) u[k] = (x[k] * scale) * over;
      over_length[row] = over * scale > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max()
                                                                         : over * scale;
    }
  });
  return {unit, inverse};
}

// Returns the gradient of the embeddings: the part of `incoming` (B, D) tangent to the unit rows, times inverse norms.
Tensor tangent(const Tensor& incoming, const Tensor& unit, const Tensor& inverse) {
  check_rows(incoming);
  check_rows(unit);
  const int64_t rows = unit.size(0), width = unit.size(1);
  STD_TORCH_CHECK(incoming.size(0) == rows && incoming.size(1) == width && inverse.dim() == 2 &&
                      inverse.size(0) == rows && inverse.size(1) == 1 && inverse.is_contiguous() && inverse.scalar_type() == ScalarType::Float,
                  "tangent: expected incoming and unit (B, D) and inverse (B, 1)");
  const Tensor gradient = torch::stable::new_empty(unit, {rows, width});
  const auto* in = (const float*)incoming.const_data_ptr();
  const auto* rows_of = (const float*)unit.const_data_ptr();
  const auto* over_length = (const float*)inverse.const_data_ptr();
  auto* to = (float*)gradient.mutable_data_ptr();
  parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float *g = in + row * width, *u = rows_of + row * width;
      float* out = to + row * width;
      const float along = sum_over(width, [&](int64_t k) { return g[k] * u[k]; });
      for (int64_t k = 0; k < width; ++k) out[k] = (g[k] - u[k] * along) * over_length[row];
    }
  });
  return gradient;
}

}  // namespace jasper_fast
