// The intrinsics of 64 bytes that mips_kernel.inl needs, but for `dot4`, which depends on the instruction set.
// Include this in an anonymous namespace, after the instruction set is chosen.
constexpr int kBytes = 64;
typedef int32_t pair_sums __attribute__((vector_size(kBytes)));
typedef int16_t pairs __attribute__((vector_size(kBytes)));
inline pair_sums madd(pairs a, pairs b) { return (pair_sums)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
typedef float lanes __attribute__((vector_size(kBytes)));
inline uint32_t lanes_at_least(lanes a, lanes b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
}
inline pair_sums repeated_block(const uint8_t* from) {
  return (pair_sums)_mm512_maskz_broadcast_i32x4((__mmask16)-1, _mm_loadu_si128((const __m128i*)from));
}
typedef double wide_lanes __attribute__((vector_size(kBytes)));
inline wide_lanes doubles(const float* from) {
  return (wide_lanes)_mm512_maskz_cvtps_pd((__mmask8)-1, _mm256_loadu_ps(from));  // GCC warns of the form without mask
}
