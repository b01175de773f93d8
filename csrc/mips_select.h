// Selection of rows that can be among the k best, from approximate scores with proven error bounds, and their order by
// fp64 scores.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "mips.h"

namespace jasper_fast {

enum class Stored { kFloat, kBfloat16, kInt8 };

// Rows as they are stored. Exact scores refer to these values.
struct Rows {
  Stored kind;
  const void* data;     // (count, width)
  const float* scales;  // (count,) for int8, else null
  int64_t count, width;

  // Sets out[q] to the exact score of a row for query q of (size, width).
  void exact(const MipsKernels& kernels, int64_t row, const double* queries, int64_t size, double* out) const;
  double exact(const MipsKernels& kernels, int64_t row, const double* query) const {
    double score;
    exact(kernels, row, query, 1, &score);
    return score;
  }
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

// Bound of |approximate - true| over a bin: relative * norms[bin] + absolute.
struct Bound {
  const double* norms;  // (bins,)
  double relative, absolute;

  double of(int64_t bin) const { return relative * norms[bin] + absolute; }
};

// The k best rows so far of a query, in memory that the caller owns.
struct TopK {
  Best* best;  // heap with the worst of the k best on top
  int64_t k;
  int64_t* count;
  double* cutoff;  // a row with a lower score cannot be among the k best

  void insert(Best found);
  // Inserts many rows, with one selection over all of them where that is cheaper than a heap.
  void merge(const Best* found, int64_t size);
};

// Search of one query in one segment of the corpus. The caller owns all memory, so that it lives between calls.
struct Selection {
  const MipsKernels* kernels;
  const Rows* rows;
  const int64_t* numbers;  // of the rows that are searched, in place of all rows, or null
  const double* query;   // (width,)
  const uint8_t* valid;  // (rows,) or null
  Bound bound;
  int64_t first_id;      // id of row 0
  bool proven;           // if true, rescore in fp64; else rank by approximate scores
  Candidate* candidates;
  int64_t capacity;
  int64_t* count;
  TopK top;
  bool* broken;          // set if an exact score is outside its bound; the result is then not proven

  // Adds approximate scores of the rows from first_row on. They are in one bin, and count <= kBin.
  void offer(const float* scores, int64_t first_row, int64_t count_in_bin);
  // Computes exact scores of the candidates and keeps the k best.
  void settle();

 private:
  int64_t number(int64_t place) const { return numbers ? numbers[place] : place; }
  void thin_out();
  void tighten();
};

// Returns the widest kernels that this processor supports, or those of JASPER_FAST_ISA.
const MipsKernels& mips_kernels();

// Returns a float <= value. A float score >= value is also >= this float, so a comparison with it drops no such score.
inline float float_below(double value) {
  return (float)(value - std::fabs(value) * 0x1p-23 - 0x1p-140);  // branch-free, so that loops vectorise
}

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes && at < 2048; at += 64) __builtin_prefetch((const char*)from + at);
}

inline bool better(const Best& a, const Best& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

}  // namespace jasper_fast
