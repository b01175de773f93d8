// Which rows can be among the k best, from approximate scores with proven error bounds, and then their fp64 order.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "mips.h"

namespace jasper_fast {

enum class Stored { kFloat, kBfloat16, kInt8 };

// Rows as they are stored, which is what scores are true of.
struct Rows {
  Stored kind;
  const void* data;     // (count, width)
  const float* scales;  // (count,) for int8, else null
  int64_t count, width;

  double exact(const MipsKernels& kernels, int64_t row, const double* query) const;
};

struct Best {
  double score;
  int64_t id;
};
static_assert(sizeof(Best) == 16);

struct Candidate {
  float score;
  uint32_t row;
};
static_assert(sizeof(Candidate) == 8);

// Bound of |approximate - true| over a bin: relative * norms[bin] + residual * residuals[bin] + absolute.
struct Bound {
  const double* norms;      // (bins,)
  const double* residuals;  // (bins,) or null
  double relative, residual, absolute;

  double of(int64_t bin) const {
    return relative * norms[bin] + (residuals ? residual * residuals[bin] : 0.0) + absolute;
  }
};

// One query's search through one piece of the corpus. All memory is the caller's, so that it can live between calls.
struct Selection {
  const MipsKernels* kernels;
  const Rows* rows;
  const double* query;   // (width,)
  const uint8_t* valid;  // (rows,) or null
  Bound bound;
  int64_t first_id;      // id of row 0
  bool proven;           // rescore in fp64; otherwise approximate scores decide
  Candidate* candidates;
  int64_t capacity;
  int64_t* count;
  Best* best;            // a heap, the worst of the best on top
  int64_t k;
  int64_t* best_count;
  double* cutoff;        // no row that scores below can be among the k best
  bool* broken;          // an exact score lay outside its bound: nothing is proven

  // Takes in approximate scores of the rows from first_row on; count <= kBin, all in one bin.
  void offer(const float* scores, int64_t first_row, int64_t count_in_bin);
  // Turns candidates into exact scores and keeps the best.
  void settle();
  void insert(Best found);

 private:
  void thin_out();
  void tighten();
};

// A float not above the value: comparing floats with it loses nothing that comparing with the value would keep.
inline float float_below(double value) {
  return (float)(value - std::fabs(value) * 0x1p-23 - 0x1p-140);  // no branch, so that loops over it vectorise
}

inline bool better(const Best& a, const Best& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

}  // namespace jasper_fast
