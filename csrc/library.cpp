// The native ops, by name. Python wraps them (jasper_fast/ops.py) with fakes, fallbacks and autograd.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace jasper_fast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> pair_counts(const Tensor& scores, const Tensor& teacher, double margin,
                                               bool exclude_ties);
Tensor pack_pairs(const Tensor& matrix);
Tensor unpack_pairs(const Tensor& counts, int64_t rows, double scale);

STABLE_TORCH_LIBRARY(jasper_fast_native, m) {
  m.def("pair_counts(Tensor scores, Tensor teacher, float margin, bool exclude_ties) -> (Tensor, Tensor, Tensor)");
  m.def("pack_pairs(Tensor matrix) -> Tensor");
  m.def("unpack_pairs(Tensor counts, int rows, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_native, CPU, m) {
  m.impl("pair_counts", TORCH_BOX(&pair_counts));
  m.impl("pack_pairs", TORCH_BOX(&pack_pairs));
  m.impl("unpack_pairs", TORCH_BOX(&unpack_pairs));
}

}  // namespace jasper_fast
