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
