// Counting kernels for any processor.
#include "counts.h"

namespace jasper_fast {
namespace {
#include "counts_kernel.inl"
}

uint64_t merge_workspace(uint32_t buckets) {
  return 2 * ((uint64_t)groups_of(buckets) * kGroup + (uint64_t)top_vectors_of(buckets) * 8);
}

const Kernels kernels_generic = {merge_run, count_bucket};

}  // namespace jasper_fast
