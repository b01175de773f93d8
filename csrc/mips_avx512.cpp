// Inner loops of inner-product search for x86-64 with AVX-512 F, BW, DQ and VL, chosen at run time.
#include "mips.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace jasper_fast {
namespace {
#include "mips_avx512.inl"
inline pair_sums dot4(pair_sums sums, pair_sums codes, pair_sums queries) {
  const __m512i products = _mm512_maddubs_epi16((__m512i)codes, (__m512i)queries);  // codes <= 15, so these fit 16 bits
  return sums + (pair_sums)_mm512_madd_epi16(products, _mm512_set1_epi16(1));
}
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_avx512 = kMipsKernels;

}  // namespace jasper_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
