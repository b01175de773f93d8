// Interface between exact inner-product search and its inner loops, compiled once per instruction set.
// Nothing but C types here, for the reason counts.h gives.
#pragma once
#include <stdint.h>

namespace jasper_fast {

constexpr int64_t kPanelRows = 48;  // rows that product_int8 widens at once
constexpr int64_t kBin = 64;  // corpus rows that share one error bound and one look at their maximum

struct MipsKernels {
  // out[r] = <rows[r], query>, accumulated in fp32 in any order. rows (count, width), contiguous.
  void (*dots_float)(const float* rows, int64_t count, int64_t width, const float* query, float* out);
  void (*dots_bfloat16)(const uint16_t* rows, int64_t count, int64_t width, const float* query, float* out);
  // Exact integers; |query| is small enough that no sum leaves 32 bits.
  void (*dots_int8)(const int8_t* rows, int64_t count, int64_t width, const int16_t* query, int32_t* out);
  // Matrix product of int8 rows with int16 queries, exact. `queries` is packed: panels of `panel` queries, of each the
  // pairs (2p, 2p + 1) of elements one after another; the width is padded to `pairs` pairs with zeros. `space` holds
  // kPanelRows * 2 * pairs int16. out[r * stride + q] = (float)sum * (row_scales[r] * query_scales[q]) for
  // q < panels * panel.
  int64_t panel;
  void (*product_int8)(const int8_t* rows, int64_t count, int64_t width, const float* row_scales,
                       const int16_t* queries, const float* query_scales, int64_t panels, int64_t pairs, float* out,
                       int64_t stride, int16_t* space);
  // fp64 dot product of one row, its order of summation a function of the width alone: equal rows score equally.
  double (*exact_float)(const float* row, int64_t width, const double* query);
  double (*exact_bfloat16)(const uint16_t* row, int64_t width, const double* query);
  double (*exact_int8)(const int8_t* row, int64_t width, const double* query);
  // highest[c] = max over r of tile[r * stride + c].
  void (*column_maxima)(const float* tile, int64_t rows, int64_t columns, int64_t stride, float* highest);
  // Writes the positions whose score is >= threshold, ascending; returns how many. count <= kBin.
  int64_t (*at_least)(const float* scores, int64_t count, float threshold, uint8_t* positions);
};

extern const MipsKernels mips_generic;
#if defined(__x86_64__)
extern const MipsKernels mips_avx2;
extern const MipsKernels mips_avx512;
#endif

}  // namespace jasper_fast
