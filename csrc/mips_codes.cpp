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

// Independent sums, so that loops over them use vectors.
constexpr int64_t kLanes = kStepDims;

template <class Number>
Number total(const Number (&lanes)[kLanes]) {
  Number all = 0;
  for (const Number lane : lanes) all += lane;
  return all;
}

// Returns the scale that makes the error of scale * levels orthogonal to them, and the norm of the error.
Fit fit(const float* x, const float* levels, int64_t width) {
  double products[kLanes] = {}, squares[kLanes] = {}, errors[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const double level = levels[d + i];
      products[i] += x[d + i] * level;
      squares[i] += level * level;
    }
  }
  const float scale = (float)(total(products) / total(squares));
  for (int64_t d = 0; d < width; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const double difference = x[d + i] - (double)scale * levels[d + i];
      errors[i] += difference * difference;
    }
  }
  return {scale, std::sqrt(total(errors)) * (1.0 + 1e-9)};
}

// Writes BITS bits of every code, from bit `shift` on, as a part of the fine plane.
template <int BITS>
void pack(const uint8_t* codes, int64_t width, int shift, uint8_t* out, int64_t bytes) {
  constexpr int64_t kCodes = 8 / BITS;
  for (int64_t at = 0; at < bytes; at += kFineBlock) {
    const int64_t block = std::min(kFineBlock, bytes - at);
    std::fill(out + at, out + at + block, 0);
    for (int64_t part = 0; part < kCodes; ++part) {
      const uint8_t* own = codes + kCodes * at + part * block;
      const int64_t count = std::min(block, width - kCodes * at - part * block);
      for (int64_t i = 0; i < count; ++i) {
        out[at + i] |= (uint8_t)((own[i] >> shift & ((1 << BITS) - 1)) << part * BITS);
      }
    }
  }
}

void hadamard(double* values, int64_t size) {
  const double factor = 1.0 / std::sqrt((double)size);
  for (int64_t i = 0; i < size; ++i) values[i] *= factor;
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t begin = 0; begin < size; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const double a = values[i], b = values[i + half];
        values[i] = a + b;
        values[i + half] = a - b;
      }
    }
  }
}

}  // namespace

void rotate(double* values, int64_t width) {
  int64_t size = 1;
  while (2 * size <= width) size *= 2;
  const uint32_t factors[] = {2654435761u, 2246822519u};  // odd; the highest bit of a product is a sign
  for (int round = 0; round < (size < width ? 2 : 1); ++round) {
    for (int64_t d = 0; d < width; ++d) {
      if ((uint32_t)d * factors[round] >> 31) values[d] = -values[d];
    }
    hadamard(values + (round ? width - size : 0), size);
  }
}

void Planes::encode(const float* x, int64_t row, Encoder& encoder) const {
  if (rotated) {
    std::copy(x, x + width, encoder.rotated.begin());
    rotate(encoder.rotated.data(), width);
    for (int64_t d = 0; d < width; ++d) encoder.values[d] = (float)encoder.rotated[d];
  } else {
    std::copy(x, x + width, encoder.values.begin());
  }
  const float* values = encoder.values.data();
  uint8_t* codes = encoder.codes.data();
  const int64_t padded = steps * kStepDims;
  float highest[kLanes] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) highest[i] = std::max(highest[i], std::fabs(values[d + i]));
  }
  float scale = *std::max_element(highest, highest + kLanes) / kTopLevel;
  if (!(scale > 0.0f)) scale = 1.0f;
  const float inverse = 1.0f / scale;
  for (int64_t d = 0; d < width; ++d) {
    const float level = std::isfinite(inverse) ? values[d] * inverse : (float)((double)values[d] / scale);
    const float code = (level + kTopLevel) * 0.5f + 0.5f;  // rounded by the conversion
    codes[d] = (uint8_t)(int32_t)std::min(std::max(code, 0.0f), (float)kTopLevel);
  }
  const auto fit_levels = [&](auto level) {
    for (int64_t d = 0; d < width; ++d) encoder.levels[d] = (float)level((int32_t)codes[d]);
    return fit(values, encoder.levels.data(), padded);
  };
  const Fit high = fit_levels([](int32_t code) { return 2 * (code >> 3) - 15; });
  const Fit all = fit_levels([](int32_t code) { return 2 * code - (int32_t)kTopLevel; });
  coarse_scales[row] = high.scale;
  coarse_errors[row] = at_least_as_high(high.error);
  fine_scales[row] = all.scale;
  fine_errors[row] = at_least_as_high(all.error);
  residuals[row / kBin] = std::max({residuals[row / kBin], (double)coarse_errors[row], (double)fine_errors[row]});
  for (int64_t step = 0; step < steps; ++step) {
    const uint8_t* own = codes + step * kStepDims;
    for (int64_t i = 0; i < 4; ++i) place(row, step)[i] = (uint8_t)(own[i] >> 3 | (own[i + 4] >> 3) << 4);
  }
  pack<2>(codes, width, 1, fine + row * bytes, pairs);
  pack<1>(codes, width, 0, fine + row * bytes + pairs, singles);
}

// Encodes rows (n, D) as the rows from `start` on of planes with room for fine.size(0) rows.
void mips_encode(const Tensor& rows, int64_t start, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& fine_errors, const Tensor& residuals,
                 const Tensor& rotated) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Float,
                  "mips: expected contiguous float32 rows (N, D)");
  const int64_t width = rows.size(1), stop = start + rows.size(0);
  const Planes planes(fine.size(0), width, coarse, fine, coarse_scales, coarse_errors, fine_scales, fine_errors,
                      residuals, rotated);
  STD_TORCH_CHECK(start >= 0 && stop <= planes.count, "mips: expected room for the rows in the planes");
  const auto* from = (const float*)rows.const_data_ptr();
  parallel_for(start / kBin, bins_of(stop), 4, [&](int64_t first, int64_t last) {
    Encoder encoder(planes.steps * kStepDims);
    for (int64_t row = std::max(start, first * kBin); row < std::min(stop, last * kBin); ++row) {
      planes.encode(from + (row - start) * width, row, encoder);
    }
  });
}

}  // namespace jasper_fast
