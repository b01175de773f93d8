// Exact search over float32 rows that also have two planes of codes, for any number of queries.
//
// Every chunk of rows is searched in three passes. The first reads the coarse plane and keeps the integer products. The
// second reads the fine plane of a few k rows of highest coarse score. The k-th of their lower bounds is a proven cutoff,
// and the scores in fp64 of those that reach it raise it. The third drops the rows whose coarse score plus its error
// bound is below the cutoff, then those whose 7-bit score plus its bound is, and rescores the rest. If this leaves most
// rows, as with near-ties, the following ones are rescored at once, for all queries together.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "buffer.h"
#include "mips_codes.h"
#include "mips_select.h"

namespace jasper_fast {

using torch::stable::parallel_for;

namespace {

constexpr int64_t kMaxMore = 8192;  // rows that the second pass looks at in addition to k
constexpr int64_t kCrowded = 4;  // If a fourth of the rows is rescored, all following ones are.
constexpr int64_t kKept = 4;  // If the coarse plane keeps a fourth of the rows, all queries read the fine plane together.
constexpr int64_t kMinTogether = 4;  // queries that do
constexpr int64_t kMaxWidth = 1 << 16;  // of rows whose sums of 7-bit codes fit 32 bits
constexpr int64_t kQueryGroup = 8;  // queries whose products of a bin stay in the first cache
constexpr int64_t kBlockBytes = 1 << 19;  // of rows that all queries look at together

#include "mips_chunk.inl"

// What a search knows of each query, in tensors that Python owns.
struct Results {
  Best* best;  // (Q, k)
  int64_t k;
  int64_t* filled;
  double* cutoffs;
  bool* broken;
  int64_t* counts;  // (Q, 2)

  TopK top(int64_t q) const { return {best + q * k, k, filled + q, cutoffs + q}; }
};

// The three passes over chunks of rows, for groups of queries.
class Search {
 public:
  Search(const Planes& planes, const Rows& rows, const double* norms, int64_t first_id, bool proven,
         const Results& results, int64_t group, int64_t sums_at_once)
      : planes_(planes), rows_(rows), norms_(norms), first_id_(first_id), proven_(proven), results_(results),
        threads_(std::max<int64_t>(1, torch::stable::get_num_threads())),
        chunk_(std::min(planes.bins, std::max<int64_t>(16, sums_at_once / group / kBin))),
        sums_(make_buffer<int32_t>(group * chunk_ * kBin)), highest_(group * chunk_) {}

  // Searches for queries, the first of which is number `first_query` of the results.
  void run(const std::vector<Query>& queries, int64_t first_query) {
    queries_ = &queries;
    first_query_ = first_query;
    size_ = (int64_t)queries.size();
    codes_.clear();
    fine_codes_.clear();
    for (const Query& query : queries) {
      codes_.insert(codes_.end(), query.coarse.begin(), query.coarse.end());
      fine_codes_.insert(fine_codes_.end(), query.fine.begin(), query.fine.end());
    }
    const auto [begin, end] = valid_bins();
    for (first_bin_ = begin; first_bin_ < end; first_bin_ += chunk_) {
      bins_ = std::min(chunk_, end - first_bin_);
      scan();
      select();
    }
  }

 private:
  struct Found {
    std::vector<Best> rows;
    Counts counts;
    bool broken = false;
  };

  Chunk chunk_of(int64_t q) const {
    return {mips_kernels(), planes_, rows_, norms_, (*queries_)[q], first_bin_, bins_, first_id_,
            sums_.get() + q * chunk_ * kBin, highest_.data() + q * chunk_, proven_};
  }

  template <class Process>
  void each_query(Process process) const {
    parallel_for(0, size_, 1, [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q) process(q, first_query_ + q);
    });
  }

  // Returns the first bin with a row that a query may return, and the end of the last one.
  std::pair<int64_t, int64_t> valid_bins() const {
    int64_t begin = planes_.bins, end = 0;
    const uint8_t* last = nullptr;
    for (const Query& query : *queries_) {
      if (!query.valid) return {0, planes_.bins};
      if (query.valid == last) continue;
      last = query.valid;
      const auto any = [&](int64_t bin) {
        return any_of(last + bin * kBin, std::min(kBin, planes_.count - bin * kBin));
      };
      int64_t own = 0, stop = planes_.bins;
      while (own < begin && !any(own)) ++own;
      while (stop > end && !any(stop - 1)) --stop;
      begin = std::min(begin, own);
      end = std::max(end, stop);
    }
    return {begin, end};
  }

  // Returns whether any query of a group may return any of `count` rows.
  bool any_valid(int64_t first_query, int64_t group, int64_t row, int64_t count) const {
    const uint8_t* last = nullptr;  // Most often, all queries have the same mask.
    for (int64_t q = first_query; q < first_query + group; ++q) {
      const uint8_t* valid = (*queries_)[q].valid;
      if (!valid) return true;
      if (valid != last && any_of(valid + row, count)) return true;
      last = valid;
    }
    return false;
  }

  // Computes the coarse products of all queries with a chunk of rows. Those of bins without valid rows are left out.
  void scan() {
    const MipsKernels& kernels = mips_kernels();
    const int64_t tasks = std::min(bins_, threads_ * 4), width = planes_.steps * kStepDims;
    parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      int32_t products[kQueryGroup * kBin];
      for (int64_t b = bins_ * first / tasks; b < bins_ * last / tasks; ++b) {
        const int64_t bin = first_bin_ + b, row = bin * kBin, present = std::min(kBin, planes_.count - row);
        for (int64_t begin = 0; begin < size_; begin += kQueryGroup) {
          const int64_t group = std::min(kQueryGroup, size_ - begin);
          if (!any_valid(begin, group, row, present)) {
            for (int64_t q = begin; q < begin + group; ++q) highest_[q * chunk_ + b] = -kInfinity;
            continue;
          }
          kernels.dots_coarse(planes_.coarse + bin * planes_.steps * kStepBytes, planes_.steps,
                              codes_.data() + begin * width, group, products, kBin);
          for (int64_t q = begin; q < begin + group; ++q) {
            const Query& query = (*queries_)[q];
            int32_t* own = products + (q - begin) * kBin;
            highest_[q * chunk_ + b] =
                kernels.centre_coarse(own, 15 * query.total, planes_.coarse_scales + row, query.scale,
                                      query.valid ? query.valid + row : nullptr, present);
            std::copy(own, own + kBin, sums_.get() + (q * chunk_ + b) * kBin);
          }
        }
      }
    });
  }

  // Rescores the rows of highest coarse score, then all others that can still be among the k best.
  void select() {
    // All queries look at a few rows before the next ones, so that these stay in the cache. One query has few parts.
    const int64_t bytes = kBin * rows_.width * (int64_t)sizeof(float);
    const int64_t blocks = (bins_ * bytes + kBlockBytes - 1) / kBlockBytes;
    const int64_t parts = std::clamp<int64_t>(size_ > 1 ? blocks : 2 * threads_, 1, bins_);
    std::vector<std::vector<Chunk::Row>> chosen(size_);
    std::vector<std::vector<Best>> rescored(size_);
    std::vector<Found> found(size_ * parts);
    const auto each_part = [&](auto process) {  // process(q, begin, end, own)
      parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
          const int64_t begin = bins_ * part / parts, end = bins_ * (part + 1) / parts;
          for (int64_t q = 0; q < size_; ++q) process(q, begin, end, found[q * parts + part]);
        }
      });
    };
    const int64_t k = results_.k, wanted = k + std::min(k, kMaxMore);
    each_query([&](int64_t q, int64_t number) {
      chosen[q] = chunk_of(q).best_coarse(wanted, results_.cutoffs[number]);
      rescored[q].resize(chosen[q].size());
      if (size_ > 1) chunk_of(q).refine(0, bins_, chosen[q]);
    });
    if (size_ == 1) {
      each_part([&](int64_t q, int64_t begin, int64_t end, Found&) { chunk_of(q).refine(begin, end, chosen[q]); });
    }
    each_query([&](int64_t q, int64_t number) { Chunk::raise(chosen[q], k, results_.cutoffs + number); });
    each_part([&](int64_t q, int64_t begin, int64_t end, Found& own) {
      chunk_of(q).rescore(begin, end, results_.cutoffs[first_query_ + q], chosen[q], rescored[q].data(), &own.broken);
    });
    each_query([&](int64_t q, int64_t number) {
      std::vector<Best> kept;
      for (size_t i = 0; i < chosen[q].size(); ++i) {
        if (chosen[q][i].reaches(results_.cutoffs[number])) kept.push_back(rescored[q][i]);
      }
      results_.counts[number * 2 + 1] += (int64_t)kept.size();
      results_.top(number).merge(kept.data(), (int64_t)kept.size());
    });
    // Pairs of a query and a row: looked at, refined, rescored. A part is added to the first before it is added to the
    // others, and they are read before the first. So a part whose counts are half added does not look crowded.
    std::atomic<int64_t> seen = 0, kept = 0, left = 0;
    const auto often = [&](const std::atomic<int64_t>& pairs, int64_t factor) {
      const int64_t number = pairs;
      return number * factor > seen;
    };
    parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = bins_ * part / parts, end = bins_ * (part + 1) / parts;
        Found* own = found.data() + part;
        if (proven_ && size_ > 1 && often(left, kCrowded)) {
          rescore_all(begin, end, chosen, own, parts);
          continue;
        }
        const bool together = proven_ && size_ >= kMinTogether && rows_.width <= kMaxWidth && often(kept, kKept);
        if (together) filter_together(begin, end, chosen, own, parts);
        int64_t own_kept = 0, own_left = 0;
        for (int64_t q = 0; q < size_; ++q) {
          Found& of_query = own[q * parts];
          const double cutoff = results_.cutoffs[first_query_ + q];
          if (!together) {
            chunk_of(q).filter(begin, end, cutoff, chosen[q], of_query.rows, &of_query.broken, &of_query.counts);
          }
          own_kept += of_query.counts.coarse;
          own_left += of_query.counts.rescored;
        }
        seen += (end - begin) * kBin * size_;
        kept += own_kept;
        left += own_left;
      }
    });
    each_query([&](int64_t q, int64_t number) {
      std::vector<Best> all;
      int64_t* counts = results_.counts + number * 2;
      for (int64_t part = 0; part < parts; ++part) {
        const Found& own = found[q * parts + part];
        all.insert(all.end(), own.rows.begin(), own.rows.end());
        results_.broken[number] |= own.broken;
        counts[0] += own.counts.coarse;
        counts[1] += own.counts.rescored;
      }
      results_.top(number).merge(all.data(), (int64_t)all.size());
      counts[0] += (int64_t)chosen[q].size();
    });
  }

  // Does the same as Chunk::filter for all queries. They read the fine plane of all rows together.
  void filter_together(int64_t begin, int64_t end, const std::vector<std::vector<Chunk::Row>>& chosen, Found* found,
                       int64_t stride) const {
    const MipsKernels& kernels = mips_kernels();
    std::vector<uint8_t> space(kFineRows * fine_padded(planes_.singles));
    std::vector<int32_t> low(size_ * kBin);
    std::vector<size_t> next(size_);
    std::vector<Chunk> chunks;
    for (int64_t q = 0; q < size_; ++q) {
      chunks.push_back(chunk_of(q));
      next[q] = Chunk::from(chosen[q], begin);
    }
    float scales[kBin] = {}, errors[kBin] = {};
    uint8_t positions[kBin];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t bin = first_bin_ + b, row = bin * kBin, count = std::min(kBin, planes_.count - row);
      kernels.dots_fine(planes_.fine + row * planes_.bytes, count, planes_.pairs, planes_.singles, fine_codes_.data(),
                        size_, space.data(), low.data(), kBin);
      std::copy(planes_.fine_scales + row, planes_.fine_scales + row + count, scales);
      std::copy(planes_.fine_errors + row, planes_.fine_errors + row + count, errors);
      for (int64_t q = 0; q < size_; ++q) {
        const Chunk& chunk = chunks[q];
        if (chunk.highest[b] == -kInfinity) continue;  // no valid row
        Found& own = found[q * stride];
        const double cutoff = results_.cutoffs[first_query_ + q], least = chunk.rest(bin);
        const float weight = at_least_as_high(chunk.weight(bin, cutoff));
        const float threshold = std::max(float_below(cutoff - least), std::numeric_limits<float>::lowest());
        const int32_t* sums = chunk.sums + b * kBin;
        own.counts.coarse += kernels.coarse_at_least(sums, planes_.coarse_scales + row, chunk.query.scale,
                                                     planes_.coarse_errors + row, weight, threshold, positions);
        int32_t* fine = low.data() + q * kBin;
        for (int64_t r = 0; r < count; ++r) {
          fine[r] = sums[r] == kNoSum ? kNoSum : 8 * sums[r] + 2 * fine[r] - 7 * chunk.query.total;
        }
        std::fill(fine + count, fine + kBin, kNoSum);
        const int64_t left =
            kernels.coarse_at_least(fine, scales, chunk.query.scale, errors, weight, threshold, positions);
        for (int64_t i = 0; i < left; ++i) {
          const int64_t local = b * kBin + positions[i];
          while (next[q] < chosen[q].size() && chosen[q][next[q]].row < local) ++next[q];
          if (next[q] < chosen[q].size() && chosen[q][next[q]].row == local) continue;
          if (i + 4 < left) chunk.prefetch_row(row + positions[i + 4]);
          const double exact = rows_.exact(kernels, row + positions[i], chunk.query.exact);
          const double score = (double)fine[positions[i]] * ((double)scales[positions[i]] * (double)chunk.query.scale);
          own.broken |= !(std::fabs(exact - score) <= least + chunk.query.norm * errors[positions[i]]);
          if (exact >= cutoff) own.rows.push_back({exact, first_id_ + row + positions[i]});
          ++own.counts.rescored;
        }
      }
    }
  }

  // Rescores all rows of bins [begin, end) but the chosen ones, for all queries together.
  void rescore_all(int64_t begin, int64_t end, const std::vector<std::vector<Chunk::Row>>& chosen, Found* found,
                   int64_t stride) const {
    std::vector<double> scores(size_ * kBin);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t bin = first_bin_ + b, row = bin * kBin, count = std::min(kBin, planes_.count - row);
      mips_kernels().exact_block((const float*)rows_.data + row * rows_.width, count, rows_.width, (*queries_)[0].exact,
                                 size_, scores.data(), kBin);
      for (int64_t q = 0; q < size_; ++q) {
        const Chunk chunk = chunk_of(q);
        if (chunk.highest[b] == -kInfinity) continue;  // no valid row
        const int32_t* sums = chunk.sums + b * kBin;
        const double* own_scores = scores.data() + q * kBin;
        const double cutoff = results_.cutoffs[first_query_ + q], least = chunk.rest(bin);
        Found& own = found[q * stride];
        for (int64_t r = 0; r < count; ++r) {
          if (sums[r] == kNoSum) continue;  // not valid
          ++own.counts.rescored;
          const double difference = std::fabs(own_scores[r] - (double)chunk.score(row + r, sums[r]));
          own.broken |= !(difference <= chunk.query.norm * planes_.coarse_errors[row + r] + least);
          if (own_scores[r] >= cutoff) own.rows.push_back({own_scores[r], first_id_ + row + r});
        }
      }
    }
    for (int64_t q = 0; q < size_; ++q) {  // The chosen rows are among the results already.
      Found& own = found[q * stride];
      own.counts.coarse += own.counts.rescored;
      auto next = chosen[q].begin() + Chunk::from(chosen[q], begin);
      const auto is_chosen = [&](const Best& row) {
        const int64_t local = row.id - first_id_ - first_bin_ * kBin;
        while (next != chosen[q].end() && next->row < local) ++next;
        return next != chosen[q].end() && next->row == local;
      };
      std::erase_if(own.rows, is_chosen);
    }
  }

  const Planes& planes_;
  const Rows& rows_;
  const double* norms_;
  int64_t first_id_;
  bool proven_;
  Results results_;
  int64_t threads_, chunk_;   // bins of a chunk
  Buffer<int32_t> sums_;      // (group, chunk, kBin)
  std::vector<float> highest_;  // (group, chunk)
  const std::vector<Query>* queries_ = nullptr;
  std::vector<int8_t> codes_, fine_codes_;
  int64_t first_query_ = 0, size_ = 0, first_bin_ = 0, bins_ = 0;
};

}  // namespace

// Searches rows with two planes for queries (Q, D) with elements below 1. `norms` are those of mips_norms. Groups of up
// to `queries_at_once` queries are searched one after another, with up to `sums_at_once` products in memory. `counts`
// (Q, 2) adds up the rows that pass the coarse bound, and those rescored in fp64.
void mips_planes(const Tensor& queries, const Tensor& rows_tensor, const Tensor& coarse, const Tensor& fine,
                 const Tensor& coarse_scales, const Tensor& coarse_errors, const Tensor& fine_scales,
                 const Tensor& fine_errors, const Tensor& residuals, const Tensor& rotated, const Tensor& norms,
                 const Tensor& valid, int64_t first_id, bool proven, int64_t queries_at_once, int64_t sums_at_once,
                 const Tensor& best, const Tensor& best_counts, const Tensor& cutoffs, const Tensor& broken, const Tensor& counts) {
  STD_TORCH_CHECK(rows_tensor.dim() == 2 && rows_tensor.is_contiguous() &&
                      rows_tensor.scalar_type() == ScalarType::Float,
                  "mips: expected contiguous float32 rows (N, D)");
  const Rows rows = {Stored::kFloat, rows_tensor.const_data_ptr(), nullptr, rows_tensor.size(0), rows_tensor.size(1)};
  const Planes planes(rows.count, rows.width, coarse, fine, coarse_scales, coarse_errors, fine_scales, fine_errors,
                      residuals, rotated);
  const int64_t size = queries.size(0), k = best.size(1);
  STD_TORCH_CHECK(planes.steps * kStepDims < ((int64_t)1 << 31) / (2 * 15 * kTopCode),
                  "mips: rows are too wide for 32-bit sums");
  STD_TORCH_CHECK(queries_at_once > 0 && sums_at_once > 0, "mips: expected positive limits");
  const auto* exact = checked<double>(queries, ScalarType::Double, size * rows.width, "queries");
  const auto* row_norms = checked<double>(norms, ScalarType::Double, planes.bins, "norms");
  const Results results = {(Best*)checked<int64_t>(best, ScalarType::Long, size * k * 2, "best"),
                           k,
                           checked<int64_t>(best_counts, ScalarType::Long, size, "best_counts"),
                           checked<double>(cutoffs, ScalarType::Double, size, "cutoffs"),
                           checked<bool>(broken, ScalarType::Bool, size, "broken"),
                           checked<int64_t>(counts, ScalarType::Long, size * 2, "counts")};
  const bool masked = valid.numel() > 0, each = masked && valid.dim() == 2;
  const int64_t places = rows.count * (each ? size : 1);
  const auto* mask = masked ? checked<uint8_t>(valid, ScalarType::Bool, places, "valid") : nullptr;
  const int64_t group = std::min(size, queries_at_once);
  if (!size || !planes.bins) return;
  Search search(planes, rows, row_norms, first_id, proven, results, group, sums_at_once);
  for (int64_t begin = 0; begin < size; begin += group) {
    std::vector<Query> own;
    for (int64_t q = begin; q < std::min(size, begin + group); ++q) {
      own.emplace_back(exact + q * rows.width, planes, mask ? mask + (each ? q * rows.count : 0) : nullptr);
    }
    search.run(own, begin);
  }
}

// Returns scores (Q, k) fp64 and ids (Q, k), best first, of the rows that `best` holds, padded with -inf and -1.
std::tuple<Tensor, Tensor> mips_sorted(const Tensor& best, const Tensor& best_counts) {
  const int64_t size = best.size(0), k = best.size(1);
  auto* rows = (const Best*)checked<int64_t>(best, ScalarType::Long, size * k * 2, "best");
  const auto* filled = checked<int64_t>(best_counts, ScalarType::Long, size, "best_counts");
  const Tensor scores = torch::stable::new_empty(best, {size, k}, ScalarType::Double);
  const Tensor ids = torch::stable::new_empty(best, {size, k});
  auto* scores_out = (double*)scores.mutable_data_ptr();
  auto* ids_out = (int64_t*)ids.mutable_data_ptr();
  parallel_for(0, size, std::max<int64_t>(1, 1024 / k), [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      std::vector<Best> own(rows + q * k, rows + q * k + filled[q]);
      std::sort(own.begin(), own.end(), better);
      own.resize(k, {-std::numeric_limits<double>::infinity(), -1});
      for (int64_t i = 0; i < k; ++i) {
        scores_out[q * k + i] = own[i].score;
        ids_out[q * k + i] = own[i].id;
      }
    }
  });
  return {scores, ids};
}

}  // namespace jasper_fast
