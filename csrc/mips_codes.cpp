#include "mips_codes.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace jasper_fast {

using torch::stable::parallel_for;

void Planes::encode(const float* x, int64_t row) const {
  float largest = 0.0f;
  for (int64_t d = 0; d < width; ++d) largest = std::max(largest, std::fabs(x[d]));
  float scale = largest / kTopCode;
  if (!(scale > 0.0f)) scale = 1.0f;
  std::vector<int16_t> codes(steps * kStepDims, 0);
  const float inverse = std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
  double products = 0.0, squares = 0.0, error = 0.0;
  for (int64_t d = 0; d < width; ++d) {
    const float level = inverse != 0.0f ? x[d] * inverse : (float)((double)x[d] / scale);
    codes[d] = (int16_t)(std::min(127.0f, std::max(-127.0f, std::nearbyint(level))) + 128.0f);
    const double difference = x[d] - (double)scale * (codes[d] - 128), coarse_code = 2 * (codes[d] >> 4) - 15;
    error += difference * difference;
    products += x[d] * coarse_code;
    squares += coarse_code * coarse_code;
  }
  const float coarse_scale = (float)(products / squares);  // makes the error orthogonal to the code
  double coarse_error = 0.0;
  for (int64_t d = 0; d < width; ++d) {
    const double difference = x[d] - (double)coarse_scale * (2 * (codes[d] >> 4) - 15);
    coarse_error += difference * difference;
  }
  constexpr double kUp = 1.0 + 1e-9;
  fine_scales[row] = scale;
  coarse_scales[row] = coarse_scale;
  coarse_errors[row] = at_least_as_high(std::sqrt(coarse_error) * kUp);
  double* highest = residuals + row / kBin * 2;
  highest[0] = std::max(highest[0], (double)coarse_errors[row]);
  highest[1] = std::max(highest[1], std::sqrt(error) * kUp);
  for (int64_t step = 0; step < steps; ++step) {
    const int16_t* own = codes.data() + step * kStepDims;
    for (int64_t i = 0; i < 4; ++i) place(row, step)[i] = (uint8_t)(own[i] >> 4 | (own[i + 4] >> 4) << 4);
  }
  for (int64_t i = 0; i < bytes; ++i) {
    const int64_t upper = bytes + i < width ? codes[bytes + i] & 15 : 0;
    fine[row * bytes + i] = (uint8_t)((codes[i] & 15) | upper << 4);
  }
}

// Encodes rows (n, D) as the rows from `start` on of planes with room for fine.size(0) rows.
void mips_encode(const Tensor& rows, int64_t start, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& residuals) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Float,
                  "mips: expected contiguous float32 rows (N, D)");
  const int64_t width = rows.size(1), stop = start + rows.size(0);
  const Planes planes(fine.size(0), width, coarse, fine, coarse_scales, coarse_errors, fine_scales, residuals);
  STD_TORCH_CHECK(start >= 0 && stop <= planes.count, "mips: expected room for the rows in the planes");
  const auto* from = (const float*)rows.const_data_ptr();
  parallel_for(start / kBin, bins_of(stop), 4, [&](int64_t first, int64_t last) {
    for (int64_t row = std::max(start, first * kBin); row < std::min(stop, last * kBin); ++row) {
      planes.encode(from + (row - start) * width, row);
    }
  });
}

}  // namespace jasper_fast
