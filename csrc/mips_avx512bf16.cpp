// Inner loops of inner-product search for x86-64 with AVX-512 F, BW, DQ, VL, VNNI and BF16, chosen at run time.
#include "mips.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
#endif

namespace jasper_fast {
namespace {
#include "mips_avx512.inl"
inline pair_sums dot4(pair_sums sums, pair_sums codes, pair_sums queries) {
  return (pair_sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)queries);
}
inline lanes add_pairs(lanes sums, pairs a, pairs b) {
  return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#define JASPER_FAST_BFLOAT16_PAIRS
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_avx512bf16 = kMipsKernels;

}  // namespace jasper_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
