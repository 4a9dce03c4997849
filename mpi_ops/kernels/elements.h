// Element functions of Global-QSGD, one source for every backend.
//
// The host library (host.cpp) and the CUDA kernels include this header, so a gradient gives the
// same codes on a CPU and on a GPU, bit for bit. Nothing here depends on fused multiply-add
// (compile with -ffp-contract=off / --fmad=false), on denormal floats, or on the rounding mode
// being changed.
//
// Layout shared by all kernels: elements are grouped in rows of kRow = 32 consecutive elements (a
// warp). A payload row holds whole element rows as lanes, so that lane packing never shuffles
// across a vector or a warp: payload row r, column j packs the elements (r * lanes + k) * 32 + j
// for k = 0 .. lanes-1.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define GQ_HD __host__ __device__ __forceinline__
#else
#define GQ_HD static inline __attribute__((always_inline))
#endif

namespace gq {

constexpr int kRow = 32;
constexpr uint32_t kAbsMask = 0x7fffffffu;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kNaNBits = 0x7fc00000u;

// ----------------------------------------------------------------------------------- bit patterns

GQ_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

GQ_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

GQ_HD int32_t round_to_int(float value) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(value);
#else
  return static_cast<int32_t>(__builtin_rintf(value));
#endif
}

GQ_HD float smaller(float a, float b) { return a < b ? a : b; }
GQ_HD float larger(float a, float b) { return a > b ? a : b; }

GQ_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

GQ_HD int32_t signed_of(uint32_t word) { return static_cast<int32_t>(word); }
GQ_HD uint32_t words_of(int32_t value) { return static_cast<uint32_t>(value); }
GQ_HD uint32_t mask_of(bool comparison) { return comparison ? ~0u : 0u; }
GQ_HD float float_from(int32_t value) { return static_cast<float>(value); }
GQ_HD int32_t truncated(float value) { return static_cast<int32_t>(value); }

}  // namespace gq

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include "vectors.h"
#endif

namespace gq {

// ---------------------------------------------------------------------------------- element types

// IEEE half and bfloat16 as bit patterns: conversions are integer arithmetic, hence the same on all
// backends and vectorizable without F16C.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

GQ_HD float load(float value) { return value; }
// Beyond the range of float32 a double becomes Inf, which reaches every rank as NaN.
GQ_HD float load(double value) {
#if defined(__CUDA_ARCH__)
  // A GPU makes one NaN of all of them; a CPU keeps the sign and the upper bits.
  if (value != value) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
    const uint32_t sign = static_cast<uint32_t>(bits >> 32) & 0x80000000u;
    return float_of(sign | kNaNBits | (static_cast<uint32_t>(bits >> 29) & 0x003fffffu));
  }
#endif
  return static_cast<float>(value);
}
GQ_HD float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
GQ_HD float load(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // Rebias the exponent by 127 - 15 = 112; Inf and NaN (exponent 31) need it twice.
  const uint32_t rebias = 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  // A denormal half is a small multiple of 2^-24.
  const uint32_t denormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? denormal : normal));
}

GQ_HD void store(float* out, float value) { *out = value; }
GQ_HD void store(double* out, float value) {
#if defined(__CUDA_ARCH__)
  if (value != value) {  // as in load(double)
    const uint64_t sign = bits_of(value) & 0x80000000u;
    const uint64_t payload = bits_of(value) & 0x003fffffu;
    const uint64_t bits = ((sign | 0x7ff80000u) << 32) | (payload << 29);
    *out = __longlong_as_double(static_cast<int64_t>(bits));
    return;
  }
#endif
  *out = static_cast<double>(value);
}
GQ_HD void store(BFloat16* out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = ((bits >> 16) & 0x8000u) | 0x7fc0u;
  out->bits = static_cast<uint16_t>((bits & kAbsMask) > kInfBits ? nan : rounded);
}
GQ_HD void store(Half* out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & kAbsMask;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // The unit of 0.5f in the last place is 2^-24, the smallest half: the addition rounds to it.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < bits_of(0x1p-14f) ? denormal : normal;
  half = magnitude >= bits_of(65520.0f) ? 0x7c00u : half;  // the first float that rounds to Inf
  half = magnitude > kInfBits ? 0x7e00u : half;
  out->bits = static_cast<uint16_t>(sign | half);
}

// Largest finite value of an element type, as far as float32 goes. A norm above it would be
// of no use: it already bounds every |x|, and levels above it would decode to Inf.
GQ_HD float largest_finite(float) { return 0x1.fffffep127f; }
GQ_HD float largest_finite(double) { return 0x1.fffffep127f; }
GQ_HD float largest_finite(Half) { return 65504.0f; }
GQ_HD float largest_finite(BFloat16) { return 0x1.fep127f; }

// The L2 norm of a block as it travels, from the sum of the squares of its elements.
template <typename T>
GQ_HD int32_t norm_of_squares(double sum) {
#if defined(__CUDA_ARCH__)
  const double root = __dsqrt_rn(sum);
#else
  const double root = __builtin_sqrt(sum);
#endif
  // Round up, so that the float norm still bounds every |x|.
  float norm = static_cast<float>(root);
  if (norm < root) norm = float_of(bits_of(norm) + 1u);
  // Still bounds every |x|, and no decoded value can be Inf.
  if (root <= 0x1.fffffffffffffp1023) norm = smaller(norm, largest_finite(T{}));
  return static_cast<int32_t>(root != root ? kNaNBits : bits_of(norm));
}

// ------------------------------------------------------------------------------------- randomness

// Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Seven rounds are the fewest that pass BigCrush in that paper's Table 2 (ten are its safety margin
// for general use); the dither of a gradient is not an adversarial use, and rounds are most of its
// cost.
constexpr int kPhiloxRounds = 7;

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;

struct Random {
  uint32_t key[2];     // identifies (seed, tensor)
  uint32_t stream[2];  // (step, rank and stage); see mpi_ops/dither.py
};

template <int kRounds>
GQ_HD void philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                      uint32_t out[4]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#else
#pragma GCC unroll 16
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32);
    const uint32_t high1 = static_cast<uint32_t>(product1 >> 32);
    c0 = high1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = high0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

GQ_HD void random_block(const Random& random, uint64_t counter, uint32_t out[4]) {
  philox4x32<kPhiloxRounds>(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                            random.stream[0], random.stream[1], random.key[0], random.key[1], out);
}

// One Philox block of four words serves the eight elements that stand in one column of a group of
// eight rows: counter = group * 32 + column, element row h of the group takes half h of the block.
constexpr int kGroupRows = 8;

// The 32 random bits of row h, 0 <= h < 8, out of its word h / 2: its own half on top, the other
// half below. Every element's 32 bits are exactly uniform. The two elements that share a word are
// independent in their upper 16 bits; standard dithering uses those alone, exponential dithering
// the upper 23, where the shared bits can matter only if the own 16 tie (probability 2^-16).
GQ_HD uint32_t random_bits(uint32_t word, int h) {
  return h % 2 ? word : (word << 16) | (word >> 16);
}

// The own half of row h on top, which is all that standard dithering uses.
template <typename U>
GQ_HD U own_random_bits(U word, int h) {
  return h % 2 ? word : word << 16;
}

// ------------------------------------------------------------------- dithers that repel each other

// Where the roundings of n ranks are added up, their errors should cancel. So the ranks draw the
// same random numbers, and each XORs a mask of its own to them: its upper bits, `strata` of them,
// put the ranks into different ones of 2^strata equal parts of [0, 1) for every element, and its
// lower bits move them about inside. Each rank's numbers are as uniform and independent as without
// a mask; between two ranks no covariance of two roundings is positive (docs/theory.md; correlated
// quantization, Suresh, Sun, Ro and Yu, ICML 2022). Cohorts of 256 ranks have numbers of their own.
struct Dither {
  Random random;    // the same for all ranks of a cohort
  uint32_t rank;    // in the cohort
  uint32_t strata;  // 0: no other rank has the same numbers, and there is no mask
};

constexpr uint32_t kMaximumStrata = 8;

// In the place of `strata`: every number is a half, so values round to the nearest level.
constexpr uint32_t kNearest = 15;
constexpr uint32_t kHalves = 0x80008000u;  // in both halves of a word

GQ_HD Dither dither_of(const Random& words) {
  uint32_t strata = (words.stream[1] >> 4) & 15u;
  if (strata == 0 || strata == kNearest) return {words, 0, strata};
  if (strata > kMaximumStrata) strata = kMaximumStrata;
  const uint32_t shared = words.stream[1] & ~0xff00u;
  return {{{words.key[0], words.key[1]}, {words.stream[0], shared}},
          (words.stream[1] >> 8) & 0xffu,
          strata};
}

// The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
// generators", OOPSLA 2014).
GQ_HD uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// The product in the field of 2^degree elements, 1 <= degree <= 8; its polynomials, one to a byte,
// are irreducible and lack their first term. For a random a that is not 0, the products a * i and
// a * j of two ranks are each other's distance apart, which is any but 0 with the same probability.
GQ_HD uint32_t field_product(uint32_t a, uint32_t b, uint32_t degree) {
  const uint64_t polynomials = 0x1B03030503030301u;
  const uint32_t polynomial = static_cast<uint32_t>(polynomials >> (8 * (degree - 1))) & 0xffu;
  uint32_t product = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // it is short, and unrolled it takes registers
#endif
  for (uint32_t bit = 0; bit < degree; ++bit) {
    product ^= (b >> bit & 1u) ? a : 0u;
    const uint32_t carry = a >> (degree - 1) & 1u;
    a = ((a << 1) & ((1u << degree) - 1u)) ^ (carry ? polynomial : 0u);
  }
  return product;
}

// What this rank XORs to both halves of the random words of a group of rows.
GQ_HD uint32_t dither_mask(const Dither& dither, uint64_t group) {
  if (dither.strata == 0 || dither.strata == kNearest) return 0;
  const Random& random = dither.random;
  const uint64_t key = static_cast<uint64_t>(random.key[1]) << 32 | random.key[0];
  const uint64_t stream = static_cast<uint64_t>(random.stream[1]) << 32 | random.stream[0];
  const uint64_t shared = mix64((key ^ mix64(stream)) + (group + 1) * 0x9E3779B97F4A7C15u);
  const uint32_t others = (1u << dither.strata) - 1u;
  const uint32_t factor = 1u + static_cast<uint32_t>(((shared >> 32) * others) >> 32);
  const uint32_t stratum = field_product(factor, dither.rank, dither.strata);
  const uint64_t own = mix64(shared + (dither.rank + 1u) * 0xD1342543DE82EF95u);
  const uint32_t inside = (0xffffu >> dither.strata) * 0x00010001u;
  return (stratum << (16 - dither.strata)) * 0x00010001u |
         (static_cast<uint32_t>(own >> 32) & inside);
}

// ------------------------------------------------------------------------------ keyed by contents

// One term of the hash that keys a reduction by its contents: a sum of products with odd constants
// that differ from word to word (multilinear hashing; the constants are a Weyl sequence of the
// golden ratio).
GQ_HD uint64_t content_term(uint32_t word, int position) {
  const uint32_t constant = 0x9E3779B9u * (2u * static_cast<uint32_t>(position) + 1u);
  return static_cast<uint64_t>(word) * constant;
}

// ----------------------------------------------------------------------------------------- scales

// Multiplying by `pre` (1 or a power of two, exact) and then by `factor` divides by a norm of
// any size without the reciprocal becoming Inf or denormal.
struct Scale {
  float pre;
  float factor;
};

constexpr float kTinyNorm = 0x1p-60f;
constexpr float kHugeNorm = 0x1p100f;

// A norm travels as the bit pattern of a non-negative float: integer order is float order and
// finite < Inf < NaN, so an integer Max-allreduce carries a NaN of one rank to all ranks. Where a
// norm decodes values it becomes NaN if it is not finite, and then so does every element of its
// block.
GQ_HD bool norm_is_finite(int32_t norm_bits) { return static_cast<uint32_t>(norm_bits) < kInfBits; }
GQ_HD float norm_of(int32_t norm_bits) {
  return float_of(norm_is_finite(norm_bits) ? static_cast<uint32_t>(norm_bits) : kNaNBits);
}

// numerator / norm, for 1 <= numerator <= 2^31; zero where the norm is zero or not finite.
GQ_HD Scale scale_down(int32_t norm_bits, float numerator) {
  if (norm_bits == 0 || !norm_is_finite(norm_bits)) return {1.0f, 0.0f};
  const float norm = norm_of(norm_bits);
  const float pre = norm < kTinyNorm ? 0x1p64f : norm > kHugeNorm ? 0x1p-40f : 1.0f;
  return {pre, numerator / (norm * pre)};
}

// norm / denominator, for 1 <= denominator <= 2^31; NaN where the norm is not finite.
GQ_HD Scale scale_up(int32_t norm_bits, float denominator) {
  const float norm = norm_of(norm_bits);
  const bool tiny = norm < kTinyNorm;
  return {tiny ? 0x1p-64f : 1.0f, norm * (tiny ? 0x1p64f : 1.0f) / denominator};
}

// ----------------------------------------------------------------------------- standard dithering

// Levels k/s, k = -s .. s. `scale` is 65536 * s / norm: the value becomes fixed point with 16
// fractional bits, and adding 16 uniform bits before the floor rounds it without bias (QSGD,
// Alistarh et al. 2017, with the global norm of Global-QSGD). `limit` = 65536 * s makes |code| <= s
// hold exactly, whatever the rounding of the scale.
template <typename F, typename U>
GQ_HD auto quantize_standard(F value, Scale scale, float limit, U random32) {
  const F scaled = value * scale.pre * scale.factor;
  const F clamped = larger(smaller(scaled, limit), -limit);
  return (round_to_int(clamped) + signed_of(random32 >> 16)) >> 16;
}

// Square levels: code k stands for sign(k) * k^2 / s^2, so levels are closer where most elements of
// a block are. `scale` is s^2 / norm and `limit` s^2. For k^2 <= m <= (k + 1)^2, m the magnitude in
// units of the first level, the fraction (m - k^2) / (2k + 1) of the way to the next level is
// compared with 16 random bits, as with even levels, but without dividing. The bits are inverted
// for positive values, so that for both signs larger numbers round up and not outwards. Where the
// square root is rounded up to k + 1, the fraction is a little below zero.
template <typename F, typename U>
GQ_HD auto quantize_square(F value, Scale scale, float limit, U random32) {
  const F scaled = value * scale.pre * scale.factor;
  const F magnitude = smaller(float_of(bits_of(scaled) & kAbsMask), limit);
  const U positive = ~mask_of(scaled < 0.0f);  // NaN counts as positive, as with even levels
  const auto below = truncated(square_root(magnitude));
  const F low = float_from(below);
  const F above = magnitude - low * low;
  const F needed = float_from(signed_of((random32 ^ positive) >> 16)) + 0.5f;
  const F step = low * 0x1p-15f + 0x1p-16f;  // (2k + 1) / 65536
  const U level = words_of(below) - mask_of(needed * step < above);
  return signed_of(positive - (level ^ positive));  // negated where it is not positive
}

// `limit` is what `scale` makes of the norm.
template <bool kSquare>
GQ_HD float limit_of(int levels) {
  const float top = static_cast<float>(levels);
  return kSquare ? top * top : 65536.0f * top;
}

template <bool kSquare, typename F, typename U>
GQ_HD auto quantize_level(F value, Scale scale, float limit, U random32) {
  if constexpr (kSquare)
    return quantize_square(value, scale, limit, random32);
  else
    return quantize_standard(value, scale, limit, random32);
}

// What a code stands for, as a multiple of what code 1 does.
GQ_HD int32_t level_of(int32_t code, bool square) {
  return square ? code * (code < 0 ? -code : code) : code;
}

// The signed low `bits` bits of a balanced-radix word, and the word without them.
GQ_HD int32_t lowest_lane(int32_t word, int bits) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) << (32 - bits)) >> (32 - bits);
}
// Unsigned, so that words that no rank has made wrap around as well on every backend.
GQ_HD int32_t drop_lane(int32_t word, int32_t lane, int bits) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) - static_cast<uint32_t>(lane)) >> bits;
}

// Dense lanes, of square levels with 3, 5 and 6 bits: no words are added, so the radix need not be
// a power of two, and is the largest odd one, 2s + 1, of which so many lanes fit a word. A code of
// -s to s in lane k of n has the weight radix^(n - 1 - k): the first lane is the highest.
struct Dense {
  uint32_t radix;   // 0: lanes are those of balanced words of a power of two
  uint32_t zero;    // words are counted from that of n times -s on; the word 0 has this number
  uint32_t factor;  // see dense_fraction
  int shift;
};

// The highest weight: that of the first lane.
GQ_HD constexpr uint32_t dense_weight(uint32_t radix, int lanes) {
  uint32_t weight = 1;
  for (int lane = 1; lane < lanes; ++lane) weight *= radix;
  return weight;
}

template <uint32_t kRadix, int kLanes, int kShift>
GQ_HD constexpr Dense dense_lanes() {
  constexpr uint64_t numbers = uint64_t{dense_weight(kRadix, kLanes)} * kRadix;  // of words
  constexpr uint64_t room = (uint64_t{1} << 32) - numbers;
  constexpr uint64_t factor = (room << kShift) / numbers + 1;
  constexpr uint64_t excess = factor * numbers - (room << kShift);
  static_assert(numbers < uint64_t{1} << 32 && factor < uint64_t{1} << 32, "32 bits each");
  static_assert(numbers * excess < room << kShift, "the fractions of two numbers would overlap");
  return {kRadix, static_cast<uint32_t>(numbers / 2), static_cast<uint32_t>(factor), kShift};
}

GQ_HD constexpr Dense dense_of(int bits) {
  return bits == 3   ? dense_lanes<9, 10, 34>()
         : bits == 5 ? dense_lanes<39, 6, 34>()
         : bits == 6 ? dense_lanes<83, 5, 35>()
                     : Dense{0, 0, 0, 0};
}

// A word as a fraction of all words, in units of 2^-32: any number from N up to, and without, N + 1
// times 2^32 / radix^n, for word number N. That is N + N * room / radix^n, room = 2^32 - radix^n;
// factor / 2^shift is a little more than room / radix^n, and 1 makes up for what the shift drops.
// dense_lanes() checks that N + 1 is not reached.
GQ_HD uint32_t dense_fraction(int32_t word, const Dense& dense) {
  const uint32_t number = words_of(word) + dense.zero;
  return number + 1u + static_cast<uint32_t>(uint64_t{number} * dense.factor >> dense.shift);
}

// The code of the highest lane: what a product with the radix carries out of 32 bits, so between -s
// and s for any word. What stays in them is the fraction of the other lanes.
GQ_HD int32_t take_dense(uint32_t& fraction, const Dense& dense) {
  const uint64_t product = uint64_t{fraction} * dense.radix;
  fraction = static_cast<uint32_t>(product);
  return static_cast<int32_t>(product >> 32) - static_cast<int32_t>(dense.radix / 2);
}

// |mean| <= norm holds exactly: rounding of the scale must not turn the largest float into Inf.
GQ_HD float dequantize_standard(int32_t lane_sum, Scale scale, float norm) {
  const float mean = static_cast<float>(lane_sum) * scale.factor * scale.pre;
  // Not in the other order: this one returns a NaN norm as it is, the same on every backend.
  return smaller(larger(mean, -norm), norm);
}

// -------------------------------------------------------------------------- exponential dithering

// A code of `kBits` bits is a sign and a level number e = 0 .. top, top = 2^(kBits-1) - 1. Level 0
// is zero, level e is 2^(e - top).
template <int kBits>
struct Exponential {
  static constexpr int kTop = (1 << (kBits - 1)) - 1;
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kBias = 128u - kTop;  // float exponent field of the smallest level
};

// Unbiased rounding of `value` to a level, saturating at the magnitude whose bit pattern is
// `top_bits` (at most that of 1); `sign_bits` is a float of the same sign. For y = |value| at least
// the smallest level, z = 2y; below it, z = y + smallest, which is linear in y between the same two
// powers of two. Adding 23 uniform bits to the mantissa carries into the exponent with exactly the
// unbiased probability. Comparing bit patterns orders non-negative floats and saturates a NaN.
template <int kBits>
GQ_HD uint32_t encode_exponential(float value, uint32_t sign_bits, uint32_t top_bits,
                                  uint32_t random32) {
  using E = Exponential<kBits>;
  const uint32_t smallest = E::kBias << 23;
  const uint32_t magnitude = bits_of(value) & kAbsMask;
  const uint32_t y = magnitude < top_bits ? magnitude : top_bits;
  const float z = float_of(y) + float_of(y > smallest ? y : smallest);
  const uint32_t level = ((bits_of(z) + (random32 >> 9)) >> 23) - E::kBias;
  return ((sign_bits >> (32 - kBits)) & E::kSign) | level;
}

// `scale` is 1 / norm and `top_bits` the bit pattern of 2^-headroom, the level of the norm.
template <int kBits>
GQ_HD uint32_t quantize_exponential(float value, Scale scale, uint32_t top_bits,
                                    uint32_t random32) {
  const float y = value * scale.pre * scale.factor * float_of(top_bits);
  // The sign of x, since that of Inf * 0 depends on the processor.
  return encode_exponential<kBits>(y, bits_of(value), top_bits, random32);
}

constexpr uint32_t kOneBits = 127u << 23;  // bit pattern of 1.0f

// The code stands in the low bits; with eight bits it is sign-extended (an int8_t widened), which
// puts the sign and the level where a float has its own with one shift.
template <int kBits>
GQ_HD float decode_exponential(int32_t code) {
  using E = Exponential<kBits>;
  const uint32_t word = static_cast<uint32_t>(code);
  if (kBits == 8) return float_of((word << 23) & 0xbfffffffu);
  const uint32_t level = word & (E::kSign - 1u);
  const uint32_t magnitude = (level == 0 ? 0u : level + (E::kBias - 1u)) << 23;
  return float_of(((word & E::kSign) << (32 - kBits)) | magnitude);
}

// ------------------------------------------------------------------------ adding two 4-bit codes

// The same sum and the same law as decoding, adding and encoding, in bytes: levels d apart add up
// to a value at 2^-d of the way to the next higher level, and subtract to one at 2^-(d-1) of the
// way from the higher of them to the next lower one (the case rule of arXiv 2305.18627). No
// distance needs more than six random bits, so eight are exactly unbiased.

// What the probability depends on: the distance d of the two levels, and 8 if the signs differ.
GQ_HD uint8_t addition_case(uint8_t a, uint8_t b) {
  const uint8_t level_a = a & 7, level_b = b & 7;
  const uint8_t distance = level_a > level_b ? level_a - level_b : level_b - level_a;
  return static_cast<uint8_t>(distance | ((a ^ b) & 8));
}

// The half of a byte that holds one code: 0 the low one, 1 the high one.
GQ_HD uint8_t nibble(uint8_t byte, int half) {
  return static_cast<uint8_t>(half ? byte >> 4 : byte & 15);
}

// The largest of 256 random numbers at which the sum moves away from the larger level.
GQ_HD uint8_t addition_limit(uint8_t which) {
  return static_cast<uint8_t>(which < 8 ? 255 >> which : 511 >> (which - 8));
}

GQ_HD uint8_t all_ones_if(bool condition) { return condition ? 0xff : 0; }

// Saturates at the highest level. In masks of whole bytes, which compilers keep in vectors.
GQ_HD uint8_t add_codes(uint8_t a, uint8_t b, uint8_t limit, uint8_t random8) {
  const uint8_t level_a = a & 7, level_b = b & 7;
  const uint8_t high = level_a > level_b ? level_a : level_b;
  const uint8_t low = level_a > level_b ? level_b : level_a;
  const uint8_t differ = all_ones_if(((a ^ b) & 8) != 0);
  // -1 where the sum moves one level: up, or down (the negative) where the signs differ.
  const uint8_t move = all_ones_if(random8 <= limit) & all_ones_if(low != 0);
  const uint8_t step = static_cast<uint8_t>((move ^ differ) - differ);
  const uint8_t level = static_cast<uint8_t>(high - step);
  const uint8_t sign = (level_a == high ? a : b) & 8;
  const uint8_t cancels = differ & all_ones_if(high == low);
  return static_cast<uint8_t>((sign | (level < 7 ? level : 7)) & ~cancels);
}
GQ_HD uint8_t add_codes(uint8_t a, uint8_t b, uint8_t random8) {
  return add_codes(a, b, addition_limit(addition_case(a, b)), random8);
}

}  // namespace gq
