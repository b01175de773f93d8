// Registration of the native ops. Python wraps them with fakes, fallbacks and autograd.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace jasper_fast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> pair_counts(const Tensor& scores, const Tensor& teacher, double margin,
                                               bool exclude_ties);
Tensor pack_pairs(const Tensor& matrix);
Tensor unpack_pairs(const Tensor& counts, int64_t rows, double scale);
Tensor mips_norms(const Tensor& rows, const Tensor& scales);
void mips_tile(const Tensor& tile, int64_t first_row, const Tensor& queries, const Tensor& rows, const Tensor& scales,
               const Tensor& norms, const Tensor& bounds, const Tensor& valid,
               int64_t first_id, bool proven, const Tensor& candidates, const Tensor& counts, const Tensor& best,
               const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken);
void mips_settle(const Tensor& queries, const Tensor& rows, const Tensor& scales, const Tensor& norms,
                 const Tensor& bounds, const Tensor& valid, int64_t first_id, bool proven,
                 const Tensor& candidates, const Tensor& counts, const Tensor& best, const Tensor& best_counts,
                 const Tensor& cutoffs, const Tensor& broken);
void mips_few(const Tensor& scan_queries, const Tensor& query_scales, bool fill_norms, const Tensor& queries, const Tensor& rows,
              const Tensor& scales, const Tensor& norms, const Tensor& bounds, const Tensor& valid, int64_t first_id,
              bool proven, int64_t capacity, const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs,
              const Tensor& broken);
void mips_encode(const Tensor& rows, int64_t start, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& fine_errors, const Tensor& residuals, const Tensor& rotated);
void mips_planes(const Tensor& queries, const Tensor& rows, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& fine_errors, const Tensor& residuals, const Tensor& rotated, const Tensor& norms,
                 const Tensor& valid, int64_t first_id, bool proven, int64_t queries_at_once, int64_t sums_at_once,
                 const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken, const Tensor& counts);
int64_t mips_vectors(const Tensor& rows);
std::tuple<Tensor, Tensor> mips_chosen(const Tensor& mask, int64_t limit);
std::tuple<Tensor, Tensor, Tensor, Tensor> mips_scaled(const Tensor& queries);
void mips_rows(const Tensor& numbers, const Tensor& scan_queries, const Tensor& queries, const Tensor& rows,
               const Tensor& scales, const Tensor& norms, int64_t first_id, bool low, int64_t capacity,
               const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken);
std::tuple<Tensor, Tensor> mips_sorted(const Tensor& best, const Tensor& best_counts);
std::tuple<Tensor, Tensor> unit_rows(const Tensor& embeddings);
Tensor tangent(const Tensor& incoming, const Tensor& unit, const Tensor& inverse);
void binned_histogram(const Tensor& student, const Tensor& teacher, const Tensor& grid, Tensor counts,
                      Tensor fine_student, Tensor fine_teacher);
Tensor binned_coefficients(Tensor student, const Tensor& teacher, const Tensor& grid, const Tensor& nodes,
                           const Tensor& own, const Tensor& rank);

STABLE_TORCH_LIBRARY(jasper_fast_native, m) {
  m.def("pair_counts(Tensor scores, Tensor teacher, float margin, bool exclude_ties) -> (Tensor, Tensor, Tensor)");
  m.def("pack_pairs(Tensor matrix) -> Tensor");
  m.def("unpack_pairs(Tensor counts, int rows, float scale) -> Tensor");
  m.def("mips_norms(Tensor rows, Tensor scales) -> Tensor");
  m.def("mips_tile(Tensor tile, int first_row, Tensor queries, Tensor rows, Tensor scales, Tensor norms, "
        "Tensor bounds, Tensor valid, int first_id, bool proven, "
        "Tensor(a!) candidates, Tensor(b!) counts, Tensor(c!) best, Tensor(d!) best_counts, "
        "Tensor(e!) cutoffs, Tensor(f!) broken) -> ()");
  m.def("mips_settle(Tensor queries, Tensor rows, Tensor scales, Tensor norms, "
        "Tensor bounds, Tensor valid, int first_id, bool proven, "
        "Tensor(a!) candidates, Tensor(b!) counts, Tensor(c!) best, Tensor(d!) best_counts, "
        "Tensor(e!) cutoffs, Tensor(f!) broken) -> ()");
  m.def("mips_few(Tensor scan_queries, Tensor query_scales, "
        "bool fill_norms, Tensor queries, Tensor rows, Tensor scales, Tensor(a!) norms, Tensor bounds, Tensor valid, "
        "int first_id, bool proven, int capacity, Tensor(b!) best, Tensor(c!) best_counts, Tensor(d!) cutoffs, "
        "Tensor(e!) broken) -> ()");
  m.def("mips_encode(Tensor rows, int start, Tensor(a!) coarse, Tensor(b!) fine, Tensor(c!) coarse_scales, "
        "Tensor(d!) coarse_errors, Tensor(e!) fine_scales, Tensor(f!) fine_errors, Tensor(g!) residuals, "
        "Tensor rotated) -> ()");
  m.def("mips_planes(Tensor queries, Tensor rows, "
        "Tensor coarse, Tensor fine, Tensor coarse_scales, Tensor coarse_errors, Tensor fine_scales, "
        "Tensor fine_errors, Tensor residuals, Tensor rotated, Tensor norms, Tensor valid, int first_id, bool proven, "
        "int queries_at_once, int sums_at_once, "
        "Tensor(a!) best, Tensor(b!) best_counts, Tensor(c!) cutoffs, Tensor(d!) broken, Tensor(e!) counts) -> ()");
  m.def("mips_vectors(Tensor rows) -> int");
  m.def("mips_chosen(Tensor mask, int limit) -> (Tensor, Tensor)");
  m.def("mips_scaled(Tensor queries) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("mips_rows(Tensor numbers, Tensor scan_queries, Tensor queries, Tensor rows, Tensor scales, Tensor norms, "
        "int first_id, bool low, int capacity, Tensor(a!) best, Tensor(b!) best_counts, Tensor(c!) cutoffs, "
        "Tensor(d!) broken) -> ()");
  m.def("mips_sorted(Tensor best, Tensor best_counts) -> (Tensor, Tensor)");
  m.def("unit_rows(Tensor embeddings) -> (Tensor, Tensor)");
  m.def("tangent(Tensor incoming, Tensor unit, Tensor inverse) -> Tensor");
  m.def(
      "binned_histogram(Tensor student, Tensor teacher, Tensor grid, Tensor(a!) counts, Tensor(b!) fine_student, "
      "Tensor(c!) fine_teacher) -> ()");
  m.def(
      "binned_coefficients(Tensor(a!) student, Tensor teacher, Tensor grid, Tensor nodes, Tensor own, Tensor rank) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_native, CPU, m) {
  m.impl("pair_counts", TORCH_BOX(&pair_counts));
  m.impl("pack_pairs", TORCH_BOX(&pack_pairs));
  m.impl("unpack_pairs", TORCH_BOX(&unpack_pairs));
  m.impl("mips_norms", TORCH_BOX(&mips_norms));
  m.impl("mips_tile", TORCH_BOX(&mips_tile));
  m.impl("mips_settle", TORCH_BOX(&mips_settle));
  m.impl("mips_vectors", TORCH_BOX(&mips_vectors));
  m.impl("mips_few", TORCH_BOX(&mips_few));
  m.impl("mips_encode", TORCH_BOX(&mips_encode));
  m.impl("mips_planes", TORCH_BOX(&mips_planes));
  m.impl("mips_chosen", TORCH_BOX(&mips_chosen));
  m.impl("mips_scaled", TORCH_BOX(&mips_scaled));
  m.impl("mips_rows", TORCH_BOX(&mips_rows));
  m.impl("mips_sorted", TORCH_BOX(&mips_sorted));
  m.impl("unit_rows", TORCH_BOX(&unit_rows));
  m.impl("tangent", TORCH_BOX(&tangent));
  m.impl("binned_histogram", TORCH_BOX(&binned_histogram));
  m.impl("binned_coefficients", TORCH_BOX(&binned_coefficients));
}

}  // namespace jasper_fast
