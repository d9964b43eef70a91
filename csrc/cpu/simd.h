// A vector of kLanes floats, and one of kLanes 32-bit integers, for the instruction set in whose
// region this file is included (for_each_isa.h). Arithmetic operators are those of the compiler's
// vector types; the rest is below. Include <immintrin.h> (on x86-64), <cstdint> before it.

#define FCNSEG_INLINE inline __attribute__((always_inline))

namespace fcnseg {
namespace FCNSEG_ISA {

#if FCNSEG_ISA_LEVEL == 2
constexpr int kLanes = 16;
#elif FCNSEG_ISA_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));

FCNSEG_INLINE Float splat(float x) { return x - Float{}; }
FCNSEG_INLINE Int splat_int(int32_t x) { return Int{} + x; }

FCNSEG_INLINE Float load(const float* p) {
  Float v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FCNSEG_INLINE Int load_int(const int32_t* p) {
  Int v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FCNSEG_INLINE void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
FCNSEG_INLINE void store_int(int32_t* p, Int v) { __builtin_memcpy(p, &v, sizeof v); }

FCNSEG_INLINE Int bits(Float v) { return (Int)v; }
FCNSEG_INLINE Float from_bits(Int v) { return (Float)v; }
// `mask` holds all ones or all zeros per lane.
FCNSEG_INLINE Float select(Int mask, Float yes, Float no) {
  return from_bits((mask & bits(yes)) | (~mask & bits(no)));
}

#if FCNSEG_ISA_LEVEL == 2

FCNSEG_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
FCNSEG_INLINE Float vmin(Float a, Float b) { return _mm512_min_ps(a, b); }
FCNSEG_INLINE Float vmax(Float a, Float b) { return _mm512_max_ps(a, b); }
FCNSEG_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps((__m512i)v); }
FCNSEG_INLINE Float gather(const float* base, Int index) {
  return _mm512_i32gather_ps((__m512i)index, base, 4);
}
FCNSEG_INLINE Int gather_int(const int32_t* base, Int index) {
  return (Int)_mm512_i32gather_epi32((__m512i)index, base, 4);
}
// 1 / x of a positive normal x, to about one unit in the last place.
FCNSEG_INLINE Float reciprocal(Float x) {
  const Float y = _mm512_rcp14_ps(x);
  const Float error = _mm512_fnmadd_ps(x, y, splat(1.f));
  return fma(y, error, y);
}
// x = mantissa(x) 2^exponent(x), 1 <= mantissa < 2, for a positive normal x.
FCNSEG_INLINE Float exponent(Float x) { return _mm512_getexp_ps(x); }
FCNSEG_INLINE Float mantissa(Float x) {
  return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
}
// Where z > best, takes z and c.
FCNSEG_INLINE void keep_greater(Float z, Int c, Float& best, Int& id) {
  const __mmask16 greater = _mm512_cmp_ps_mask(z, best, _CMP_GT_OQ);
  best = _mm512_max_ps(z, best);
  id = (Int)_mm512_mask_mov_epi32((__m512i)id, greater, (__m512i)c);
}
FCNSEG_INLINE bool any(Int mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}
// Lane j is v[j - 1], lane 0 the last one of `before`.
FCNSEG_INLINE Float shift_in(Float before, Float v) {
  return from_bits((Int)_mm512_alignr_epi32((__m512i)v, (__m512i)before, 15));
}
// Bit j is set where lane j of v is not zero.
FCNSEG_INLINE uint32_t nonzero_bits(Int v) {
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
}

#else

#if FCNSEG_ISA_LEVEL == 1
FCNSEG_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
FCNSEG_INLINE Float vmin(Float a, Float b) { return _mm256_min_ps(a, b); }
FCNSEG_INLINE Float vmax(Float a, Float b) { return _mm256_max_ps(a, b); }
FCNSEG_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps((__m256i)v); }
FCNSEG_INLINE Float gather(const float* base, Int index) {
  return _mm256_i32gather_ps(base, (__m256i)index, 4);
}
FCNSEG_INLINE Int gather_int(const int32_t* base, Int index) {
  return (Int)_mm256_i32gather_epi32(base, (__m256i)index, 4);
}
FCNSEG_INLINE uint32_t nonzero_bits(Int v) {
  return 0xff & ~_mm256_movemask_ps((__m256)(v == Int{}));
}
FCNSEG_INLINE bool any(Int mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
#else
FCNSEG_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
FCNSEG_INLINE Float vmin(Float a, Float b) { return select(a < b, a, b); }
FCNSEG_INLINE Float vmax(Float a, Float b) { return select(a > b, a, b); }
FCNSEG_INLINE Float to_float(Int v) { return __builtin_convertvector(v, Float); }
FCNSEG_INLINE Float gather(const float* base, Int index) {
  Float v;
  for (int j = 0; j < kLanes; ++j) v[j] = base[index[j]];
  return v;
}
FCNSEG_INLINE Int gather_int(const int32_t* base, Int index) {
  Int v;
  for (int j = 0; j < kLanes; ++j) v[j] = base[index[j]];
  return v;
}
FCNSEG_INLINE uint32_t nonzero_bits(Int v) {
  uint32_t result = 0;
  for (int j = 0; j < kLanes; ++j) result |= static_cast<uint32_t>(v[j] != 0) << j;
  return result;
}
FCNSEG_INLINE bool any(Int mask) { return nonzero_bits(mask) != 0; }
#endif

FCNSEG_INLINE void keep_greater(Float z, Int c, Float& best, Int& id) {
  const Int greater = z > best;
  best = vmax(z, best);
  id = (greater & c) | (~greater & id);
}
FCNSEG_INLINE Float reciprocal(Float x) { return 1.f / x; }
FCNSEG_INLINE Float exponent(Float x) { return to_float((bits(x) >> 23) - 127); }
FCNSEG_INLINE Float mantissa(Float x) { return from_bits((bits(x) & 0x007fffff) | 0x3f800000); }

#endif

// 2^x for -126 <= x <= 126: round to n + f, a polynomial in f, n added to the exponent field. Its
// degree, 5 or 6, is the accuracy.
template <int kDegree = 6>
FCNSEG_INLINE Float exp2(Float x) {
  const Float magic = splat(12582912.f);  // 1.5 2^23: the sum's low bits are round(x)
  const Float shifted = x + magic;
  const Float f = x - (shifted - magic);
  Float p;                       // minimax on [-1/2, 1/2]
  if constexpr (kDegree == 6) {  // relative error 1.6e-8
    p = splat(1.5345810e-4f);
    p = fma(p, f, splat(1.3399931e-3f));
    p = fma(p, f, splat(9.6184891e-3f));
    p = fma(p, f, splat(5.5503286e-2f));
    p = fma(p, f, splat(2.4022646e-1f));
    p = fma(p, f, splat(6.9314718e-1f));
  } else {  // 9.2e-8
    p = splat(1.32647e-3f);
    p = fma(p, f, splat(9.67151e-3f));
    p = fma(p, f, splat(5.550734e-2f));
    p = fma(p, f, splat(2.4022242e-1f));
    p = fma(p, f, splat(6.9314698e-1f));
  }
  p = fma(p, f, splat(1.0f));
  return from_bits(bits(p) + (bits(shifted) << 23));
}

// log2 of a positive normal number: mantissa brought to [0.75, 1.5), then the atanh series.
FCNSEG_INLINE Float log2(Float x) {
  const Float m1 = mantissa(x);
  const Int high = m1 >= 1.5f;
  const Float m = select(high, 0.5f * m1, m1);
  const Float e = exponent(x) + select(high, splat(1.f), splat(0.f));
  const Float t = (m - 1.f) / (m + 1.f);
  const Float t2 = t * t;
  Float p = splat(2.8853901f / 9.f);
  p = fma(p, t2, splat(2.8853901f / 7.f));
  p = fma(p, t2, splat(2.8853901f / 5.f));
  p = fma(p, t2, splat(2.8853901f / 3.f));
  p = fma(p, t2, splat(2.8853901f));
  return fma(p, t, e);
}

FCNSEG_INLINE double sum(Float v) {
#if FCNSEG_ISA_LEVEL == 2
  return _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)) +
                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#else
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += v[j];
  return total;
#endif
}
FCNSEG_INLINE float lowest(Float v) {
  float least = v[0];
  for (int j = 1; j < kLanes; ++j) least = v[j] < least ? v[j] : least;
  return least;
}

}  // namespace FCNSEG_ISA
}  // namespace fcnseg
