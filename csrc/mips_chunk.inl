// One query over a chunk of rows with planes of codes: its codes, and the passes of mips_planes.cpp, which includes this.
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Codes of a query, and the factors of the bounds (docs/mips.md).
struct Query {
  const double* exact;         // (width,)
  const uint8_t* valid;        // (rows,) or null
  std::vector<int8_t> coarse;  // codes in the order of the coarse plane
  std::vector<int8_t> fine;    // and of the fine plane
  float scale;
  int32_t total = 0;  // sum of the codes
  double norm, relative, absolute;

  Query(const double* exact_, const Planes& planes, const uint8_t* valid_)
      : exact(exact_), valid(valid_), coarse(planes.steps * kStepDims, 0), fine(fine_padded(planes.singles), 0) {
    constexpr double kUnit = 0x1p-24, kUp = 1.0 + 1e-6;
    double largest = 0.0, squares = 0.0, errors = 0.0, scanned = 0.0;
    std::vector<double> values(exact, exact + planes.width);
    if (planes.rotated) rotate(values.data(), planes.width);
    for (const double value : values) largest = std::max(largest, std::fabs(value));
    scale = (float)(largest / kTopCode);
    if (!(scale > 0.0f)) scale = 1.0f;
    for (int64_t d = 0; d < planes.width; ++d) {
      const double code = std::clamp(std::nearbyint(values[d] / scale), -(double)kTopCode, (double)kTopCode);
      coarse[d] = fine[d] = (int8_t)code;
      total += (int32_t)code;
      const double value = code * scale, error = values[d] - value;
      squares += values[d] * values[d];
      errors += error * error;
      scanned += value * value;
    }
    const double length = std::sqrt(scanned), rounding = std::sqrt(errors);
    norm = std::sqrt(squares) * (1.0 + 1e-9);
    // 32 units: of the score, of score + error in float, of a rotated row, and of a scale that is not exactly orthogonal.
    relative = (rounding + 32 * kUnit * (norm + length)) * kUp;
    absolute = (double)planes.width * 0x1p-125;
  }
};

bool any_of(const uint8_t* valid, int64_t count) {
  uint8_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= valid[i];
  return any != 0;
}

struct Counts {
  int64_t coarse = 0, rescored = 0;  // rows that passed the coarse bound; rows rescored in fp64
};

// Passes over one query's products of a chunk of rows.
struct Chunk {
  const MipsKernels& kernels;
  const Planes& planes;
  const Rows& rows;
  const double* norms;
  const Query& query;
  int64_t first_bin, bins, first_id;
  const int32_t* sums;    // (bins * kBin,)
  const float* highest;   // (bins,) highest coarse scores
  bool proven;

  float score(int64_t row, int32_t sum) const { return (float)sum * (planes.coarse_scales[row] * query.scale); }

  // A score is that of the rounded query with a row's codes. This bounds its difference from that of the query itself.
  double rest(int64_t bin) const { return query.relative * norms[bin] + query.absolute; }

  // Bounds the part of the query that is orthogonal to codes of a bin, given a lower bound of its product with them.
  double orthogonal(int64_t bin, double product) const {
    const double norm = norms[bin] * (1.0 + 1e-6);
    if (!(product > 0.0) || !(norm > 0.0)) return query.norm;
    const double part = product / norm, left = query.norm * query.norm - part * part;
    return std::min(std::sqrt(std::max(left, 0.0)) + query.norm * 1e-7, query.norm);
  }

  // The same for codes of rows that reach `cutoff`, with a product of at least cutoff - |query| * error.
  double weight(int64_t bin, double cutoff) const {
    double own = query.norm;
    const double error = planes.residuals[bin];
    for (int round = 0; round < 2; ++round) own = orthogonal(bin, cutoff - own * error - rest(bin));
    return own;
  }

  double coarse_error(int64_t row) const { return query.norm * planes.coarse_errors[row] + rest(row / kBin); }

  // Bounds |score - true score| of a row by what its score says of the angle.
  double fine_error(int64_t row, double score) const {
    const int64_t bin = row / kBin;
    return rest(bin) + orthogonal(bin, score - rest(bin)) * planes.fine_errors[row];
  }

  double fine_score(int64_t row, int32_t sum) const {
    const int64_t low = kernels.dot_fine(planes.fine + row * planes.bytes, planes.pairs, planes.singles, query.fine.data());
    return (double)(8 * (int64_t)sum + 2 * low - 7 * (int64_t)query.total) *
           ((double)planes.fine_scales[row] * (double)query.scale);
  }

  struct Row {
    float score;
    uint32_t row;  // of the chunk
    double fine, error;

    bool reaches(double cutoff) const { return fine + error >= cutoff; }
  };

  // Returns a threshold that about `wanted` coarse scores of the chunk reach.
  float threshold_for(int64_t wanted) const {
    constexpr int64_t kSamples = 2048, kMinRank = 32;
    std::vector<float> scores;
    if (4 * wanted <= bins) {  // as many bins have a row above this, and few of them more than one
      scores.assign(highest, highest + bins);
      std::nth_element(scores.begin(), scores.begin() + (wanted - 1), scores.end(), std::greater<float>());
      return std::max(scores[wanted - 1], std::numeric_limits<float>::lowest());
    }
    const int64_t needed = (kMinRank * kBin + wanted - 1) / wanted;  // samples of a bin
    const int64_t each = std::clamp<int64_t>(std::max(kSamples / bins, needed), 1, kBin), rank = wanted * each / kBin;
    if (rank >= bins * each) return std::numeric_limits<float>::lowest();
    for (int64_t b = 0; b < bins; ++b) {
      for (int64_t i = 0; i < each; ++i) {
        const int64_t local = b * kBin + (b + i * kBin / each) % kBin;
        const bool absent = highest[b] == -kInfinity || sums[local] == kNoSum;
        scores.push_back(absent ? -kInfinity : score(first_bin * kBin + local, sums[local]));
      }
    }
    std::nth_element(scores.begin(), scores.begin() + rank, scores.end(), std::greater<float>());
    return std::max(scores[rank], std::numeric_limits<float>::lowest());
  }

  // Returns about `wanted` rows of highest coarse score, ascending by number. Rows that cannot reach the cutoff are left
  // out.
  std::vector<Row> best_coarse(int64_t wanted, double cutoff) const {
    const float threshold = threshold_for(wanted);
    std::vector<Row> found;
    uint8_t positions[kBin];
    for (int64_t b = 0; b < bins; ++b) {
      if (!(highest[b] >= threshold)) continue;
      const int64_t bin = first_bin + b;
      if (highest[b] + query.norm * planes.residuals[bin] + rest(bin) < cutoff) continue;
      const int64_t count = kernels.coarse_at_least(sums + b * kBin, planes.coarse_scales + bin * kBin, query.scale,
                                                    nullptr, 0.0f, threshold, positions);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = b * kBin + positions[i];
        found.push_back({score(first_bin * kBin + row, sums[row]), (uint32_t)row, 0.0, 0.0});
      }
    }
    if ((int64_t)found.size() > 2 * wanted) {
      std::nth_element(found.begin(), found.begin() + (wanted - 1), found.end(), [](const Row& a, const Row& b) {
        return a.score > b.score || (a.score == b.score && a.row < b.row);
      });
      found.resize(wanted);
      std::sort(found.begin(), found.end(), [](const Row& a, const Row& b) { return a.row < b.row; });
    }
    return found;
  }

  // Raises a cutoff to the k-th highest of the rows' lower bounds.
  static void raise(const std::vector<Row>& rows, int64_t k, double* cutoff) {
    if ((int64_t)rows.size() < k) return;
    std::vector<double> lower;
    for (const Row& row : rows) lower.push_back(row.fine - row.error);
    std::nth_element(lower.begin(), lower.begin() + (k - 1), lower.end(), std::greater<double>());
    *cutoff = std::max(*cutoff, lower[k - 1]);
  }

  void prefetch_row(int64_t row) const {
    if (proven) prefetch((const float*)rows.data + row * rows.width, rows.width * 4);
  }

  void prefetch_fine(int64_t row) const { prefetch(planes.fine + row * planes.bytes, planes.bytes); }

  // Computes the 7-bit scores of the chosen rows of bins [begin, end).
  void refine(int64_t begin, int64_t end, std::vector<Row>& chosen) const {
    constexpr size_t kEarlier = 8;
    for (size_t i = from(chosen, begin); i < chosen.size() && chosen[i].row < end * kBin; ++i) {
      if (i + kEarlier < chosen.size()) prefetch_fine(first_bin * kBin + chosen[i + kEarlier].row);
      const int64_t row = first_bin * kBin + chosen[i].row;
      chosen[i].fine = fine_score(row, sums[chosen[i].row]);
      chosen[i].error = proven ? fine_error(row, chosen[i].fine) : 0.0;
    }
  }

  // Rescores the chosen rows of bins [begin, end) that reach the cutoff. found[i] is that of chosen[i].
  void rescore(int64_t begin, int64_t end, double cutoff, const std::vector<Row>& chosen, Best* found,
               bool* broken) const {
    constexpr size_t kEarlier = 4;
    for (size_t i = from(chosen, begin); i < chosen.size() && chosen[i].row < end * kBin; ++i) {
      if (i + kEarlier < chosen.size() && chosen[i + kEarlier].reaches(cutoff)) {
        prefetch_row(first_bin * kBin + chosen[i + kEarlier].row);
      }
      if (!chosen[i].reaches(cutoff)) continue;
      const int64_t row = first_bin * kBin + chosen[i].row;
      const double exact = proven ? rows.exact(kernels, row, query.exact) : chosen[i].fine;
      if (proven) {
        *broken |= !(std::fabs(exact - (double)chosen[i].score) <= coarse_error(row));
        *broken |= !(std::fabs(exact - chosen[i].fine) <= chosen[i].error);
      }
      found[i] = {exact, first_id + row};
    }
  }

  // Returns the first place of a row of `bin` or later.
  static size_t from(const std::vector<Row>& chosen, int64_t bin) {
    const auto before = [](const Row& a, int64_t row) { return a.row < row; };
    return std::lower_bound(chosen.begin(), chosen.end(), bin * kBin, before) - chosen.begin();
  }

  // Appends rows of bins [begin, end) that can reach the cutoff, except the chosen ones.
  void filter(int64_t begin, int64_t end, double cutoff, const std::vector<Row>& chosen, std::vector<Best>& found,
              bool* broken, Counts* counts) const {
    struct Pending {
      int64_t row;
      int32_t sum;
      double error, least, score;  // `error` is first the weight of the codes' error, then that error
    };
    constexpr int kPending = 16;
    Pending coarse[kPending], fine[kPending];
    int coarse_count = 0, fine_count = 0;
    int64_t refined = 0, dropped = 0;
    auto next = chosen.begin() + from(chosen, begin);
    const auto rescore_pending = [&] {
      for (int i = 0; i < fine_count; ++i) {
        const Pending& own = fine[i];
        const double exact = proven ? rows.exact(kernels, own.row, query.exact) : own.score;
        if (proven) *broken |= !(std::fabs(exact - own.score) <= own.least + query.norm * own.error);
        if (exact >= cutoff) found.push_back({exact, first_id + own.row});
      }
      counts->rescored += fine_count;
      fine_count = 0;
    };
    const auto refine_pending = [&] {
      // If the fine plane drops few rows, as with near-ties, it is read for one in 16 groups only.
      const bool refine = !proven || dropped * 8 >= refined || counts->coarse / kPending % 16 == 0;
      counts->coarse += coarse_count;
      for (int i = 0; i < coarse_count; ++i) {
        Pending own = coarse[i];
        if (refine) {
          own.score = fine_score(own.row, own.sum);
          const double error = planes.fine_errors[own.row];
          ++refined;
          if (own.score + (proven ? own.least + own.error * error : 0.0) < cutoff) {
            ++dropped;
            continue;
          }
          own.error = error;
        } else {
          own.score = score(own.row, own.sum);
          own.error = planes.coarse_errors[own.row];
        }
        prefetch_row(own.row);
        fine[fine_count++] = own;
        if (fine_count == kPending) rescore_pending();
      }
      coarse_count = 0;
    };
    uint8_t positions[kBin];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t bin = first_bin + b;
      const double least = rest(bin);
      if (highest[b] == -kInfinity) continue;  // no valid row
      if (!(highest[b] + query.norm * planes.residuals[bin] + least >= cutoff)) continue;
      const double own = weight(bin, cutoff);
      const float threshold = std::max(float_below(cutoff - least), std::numeric_limits<float>::lowest());
      const float factor = at_least_as_high(own);
      const int64_t count = kernels.coarse_at_least(sums + b * kBin, planes.coarse_scales + bin * kBin, query.scale,
                                                    planes.coarse_errors + bin * kBin, factor, threshold, positions);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t local = b * kBin + positions[i];
        while (next != chosen.end() && next->row < local) ++next;
        if (next != chosen.end() && next->row == local) continue;
        const int64_t row = first_bin * kBin + local;
        prefetch_fine(row);
        coarse[coarse_count++] = {row, sums[local], own, least, 0.0};
        if (coarse_count == kPending) refine_pending();
      }
    }
    refine_pending();
    rescore_pending();
  }
};
