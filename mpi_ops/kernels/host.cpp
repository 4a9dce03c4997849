// Host kernels: thin loops over elements.h with a C interface for ctypes.
//
// Every loop works on rows of 32 elements with a constant trip count, which compilers turn into two
// AVX-512 or four AVX2 vectors. setup.py compiles this file once for each instruction set (GQ_ISA
// is the suffix of the exported names, -march the compiler's flag) and isa.cpp names the best one
// at run time. No inline function of the standard library is used: its out-of-line copy could be
// shared between instruction sets. Pointers need the natural alignment of their type only.

#include <type_traits>

#include "elias.h"
#include "threads.h"
#include "vector_host.h"

#define GQ_JOIN2(name, isa) name##_##isa
#define GQ_JOIN(name, isa) GQ_JOIN2(name, isa)
#define GQ_EXPORT(name) extern "C" __attribute__((visibility("default"))) int GQ_JOIN(name, GQ_ISA)

#define GQ_INLINE static inline __attribute__((always_inline))

namespace {

using namespace gq;

// Codes of the element types in the C interface; mpi_ops/kernels/host.py holds the same list.
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

constexpr int kStatusOk = 0;
constexpr int kStatusBadDType = 1;
constexpr int kStatusBadBits = 2;
constexpr int kStatusBadStream = 3;

GQ_INLINE int64_t rows_of(int64_t count) { return (count + kRow - 1) / kRow; }

// A tensor, or a part of one, in a table of those that one call works on. The same fields as
// SEGMENT in interface.py. Norms and payloads are those of all segments, and places count their
// elements.
struct Segment {
  void* x;  // its elements; null: zeros, and no results
  int64_t elements;
  int64_t norms;       // place of its first norm
  int64_t payload;     // place of its codes
  int64_t stop;        // place where what follows the codes ends, which becomes zeros
  uint32_t random[4];  // its dither
  int64_t group;       // the group of kGroupRows rows, in its dither, that it begins with
};

GQ_INLINE int64_t whole_block(int64_t count) { return (count > 0 ? rows_of(count) : 1) * kRow; }

GQ_INLINE int64_t standard_words(int64_t count, int bits) {
  const int lanes = 32 / bits;
  return (rows_of(count) + lanes - 1) / lanes * kRow;
}

GQ_INLINE int64_t exponential_bytes(int64_t count, int bits) {
  const int per_byte = 8 / bits;
  return (rows_of(count) + per_byte - 1) / per_byte * kRow;
}

// Norms of zeros.
GQ_INLINE void clear(int32_t* norms, int64_t count, int64_t block) {
  const int64_t blocks = (count + block - 1) / block;
  if (blocks == 0) return;  // there may be no pointer
  __builtin_memset(norms, 0, sizeof(int32_t) * static_cast<size_t>(blocks));
}

// Zeros behind a segment's `size` codes; and in their place, where there are no elements.
template <typename T>
GQ_INLINE void pad(T* payload, const Segment& s, int64_t size) {
  const int64_t begin = s.payload + (s.x == nullptr ? 0 : size);
  if (begin < s.stop)
    __builtin_memset(payload + begin, 0, sizeof(T) * static_cast<size_t>(s.stop - begin));
}

// ------------------------------------------------------------------------------------------ norms

// Tensors from this size on do not fit the caches.
constexpr int64_t kLargeBytes = int64_t{16} << 20;

template <typename T>
GQ_INLINE bool is_large(int64_t count) {
  return count * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
}

// Asks for bytes far ahead, into the second cache, which can wait for more of them than the first:
// some processors read no faster than half of what they copy without.
template <int kBytes>
GQ_INLINE void prefetch_far(const void* bytes) {
  constexpr int kAhead = 16384;
  for (int b = 0; b < kBytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(bytes) + kAhead + b, 0, 2);
}

template <typename T>
GQ_INLINE void absmax(const T* x, int64_t count, int64_t block, bool large, int32_t* norms) {
  constexpr int kSegment = 256;
  for (int64_t begin = 0, b = 0; begin < count; begin += block, ++b) {
    const int64_t end = begin + block < count ? begin + block : count;
    int32_t largest = 0;
    for (int64_t segment = begin; segment < end; segment += kSegment) {
      const int64_t stop = segment + kSegment < end ? segment + kSegment : end;
      if (large) prefetch_far<kSegment * sizeof(T)>(x + segment);
      for (int64_t i = segment; i < stop; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of(load(x[i])) & kAbsMask);
        largest = bits > largest ? bits : largest;
      }
    }
    norms[b] = largest;
  }
}

template <typename T>
GQ_INLINE void l2norm(const T* x, int64_t count, int64_t block, int32_t* norms) {
  for (int64_t begin = 0, b = 0; begin < count; begin += block, ++b) {
    const int64_t end = begin + block < count ? begin + block : count;
    // Sixteen partial sums in double: no overflow of squares, a fixed order, and room to vectorize.
    double sums[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
      for (int j = 0; j < 16; ++j) {
        const double value = load(x[i + j]);
        sums[j] += value * value;
      }
    for (int j = 0; i < end; ++i, ++j) {
      const double value = load(x[i]);
      sums[j] += value * value;
    }
    double sum = 0;
    for (int j = 0; j < 16; ++j) sum += sums[j];
    norms[b] = norm_of_squares<T>(sum);
  }
}

// --------------------------------------------------------------------------------------- row walk

// Walks over the rows of a tensor, from one that begins with element `begin` on, and gives the norm
// bits of each row's block.
struct RowNorms {
  const int32_t* norms;
  int64_t rows_per_block;
  int64_t passed;  // rows of the first block that lie before
  int64_t left = 0;
  int32_t current = 0;

  inline __attribute__((always_inline)) RowNorms(const int32_t* all, int64_t block, int64_t begin)
      : norms(all + begin / block), rows_per_block(block / kRow), passed(begin % block / kRow) {}

  // False where the row is in the block of the row before, so that its scale is known.
  inline __attribute__((always_inline)) bool advance() {
    if (left != 0) {
      --left;
      return false;
    }
    current = *norms++;
    left = rows_per_block - passed - 1;
    passed = 0;
    return true;
  }
};

constexpr int kGroup = kGroupRows * kRow;  // elements that share one call of random_group

// Asks for the bytes that the fourth iteration from now will read: the arithmetic of the generator
// leaves the processor too little room to run ahead by itself.
template <int kBytes>
GQ_INLINE void prefetch(const void* bytes) {
  constexpr int kAhead = 4;
  for (int b = 0; b < kBytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(bytes) + kAhead * kBytes + b);
}

// The next `kSize` elements; where only `count` are left, those and zeros.
template <int kSize, typename T>
GQ_INLINE const T* padded_group(const T* x, int64_t count, T* buffer) {
  if (count >= kSize) return x;
  __builtin_memset(static_cast<void*>(buffer), 0, sizeof(T) * kSize);
  __builtin_memcpy(static_cast<void*>(buffer), x, sizeof(T) * static_cast<size_t>(count));
  return buffer;
}

// ------------------------------------------------------------------------------------- quantizing

GQ_INLINE void next_scales(RowNorms& rows, int count, float numerator, Scale& scale,
                           Scale* scales) {
  for (int h = 0; h < count; ++h) {
    if (rows.advance()) scale = scale_down(rows.current, numerator);
    scales[h] = scale;
  }
}

// The next kGroup elements as floats; where only `count` are left, those and zeros.
template <typename T>
GQ_INLINE const float* group_of(const T* x, int64_t count, float* buffer) {
  prefetch<kGroup * sizeof(T)>(x);
  if (count >= kGroup) {
    if constexpr (std::is_same_v<T, float>) return x;
    for (int i = 0; i < kGroup; ++i) buffer[i] = load(x[i]);
    return buffer;
  }
  __builtin_memset(buffer, 0, sizeof(float) * kGroup);
  for (int i = 0; i < count; ++i) buffer[i] = load(x[i]);
  return buffer;
}

// Codes of a group of rows; rows beyond the last have scales of 0, which give codes of 0. kBits is
// the width where its lanes divide the rows of a group, and codes are packed: `out` has payload
// rows. It is 0 elsewhere, and `out` has a row of codes for each row.
template <int kBits, bool kSquare>
static void quantize_standard_group(const float* values, int rows, const Scale* scales, float limit,
                                    const RandomKeys& keys, const RandomGroup& random,
                                    int32_t* out) {
  constexpr int kLanes = kBits > 0 ? 32 / kBits : 1;
#pragma GCC unroll 4
  for (int start = 0; start < kRow; start += kWidth) {
    Words words[4];
    random_columns(keys, random, start, words);
#pragma GCC unroll 8
    for (int p = 0; p < kGroupRows / kLanes; ++p) {
      if (p * kLanes >= rows) break;
      Words packed = {};
#pragma GCC unroll 8
      for (int k = 0; k < kLanes; ++k) {
        const int h = p * kLanes + k;
        const Ints code = quantize_level<kSquare>(get<Floats>(values + h * kRow + start), scales[h],
                                                  limit, own_random_bits(words[h / 2], h));
        packed += words_of(code) << (kBits * k);
      }
      put(out + p * kRow + start, packed);
    }
  }
}

template <typename T, int kBits, bool kSquare>
GQ_INLINE void quantize_standard_rows(const T* x, int64_t count, RowNorms row_norms, int bits,
                                      int levels, const Dither& dither, int64_t first,
                                      int32_t* payload) {
  const int lanes = 32 / bits;
  const bool dense = kSquare && kBits == 0 && dense_of(bits).radix != 0;
  uint32_t weights[16];  // of dense lanes
  if (dense)
    for (int k = 0; k < lanes; ++k) weights[k] = dense_weight(dense_of(bits).radix, lanes - k);
  const float limit = limit_of<kSquare>(levels);
  Scale scale = {1.0f, 0.0f};
  int lane = 0;
  const RandomKeys keys = random_keys(dither.random);
  for (int64_t begin = 0, group = first; begin < count; begin += kGroup, ++group) {
    const int rows = static_cast<int>(rows_of(begin + kGroup < count ? kGroup : count - begin));
    Scale scales[kGroupRows] = {};
    next_scales(row_norms, rows, limit, scale, scales);
    const uint64_t number = static_cast<uint64_t>(group);
    const RandomGroup random = random_group(keys, dither.random.stream, number,
                                            dither_mask(dither, number), dither.strata == kNearest);
    float buffer[kGroup];
    const float* values = group_of(x + begin, count - begin, buffer);
    if constexpr (kBits > 0) {
      quantize_standard_group<kBits, kSquare>(values, rows, scales, limit, keys, random, payload);
      payload += kGroupRows * kBits;
    } else {
      alignas(64) int32_t codes[kGroup];
      quantize_standard_group<0, kSquare>(values, rows, scales, limit, keys, random, codes);
      for (int h = 0; h < rows; ++h) {
        if (lane == 0) __builtin_memset(payload, 0, sizeof(int32_t) * kRow);
        const int32_t* own = codes + h * kRow;
        if (dense)
          for (int j = 0; j < kRow; ++j)
            payload[j] = signed_of(words_of(payload[j]) + words_of(own[j]) * weights[lane]);
        else
          for (int j = 0; j < kRow; ++j)
            payload[j] = signed_of(words_of(payload[j]) + (words_of(own[j]) << (bits * lane)));
        if (++lane == lanes) {
          lane = 0;
          payload += kRow;
        }
      }
    }
  }
}

// Writes a row of bytes, in each of which `code(k, j)` is the k-th code of column j.
template <int kBits, typename Code>
GQ_INLINE void pack_codes(uint8_t* to, const Code& code) {
  alignas(64) uint32_t packed[kRow];
  for (int j = 0; j < kRow; ++j) {
    uint32_t byte = 0;
#pragma GCC unroll 2
    for (int k = 0; k < 8 / kBits; ++k) byte |= code(k, j) << (kBits * k);
    packed[j] = byte;
  }
  narrow_row(packed, to);
}

// Loops over rows, of which compilers make vectors reliably: all of it is arithmetic of integers
// but for products and one sum.
template <int kBits>
static void quantize_exponential_group(const float* values, int rows, const Scale* scales,
                                       uint32_t top_bits, const uint32_t (*words)[kRow],
                                       uint8_t* codes) {
  constexpr int kPerByte = 8 / kBits;
#pragma GCC unroll 8
  for (int p = 0; p < kGroupRows / kPerByte; ++p) {
    if (p * kPerByte >= rows) break;
    pack_codes<kBits>(codes + p * kRow, [=](int k, int j) __attribute__((always_inline)) {
      const int h = p * kPerByte + k;
      return quantize_exponential<kBits>(values[h * kRow + j], scales[h], top_bits,
                                         random_bits(words[h / 2][j], h));
    });
  }
}

template <typename T, int kBits>
GQ_INLINE void quantize_exponential_rows(const T* x, int64_t count, RowNorms row_norms,
                                         int headroom, const Random& random, int64_t first,
                                         uint8_t* codes) {
  const uint32_t top_bits = static_cast<uint32_t>(127 - headroom) << 23;  // 2^-headroom
  Scale scale = {1.0f, 0.0f};
  const RandomKeys keys = random_keys(random);
  for (int64_t begin = 0, group = first; begin < count; begin += kGroup, ++group) {
    const int rows = static_cast<int>(rows_of(begin + kGroup < count ? kGroup : count - begin));
    Scale scales[kGroupRows] = {};
    next_scales(row_norms, rows, 1.0f, scale, scales);
    float buffer[kGroup];
    alignas(64) uint32_t words[4][kRow];
    random_words(keys, random.stream, static_cast<uint64_t>(group), words);
    quantize_exponential_group<kBits>(group_of(x + begin, count - begin, buffer), rows, scales,
                                      top_bits, words, codes);
    codes += kGroup * kBits / 8;
  }
}

// ----------------------------------------------------------------------------------- dequantizing

// Large results are written past the caches, which they would only flush.
template <typename T>
GQ_INLINE bool worth_streaming(const T* out, int64_t count) {
  return is_large<T>(count) && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

template <typename T>
GQ_INLINE void store_row(T* out, int64_t row, int64_t count, bool stream, const T* values) {
  const int64_t begin = row * kRow;
  const int64_t width = count - begin < kRow ? count - begin : kRow;
  void* to = out + begin;
  if (width < kRow)
    __builtin_memcpy(to, values, sizeof(T) * static_cast<size_t>(width));
  else if (stream)
    stream_copy(to, values, sizeof(T) * kRow);
  else
    __builtin_memcpy(to, values, sizeof(T) * kRow);
}

// A row of words, lane after lane: load() one, and for each lane call next(), and code(j) once for
// each column. kBits is the width where it is fixed, 0 where it is `bits`.
template <int kBits>
struct BinaryLanes {
  alignas(64) int32_t words[kRow];
  int bits;

  inline __attribute__((always_inline)) explicit BinaryLanes(int width)
      : bits(kBits > 0 ? kBits : width) {}
  inline __attribute__((always_inline)) void load(const int32_t* from) {
    __builtin_memcpy(words, from, sizeof words);
  }
  inline __attribute__((always_inline)) void next() {}
  inline __attribute__((always_inline)) int32_t code(int j) {
    const int32_t lane = lowest_lane(words[j], bits);
    words[j] = drop_lane(words[j], lane, bits);
    return lane;
  }
};

template <int kBits>
struct DenseLanes {
  DenseRow row;
  alignas(64) int32_t codes[kRow];
  static constexpr Dense kDense = dense_of(kBits);

  inline __attribute__((always_inline)) explicit DenseLanes(int) {}
  inline __attribute__((always_inline)) void load(const int32_t* from) {
    load_dense(from, kDense, row);
  }
  inline __attribute__((always_inline)) void next() { take_dense(row, kDense, codes); }
  inline __attribute__((always_inline)) int32_t code(int j) const { return codes[j]; }
};

template <bool kSquare, typename Lanes, typename T>
GQ_INLINE void dequantize_standard_rows(const int32_t* payload, int64_t count, RowNorms row_norms,
                                        int bits, int64_t divisor, bool stream, T* out) {
  const int lanes = 32 / bits;
  const int64_t rows = rows_of(count);
  Scale scale = {1.0f, 0.0f};
  Lanes words(bits);
  for (int64_t row = 0; row < rows; payload += kRow) {
    words.load(payload);
    for (int k = 0; k < lanes && row < rows; ++k, ++row) {
      if (row_norms.advance()) scale = scale_up(row_norms.current, static_cast<float>(divisor));
      const float norm = norm_of(row_norms.current);
      alignas(64) T values[kRow];
      words.next();
      for (int j = 0; j < kRow; ++j)
        store(values + j, dequantize_standard(level_of(words.code(j), kSquare), scale, norm));
      store_row(out, row, count, stream, values);
    }
  }
  if (stream) stream_fence();
}

// The mean of several ranks' codes by the same norms: levels are added as integers, which is exact.
// kBits is the width where it is fixed, 0 where it is `bits`.
template <int kBits, bool kSquare, typename Lanes>
GQ_INLINE void mean_standard_rows(const int32_t* const* payloads, int64_t words, int inputs,
                                  int64_t count, RowNorms row_norms, int bits, int64_t divisor,
                                  float* out) {
  constexpr int kMostLanes = kBits > 0 ? 32 / kBits : 16;
  const int lanes = kBits > 0 ? kMostLanes : 32 / bits;
  const float ranks_levels = static_cast<float>(divisor);
  const int64_t rows = rows_of(count);
  for (int64_t row = 0, at = words; row < rows; at += kRow) {
    alignas(64) int32_t sums[kMostLanes][kRow] = {};
    for (int i = 0; i < inputs; ++i) {
      Lanes own(bits);
      own.load(payloads[i] + at);
      for (int k = 0; k < lanes; ++k) {
        own.next();
        for (int j = 0; j < kRow; ++j) sums[k][j] += level_of(own.code(j), kSquare);
      }
    }
    for (int k = 0; k < lanes && row < rows; ++k, ++row) {
      row_norms.advance();
      const float norm = norm_of(row_norms.current);
      alignas(64) float values[kRow];
      for (int j = 0; j < kRow; ++j) {
        // Divided first: where all ranks are at the largest level, the mean is the norm exactly.
        const float mean = static_cast<float>(sums[k][j]) / ranks_levels * norm;
        values[j] = smaller(larger(mean, -norm), norm);
      }
      store_row(out, row, count, false, values);
    }
  }
}

template <typename T, int kBits>
GQ_INLINE void dequantize_exponential_rows(const uint8_t* codes, int64_t count, RowNorms row_norms,
                                           int headroom, bool stream, T* out) {
  constexpr int kPerByte = 8 / kBits;
  const float raise = float_of(static_cast<uint32_t>(127 + headroom) << 23);  // 2^headroom
  const int64_t rows = rows_of(count);
  float norm = 0.0f;
  for (int64_t row = 0; row < rows; codes += kRow) {
    alignas(64) int32_t packed[kRow];
    widen_row(codes, packed);
#pragma GCC unroll 2
    for (int k = 0; k < kPerByte; ++k, ++row) {
      if (row >= rows) break;
      if (row_norms.advance()) norm = norm_of(row_norms.current);
      alignas(64) T values[kRow];
      for (int j = 0; j < kRow; ++j)
        store(values + j, decode_exponential<kBits>(packed[j] >> (kBits * k)) * raise * norm);
      store_row(out, row, count, stream, values);
    }
  }
  if (stream) stream_fence();
}

// --------------------------------------------------------------------- reducing exponential codes

// The two inputs of a keyed reduction, mixed into 64 bits; symmetric in them.
GQ_INLINE uint64_t content_key(const uint8_t* a, const uint8_t* b, int bytes) {
  uint64_t key = 0;
  for (int i = 0; i < bytes / 4; ++i) {
    uint32_t word_a, word_b;
    __builtin_memcpy(&word_a, a + 4 * i, sizeof word_a);
    __builtin_memcpy(&word_b, b + 4 * i, sizeof word_b);
    key += content_term(word_a + word_b, i);
  }
  return key;
}

GQ_INLINE Random keyed(const Random& random, const uint8_t* a, const uint8_t* b, int bytes) {
  const uint64_t key = content_key(a, b, bytes);
  return {{random.key[0], random.key[1]},
          {random.stream[0] ^ static_cast<uint32_t>(key),
           random.stream[1] ^ static_cast<uint32_t>(key >> 32)}};
}

// out = round(factor * sum of inputs), one stochastic rounding whatever the number of inputs.
// kInputs is the number of inputs where it is fixed, 0 where it is `inputs`; `out` may be one of
// the inputs. A keyed reduction (of two inputs) takes the stream of its dither from the inputs'
// contents.
template <int kBits, int kInputs, bool kKeyed>
GQ_INLINE void reduce_exponential_rows(const uint8_t* const* codes, int64_t place, int inputs,
                                       int64_t bytes, float factor, const Random& random,
                                       int64_t first, uint8_t* out) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kByteRows = kGroupRows / kPerByte;
  constexpr int kGroupBytes = kByteRows * kRow;
  const int n = kInputs > 0 ? kInputs : inputs;
  const RandomKeys keys = random_keys(random);
  for (int64_t begin = 0, group = first; begin < bytes; begin += kGroupBytes, ++group) {
    const int64_t left = bytes - begin;
    uint8_t padded[2][kGroupBytes];
    Random stream = random;
    if constexpr (kKeyed)
      stream =
          keyed(random, padded_group<kGroupBytes>(codes[0] + place + begin, left, padded[0]),
                padded_group<kGroupBytes>(codes[1] + place + begin, left, padded[1]), kGroupBytes);
    alignas(64) uint32_t words[4][kRow];
    random_words(keys, stream.stream, static_cast<uint64_t>(group), words);
    alignas(64) float sums[kGroupRows][kRow];
#pragma GCC unroll 2
    for (int i = 0; i < n; ++i) {
      prefetch<kGroupBytes>(codes[i] + place + begin);
      const uint8_t* from = padded_group<kGroupBytes>(codes[i] + place + begin, left, padded[0]);
      for (int p = 0; p < kByteRows; ++p) {
        alignas(64) int32_t widened[kRow];
        widen_row(from + p * kRow, widened);
#pragma GCC unroll 2
        for (int k = 0; k < kPerByte; ++k) {
          float* sum = sums[p * kPerByte + k];
          for (int j = 0; j < kRow; ++j) {
            const float value = decode_exponential<kBits>(widened[j] >> (kBits * k));
            sum[j] = i == 0 ? value : sum[j] + value;
          }
        }
      }
    }
    uint8_t* to = left < kGroupBytes ? padded[0] : out + begin;
    for (int p = 0; p < kByteRows; ++p) {
      pack_codes<kBits>(to + p * kRow, [&](int k, int j) __attribute__((always_inline)) {
        const int h = p * kPerByte + k;
        const float mean = sums[h][j] * factor;
        return encode_exponential<kBits>(mean, bits_of(mean), kOneBits,
                                         random_bits(words[h / 2][j], h));
      });
    }
    if (left < kGroupBytes) __builtin_memcpy(out + begin, padded[0], static_cast<size_t>(left));
  }
}

// The same for 4-bit codes, not keyed. Their levels are integers in units of the smallest one,
// which one look-up decodes for 32 codes, and sums of integers are those of floats, as exact.
GQ_INLINE void reduce_packed_rows(const uint8_t* const* codes, int64_t place, int inputs,
                                  int64_t bytes, float factor, const Random& random, int64_t first,
                                  uint8_t* out) {
  constexpr int kByteRows = kGroupRows / 2;
  constexpr int kGroupBytes = kByteRows * kRow;
  alignas(16) uint8_t units[16];
  for (int code = 0; code < 16; ++code)
    units[code] = static_cast<uint8_t>(
        static_cast<int8_t>(decode_exponential<4>(code) / decode_exponential<4>(1)));
  const RandomKeys keys = random_keys(random);
  for (int64_t begin = 0, group = first; begin < bytes; begin += kGroupBytes, ++group) {
    const int64_t left = bytes - begin;
    uint8_t padded[kGroupBytes];
    alignas(64) int32_t sums[kGroupRows][kRow] = {};
    for (int i = 0; i < inputs; ++i) {
      prefetch<kGroupBytes>(codes[i] + place + begin);
      const uint8_t* from = padded_group<kGroupBytes>(codes[i] + place + begin, left, padded);
      alignas(64) uint8_t decoded[kGroupRows * kRow];
      for (int p = 0; p < kByteRows; ++p) {
        for (int j = 0; j < kRow; ++j) decoded[2 * p * kRow + j] = nibble(from[p * kRow + j], 0);
        for (int j = 0; j < kRow; ++j)
          decoded[(2 * p + 1) * kRow + j] = nibble(from[p * kRow + j], 1);
      }
      look_up(units, decoded, sizeof decoded);
      for (int h = 0; h < kGroupRows; ++h) {
        alignas(64) int32_t widened[kRow];
        widen_row(decoded + h * kRow, widened);
        for (int j = 0; j < kRow; ++j) sums[h][j] += widened[j];
      }
    }
    alignas(64) uint32_t words[4][kRow];
    random_words(keys, random.stream, static_cast<uint64_t>(group), words);
    uint8_t* to = left < kGroupBytes ? padded : out + begin;
#pragma GCC unroll 4
    for (int p = 0; p < kByteRows; ++p) {
      pack_codes<4>(to + p * kRow, [&](int k, int j) __attribute__((always_inline)) {
        const int h = 2 * p + k;
        const float sum = static_cast<float>(sums[h][j]) * decode_exponential<4>(1);
        const float mean = sum * factor;
        return encode_exponential<4>(mean, bits_of(mean), kOneBits,
                                     random_bits(words[h / 2][j], h));
      });
    }
    if (left < kGroupBytes) __builtin_memcpy(out + begin, padded, static_cast<size_t>(left));
  }
}

// The operation of MPI for 4-bit codes: a Philox block to sixteen codes in place of eight, and
// bytes in place of floats. Random byte i of a group is that of the low half of code byte i, random
// byte kBytes + i that of its high half; a word's first byte is its lowest.
GQ_INLINE void add_packed_rows(const uint8_t* in, uint8_t* inout, int64_t bytes,
                               const Random& random, int64_t first) {
  constexpr int kBytes = kGroupRows * kRow;
  alignas(16) uint8_t table[16];
  for (uint8_t i = 0; i < 16; ++i) table[i] = addition_limit(i);
  const RandomKeys keys = random_keys(random);
  for (int64_t begin = 0, group = first; begin < bytes; begin += kBytes, ++group) {
    const int64_t left = bytes - begin;
    uint8_t padded[2][kBytes];
    prefetch<kBytes>(in + begin);
    prefetch<kBytes>(inout + begin);
    const uint8_t* a = padded_group<kBytes>(in + begin, left, padded[0]);
    const uint8_t* b = padded_group<kBytes>(inout + begin, left, padded[1]);
    alignas(64) uint32_t words[4][kRow];
    random_words(keys, keyed(random, a, b, kBytes).stream, static_cast<uint64_t>(group), words);
    alignas(64) uint8_t sums[kBytes], limits[kBytes];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* numbers = reinterpret_cast<const uint8_t*>(words) + half * kBytes;
      for (int i = 0; i < kBytes; ++i)
        limits[i] = addition_case(nibble(a[i], half), nibble(b[i], half));
      look_up(table, limits, kBytes);
      for (int i = 0; i < kBytes; ++i) {
        const uint8_t sum =
            add_codes(nibble(a[i], half), nibble(b[i], half), limits[i], numbers[i]);
        sums[i] = half == 0 ? sum : static_cast<uint8_t>(sums[i] | (sum << 4));
      }
    }
    if (left < kBytes) {
      __builtin_memcpy(inout + begin, sums, static_cast<size_t>(left));
    } else {  // a single copy of this size becomes a slow string instruction
      for (int i = 0; i < kBytes; i += kRow) __builtin_memcpy(inout + begin + i, sums + i, kRow);
    }
  }
}

// ------------------------------------------------------------------------------------ Elias codes

// Recodes the lanes of a payload. Returns where the stream ends, at most 2 * bits bits for each
// code behind `out`, in whole words.
GQ_INLINE uint8_t* encode_elias(const int32_t* payload, int64_t count, int bits, uint8_t* out) {
  const int lanes = 32 / bits;
  BitWriter writer(out);
  for (int64_t begin = 0; begin < count; payload += kRow) {
    alignas(64) int32_t words[kRow];
    __builtin_memcpy(words, payload, sizeof words);
    for (int k = 0; k < lanes && begin < count; ++k, begin += kRow) {
      alignas(64) int32_t symbols[kRow], lengths[kRow];
      for (int j = 0; j < kRow; ++j) {
        const int32_t code = lowest_lane(words[j], bits);
        words[j] = drop_lane(words[j], code, bits);
        const int32_t sign = code < 0, number = (code < 0 ? -code : code) + 1;
        // The exponent of a float is the logarithm; of vectors of these there is no other.
        const uint32_t exponent = bits_of(static_cast<float>(number)) >> 23;
        const int32_t zeros = static_cast<int32_t>(exponent) - 127;
        symbols[j] = code == 0 ? 1 : number << 1 | sign;
        lengths[j] = code == 0 ? 1 : 2 * zeros + 2;
      }
      const int width = static_cast<int>(count - begin < kRow ? count - begin : kRow);
      for (int j = 0; j < width; ++j) writer.put(static_cast<uint32_t>(symbols[j]), lengths[j]);
    }
  }
  return writer.finish();
}

// The other way round. False where the stream is not that of `count` codes; never reads beyond its
// end, whatever it has.
GQ_INLINE bool decode_elias(const uint8_t* stream, int64_t bytes, int64_t count, int bits,
                            int32_t* payload) {
  const int lanes = 32 / bits, together = 56 / (2 * bits);  // codes that a refill has bits for
  BitReader reader(stream, stream + bytes);
  for (int64_t begin = 0; begin < count; payload += kRow) {
    alignas(64) int32_t words[kRow] = {};
    for (int k = 0; k < lanes && begin < count; ++k, begin += kRow) {
      const int width = static_cast<int>(count - begin < kRow ? count - begin : kRow);
      alignas(64) int32_t codes[kRow] = {};
      for (int j = 0; j < width;) {
        reader.refill();
        const int stop = j + together < width ? j + together : width;
        for (; j < stop; ++j)
          if (!reader.take(bits, codes[j])) return false;
        if (reader.overdrawn()) return false;
      }
      for (int j = 0; j < kRow; ++j)
        words[j] = static_cast<int32_t>(static_cast<uint32_t>(words[j]) +
                                        (static_cast<uint32_t>(codes[j]) << (bits * k)));
    }
    __builtin_memcpy(payload, words, sizeof words);
  }
  return reader.finished();
}

// ------------------------------------------------------------------------------- sharing the work

// Smaller calls are done before another thread has woken up; a piece takes some 10 microseconds.
constexpr int64_t kSharedBytes = 256 << 10;
constexpr int64_t kPieceBytes = 128 << 10;

// Calls body(s, begin, end) for parts of all segments, each of which has at most the elements of
// its segment, on several threads where `item` bytes of each element are enough work. Parts begin
// at multiples of unit(s), and a segment without elements is one part.
template <typename Length, typename Unit, typename Body>
GQ_INLINE void for_parts(const Segment* segments, int64_t count, int64_t item, const Length& length,
                         const Unit& unit, const Body& body) {
  // As if all segments lay behind each other, with a place between them, so that each begins at
  // another one.
  int64_t places = 0;
  for (int64_t i = 0; i < count; ++i) places += length(segments[i]) + 1;
  const bool shared = threads() > 1 && places * item >= kSharedBytes;
  const int64_t piece = shared ? kPieceBytes / item + 1 : places;
  const auto work = [&](int64_t number) {
    const int64_t first = number * piece, last = first + piece;
    int64_t place = 0;
    for (int64_t i = 0; i < count && place < last; ++i) {
      const Segment& s = segments[i];
      const int64_t elements = length(s);
      if (place + elements < first) {  // another piece has it
        place += elements + 1;
        continue;
      }
      const int64_t step = unit(s);
      const auto cut = [&](int64_t at) {
        const int64_t whole = at <= place ? 0 : (at - place + step - 1) / step * step;
        return whole < elements ? whole : elements;
      };
      const int64_t begin = cut(first), end = cut(last);
      if (begin < end || (elements == 0 && first <= place)) body(s, begin, end);
      place += elements + 1;
    }
  };
  using Run = decltype(work);
  share([](const void* run, int64_t number) { (*static_cast<const Run*>(run))(number); }, &work,
        places == 0 ? 0 : (places + piece - 1) / piece);
}

GQ_INLINE int64_t elements_of(const Segment& s) { return s.elements; }

// A tensor by itself. `x` may be what a kernel only reads.
GQ_INLINE Segment whole(const void* x, int64_t count, const uint32_t* random = nullptr) {
  Segment s = {const_cast<void*>(x), count, 0, 0, 0, {}, 0};
  if (random != nullptr) __builtin_memcpy(s.random, random, sizeof s.random);
  return s;
}

GQ_INLINE Random generator_of(const Segment& s) {
  return {{s.random[0], s.random[1]}, {s.random[2], s.random[3]}};
}

// The size of a segment's blocks; 0 makes a block of each segment.
GQ_INLINE int64_t block_of(const Segment& s, int64_t block) {
  return block > 0 ? block : whole_block(s.elements);
}

// ----------------------------------------------------------------------------------- whole tensors

// `measure` is absmax or l2norm. A block is never cut: the sum of its squares has an order.
template <typename T, typename Measure>
GQ_INLINE void measure_segments(const Segment* segments, int64_t count, int64_t block,
                                int32_t* norms, const Measure& measure) {
  for_parts(
      segments, count, sizeof(T), elements_of, [=](const Segment& s) { return block_of(s, block); },
      [=](const Segment& s, int64_t begin, int64_t end) {
        const int64_t width = block_of(s, block);
        int32_t* own = norms + s.norms + begin / width;
        if (s.x == nullptr)
          clear(own, end - begin, width);
        else
          measure(s, static_cast<const T*>(s.x) + begin, end - begin, width, own);
      });
}

template <typename T>
GQ_INLINE void absmax_segments(const Segment* segments, int64_t count, int64_t block,
                               int32_t* norms) {
  measure_segments<T>(segments, count, block, norms,
                      [](const Segment& s, const T* x, int64_t size, int64_t width, int32_t* own) {
                        absmax(x, size, width, is_large<T>(s.elements), own);
                      });
}

template <typename T>
GQ_INLINE void l2norm_segments(const Segment* segments, int64_t count, int64_t block,
                               int32_t* norms) {
  measure_segments<T>(segments, count, block, norms,
                      [](const Segment&, const T* x, int64_t size, int64_t width, int32_t* own) {
                        l2norm(x, size, width, own);
                      });
}

template <typename T, int kBits, bool kSquare>
GQ_INLINE void quantize_standard_segments(const Segment* segments, int64_t count, int64_t block,
                                          const int32_t* norms, int bits, int levels,
                                          int32_t* payload) {
  for_parts(
      segments, count, sizeof(T), elements_of,
      [=](const Segment&) { return int64_t{kGroup} * (32 / bits); },  // whole groups, whole words
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (begin == 0) pad(payload, s, standard_words(s.elements, bits));
        if (s.x == nullptr) return;
        quantize_standard_rows<T, kBits, kSquare>(
            static_cast<const T*>(s.x) + begin, end - begin,
            RowNorms(norms + s.norms, block_of(s, block), begin), bits, levels,
            dither_of(generator_of(s)), s.group + begin / kGroup,
            payload + s.payload + standard_words(begin, bits));
      });
}

template <typename T, bool kSquare, typename Lanes>
GQ_INLINE void dequantize_standard_segments(const Segment* segments, int64_t count, int64_t block,
                                            const int32_t* norms, int bits, int64_t divisor,
                                            const int32_t* payload) {
  for_parts(
      segments, count, sizeof(T), elements_of,
      [=](const Segment&) { return int64_t{kGroup} * (32 / bits); },
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (s.x == nullptr) return;
        T* out = static_cast<T*>(s.x);
        dequantize_standard_rows<kSquare, Lanes>(
            payload + s.payload + standard_words(begin, bits), end - begin,
            RowNorms(norms + s.norms, block_of(s, block), begin), bits, divisor,
            worth_streaming(out, s.elements), out + begin);
      });
}

template <int kBits, bool kSquare, typename Lanes>
GQ_INLINE void mean_standard_segment(const int32_t* const* payloads, int inputs, const Segment& s,
                                     int64_t block, const int32_t* norms, int bits,
                                     int64_t divisor) {
  for_parts(
      &s, 1, sizeof(float), elements_of,
      [=](const Segment&) { return int64_t{kGroup} * (32 / bits); },
      [=](const Segment&, int64_t begin, int64_t end) {
        mean_standard_rows<kBits, kSquare, Lanes>(payloads, standard_words(begin, bits), inputs,
                                                  end - begin, RowNorms(norms, block, begin), bits,
                                                  divisor, static_cast<float*>(s.x) + begin);
      });
}

template <typename T, int kBits>
GQ_INLINE void quantize_exponential_segments(const Segment* segments, int64_t count, int64_t block,
                                             const int32_t* norms, int headroom, uint8_t* codes) {
  for_parts(
      segments, count, sizeof(T), elements_of, [](const Segment&) { return int64_t{kGroup}; },
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (begin == 0) pad(codes, s, exponential_bytes(s.elements, kBits));
        if (s.x == nullptr) return;
        quantize_exponential_rows<T, kBits>(static_cast<const T*>(s.x) + begin, end - begin,
                                            RowNorms(norms + s.norms, block_of(s, block), begin),
                                            headroom, generator_of(s), s.group + begin / kGroup,
                                            codes + s.payload + begin * kBits / 8);
      });
}

template <typename T, int kBits>
GQ_INLINE void dequantize_exponential_segments(const Segment* segments, int64_t count,
                                               int64_t block, const int32_t* norms, int headroom,
                                               const uint8_t* codes) {
  for_parts(
      segments, count, sizeof(T), elements_of, [](const Segment&) { return int64_t{kGroup}; },
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (s.x == nullptr) return;
        T* out = static_cast<T*>(s.x);
        dequantize_exponential_rows<T, kBits>(codes + s.payload + begin * kBits / 8, end - begin,
                                              RowNorms(norms + s.norms, block_of(s, block), begin),
                                              headroom, worth_streaming(out, s.elements),
                                              out + begin);
      });
}

// `length` is how many bytes of codes a segment has. They lie at the same places in all inputs and
// in `out`. An element of for_parts is a byte here.
template <typename Length>
GQ_INLINE int reduce_segments(const uint8_t* const* codes, int inputs, const Segment* segments,
                              int64_t count, int bits, float factor, const Length& length,
                              uint8_t* out) {
  if (bits != 4 && bits != 8) return kStatusBadBits;
  const int64_t group = kGroup * bits / 8;
  for_parts(
      segments, count, inputs, length, [=](const Segment&) { return group; },
      [=](const Segment& s, int64_t begin, int64_t end) {
        const Random random = generator_of(s);
        const int64_t place = s.payload + begin, first = s.group + begin / group;
        if (bits == 4)
          reduce_packed_rows(codes, place, inputs, end - begin, factor, random, first, out + place);
        else if (inputs == 2)
          reduce_exponential_rows<8, 2, false>(codes, place, inputs, end - begin, factor, random,
                                               first, out + place);
        else
          reduce_exponential_rows<8, 0, false>(codes, place, inputs, end - begin, factor, random,
                                               first, out + place);
      });
  return kStatusOk;
}

// ------------------------------------------------------------------------------------ exact sums

// Elements as floats times `factor`, one segment behind the other in `flat`, and zeros between.
template <typename T>
GQ_INLINE void pack_segments(const Segment* segments, int64_t count, float factor, float* flat) {
  for_parts(
      segments, count, sizeof(T), elements_of, [](const Segment&) { return int64_t{kGroup}; },
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (begin == 0) pad(flat, s, s.elements);
        if (s.x == nullptr) return;
        const T* x = static_cast<const T*>(s.x);
        float* out = flat + s.payload;
        for (int64_t i = begin; i < end; ++i) out[i] = load(x[i]) * factor;
      });
}

// What pack_segments has made of elements, without a factor, as elements again.
template <typename T>
GQ_INLINE void unpack_segments(const Segment* segments, int64_t count, const float* flat) {
  for_parts(
      segments, count, sizeof(T), elements_of, [](const Segment&) { return int64_t{kGroup}; },
      [=](const Segment& s, int64_t begin, int64_t end) {
        if (s.x == nullptr) return;
        T* x = static_cast<T*>(s.x);
        const float* from = flat + s.payload;
        for (int64_t i = begin; i < end; ++i) store(x + i, from[i]);
      });
}

// The sum of several rows, in their order; `out` may be one of them.
GQ_INLINE void add_rows(const float* const* rows, int inputs, int64_t count, float* out) {
  constexpr int64_t kPart = 1024;
  const Segment s = whole(out, count);
  for_parts(
      &s, 1, int64_t{4} * inputs, elements_of, [](const Segment&) { return kPart; },
      [=](const Segment&, int64_t begin, int64_t end) {
        float sums[kPart];
        for (int64_t at = begin; at < end; at += kPart) {
          const int64_t size = end - at < kPart ? end - at : kPart;
          for (int64_t i = 0; i < size; ++i) sums[i] = rows[0][at + i];
          for (int r = 1; r < inputs; ++r)
            for (int64_t i = 0; i < size; ++i) sums[i] += rows[r][at + i];
          for (int64_t i = 0; i < size; ++i) out[at + i] = sums[i];
        }
      });
}

}  // namespace

// ------------------------------------------------------------------------------------ C interface

// Returns after `statement` with T bound to the element type of `dtype`.
#define GQ_DISPATCH(dtype, statement) \
  switch (dtype) {                    \
    case kFloat32: {                  \
      using T = float;                \
      statement;                      \
      return kStatusOk;               \
    }                                 \
    case kFloat64: {                  \
      using T = double;               \
      statement;                      \
      return kStatusOk;               \
    }                                 \
    case kFloat16: {                  \
      using T = Half;                 \
      statement;                      \
      return kStatusOk;               \
    }                                 \
    case kBFloat16: {                 \
      using T = BFloat16;             \
      statement;                      \
      return kStatusOk;               \
    }                                 \
    default:                          \
      return kStatusBadDType;         \
  }

// Each kernel is one for tables; a tensor by itself is a table of one segment.

GQ_EXPORT(gq_absmax_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, int32_t* norms) {
  GQ_DISPATCH(dtype, absmax_segments<T>(segments, count, block, norms));
}

GQ_EXPORT(gq_absmax)(int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
  const Segment s = whole(x, count);
  return GQ_JOIN(gq_absmax_table, GQ_ISA)(dtype, &s, 1, block, norms);
}

GQ_EXPORT(gq_l2norm_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, int32_t* norms) {
  GQ_DISPATCH(dtype, l2norm_segments<T>(segments, count, block, norms));
}

GQ_EXPORT(gq_l2norm)(int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
  const Segment s = whole(x, count);
  return GQ_JOIN(gq_l2norm_table, GQ_ISA)(dtype, &s, 1, block, norms);
}

template <int kBits>
static int quantize_standard_of(int dtype, const Segment* segments, int64_t count, int64_t block,
                                const int32_t* norms, int bits, int levels, int square,
                                int32_t* payload) {
  if constexpr (kBits <= 8) {
    if (square)
      GQ_DISPATCH(dtype, (quantize_standard_segments<T, kBits, true>(segments, count, block, norms,
                                                                     bits, levels, payload)));
  }
  GQ_DISPATCH(dtype, (quantize_standard_segments<T, kBits, false>(segments, count, block, norms,
                                                                  bits, levels, payload)));
}

GQ_EXPORT(gq_quantize_standard_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, const int32_t* norms, int bits,
 int levels, int square, int32_t* payload) {
  const auto quantize = bits == 16  ? quantize_standard_of<16>
                        : bits == 8 ? quantize_standard_of<8>
                        : bits == 4 ? quantize_standard_of<4>
                                    : quantize_standard_of<0>;
  return quantize(dtype, segments, count, block, norms, bits, levels, square, payload);
}

GQ_EXPORT(gq_quantize_standard)(int dtype, const void* x, int64_t count, int64_t block,
                                const int32_t* norms, int bits, int levels, int square,
                                const uint32_t* random, int32_t* payload) {
  const Segment s = whole(x, count, random);
  return GQ_JOIN(gq_quantize_standard_table, GQ_ISA)(dtype, &s, 1, block, norms, bits, levels,
                                                     square, payload);
}

template <bool kSquare, typename Lanes>
static int dequantize_standard_of(int dtype, const Segment* segments, int64_t count, int64_t block,
                                  const int32_t* norms, int bits, int64_t divisor,
                                  const int32_t* payload) {
  GQ_DISPATCH(dtype, (dequantize_standard_segments<T, kSquare, Lanes>(segments, count, block, norms,
                                                                      bits, divisor, payload)));
}

GQ_EXPORT(gq_dequantize_standard_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, const int32_t* norms, int bits,
 int square, int64_t divisor, const int32_t* payload) {
  const auto dequantize = !square     ? dequantize_standard_of<false, BinaryLanes<0>>
                          : bits == 3 ? dequantize_standard_of<true, DenseLanes<3>>
                          : bits == 5 ? dequantize_standard_of<true, DenseLanes<5>>
                          : bits == 6 ? dequantize_standard_of<true, DenseLanes<6>>
                                      : dequantize_standard_of<true, BinaryLanes<0>>;
  return dequantize(dtype, segments, count, block, norms, bits, divisor, payload);
}

GQ_EXPORT(gq_dequantize_standard)(int dtype, const int32_t* payload, int64_t count, int64_t block,
                                  const int32_t* norms, int bits, int square, int64_t divisor,
                                  void* out) {
  const Segment s = whole(out, count);
  return GQ_JOIN(gq_dequantize_standard_table, GQ_ISA)(dtype, &s, 1, block, norms, bits, square,
                                                       divisor, payload);
}

template <int kBits, bool kSquare, typename Lanes = BinaryLanes<kBits>>
static void mean_standard_of(const int32_t* const* payloads, int inputs, const Segment& s,
                             int64_t block, const int32_t* norms, int bits, int64_t divisor) {
  mean_standard_segment<kBits, kSquare, Lanes>(payloads, inputs, s, block, norms, bits, divisor);
}

GQ_EXPORT(gq_mean_standard)
(const int32_t* const* payloads, int inputs, int64_t count, int64_t block, const int32_t* norms,
 int bits, int square, int64_t divisor, float* out) {
  const auto square_mean = bits == 8   ? mean_standard_of<8, true>
                           : bits == 6 ? mean_standard_of<6, true, DenseLanes<6>>
                           : bits == 5 ? mean_standard_of<5, true, DenseLanes<5>>
                           : bits == 4 ? mean_standard_of<4, true>
                           : bits == 3 ? mean_standard_of<3, true, DenseLanes<3>>
                                       : mean_standard_of<0, true>;
  const auto even_mean = bits == 8   ? mean_standard_of<8, false>
                         : bits == 4 ? mean_standard_of<4, false>
                                     : mean_standard_of<0, false>;
  const auto mean = square ? square_mean : even_mean;
  mean(payloads, inputs, whole(out, count), block, norms, bits, divisor);
  return kStatusOk;
}

static int quantize_exponential(int dtype, const Segment* segments, int64_t count, int64_t block,
                                const int32_t* norms, int bits, int headroom, uint8_t* codes) {
  if (bits == 8)
    GQ_DISPATCH(dtype, (quantize_exponential_segments<T, 8>(segments, count, block, norms, headroom,
                                                            codes)));
  if (bits == 4)
    GQ_DISPATCH(dtype, (quantize_exponential_segments<T, 4>(segments, count, block, norms, headroom,
                                                            codes)));
  return kStatusBadBits;
}

GQ_EXPORT(gq_quantize_exponential_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, const int32_t* norms, int bits,
 uint8_t* codes) {
  return quantize_exponential(dtype, segments, count, block, norms, bits, 0, codes);
}

GQ_EXPORT(gq_quantize_exponential)(int dtype, const void* x, int64_t count, int64_t block,
                                   const int32_t* norms, int bits, int headroom,
                                   const uint32_t* random, uint8_t* codes) {
  const Segment s = whole(x, count, random);
  return quantize_exponential(dtype, &s, 1, block, norms, bits, headroom, codes);
}

static int dequantize_exponential(int dtype, const Segment* segments, int64_t count, int64_t block,
                                  const int32_t* norms, int bits, int headroom,
                                  const uint8_t* codes) {
  if (bits == 8)
    GQ_DISPATCH(dtype, (dequantize_exponential_segments<T, 8>(segments, count, block, norms,
                                                              headroom, codes)));
  if (bits == 4)
    GQ_DISPATCH(dtype, (dequantize_exponential_segments<T, 4>(segments, count, block, norms,
                                                              headroom, codes)));
  return kStatusBadBits;
}

GQ_EXPORT(gq_dequantize_exponential_table)
(int dtype, const Segment* segments, int64_t count, int64_t block, const int32_t* norms, int bits,
 const uint8_t* codes) {
  return dequantize_exponential(dtype, segments, count, block, norms, bits, 0, codes);
}

GQ_EXPORT(gq_dequantize_exponential)(int dtype, const uint8_t* codes, int64_t count, int64_t block,
                                     const int32_t* norms, int bits, int headroom, void* out) {
  const Segment s = whole(out, count);
  return dequantize_exponential(dtype, &s, 1, block, norms, bits, headroom, codes);
}

GQ_EXPORT(gq_reduce_exponential_table)
(const uint8_t* const* codes, int inputs, const Segment* segments, int64_t count, int bits,
 float factor, uint8_t* out) {
  const auto length = [=](const Segment& s) { return exponential_bytes(s.elements, bits); };
  return reduce_segments(codes, inputs, segments, count, bits, factor, length, out);
}

// Any number of bytes, not only whole rows.
GQ_EXPORT(gq_reduce_exponential)
(const uint8_t* const* codes, int inputs, int64_t bytes, int bits, float factor,
 const uint32_t* random, uint8_t* out) {
  const Segment s = whole(nullptr, bytes, random);
  return reduce_segments(codes, inputs, &s, 1, bits, factor, elements_of, out);
}

// The operation of MPI: inout = round(in + inout), a pure function of the two and of `random`.
GQ_EXPORT(gq_add_exponential)
(const uint8_t* in, uint8_t* inout, int64_t bytes, int bits, const uint32_t* random) {
  if (bits != 4 && bits != 8) return kStatusBadBits;
  const Segment s = whole(nullptr, bytes, random);
  for_parts(
      &s, 1, 2, elements_of, [](const Segment&) { return int64_t{kGroup}; },
      [=](const Segment& all, int64_t begin, int64_t end) {
        const uint8_t* codes[2] = {in, inout};
        if (bits == 8)
          reduce_exponential_rows<8, 2, true>(codes, begin, 2, end - begin, 1.0f, generator_of(all),
                                              begin / kGroup, inout + begin);
        else
          add_packed_rows(in + begin, inout + begin, end - begin, generator_of(all),
                          begin / kGroup);
      });
  return kStatusOk;
}

// The payload of `count` codes as a stream, and its bytes.
GQ_EXPORT(gq_encode_elias)
(const int32_t* payload, int64_t count, int bits, uint8_t* out, int64_t* bytes) {
  *bytes = encode_elias(payload, count, bits, out) - out;
  return kStatusOk;
}

GQ_EXPORT(gq_decode_elias)
(const uint8_t* stream, int64_t bytes, int64_t count, int bits, int32_t* payload) {
  return decode_elias(stream, bytes, count, bits, payload) ? kStatusOk : kStatusBadStream;
}

// Random words as the quantizers see them, for tests against the published generator.
GQ_EXPORT(gq_pack_table)
(int dtype, const Segment* segments, int64_t count, float factor, float* flat) {
  GQ_DISPATCH(dtype, pack_segments<T>(segments, count, factor, flat));
}

GQ_EXPORT(gq_unpack_table)
(int dtype, const Segment* segments, int64_t count, const float* flat) {
  GQ_DISPATCH(dtype, unpack_segments<T>(segments, count, flat));
}

GQ_EXPORT(gq_add)(const float* const* rows, int inputs, int64_t count, float* out) {
  add_rows(rows, inputs, count, out);
  return kStatusOk;
}

GQ_EXPORT(gq_philox)(const uint32_t* counter, const uint32_t* key, int rounds, uint32_t* out) {
  if (rounds == 7)
    philox4x32<7>(counter[0], counter[1], counter[2], counter[3], key[0], key[1], out);
  else if (rounds == 10)
    philox4x32<10>(counter[0], counter[1], counter[2], counter[3], key[0], key[1], out);
  else
    return kStatusBadBits;
  return kStatusOk;
}
