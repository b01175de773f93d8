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

// Writes the three low bits of a row's codes to one byte for each dimension.
static void unpack_fine(const uint8_t* codes, int64_t pairs, int64_t singles, uint8_t* out) {
  constexpr int kParts = kBytes / kFineBlock;  // blocks of dimensions in a vector
  static const uint32_t kPart[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uvec parts = load<uvec>(kPart);
  const uint8_t* last = codes + pairs;
  int64_t at = 0;
  for (; at + kFineBlock <= pairs; at += kFineBlock) {
    const uvec block = (uvec)repeated_block(codes + at);
    for (int part = 0; part < 4; part += kParts) {
      const uvec own = ((block >> (parts + part) * 2) & 0x03030303u) << 1;
      __builtin_memcpy(out + 4 * at + part * kFineBlock, &own, sizeof(own));
    }
  }
  int64_t rest = pairs - at;
  for (int64_t i = 0; i < rest; ++i) {
    for (int part = 0; part < 4; ++part) out[4 * at + part * rest + i] = (uint8_t)((codes[at + i] >> part * 2 & 3) << 1);
  }
  for (at = 0; at + kFineBlock <= singles; at += kFineBlock) {
    const uvec block = (uvec)repeated_block(last + at);
    for (int part = 0; part < 8; part += kParts) {
      uint8_t* own = out + 8 * at + part * kFineBlock;
      const uvec all = load<uvec>(own) | ((block >> (parts + part)) & 0x01010101u);
      __builtin_memcpy(own, &all, sizeof(all));
    }
  }
  rest = singles - at;
  for (int64_t i = 0; i < rest; ++i) {
    for (int part = 0; part < 8; ++part) out[8 * at + part * rest + i] |= (uint8_t)(last[at + i] >> part & 1);
  }
}

template <int ROWS, int QUERIES>
static inline void fine_together(const uint8_t* rows, int64_t width, const int8_t* queries, int32_t* out,
                                 int64_t stride) {
  ivec sums[QUERIES][ROWS] = {};
  for (int64_t d = 0; d < width; d += kBytes) {
    ivec own[ROWS];
    for (int r = 0; r < ROWS; ++r) own[r] = load<ivec>(rows + r * width + d);
    for (int q = 0; q < QUERIES; ++q) {
      const ivec query = load<ivec>(queries + q * width + d);
      for (int r = 0; r < ROWS; ++r) sums[q][r] = dot4(sums[q][r], own[r], query);
    }
  }
  for (int q = 0; q < QUERIES; ++q) add_lanes<ROWS>(sums[q], out + q * stride);
}

template <int ROWS>
static inline void fine_rows(const uint8_t* rows, int64_t width, const int8_t* queries, int64_t size, int32_t* out,
                             int64_t stride) {
  constexpr int kQueries = kBytes == 64 ? 4 : 2;
  int64_t q = 0;
  for (; q + kQueries <= size; q += kQueries) {
    fine_together<ROWS, kQueries>(rows, width, queries + q * width, out + q * stride, stride);
  }
  for (; q < size; ++q) fine_together<ROWS, 1>(rows, width, queries + q * width, out + q * stride, stride);
}

static void dots_fine(const uint8_t* codes, int64_t count, int64_t pairs, int64_t singles, const int8_t* queries,
                      int64_t size, uint8_t* space, int32_t* out, int64_t stride) {
  const int64_t width = fine_padded(singles), bytes = pairs + singles;
  for (int64_t begin = 0; begin < count; begin += kFineRows) {
    const int64_t rows = count - begin < kFineRows ? count - begin : kFineRows;
    for (int64_t r = 0; r < rows; ++r) unpack_fine(codes + (begin + r) * bytes, pairs, singles, space + r * width);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) fine_rows<4>(space + r * width, width, queries, size, out + begin + r, stride);
    for (; r < rows; ++r) fine_rows<1>(space + r * width, width, queries, size, out + begin + r, stride);
  }
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
