// Interface between exact inner-product search and its inner loops, which are compiled once per instruction set.
// This header uses C types alone, for the reason in counts.h.
#pragma once
#include <stdint.h>

namespace jasper_fast {

constexpr int64_t kPanelRows = 48;  // rows that product_int8 widens to int16 together
constexpr int64_t kBin = 64;  // corpus rows that share one error bound and one maximum

struct MipsKernels {
  // out[r] = <rows[r], query>, accumulated in fp32 in any order. rows (count, width), contiguous.
  void (*dots_float)(const float* rows, int64_t count, int64_t width, const float* query, float* out);
  void (*dots_bfloat16)(const uint16_t* rows, int64_t count, int64_t width, const float* query, float* out);
  // Exact integers. |query| must be small enough that every sum fits 32 bits.
  void (*dots_int8)(const int8_t* rows, int64_t count, int64_t width, const int16_t* query, int32_t* out);
  // Exact matrix product of int8 rows with int16 queries. `queries` is packed into panels of `panel` queries. A panel
  // holds the element pairs (2p, 2p + 1) of its queries one after another, padded with zeros to `pairs` pairs. `space`
  // is scratch for kPanelRows * 2 * pairs int16. out[r * stride + q] = (float)sum * (row_scales[r] * query_scales[q])
  // for q < panels * panel.
  int64_t panel;
  void (*product_int8)(const int8_t* rows, int64_t count, int64_t width, const float* row_scales,
                       const int16_t* queries, const float* query_scales, int64_t panels, int64_t pairs, float* out,
                       int64_t stride, int16_t* space);
  // fp64 dot product of one row. The summation order depends on the width alone, so equal rows have equal scores.
  double (*exact_float)(const float* row, int64_t width, const double* query);
  double (*exact_bfloat16)(const uint16_t* row, int64_t width, const double* query);
  double (*exact_int8)(const int8_t* row, int64_t width, const double* query);
  // highest[c] = max over r of tile[r * stride + c].
  void (*column_maxima)(const float* tile, int64_t rows, int64_t columns, int64_t stride, float* highest);
  // Writes the positions of scores >= threshold, ascending, and returns their number. count <= kBin.
  int64_t (*at_least)(const float* scores, int64_t count, float threshold, uint8_t* positions);
};

extern const MipsKernels mips_generic;
#if defined(__x86_64__)
extern const MipsKernels mips_avx2;
extern const MipsKernels mips_avx512;
#endif

}  // namespace jasper_fast
