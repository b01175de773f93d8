// Counting kernels for x86-64 with AVX2, POPCNT and BMI, chosen at run time.
#include "counts.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt,bmi,bmi2,lzcnt")
#endif

namespace jasper_fast {
namespace {
#include "counts_kernel.inl"
}

const Kernels kernels_avx2 = {merge_run, count_bucket};

}  // namespace jasper_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
