// Inner loops of inner-product search for x86-64 with AVX2 and FMA, chosen at run time.
#include "mips.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace jasper_fast {
namespace {
constexpr int kBytes = 32;
typedef int32_t pair_sums __attribute__((vector_size(kBytes)));
typedef int16_t pairs __attribute__((vector_size(kBytes)));
inline pair_sums madd(pairs a, pairs b) { return (pair_sums)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
typedef float lanes __attribute__((vector_size(kBytes)));
inline pair_sums dot4(pair_sums sums, pair_sums codes, pair_sums queries) {
  const __m256i products = _mm256_maddubs_epi16((__m256i)codes, (__m256i)queries);  // codes <= 15, so these fit 16 bits
  return sums + (pair_sums)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
inline uint32_t lanes_at_least(lanes a, lanes b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
}
inline pair_sums repeated_block(const uint8_t* from) {
  return (pair_sums)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
}
typedef double wide_lanes __attribute__((vector_size(kBytes)));
inline wide_lanes doubles(const float* from) { return (wide_lanes)_mm256_cvtps_pd(_mm_loadu_ps(from)); }
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_avx2 = kMipsKernels;

}  // namespace jasper_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
