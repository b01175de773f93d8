#include "mips_select.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace jasper_fast {

void Rows::exact(const MipsKernels& kernels, int64_t row, const double* queries, int64_t size, double* out) const {
  switch (kind) {
    case Stored::kFloat: return kernels.exact_float((const float*)data + row * width, width, queries, size, out);
    case Stored::kBfloat16: return kernels.exact_bfloat16((const uint16_t*)data + row * width, width, queries, size, out);
    default:
      kernels.exact_int8((const int8_t*)data + row * width, width, queries, size, out);
      for (int64_t q = 0; q < size; ++q) out[q] *= (double)scales[row];
  }
}

void Selection::offer(const float* scores, int64_t first_row, int64_t count_in_bin) {
  uint8_t positions[kBin];
  const double error = proven ? bound.of(first_row / kBin) : 0.0;
  const int64_t found = kernels->at_least(scores, count_in_bin, float_below(*top.cutoff - error), positions);
  for (int64_t i = 0; i < found; ++i) {
    const int64_t row = first_row + positions[i];
    if (valid && !valid[row]) continue;
    candidates[(*count)++] = {scores[positions[i]], (uint32_t)row};
  }
  if (*count + kBin > capacity) tighten();
}

// Raises the cutoff to the k-th best lower bound and drops candidates that cannot reach it.
void Selection::thin_out() {
  if (*count + *top.count <= top.k) return;
  std::vector<double> lower;
  lower.reserve(*count + *top.count);
  for (int64_t i = 0; i < *count; ++i) {
    lower.push_back((double)candidates[i].score - (proven ? bound.of(candidates[i].row / kBin) : 0.0));
  }
  for (int64_t i = 0; i < *top.count; ++i) lower.push_back(top.best[i].score);
  std::nth_element(lower.begin(), lower.begin() + (top.k - 1), lower.end(), std::greater<double>());
  *top.cutoff = std::max(*top.cutoff, lower[top.k - 1]);
  int64_t kept = 0;
  for (int64_t i = 0; i < *count; ++i) {
    const double upper = (double)candidates[i].score + (proven ? bound.of(candidates[i].row / kBin) : 0.0);
    if (upper >= *top.cutoff) candidates[kept++] = candidates[i];
  }
  *count = kept;
}

// Rescores the candidates now if thinning out frees too little, as with nearly equal scores. That bounds the memory for
// any data.
void Selection::tighten() {
  thin_out();
  if (*count > capacity - capacity / 4) settle();
}

void Selection::settle() {
  thin_out();
  std::vector<Best> found;
  const bool many = *count > top.k / 8 + 16;  // a cutoff that rises with each row would drop few of them
  for (int64_t i = 0; i < *count; ++i) {
    const Candidate candidate = candidates[i];
    double score = candidate.score;
    if (proven) {
      const double error = bound.of(candidate.row / kBin);
      if (score + error < *top.cutoff) continue;
      const double exact = rows->exact(*kernels, number(candidate.row), query);
      *broken |= !(std::fabs(exact - score) <= error);
      score = exact;
    }
    const Best own = {score, first_id + number(candidate.row)};
    if (many) {
      found.push_back(own);
    } else {
      top.insert(own);
    }
  }
  *count = 0;
  top.merge(found.data(), (int64_t)found.size());
}

void TopK::merge(const Best* found, int64_t size) {
  if (size <= k / 8 + 16 || (k <= 128 && k * 4 <= size)) {  // of many rows, a few are among the k best so far
    for (int64_t i = 0; i < size; ++i) insert(found[i]);
    return;
  }
  std::vector<Best> all(best, best + *count);
  all.insert(all.end(), found, found + size);
  if ((int64_t)all.size() > k) {
    std::nth_element(all.begin(), all.begin() + (k - 1), all.end(), better);
    all.resize(k);
  }
  std::make_heap(all.begin(), all.end(), better);
  std::copy(all.begin(), all.end(), best);
  *count = (int64_t)all.size();
  if (*count == k) *cutoff = std::max(*cutoff, best[0].score);
}

void TopK::insert(Best found) {
  if (*count < k) {
    best[(*count)++] = found;
    std::push_heap(best, best + *count, better);
  } else if (better(found, best[0])) {
    std::pop_heap(best, best + k, better);
    best[k - 1] = found;
    std::push_heap(best, best + k, better);
  }
  if (*count == k) *cutoff = std::max(*cutoff, best[0].score);
}

}  // namespace jasper_fast
