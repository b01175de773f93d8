// Inner loops of inner-product search. Included inside a namespace by one translation unit per instruction set, which
// defines kBytes (of a vector) and madd(a, b): products of neighbouring 16-bit lanes, added in pairs.

typedef float fvec __attribute__((vector_size(kBytes)));
typedef double dvec __attribute__((vector_size(kBytes)));
typedef int32_t ivec __attribute__((vector_size(kBytes)));
typedef uint32_t uvec __attribute__((vector_size(kBytes)));
typedef int16_t svec __attribute__((vector_size(kBytes)));
typedef float half_fvec __attribute__((vector_size(kBytes / 2)));
typedef uint16_t half_uvec __attribute__((vector_size(kBytes / 2)));
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

// Hardware prefetching loses its way among short rows read four at a time: ask for what comes this many rows later.
constexpr int64_t kAhead = 16;

template <int ROWS, class Element>
static inline void dot_rows(const Element* rows, int64_t width, const float* query, float* out) {
  fvec sums[ROWS][2] = {};  // two per row hide the latency of the multiply-adds
  int64_t d = 0;
  for (; d + 2 * kFloats <= width; d += 2 * kFloats) {
    const fvec first = load<fvec>(query + d), second = load<fvec>(query + d + kFloats);
    for (int r = 0; r < ROWS; ++r) {
      __builtin_prefetch(rows + (r + kAhead) * width + d);
      sums[r][0] += floats(rows + r * width + d) * first;
      sums[r][1] += floats(rows + r * width + d + kFloats) * second;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const fvec sum = sums[r][0] + sums[r][1];
    float total = 0.0f;
    for (int64_t lane = 0; lane < kFloats; ++lane) total += sum[lane];
    for (int64_t rest = d; rest < width; ++rest) total += one(rows + r * width + rest) * query[rest];
    out[r] = total;
  }
}

template <class Element>
static void dots(const Element* rows, int64_t count, int64_t width, const float* query, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<4>(rows + r * width, width, query, out + r);
  for (; r < count; ++r) dot_rows<1>(rows + r * width, width, query, out + r);
}

template <int ROWS>
static inline void dot_rows_int8(const int8_t* rows, int64_t width, const int16_t* query, int32_t* out) {
  ivec sums[ROWS] = {};
  int64_t d = 0;
  for (; d + kShorts <= width; d += kShorts) {
    const svec own = load<svec>(query + d);
    for (int r = 0; r < ROWS; ++r) {
      if (d % (4 * kShorts) == 0) __builtin_prefetch(rows + (r + kAhead) * width + d);
      sums[r] += madd(__builtin_convertvector(load<half_bvec>(rows + r * width + d), svec), own);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    int32_t total = 0;
    for (int64_t lane = 0; lane < kFloats; ++lane) total += sums[r][lane];
    for (int64_t rest = d; rest < width; ++rest) total += (int32_t)rows[r * width + rest] * query[rest];
    out[r] = total;
  }
}

static void dots_int8(const int8_t* rows, int64_t count, int64_t width, const int16_t* query, int32_t* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows_int8<4>(rows + r * width, width, query, out + r);
  for (; r < count; ++r) dot_rows_int8<1>(rows + r * width, width, query, out + r);
}

static inline dvec doubles(const float* from) { return __builtin_convertvector(load<half_fvec>(from), dvec); }
template <class Element>
static inline dvec doubles(const Element* from) {
  dvec values;
  for (int64_t lane = 0; lane < kDoubles; ++lane) values[lane] = one(from + lane);
  return values;
}

template <class Element>
static double exact(const Element* row, int64_t width, const double* query) {
  constexpr int64_t kStep = 4 * kDoubles;
  dvec sums[4] = {};
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
    for (int part = 0; part < 4; ++part) {
      sums[part] += doubles(row + d + part * kDoubles) * load<dvec>(query + d + part * kDoubles);
    }
  }
  const dvec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0.0;
  for (int64_t lane = 0; lane < kDoubles; ++lane) total += sum[lane];
  for (; d < width; ++d) total += (double)one(row + d) * query[d];
  return total;
}

static inline fvec higher(fvec a, fvec b) { return a > b ? a : b; }

// Row by row, because tiles are read from an outer cache, which streams; four rows at a time.
static void column_maxima(const float* tile, int64_t rows, int64_t columns, int64_t stride, float* highest) {
  for (int64_t c = 0; c < columns; ++c) highest[c] = tile[c];
  for (int64_t r = 1; r < rows; r += 4) {
    const float* own[4];  // the last rows again where fewer than four are left
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
  int64_t found = 0;  // few bins come here: without a branch on each score, whose outcome nothing predicts
  for (i = 0; i < count; ++i) {
    positions[found] = (uint8_t)i;
    found += scores[i] >= threshold;
  }
  return found;
}

constexpr MipsKernels kMipsKernels = {dots<float>, dots<uint16_t>,  dots_int8, exact<float>, exact<uint16_t>,
                                      exact<int8_t>, column_maxima, at_least};
