// The two planes of 7-bit codes of float32 rows. The coarse plane has the high four bits of each code, the fine plane the
// low three.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "mips.h"

namespace jasper_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTopCode = 127;  // of a query
constexpr int64_t kTopLevel = 127;  // of a row's 7-bit codes, which stand for odd multiples of a scale up to this one

template <class T>
T* checked(const Tensor& tensor, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == numel,
                  "mips: wrong shape or dtype of ", name);
  return (T*)tensor.mutable_data_ptr();
}

inline int64_t bins_of(int64_t rows) { return (rows + kBin - 1) / kBin; }
inline int64_t steps_of(int64_t width) { return (width + kStepDims - 1) / kStepDims; }

inline float at_least_as_high(double value) {
  const float rounded = (float)value;
  return rounded >= value ? rounded : std::nextafter(rounded, std::numeric_limits<float>::infinity());
}

// Memory of one thread for a row that is encoded, padded with zeros.
struct Encoder {
  std::vector<float> values, levels;
  std::vector<uint8_t> codes;
  std::vector<double> rotated;

  explicit Encoder(int64_t padded) : values(padded), levels(padded), codes(padded), rotated(padded) {}
};

// Rotates (width,) values: random signs and a Hadamard transform of the first power of two of them, then the same for
// the last ones. So a few large values become many of similar size. Products change by less than 2^-45 of the norms.
void rotate(double* values, int64_t width);

// The two planes of (count, width) rows, and what the bounds of their scores need.
struct Planes {
  int64_t count, width, bins, steps, pairs, singles, bytes;
  uint8_t* coarse;        // (bins, steps * kStepBytes)
  uint8_t* fine;          // (count, bytes): three bits a dimension (mips.h)
  float* coarse_scales;   // (bins * kBin,): row ~ scale * (2 * code - 15)
  float* coarse_errors;   // (bins * kBin,): norm of the difference, rounded up
  float* fine_scales;     // (count,): row ~ scale * (2 * (8 * coarse + fine) - 127)
  float* fine_errors;     // (count,): norm of the difference, rounded up
  double* residuals;      // (bins,): highest error of either codes
  bool rotated;           // if true, the codes are those of rotated rows

  Planes(int64_t count_, int64_t width_, const Tensor& coarse_, const Tensor& fine_, const Tensor& coarse_scales_,
         const Tensor& coarse_errors_, const Tensor& fine_scales_, const Tensor& fine_errors_,
         const Tensor& residuals_, const Tensor& rotated_)
      : count(count_), width(width_), bins(bins_of(count_)), steps(steps_of(width_)), pairs((width_ + 3) / 4),
        singles((width_ + 7) / 8), bytes(pairs + singles) {
    coarse = checked<uint8_t>(coarse_, ScalarType::Byte, bins * steps * kStepBytes, "the coarse plane");
    fine = checked<uint8_t>(fine_, ScalarType::Byte, count * bytes, "the fine plane");
    coarse_scales = checked<float>(coarse_scales_, ScalarType::Float, bins * kBin, "coarse scales");
    coarse_errors = checked<float>(coarse_errors_, ScalarType::Float, bins * kBin, "coarse errors");
    fine_scales = checked<float>(fine_scales_, ScalarType::Float, count, "fine scales");
    fine_errors = checked<float>(fine_errors_, ScalarType::Float, count, "fine errors");
    residuals = checked<double>(residuals_, ScalarType::Double, bins, "residuals");
    rotated = *checked<uint8_t>(rotated_, ScalarType::Byte, 1, "the rotation") != 0;
  }

  uint8_t* place(int64_t row, int64_t step) const {
    return coarse + (row / kBin * steps + step) * kStepBytes + row % kBin * (kStepDims / 2);
  }

  // Writes the codes of a row. The errors are measured, so they hold for any rounding of the codes.
  void encode(const float* x, int64_t row, Encoder& encoder) const;
};

}  // namespace jasper_fast
