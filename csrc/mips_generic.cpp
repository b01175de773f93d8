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
typedef float lanes __attribute__((vector_size(kBytes)));
typedef uint8_t codes_vec __attribute__((vector_size(kBytes)));
typedef int8_t queries_vec __attribute__((vector_size(kBytes)));
inline pair_sums dot4(pair_sums sums, pair_sums codes, pair_sums queries) {
  const codes_vec a = (codes_vec)codes;
  const queries_vec b = (queries_vec)queries;
  for (int lane = 0; lane < kBytes / 4; ++lane) {
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sums[lane] += (int32_t)a[i] * b[i];
  }
  return sums;
}
inline uint32_t lanes_at_least(lanes a, lanes b) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kBytes / 4; ++lane) bits |= (uint32_t)(a[lane] >= b[lane]) << lane;
  return bits;
}
inline pair_sums repeated_block(const uint8_t* from) {
  pair_sums block;
  __builtin_memcpy(&block, from, sizeof(block));
  return block;
}
typedef double wide_lanes __attribute__((vector_size(kBytes)));
inline wide_lanes doubles(const float* from) { return wide_lanes{from[0], from[1]}; }
#include "mips_kernel.inl"
}  // namespace

const MipsKernels mips_generic = kMipsKernels;

}  // namespace jasper_fast
