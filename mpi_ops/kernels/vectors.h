// Vectors of 32-bit elements, as wide as the instruction set has them, for which the templates of
// elements.h work as for a single element. One element where there are none of our own: compilers
// make vectors of such loops themselves, but not reliably.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace gq {

#if defined(__x86_64__) && defined(__GNUC__)

// One intrinsic of each instruction set.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#define GQ_SELECT(avx512, avx2, sse2) avx512
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#define GQ_SELECT(avx512, avx2, sse2) avx2
#else
constexpr int kWidth = 4;
#define GQ_SELECT(avx512, avx2, sse2) sse2
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

GQ_HD Words bits_of(Floats values) { return reinterpret_cast<Words>(values); }
GQ_HD Floats float_of(Words bits) { return reinterpret_cast<Floats>(bits); }
GQ_HD Ints signed_of(Words words) { return reinterpret_cast<Ints>(words); }
GQ_HD Words words_of(Ints values) { return reinterpret_cast<Words>(values); }
GQ_HD Words mask_of(Ints comparison) { return reinterpret_cast<Words>(comparison); }
GQ_HD Floats float_from(Ints values) { return __builtin_convertvector(values, Floats); }
GQ_HD Ints truncated(Floats values) {
  return reinterpret_cast<Ints>(
      GQ_SELECT(_mm512_cvttps_epi32, _mm256_cvttps_epi32, _mm_cvttps_epi32)(values));
}
GQ_HD Ints round_to_int(Floats values) {
  return reinterpret_cast<Ints>(
      GQ_SELECT(_mm512_cvtps_epi32, _mm256_cvtps_epi32, _mm_cvtps_epi32)(values));
}
GQ_HD Floats square_root(Floats values) {
  return GQ_SELECT(_mm512_sqrt_ps, _mm256_sqrt_ps, _mm_sqrt_ps)(values);
}
// The second operand where one is NaN, as `a < b ? a : b` has it.
GQ_HD Floats smaller(Floats a, float b) {
  return GQ_SELECT(_mm512_min_ps, _mm256_min_ps, _mm_min_ps)(a, Floats{} + b);
}
GQ_HD Floats larger(Floats a, float b) {
  return GQ_SELECT(_mm512_max_ps, _mm256_max_ps, _mm_max_ps)(a, Floats{} + b);
}
#else

constexpr int kWidth = 1;
typedef float Floats;
typedef int32_t Ints;
typedef uint32_t Words;

#endif

}  // namespace gq
