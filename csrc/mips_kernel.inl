// Inner loops of inner-product search, included inside a namespace by one translation unit per instruction set. That
// unit defines kBytes (the size of a vector), madd(a, b), which adds products of neighbouring 16-bit lanes in pairs, and
// doubles(from), which widens floats.
// The loops of mips_nibbles.inl need more.

typedef float fvec __attribute__((vector_size(kBytes)));
typedef double dvec __attribute__((vector_size(kBytes)));
typedef int32_t ivec __attribute__((vector_size(kBytes)));
typedef uint32_t uvec __attribute__((vector_size(kBytes)));
typedef int16_t svec __attribute__((vector_size(kBytes)));
typedef uint16_t half_uvec __attribute__((vector_size(kBytes / 2)));
typedef uint8_t lane_bytes __attribute__((vector_size(kBytes / 4)));
typedef int8_t half_bvec __attribute__((vector_size(kBytes / 2)));

constexpr int64_t kFloats = kBytes / 4, kDoubles = kBytes / 8, kShorts = kBytes / 2;

template <class Vector>
static inline Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

static inline float one(const float* from) { return *from; }
static inline float one(const uint16_t* from) {
  const uint32_t bits = (uint32_t)*from << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline float one(const int8_t* from) { return *from; }

static inline fvec floats(const float* from) { return load<fvec>(from); }
static inline fvec floats(const uint16_t* from) {
  return (fvec)(__builtin_convertvector(load<half_uvec>(from), uvec) << 16);
}

// The even lanes of a, then those of b.
template <class Vector>
static inline Vector even(Vector a, Vector b) {
  if constexpr (sizeof(Vector) == 16) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  } else if constexpr (sizeof(Vector) == 32) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
}

template <class Vector>
static inline Vector odd(Vector a, Vector b) {
  if constexpr (sizeof(Vector) == 16) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else if constexpr (sizeof(Vector) == 32) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// Sets totals[r] to the sum of the lanes of sums[r], for one or four vectors. Four cost little more than one.
template <int ROWS, class Vector, class Number>
static inline void add_lanes(const Vector* sums, Number* totals) {
  if constexpr (ROWS == 4) {
    const Vector first = even(sums[0], sums[1]) + odd(sums[0], sums[1]);
    const Vector second = even(sums[2], sums[3]) + odd(sums[2], sums[3]);
    Vector all = even(first, second) + odd(first, second);
    for (int64_t left = kFloats / 4; left > 1; left /= 2) all = even(all, all) + odd(all, all);
    for (int r = 0; r < 4; ++r) totals[r] = all[r];
  } else {
    totals[0] = 0;
    for (int64_t lane = 0; lane < kFloats; ++lane) totals[0] += sums[0][lane];
  }
}

// Rows are read one after another, as one memory stream. Hardware prefetching ends at each page, software prefetching
// does not. In measurements it is faster for bf16 and int8, and slower for fp32.
constexpr int64_t kAhead = 8192;  // bytes

template <int ROWS, class Element>
static inline void dot_rows(const Element* rows, int64_t width, const float* query, float* out) {
  fvec totals[ROWS];
  int64_t d = 0;
  for (int r = 0; r < ROWS; ++r) {
    const Element* row = rows + r * width;
    fvec sums[4] = {};  // four sums hide the latency of multiply-add
    for (d = 0; d + 4 * kFloats <= width; d += 4 * kFloats) {
      if constexpr (sizeof(Element) < sizeof(float)) __builtin_prefetch((const char*)(row + d) + kAhead);
      for (int part = 0; part < 4; ++part) {
        sums[part] += floats(row + d + part * kFloats) * load<fvec>(query + d + part * kFloats);
      }
    }
    for (; d + kFloats <= width; d += kFloats) sums[0] += floats(row + d) * load<fvec>(query + d);
    totals[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  add_lanes<ROWS>(totals, out);
  for (; d < width; ++d) {
    for (int r = 0; r < ROWS; ++r) out[r] += one(rows + r * width + d) * query[d];
  }
}

template <class Element>
static void dots(const Element* rows, int64_t count, int64_t width, const float* query, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<4>(rows + r * width, width, query, out + r);
  for (; r < count; ++r) dot_rows<1>(rows + r * width, width, query, out + r);
}

// Products of ROWS rows with QUERIES queries, whose sums stay in registers. The queries are `width` apart.
template <int ROWS, int QUERIES, class Element>
static inline void products_together(const Element* rows, int64_t width, const float* queries, float* out,
                                     int64_t stride) {
  fvec sums[QUERIES][ROWS] = {};
  int64_t d = 0;
  for (; d + kFloats <= width; d += kFloats) {
    fvec own[ROWS];
    for (int r = 0; r < ROWS; ++r) own[r] = floats(rows + r * width + d);
    for (int q = 0; q < QUERIES; ++q) {
      const fvec query = load<fvec>(queries + q * width + d);
      for (int r = 0; r < ROWS; ++r) sums[q][r] += own[r] * query;
    }
  }
  for (int q = 0; q < QUERIES; ++q) {
    add_lanes<ROWS>(sums[q], out + q * stride);
    for (int64_t i = d; i < width; ++i) {
      for (int r = 0; r < ROWS; ++r) out[q * stride + r] += one(rows + r * width + i) * queries[q * width + i];
    }
  }
}

template <class Element>
static void products(const Element* rows, int64_t count, int64_t width, const float* queries, int64_t size, float* out,
                     int64_t stride) {
  constexpr int kQueries = kBytes == 64 ? 4 : 2;  // sums of more queries do not fit the registers
  int64_t q = 0;
  for (; q + kQueries <= size; q += kQueries) {
    const float* own = queries + q * width;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      products_together<4, kQueries>(rows + r * width, width, own, out + q * stride + r, stride);
    }
    for (; r < count; ++r) {
      products_together<1, kQueries>(rows + r * width, width, own, out + q * stride + r, stride);
    }
  }
  for (; q < size; ++q) dots(rows, count, width, queries + q * width, out + q * stride);
}

#ifdef JASPER_FAST_BFLOAT16_PAIRS
// Products of ROWS rows with QUERIES queries by instructions that add the products of two neighbouring elements.
template <int ROWS, int QUERIES>
static inline void pairs_together(const uint16_t* rows, int64_t width, const uint16_t* queries, float* out,
                                  int64_t stride) {
  fvec sums[QUERIES][ROWS] = {};
  int64_t d = 0;
  for (; d + kShorts <= width; d += kShorts) {
    svec own[ROWS];
    for (int r = 0; r < ROWS; ++r) own[r] = load<svec>(rows + r * width + d);
    for (int q = 0; q < QUERIES; ++q) {
      const svec query = load<svec>(queries + q * width + d);
      for (int r = 0; r < ROWS; ++r) sums[q][r] = add_pairs(sums[q][r], own[r], query);
    }
  }
  for (int q = 0; q < QUERIES; ++q) {
    add_lanes<ROWS>(sums[q], out + q * stride);
    for (int64_t i = d; i < width; ++i) {
      for (int r = 0; r < ROWS; ++r) out[q * stride + r] += one(rows + r * width + i) * one(queries + q * width + i);
    }
  }
}

template <int QUERIES>
static inline void pairs_rows(const uint16_t* rows, int64_t count, int64_t width, const uint16_t* queries, float* out,
                              int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) pairs_together<4, QUERIES>(rows + r * width, width, queries, out + r, stride);
  for (; r < count; ++r) pairs_together<1, QUERIES>(rows + r * width, width, queries, out + r, stride);
}

static void products_pairs(const uint16_t* rows, int64_t count, int64_t width, const uint16_t* queries, int64_t size,
                           float* out, int64_t stride) {
  int64_t q = 0;
  for (; q + 4 <= size; q += 4) pairs_rows<4>(rows, count, width, queries + q * width, out + q * stride, stride);
  for (; q < size; ++q) pairs_rows<1>(rows, count, width, queries + q * width, out + q * stride, stride);
}
#else
constexpr decltype(MipsKernels::products_pairs) products_pairs = nullptr;
#endif

template <int ROWS>
static inline void dot_rows_int8(const int8_t* rows, int64_t width, const int16_t* query, int32_t* out) {
  ivec totals[ROWS];
  int64_t d = 0;
  for (int r = 0; r < ROWS; ++r) {
    const int8_t* row = rows + r * width;
    ivec sums[2] = {};
    for (d = 0; d + 4 * kShorts <= width; d += 4 * kShorts) {
      __builtin_prefetch(row + d + kAhead);
      for (int part = 0; part < 4; ++part) {
        const svec wide = __builtin_convertvector(load<half_bvec>(row + d + part * kShorts), svec);
        sums[part % 2] += madd(wide, load<svec>(query + d + part * kShorts));
      }
    }
    for (; d + kShorts <= width; d += kShorts) {
      sums[0] += madd(__builtin_convertvector(load<half_bvec>(row + d), svec), load<svec>(query + d));
    }
    totals[r] = sums[0] + sums[1];
  }
  add_lanes<ROWS>(totals, out);
  for (; d < width; ++d) {
    for (int r = 0; r < ROWS; ++r) out[r] += (int32_t)rows[r * width + d] * query[d];
  }
}

static void dots_int8(const int8_t* rows, int64_t count, int64_t width, const int16_t* query, int32_t* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows_int8<4>(rows + r * width, width, query, out + r);
  for (; r < count; ++r) dot_rows_int8<1>(rows + r * width, width, query, out + r);
}

template <class Element>
static inline dvec doubles(const Element* from) {
  float values[kDoubles];
  for (int64_t lane = 0; lane < kDoubles; ++lane) values[lane] = one(from + lane);
  return doubles(values);
}

// The order of summation is the same for any number of rows and queries. Registers keep the sums of all of them.
template <int ROWS, int QUERIES, class Element>
static inline void exact_together(const Element* rows, int64_t width, const double* queries, double* out,
                                  int64_t stride) {
  constexpr int kParts = 2;
  constexpr int64_t kStep = kParts * kDoubles;
  dvec sums[QUERIES][ROWS][kParts] = {};
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
    for (int part = 0; part < kParts; ++part) {
      dvec own[ROWS];
      for (int r = 0; r < ROWS; ++r) own[r] = doubles(rows + r * width + d + part * kDoubles);
      for (int q = 0; q < QUERIES; ++q) {
        const dvec query = load<dvec>(queries + q * width + d + part * kDoubles);
        for (int r = 0; r < ROWS; ++r) sums[q][r][part] += own[r] * query;
      }
    }
  }
  for (int q = 0; q < QUERIES; ++q) {
    for (int r = 0; r < ROWS; ++r) {
      const dvec sum = sums[q][r][0] + sums[q][r][1];
      double lanes[kDoubles];
      __builtin_memcpy(lanes, &sum, sizeof(sum));
      for (int64_t half = kDoubles / 2; half; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      for (int64_t i = d; i < width; ++i) lanes[0] += (double)one(rows + r * width + i) * queries[q * width + i];
      out[q * stride + r] = lanes[0];
    }
  }
}

template <class Element>
static void exact(const Element* row, int64_t width, const double* queries, int64_t size, double* out) {
  constexpr int kQueries = kBytes == 64 ? 4 : 2;  // sums of more queries do not fit the registers
  int64_t q = 0;
  for (; q + kQueries <= size; q += kQueries) {
    exact_together<1, kQueries>(row, width, queries + q * width, out + q, 1);
  }
  for (; q < size; ++q) exact_together<1, 1>(row, width, queries + q * width, out + q, 1);
}

template <int QUERIES>
static inline void exact_rows(const float* rows, int64_t count, int64_t width, const double* queries, double* out,
                              int64_t stride) {
  constexpr int kRows = kBytes == 64 ? 3 : 2;
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    exact_together<kRows, QUERIES>(rows + r * width, width, queries, out + r, stride);
  }
  for (; r < count; ++r) exact_together<1, QUERIES>(rows + r * width, width, queries, out + r, stride);
}

static void exact_block(const float* rows, int64_t count, int64_t width, const double* queries, int64_t size,
                        double* out, int64_t stride) {
  constexpr int kQueries = kBytes == 64 ? 4 : 2;
  int64_t q = 0;
  for (; q + kQueries <= size; q += kQueries) {
    exact_rows<kQueries>(rows, count, width, queries + q * width, out + q * stride, stride);
  }
  for (; q < size; ++q) exact_rows<1>(rows, count, width, queries + q * width, out + q * stride, stride);
}

static inline fvec higher(fvec a, fvec b) { return a > b ? a : b; }

// Reads four rows at a time, because tiles stream from an outer cache.
static void column_maxima(const float* tile, int64_t rows, int64_t columns, int64_t stride, float* highest) {
  for (int64_t c = 0; c < columns; ++c) highest[c] = tile[c];
  for (int64_t r = 1; r < rows; r += 4) {
    const float* own[4];  // repeats the last row if fewer than four are left
    for (int64_t part = 0; part < 4; ++part) own[part] = tile + (r + part < rows ? r + part : rows - 1) * stride;
    int64_t c = 0;
    for (; c + kFloats <= columns; c += kFloats) {
      const fvec first = higher(load<fvec>(own[0] + c), load<fvec>(own[1] + c));
      const fvec second = higher(load<fvec>(own[2] + c), load<fvec>(own[3] + c));
      const fvec all = higher(higher(first, second), load<fvec>(highest + c));
      __builtin_memcpy(highest + c, &all, sizeof(all));
    }
    for (; c < columns; ++c) {
      for (int part = 0; part < 4; ++part) highest[c] = own[part][c] > highest[c] ? own[part][c] : highest[c];
    }
  }
}

static int64_t at_least(const float* scores, int64_t count, float threshold, uint8_t* positions) {
  fvec highest = fvec{} + -__builtin_huge_valf();
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const fvec own = load<fvec>(scores + i);
    highest = own > highest ? own : highest;
  }
  bool any = false;
  for (int64_t lane = 0; lane < kFloats; ++lane) any |= highest[lane] >= threshold;
  for (; i < count; ++i) any |= scores[i] >= threshold;
  if (!any) return 0;
  int64_t found = 0;  // few bins get here; no branch per score, because it would be unpredictable
  for (i = 0; i < count; ++i) {
    positions[found] = (uint8_t)i;
    found += scores[i] >= threshold;
  }
  return found;
}

#include "mips_nibbles.inl"

constexpr MipsKernels kMipsKernels = {kBytes, dots<float>,   dots<uint16_t>,  dots_int8,     products<float>,
                                      products<uint16_t>, products_pairs,
                                      exact<float>,  exact<uint16_t>, exact<int8_t>, exact_block,
                                      column_maxima, at_least,        dots_coarse,   dot_fine,
                                      dots_fine,     centre_coarse,   coarse_at_least};
