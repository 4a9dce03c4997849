// The parts of the host kernels that compilers do not vectorize well by themselves: Philox blocks
// of a whole group of rows, and rows of signed bytes widened to 32 bits and back. Same numbers as
// elements.h.
#pragma once

#include <cstddef>

#include "elements.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gq {

#if defined(__x86_64__) && defined(__GNUC__)

// Widening through the compiler's own loops stores halves of vectors that the next loop loads
// whole, which stalls on store forwarding.
GQ_HD void widen_row(const uint8_t* bytes, int32_t* words) {
#if defined(__AVX512F__)
  for (int j = 0; j < kRow; j += 16)
    _mm512_storeu_si512(
        words + j,
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j))));
#elif defined(__AVX2__)
  for (int j = 0; j < kRow; j += 8)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(words + j),
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + j))));
#else
  for (int j = 0; j < kRow; ++j) words[j] = static_cast<int8_t>(bytes[j]);
#endif
}

GQ_HD void narrow_row(const uint32_t* words, uint8_t* bytes) {
#if defined(__AVX512F__)
  for (int j = 0; j < kRow; j += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + j),
                     _mm512_cvtepi32_epi8(_mm512_loadu_si512(words + j)));
#else
  for (int j = 0; j < kRow; ++j) bytes[j] = static_cast<uint8_t>(words[j]);
#endif
}

// Copies a multiple of 64 bytes to an address that is a multiple of 64, past the caches: for
// results larger than the caches this saves reading every line before it is overwritten. Finish
// with stream_fence().
GQ_HD void stream_copy(void* to, const void* from, int bytes) {
#if defined(__AVX512F__)
  for (int b = 0; b < bytes; b += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + b),
                        _mm512_loadu_si512(static_cast<const char*>(from) + b));
#elif defined(__AVX2__)
  for (int b = 0; b < bytes; b += 32)
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(to) + b),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + b)));
#else
  for (int b = 0; b < bytes; b += 16)
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(static_cast<char*>(to) + b),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + b)));
#endif
}
GQ_HD void stream_fence() { _mm_sfence(); }

// Replaces each of a multiple of 32 bytes below 16 by its place in a table of 16 bytes.
GQ_HD void look_up(const uint8_t* table, uint8_t* bytes, int count) {
#if defined(__AVX2__)
  const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m256i both = _mm256_broadcastsi128_si256(half);
  for (int i = 0; i < count; i += 32) {
    __m256i* at = reinterpret_cast<__m256i*>(bytes + i);
    _mm256_storeu_si256(at, _mm256_shuffle_epi8(both, _mm256_loadu_si256(at)));
  }
#else
  for (int i = 0; i < count; ++i) bytes[i] = table[bytes[i]];
#endif
}

// 64-bit lanes, of which Philox uses the low 32 bits: one multiplication gives both halves of the
// product, and what stands in the upper half of a lane is ignored by the next one.
#if defined(__AVX512F__)
constexpr int kLanes64 = 8;
#elif defined(__AVX2__)
constexpr int kLanes64 = 4;
#else
constexpr int kLanes64 = 2;
#endif
typedef uint64_t Wide __attribute__((vector_size(8 * kLanes64)));

GQ_HD Wide broadcast64(uint64_t value) { return Wide{} + value; }

GQ_HD Wide multiply_low32(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<Wide>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}

// Even columns in one vector, odd columns in another: joining them takes no shuffle.
GQ_HD Wide interleave(Wide even, Wide odd) { return (even & 0xffffffffu) | (odd << 32); }

// The words of a group of rows, each XOR `mask`.
GQ_HD void random_group(const Random& random, uint64_t group, uint32_t mask,
                        uint32_t (*words)[kRow]) {
  const Wide both_masks = broadcast64(static_cast<uint64_t>(mask) << 32 | mask);
  // In flight together, in pairs of even and odd columns: as many as the registers hold.
#if defined(__AVX512F__)
  constexpr int kVectors = 4;
#else
  constexpr int kVectors = 2;
#endif
  const uint64_t first = group * kRow;
  Wide even_columns = {};
  for (int i = 0; i < kLanes64; ++i) even_columns[i] = 2 * static_cast<uint64_t>(i);
#pragma GCC unroll 4
  for (int column = 0; column < kRow; column += kVectors * kLanes64) {
    Wide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int start = column + (v / 2) * 2 * kLanes64 + v % 2;
      c0[v] = even_columns + ((first & 0xffffffffu) + static_cast<uint64_t>(start));
      c1[v] = broadcast64(first >> 32);
      c2[v] = broadcast64(random.stream[0]);
      c3[v] = broadcast64(random.stream[1]);
    }
    uint32_t k0 = random.key[0];
    uint32_t k1 = random.key[1];
#pragma GCC unroll 16
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Wide product0 = multiply_low32(c0[v], broadcast64(kPhiloxMultiplier0));
        const Wide product1 = multiply_low32(c2[v], broadcast64(kPhiloxMultiplier1));
        c0[v] = (product1 >> 32) ^ c1[v] ^ broadcast64(k0);
        c1[v] = product1;
        c2[v] = (product0 >> 32) ^ c3[v] ^ broadcast64(k1);
        c3[v] = product0;
      }
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += 2) {
      const int start = column + v * kLanes64;
      const Wide joined[4] = {interleave(c0[v], c0[v + 1]), interleave(c1[v], c1[v + 1]),
                              interleave(c2[v], c2[v + 1]), interleave(c3[v], c3[v + 1])};
      for (int w = 0; w < 4; ++w) {
        const Wide masked = joined[w] ^ both_masks;
        __builtin_memcpy(&words[w][start], &masked, sizeof(Wide));
      }
    }
  }
}

#else

GQ_HD void widen_row(const uint8_t* bytes, int32_t* words) {
  for (int j = 0; j < kRow; ++j) words[j] = static_cast<int8_t>(bytes[j]);
}

GQ_HD void narrow_row(const uint32_t* words, uint8_t* bytes) {
  for (int j = 0; j < kRow; ++j) bytes[j] = static_cast<uint8_t>(words[j]);
}

GQ_HD void stream_copy(void* to, const void* from, int bytes) {
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
}
GQ_HD void stream_fence() {}

GQ_HD void look_up(const uint8_t* table, uint8_t* bytes, int count) {
  for (int i = 0; i < count; ++i) bytes[i] = table[bytes[i]];
}

GQ_HD void random_group(const Random& random, uint64_t group, uint32_t mask,
                        uint32_t (*words)[kRow]) {
  const uint64_t first = group * kRow;
  for (int j = 0; j < kRow; ++j) {
    uint32_t word[4];
    random_block(random, first + static_cast<uint64_t>(j), word);
    for (int w = 0; w < 4; ++w) words[w][j] = word[w] ^ mask;
  }
}

#endif

}  // namespace gq
