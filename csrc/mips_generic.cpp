// Inner loops of inner-product search for any processor.
#include "mips.h"

namespace jasper_fast {
namespace {
constexpr int kBytes = 16;
typedef int32_t pair_sums __attribute__((vector_size(kBytes)));
typedef int16_t pairs __attribute__((vector_size(kBytes)));
inline pair_sums madd(pairs a, pairs b) {
  pair_sums sums;
  for (int lane = 0; lane < kBytes / 4; ++lane) {
    sums[lane] = (int32_t)a[2 * lane] * b[2 * lane] + (int32_t)a[2 * lane + 1] * b[2 * lane + 1];
  }
  return sums;
}
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_generic = kMipsKernels;

}  // namespace jasper_fast
