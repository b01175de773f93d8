// Inner loops of inner-product search for x86-64 with AVX-512 F, BW, DQ, VL and VNNI, chosen at run time.
#include "mips.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

namespace jasper_fast {
namespace {
#include "mips_avx512.inl"
inline pair_sums dot4(pair_sums sums, pair_sums codes, pair_sums queries) {
  return (pair_sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)queries);
}
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_avx512vnni = kMipsKernels;

}  // namespace jasper_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
