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

// The even 32-bit lanes of one vector and the odd ones of another.
GQ_HD Wide blend(Wide even, Wide odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_mask_mov_epi32(reinterpret_cast<__m512i>(even), 0xaaaa,
                                                      reinterpret_cast<__m512i>(odd)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0xaa));
#else
  return (even & 0xffffffffu) | (odd & ~0xffffffffull);
#endif
}

// Even columns are in one vector, odd columns in another: joining their low or their high halves
// takes no shuffle.
GQ_HD Words low_halves(Wide even, Wide odd) {
  return reinterpret_cast<Words>(blend(even, odd << 32));
}
GQ_HD Words high_halves(Wide even, Wide odd) {
  return reinterpret_cast<Words>(blend(even >> 32, odd));
}

// The fractions of a row of words of dense lanes: those of even and of odd columns apart, in the
// low halves of 64 bits.
struct DenseRow {
  Wide even[kRow / kWidth], odd[kRow / kWidth];
};

GQ_HD void load_dense(const int32_t* words, const Dense& dense, DenseRow& row) {
  const Wide factor = broadcast64(dense.factor), one = broadcast64(1);
  for (int i = 0; i < kRow / kWidth; ++i) {
    Words numbers;
    __builtin_memcpy(&numbers, words + i * kWidth, sizeof numbers);
    numbers += dense.zero;
    const Wide both = reinterpret_cast<Wide>(numbers), odd = both >> 32;
    row.even[i] = both + one + (multiply_low32(both, factor) >> dense.shift);
    row.odd[i] = odd + one + (multiply_low32(odd, factor) >> dense.shift);
  }
}

// The codes of the next lane; those of the highest one first.
GQ_HD void take_dense(DenseRow& row, const Dense& dense, int32_t* codes) {
  const Wide radix = broadcast64(dense.radix);
  for (int i = 0; i < kRow / kWidth; ++i) {
    row.even[i] = multiply_low32(row.even[i], radix);
    row.odd[i] = multiply_low32(row.odd[i], radix);
    const Words own = high_halves(row.even[i], row.odd[i]) - dense.radix / 2;
    __builtin_memcpy(codes + i * kWidth, &own, sizeof own);
  }
}

// The keys of all rounds, which are the same for all groups: as vectors, and in memory, because
// moving one from a scalar takes as long as two steps of a round.
struct RandomKeys {
  uint32_t key[2];
  Wide key0[kPhiloxRounds], key1[kPhiloxRounds];
};

GQ_HD RandomKeys random_keys(const Random& random) {
  RandomKeys keys = {{random.key[0], random.key[1]}, {}, {}};
  uint32_t key0 = random.key[0], key1 = random.key[1];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = broadcast64(key0);
    keys.key1[round] = broadcast64(key1);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return keys;
}

// Philox blocks of a group of rows. All columns have the same counter but for its first word, so
// half of the first two rounds is the same for all, and stands here.
struct RandomGroup {
  Wide first_product, into_c2, into_c0, into_c2_again, third_key1;
  Words last0, last1, mask;
  bool nearest;  // words are halves
};

// The words are those of random_block, each XOR the mask; or halves.
GQ_HD RandomGroup random_group(const RandomKeys& keys, const uint32_t* stream, uint64_t group,
                               uint32_t mask, bool nearest = false) {
  constexpr uint32_t kLast = kPhiloxRounds - 1;
  const uint64_t first = group * kRow;
  const uint32_t key0 = keys.key[0], key1 = keys.key[1];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * stream[0];
  const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(first >> 32) ^
                      key0;  // of the second round
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
  const uint32_t c3 = static_cast<uint32_t>(product0);  // of the third
  return {broadcast64(kPhiloxMultiplier0 * (first & 0xffffffffu)),
          broadcast64(stream[1] ^ key1),
          broadcast64(static_cast<uint32_t>(product1) ^ (key0 + kPhiloxKeyStep0)),
          broadcast64(static_cast<uint32_t>(product0 >> 32) ^ (key1 + kPhiloxKeyStep1)),
          broadcast64(c3 ^ (key1 + 2 * kPhiloxKeyStep1)),
          Words{} + (mask ^ (key0 + kLast * kPhiloxKeyStep0)),
          Words{} + (mask ^ (key1 + kLast * kPhiloxKeyStep1)),
          Words{} + mask,
          nearest};
}

// The four words of kWidth columns, from column `start` on.
GQ_HD void random_columns(const RandomKeys& keys, const RandomGroup& group, int start,
                          Words* words) {
  if (group.nearest) {
    for (int w = 0; w < 4; ++w) words[w] = Words{} + kHalves;
    return;
  }
  static_assert(kPhiloxRounds > 3, "the first two rounds and the last are not in the loop");
  const Wide m0 = broadcast64(kPhiloxMultiplier0), m1 = broadcast64(kPhiloxMultiplier1);
  Wide c0[2], c1[2], c2[2], c3[2];  // even columns and odd ones
  for (int odd = 0; odd < 2; ++odd) {
    Wide columns = {};
    for (int i = 0; i < kLanes64; ++i)
      columns[i] = kPhiloxMultiplier0 * static_cast<uint64_t>(start + 2 * i + odd);
    const Wide product0 = group.first_product + columns;
    const Wide product1 = multiply_low32((product0 >> 32) ^ group.into_c2, m1);
    c0[odd] = (product1 >> 32) ^ group.into_c0;
    c1[odd] = product1;
    c2[odd] = product0 ^ group.into_c2_again;
    c3[odd] = Wide{};  // the same for all columns, and part of third_key1
  }
#pragma GCC unroll 16
  for (int round = 2; round < kPhiloxRounds - 1; ++round) {
    for (int odd = 0; odd < 2; ++odd) {
      const Wide product0 = multiply_low32(c0[odd], m0);
      const Wide product1 = multiply_low32(c2[odd], m1);
      c0[odd] = (product1 >> 32) ^ c1[odd] ^ keys.key0[round];
      c1[odd] = product1;
      c2[odd] = (product0 >> 32) ^ c3[odd] ^ (round == 2 ? group.third_key1 : keys.key1[round]);
      c3[odd] = product0;
    }
  }
  const Wide even0 = multiply_low32(c0[0], m0), odd0 = multiply_low32(c0[1], m0);
  const Wide even1 = multiply_low32(c2[0], m1), odd1 = multiply_low32(c2[1], m1);
  words[0] = high_halves(even1, odd1) ^ low_halves(c1[0], c1[1]) ^ group.last0;
  words[1] = low_halves(even1, odd1) ^ group.mask;
  words[2] = high_halves(even0, odd0) ^ low_halves(c3[0], c3[1]) ^ group.last1;
  words[3] = low_halves(even0, odd0) ^ group.mask;
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

struct DenseRow {
  uint32_t fractions[kRow];
};

GQ_HD void load_dense(const int32_t* words, const Dense& dense, DenseRow& row) {
  for (int j = 0; j < kRow; ++j) row.fractions[j] = dense_fraction(words[j], dense);
}

GQ_HD void take_dense(DenseRow& row, const Dense& dense, int32_t* codes) {
  for (int j = 0; j < kRow; ++j) codes[j] = take_dense(row.fractions[j], dense);
}

struct RandomKeys {
  uint32_t key[2];
};

GQ_HD RandomKeys random_keys(const Random& random) { return {{random.key[0], random.key[1]}}; }

struct RandomGroup {
  uint32_t stream[2];
  uint64_t first;
  uint32_t mask;
  bool nearest;  // words are halves
};

GQ_HD RandomGroup random_group(const RandomKeys&, const uint32_t* stream, uint64_t group,
                               uint32_t mask, bool nearest = false) {
  return {{stream[0], stream[1]}, group * kRow, mask, nearest};
}

GQ_HD void random_columns(const RandomKeys& keys, const RandomGroup& group, int start,
                          Words* words) {
  const Random random = {{keys.key[0], keys.key[1]}, {group.stream[0], group.stream[1]}};
  random_block(random, group.first + static_cast<uint64_t>(start), words);
  for (int w = 0; w < 4; ++w) words[w] = group.nearest ? kHalves : words[w] ^ group.mask;
}

#endif

template <typename V, typename T>
GQ_HD V get(const T* from) {
  V values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

template <typename V, typename T>
GQ_HD void put(T* to, V values) {
  __builtin_memcpy(to, &values, sizeof values);
}

// All words of a group of rows, without a mask.
GQ_HD void random_words(const RandomKeys& keys, const uint32_t* stream, uint64_t number,
                        uint32_t (*words)[kRow]) {
  const RandomGroup group = random_group(keys, stream, number, 0);
#pragma GCC unroll 4
  for (int start = 0; start < kRow; start += kWidth) {
    Words columns[4];
    random_columns(keys, group, start, columns);
    for (int w = 0; w < 4; ++w) put(&words[w][start], columns[w]);
  }
}

}  // namespace gq
