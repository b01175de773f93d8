// Interface between exact inner-product search and its inner loops, which are compiled once per instruction set.
// This header uses C types alone, for the reason in counts.h.
#pragma once
#include <stdint.h>

namespace jasper_fast {

constexpr int64_t kBin = 64;  // corpus rows that share one error bound and one maximum

// The coarse plane of a bin has one step of kStepBytes for every kStepDims dimensions. Four bytes of a step belong to
// one row: their low nibbles are its first four dimensions, their high nibbles the next four.
constexpr int64_t kStepDims = 8, kStepBytes = kBin * kStepDims / 2;
// A row of the fine plane has the upper two of three bits of all dimensions, then the lowest bits. Both are in blocks of
// kFineBlock bytes: the lowest two (one) bits of the bytes are the first dimensions of a block, and so on. The last block
// may be shorter.
constexpr int64_t kFineBlock = 16;
constexpr int64_t kFineRows = 16;  // that are unpacked together for several queries
inline constexpr int64_t fine_padded(int64_t singles) { return (singles * 8 + 63) / 64 * 64; }
constexpr int32_t kNoSum = INT32_MIN;  // in place of the sum of a row that must not be returned

struct MipsKernels {
  int64_t bytes;  // of a vector
  // out[r] = <rows[r], query>, accumulated in fp32 in any order. rows (count, width), contiguous.
  void (*dots_float)(const float* rows, int64_t count, int64_t width, const float* query, float* out);
  void (*dots_bfloat16)(const uint16_t* rows, int64_t count, int64_t width, const float* query, float* out);
  // Exact integers. |query| must be small enough that every sum fits 32 bits.
  void (*dots_int8)(const int8_t* rows, int64_t count, int64_t width, const int16_t* query, int32_t* out);
  // out[q * stride + r] = <rows[r], queries[q]>, accumulated in fp32 in any order. Both are contiguous.
  void (*products)(const float* rows, int64_t count, int64_t width, const float* queries, int64_t size, float* out,
                   int64_t stride);
  // The same for bfloat16 rows.
  void (*products_bfloat16)(const uint16_t* rows, int64_t count, int64_t width, const float* queries, int64_t size,
                            float* out, int64_t stride);
  // The same for bfloat16 queries without denormals, or null. Denormal rows, products and sums may become 0.
  void (*products_pairs)(const uint16_t* rows, int64_t count, int64_t width, const uint16_t* queries, int64_t size,
                         float* out, int64_t stride);
  // out[q] = fp64 dot product of one row with query q of (size, width). The summation order depends on the width alone,
  // so equal rows have equal scores.
  void (*exact_float)(const float* row, int64_t width, const double* queries, int64_t size, double* out);
  void (*exact_bfloat16)(const uint16_t* row, int64_t width, const double* queries, int64_t size, double* out);
  void (*exact_int8)(const int8_t* row, int64_t width, const double* queries, int64_t size, double* out);
  // out[q * stride + r] = the same for rows (count, width), contiguous.
  void (*exact_block)(const float* rows, int64_t count, int64_t width, const double* queries, int64_t size, double* out,
                      int64_t stride);
  // highest[c] = max over r of tile[r * stride + c].
  void (*column_maxima)(const float* tile, int64_t rows, int64_t columns, int64_t stride, float* highest);
  // Writes the positions of scores >= threshold, ascending, and returns their number. count <= kBin.
  int64_t (*at_least)(const float* scores, int64_t count, float threshold, uint8_t* positions);
  // out[q * stride + r] = exact product of row r of a bin's coarse codes with query q, for kBin rows. `queries` is
  // (size, steps * kStepDims), padded with zeros.
  void (*dots_coarse)(const uint8_t* codes, int64_t steps, const int8_t* queries, int64_t size, int32_t* out,
                      int64_t stride);
  // Exact product of one row of fine codes, of pairs + singles bytes, with a query. The query is padded with zeros.
  int32_t (*dot_fine)(const uint8_t* codes, int64_t pairs, int64_t singles, const int8_t* query);
  // out[q * stride + r] = exact product of row r of (count, pairs + singles) fine codes with query q. The queries are
  // fine_padded(singles) apart, padded with zeros. `space` has kFineRows times as many bytes.
  void (*dots_fine)(const uint8_t* codes, int64_t count, int64_t pairs, int64_t singles, const int8_t* queries,
                    int64_t size, uint8_t* space, int32_t* out, int64_t stride);
  // Replaces kBin sums by 2 * sum - centre, or kNoSum for rows from `count` on and for rows that are not valid (if
  // given). Returns the highest score (float)sum * (scale * query_scale), or -inf. `scales` has kBin elements.
  float (*centre_coarse)(int32_t* sums, int32_t centre, const float* scales, float query_scale, const uint8_t* valid,
                         int64_t count);
  // Writes the positions of scores + weight * errors >= threshold, ascending, and returns their number. `errors` may be
  // null, else it has kBin elements.
  int64_t (*coarse_at_least)(const int32_t* sums, const float* scales, float query_scale, const float* errors,
                             float weight, float threshold, uint8_t* positions);
};

extern const MipsKernels mips_generic;
#if defined(__x86_64__)
extern const MipsKernels mips_avx2;
extern const MipsKernels mips_avx512;
extern const MipsKernels mips_avx512vnni;
extern const MipsKernels mips_avx512bf16;
#endif

}  // namespace jasper_fast
