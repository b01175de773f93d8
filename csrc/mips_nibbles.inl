// Inner loops over the two planes of codes (see mips_codes.h), included by mips_kernel.inl. The translation unit
// also defines dot4(sums, codes, queries), which adds the products of four unsigned
// codes <= 15 with four signed bytes to each 32-bit lane, lanes_at_least(a, b), one bit for each lane with a >= b, and
// repeated_block(from), a vector of copies of kFineBlock bytes.

static inline uvec low_nibbles(uvec both) { return both & 0x0f0f0f0fu; }
static inline uvec high_nibbles(uvec both) { return (both >> 4) & 0x0f0f0f0fu; }

static inline ivec repeated(const int8_t* four) { return ivec{} + load<int32_t>(four); }

// Products of one bin of the coarse plane with QUERIES queries. Vectors hold neighbouring rows, so no lanes are added.
template <int QUERIES>
static inline void coarse_together(const uint8_t* codes, int64_t steps, const int8_t* queries, int32_t* out,
                                   int64_t stride) {
  constexpr int kTogether = 4;
  for (int64_t part = 0; part < kStepBytes; part += kTogether * kBytes) {
    ivec sums[QUERIES][kTogether] = {};
    for (int64_t step = 0; step < steps; ++step) {
      const uint8_t* at = codes + step * kStepBytes + part;
      const int8_t* own = queries + step * kStepDims;
      for (int v = 0; v < kTogether; ++v) {
        if constexpr (QUERIES <= 2) __builtin_prefetch(at + v * kBytes + kAhead);
        const uvec both = load<uvec>(at + v * kBytes);
        const ivec low = (ivec)low_nibbles(both), high = (ivec)high_nibbles(both);
        for (int q = 0; q < QUERIES; ++q) {
          sums[q][v] = dot4(sums[q][v], low, repeated(own + q * steps * kStepDims));
          sums[q][v] = dot4(sums[q][v], high, repeated(own + q * steps * kStepDims + 4));
        }
      }
    }
    for (int q = 0; q < QUERIES; ++q) {
      __builtin_memcpy(out + q * stride + part / 4, sums[q], sizeof(sums[q]));
    }
  }
}

static void dots_coarse(const uint8_t* codes, int64_t steps, const int8_t* queries, int64_t size, int32_t* out,
                        int64_t stride) {
  constexpr int kQueries = kBytes == 64 ? 4 : 2;  // sums of more queries do not fit the registers
  int64_t q = 0;
  for (; q + kQueries <= size; q += kQueries) {
    coarse_together<kQueries>(codes, steps, queries + q * steps * kStepDims, out + q * stride, stride);
  }
  for (; q < size; ++q) coarse_together<1>(codes, steps, queries + q * steps * kStepDims, out + q * stride, stride);
}

// Returns the product of codes of BITS bits, 8 / BITS in a byte, with a query, as a sum of lanes and of `last`.
template <int BITS>
static inline ivec dot_bits(const uint8_t* codes, int64_t bytes, const int8_t* query, int32_t* last) {
  constexpr int kCodes = 8 / BITS, kParts = kBytes / kFineBlock;  // in a byte, and blocks in a vector
  constexpr uint32_t kMask = 0x01010101u * ((1 << BITS) - 1);
  static const uint32_t kPart[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uvec parts = load<uvec>(kPart);
  ivec all = {};
  int64_t at = 0;
  for (; at + kFineBlock <= bytes; at += kFineBlock) {
    const uvec block = (uvec)repeated_block(codes + at);
    for (int part = 0; part < kCodes; part += kParts) {
      const uvec own = (block >> (parts + part) * BITS) & kMask;
      all = dot4(all, (ivec)own, load<ivec>(query + kCodes * at + part * kFineBlock));
    }
  }
  const int64_t rest = bytes - at;
  *last = 0;
  for (int64_t i = 0; i < rest; ++i) {
    for (int part = 0; part < kCodes; ++part) {
      *last += (codes[at + i] >> part * BITS & ((1 << BITS) - 1)) * query[kCodes * at + part * rest + i];
    }
  }
  return all;
}

static int32_t dot_fine(const uint8_t* codes, int64_t pairs, int64_t singles, const int8_t* query) {
  int32_t last[2];
  ivec all = 2 * dot_bits<2>(codes, pairs, query, last);
  all += dot_bits<1>(codes + pairs, singles, query, last + 1);
  for (int64_t left = kFloats; left > 1; left /= 2) all = even(all, all) + odd(all, all);
  return all[0] + 2 * last[0] + last[1];
}

static inline fvec coarse_scores(const int32_t* sums, const float* scales, float query_scale) {
  const ivec own = load<ivec>(sums);
  const fvec scores = __builtin_convertvector(own, fvec) * (load<fvec>(scales) * query_scale);
  return own == kNoSum ? fvec{} - __builtin_huge_valf() : scores;
}

static float centre_coarse(int32_t* sums, int32_t centre, const float* scales, float query_scale,
                           const uint8_t* valid, int64_t count) {
  fvec highest = fvec{} - __builtin_huge_valf();
  uint8_t present[kBin] = {};
  if (valid) {
    __builtin_memcpy(present, valid, count);
  } else {
    __builtin_memset(present, 1, count);
  }
  for (int64_t r = 0; r < kBin; r += kFloats) {
    const ivec own = __builtin_convertvector(load<lane_bytes>(present + r), ivec) != 0;
    const ivec centred = own ? 2 * load<ivec>(sums + r) - centre : ivec{} + kNoSum;
    __builtin_memcpy(sums + r, &centred, sizeof(centred));
  }
  for (int64_t r = 0; r < kBin; r += kFloats) {
    highest = higher(highest, coarse_scores(sums + r, scales + r, query_scale));
  }
  float best = highest[0];
  for (int64_t lane = 1; lane < kFloats; ++lane) best = highest[lane] > best ? highest[lane] : best;
  return best;
}

static int64_t coarse_at_least(const int32_t* sums, const float* scales, float query_scale, const float* errors,
                               float weight, float threshold, uint8_t* positions) {
  int64_t found = 0;
  for (int64_t r = 0; r < kBin; r += kFloats) {
    const fvec scores = coarse_scores(sums + r, scales + r, query_scale);
    const fvec upper = errors ? scores + weight * load<fvec>(errors + r) : scores;
    for (uint32_t lanes = lanes_at_least(upper, fvec{} + threshold); lanes; lanes &= lanes - 1) {
      positions[found++] = (uint8_t)(r + __builtin_ctz(lanes));
    }
  }
  return found;
}
