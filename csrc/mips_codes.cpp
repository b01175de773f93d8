#include "mips_codes.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace jasper_fast {

using torch::stable::parallel_for;

namespace {

struct Fit {
  float scale;
  double error;
};

// Returns the scale that makes the error of scale * levels orthogonal to them, and the norm of the error.
template <class Level>
Fit fit(const float* x, int64_t width, Level level) {
  double products = 0.0, squares = 0.0, error = 0.0;
  for (int64_t d = 0; d < width; ++d) {
    products += x[d] * level(d);
    squares += level(d) * level(d);
  }
  const float scale = (float)(products / squares);
  for (int64_t d = 0; d < width; ++d) {
    const double difference = x[d] - (double)scale * level(d);
    error += difference * difference;
  }
  return {scale, std::sqrt(error) * (1.0 + 1e-9)};
}

// Writes BITS bits of every code, from bit `shift` on, as a part of the fine plane.
template <int BITS>
void pack(const int16_t* codes, int64_t width, int shift, uint8_t* out, int64_t bytes) {
  constexpr int64_t kCodes = 8 / BITS;
  for (int64_t at = 0; at < bytes; at += kFineBlock) {
    const int64_t block = std::min(kFineBlock, bytes - at);
    std::fill(out + at, out + at + block, 0);
    for (int64_t i = 0; i < std::min(kCodes * block, width - kCodes * at); ++i) {
      out[at + i % block] |= (uint8_t)((codes[kCodes * at + i] >> shift & ((1 << BITS) - 1)) << i / block * BITS);
    }
  }
}

}  // namespace

void Planes::encode(const float* x, int64_t row) const {
  float largest = 0.0f;
  for (int64_t d = 0; d < width; ++d) largest = std::max(largest, std::fabs(x[d]));
  float scale = largest / kTopLevel;
  if (!(scale > 0.0f)) scale = 1.0f;
  std::vector<int16_t> codes(steps * kStepDims, 0);
  const float inverse = std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    const float level = inverse != 0.0f ? x[d] * inverse : (float)((double)x[d] / scale);
    codes[d] = (int16_t)std::clamp(std::nearbyint((level + kTopLevel) * 0.5f), 0.0f, (float)kTopLevel);
  }
  const Fit high = fit(x, width, [&](int64_t d) { return (double)(2 * (codes[d] >> 3) - 15); });
  const Fit all = fit(x, width, [&](int64_t d) { return (double)(2 * codes[d] - kTopLevel); });
  coarse_scales[row] = high.scale;
  coarse_errors[row] = at_least_as_high(high.error);
  fine_scales[row] = all.scale;
  fine_errors[row] = at_least_as_high(all.error);
  residuals[row / kBin] = std::max({residuals[row / kBin], (double)coarse_errors[row], (double)fine_errors[row]});
  for (int64_t step = 0; step < steps; ++step) {
    const int16_t* own = codes.data() + step * kStepDims;
    for (int64_t i = 0; i < 4; ++i) place(row, step)[i] = (uint8_t)(own[i] >> 3 | (own[i + 4] >> 3) << 4);
  }
  pack<2>(codes.data(), width, 1, fine + row * bytes, pairs);
  pack<1>(codes.data(), width, 0, fine + row * bytes + pairs, singles);
}

// Encodes rows (n, D) as the rows from `start` on of planes with room for fine.size(0) rows.
void mips_encode(const Tensor& rows, int64_t start, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& fine_errors, const Tensor& residuals) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Float,
                  "mips: expected contiguous float32 rows (N, D)");
  const int64_t width = rows.size(1), stop = start + rows.size(0);
  const Planes planes(fine.size(0), width, coarse, fine, coarse_scales, coarse_errors, fine_scales, fine_errors, residuals);
  STD_TORCH_CHECK(start >= 0 && stop <= planes.count, "mips: expected room for the rows in the planes");
  const auto* from = (const float*)rows.const_data_ptr();
  parallel_for(start / kBin, bins_of(stop), 4, [&](int64_t first, int64_t last) {
    for (int64_t row = std::max(start, first * kBin); row < std::min(stop, last * kBin); ++row) {
      planes.encode(from + (row - start) * width, row);
    }
  });
}

}  // namespace jasper_fast
