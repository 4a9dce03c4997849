// CUDA kernels: thin loops over elements.h, compiled at run time by device.py.
//
// One thread stands for one column of the rows of 32 elements, so a warp reads and writes whole
// rows. A thread walks down as many rows as fill both whole payload rows and whole groups of eight
// rows, so one Philox block serves its eight elements. Grids may be smaller than the data. Every
// loop that holds a shuffle runs the same number of times in all threads of a warp.

#include "elements.h"

namespace {

using namespace gq;

constexpr unsigned kAllThreads = 0xffffffffu;  // of a warp

GQ_HD int column() { return static_cast<int>(threadIdx.x % kRow); }
GQ_HD int64_t warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kRow;
}
GQ_HD int64_t warps() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kRow; }

GQ_HD int64_t rows_of(int64_t count) { return (count + kRow - 1) / kRow; }
GQ_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------ norms

// Half a warp measures one segment of a block: one of the sixteen partial sums of the host to a
// thread, so blocks of one segment get the very L2 norm that the host computes.
constexpr int kHalf = 16;

// The segment of a half-warp. Segments are numbered through all blocks, as many to each of them.
struct Segment {
  int64_t block;
  int64_t begin;  // not below end if there is no such segment
  int64_t end;
};

GQ_HD Segment segment_at(int64_t index, int64_t count, int64_t block, int64_t segment) {
  const int64_t per_block = (block + segment - 1) / segment;
  const int64_t number = index / per_block;
  const int64_t begin = number * block + (index - number * per_block) * segment;
  return {number, begin, minimum(minimum(begin + segment, (number + 1) * block), count)};
}

// An upper bound of pairs of segments: what warps loop over.
GQ_HD int64_t segment_pairs(int64_t count, int64_t block, int64_t segment) {
  const int64_t per_block = (block + segment - 1) / segment;
  return ((count + block - 1) / block * per_block + 1) / 2;
}

// Where a block has several segments its norm must be zero before.
template <typename T>
GQ_HD void absmax(const T* x, int64_t count, int64_t block, int64_t segment, int32_t* norms) {
  const int half = column() / kHalf;
  for (int64_t pair = warp(); pair < segment_pairs(count, block, segment); pair += warps()) {
    const Segment own = segment_at(2 * pair + half, count, block, segment);
    int32_t largest = 0;
#pragma unroll 8
    for (int64_t i = own.begin + column() % kHalf; i < own.end; i += kHalf) {
      const int32_t bits = static_cast<int32_t>(bits_of(load(x[i])) & kAbsMask);
      largest = bits > largest ? bits : largest;
    }
    for (int offset = kHalf / 2; offset > 0; offset /= 2) {
      const int32_t other = __shfl_xor_sync(kAllThreads, largest, offset);
      largest = other > largest ? other : largest;
    }
    if (column() % kHalf == 0 && own.begin < own.end) {
      if (segment >= block)
        norms[own.block] = largest;
      else
        atomicMax(norms + own.block, largest);  // of integers: the same in every order
    }
  }
}

// Writes norms where a block is one segment, and else the sums of the segments, to be finished.
template <typename T>
GQ_HD void l2norm(const T* x, int64_t count, int64_t block, int64_t segment, double* partial,
                  int32_t* norms) {
  const int half = column() / kHalf;
  for (int64_t pair = warp(); pair < segment_pairs(count, block, segment); pair += warps()) {
    const Segment own = segment_at(2 * pair + half, count, block, segment);
    double sum = 0;
#pragma unroll 8
    for (int64_t i = own.begin + column() % kHalf; i < own.end; i += kHalf) {
      const double value = load(x[i]);
      sum += value * value;
    }
    double total = 0;
    for (int j = 0; j < kHalf; ++j) total += __shfl_sync(kAllThreads, sum, j, kHalf);
    if (column() % kHalf == 0 && own.begin < count) {
      if (segment >= block)
        norms[own.block] = norm_of_squares<T>(total);
      else
        partial[2 * pair + half] = own.begin < own.end ? total : 0.0;
    }
  }
}

// A warp to a block adds the sums of its segments, in an order that depends on nothing else.
template <typename T>
GQ_HD void l2norm_of_partial(const double* partial, int64_t count, int64_t block, int64_t segment,
                             int32_t* norms) {
  const int64_t per_block = (block + segment - 1) / segment;
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t own = warp(); own < blocks; own += warps()) {
    const int64_t used = minimum(per_block, (count - own * block + segment - 1) / segment);
    double sum = 0;
#pragma unroll 4
    for (int64_t i = column(); i < used; i += kRow) sum += partial[own * per_block + i];
    for (int offset = kRow / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(kAllThreads, sum, offset);
    if (column() == 0) norms[own] = norm_of_squares<T>(sum);
  }
}

// --------------------------------------------------------------------------------------- row walk

// Gives the norm bits of the rows' blocks, row after row; one division for each walk.
struct RowNorms {
  const int32_t* next;
  int left;       // rows of the current block that follow
  int following;  // rows of the block at `next`
  int rows_per_block;
  int32_t current;

  GQ_HD RowNorms(const int32_t* norms, int64_t block, int64_t row) : left(0), current(0) {
    const int64_t rows = block / kRow;
    const int64_t number =
        static_cast<int64_t>(static_cast<uint64_t>(row) / static_cast<uint64_t>(rows));
    next = norms + number;
    // No walk comes to the end of so many rows, and the int saves registers.
    constexpr int64_t kEnough = 64;
    following = static_cast<int>(minimum((number + 1) * rows - row, kEnough));
    rows_per_block = static_cast<int>(minimum(rows, kEnough));
  }

  // False where the row is in the block of the row before, so that its scale is known.
  GQ_HD bool advance() {
    if (left > 0) {
      --left;
      return false;
    }
    current = *next++;
    left = following - 1;
    following = rows_per_block;
    return true;
  }
};

// Rows of the least common multiple of `lanes` and kGroupRows.
GQ_HD int walk_rows(int lanes) {
  if (lanes % 8 == 0) return lanes;
  if (lanes % 4 == 0) return 2 * lanes;
  if (lanes % 2 == 0) return 4 * lanes;
  return 8 * lanes;
}

// This thread's column of the eight rows from `row` on; zeros beyond the end.
template <typename T>
GQ_HD void load_group(const T* x, int64_t row, int64_t count, float values[kGroupRows]) {
  const T* from = x + row * kRow + column();
  const int64_t after = count - row * kRow - column();
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) values[h] = h * kRow < after ? load(from[h * kRow]) : 0.0f;
}

GQ_HD Random random_of(uint64_t key, uint64_t stream) {
  return {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
          {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}};
}

// This thread's words of a group of rows, each XOR `mask`.
GQ_HD void random_column(const Random& random, int64_t group, uint32_t mask, uint32_t words[4]) {
  random_block(random, static_cast<uint64_t>(group) * kRow + static_cast<uint64_t>(column()),
               words);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] ^= mask;
}

// ------------------------------------------------------------------------------------- quantizing

// kLanes is the number of lanes where it divides the eight rows of a group, 0 elsewhere. The first
// rows have the random numbers of the group `start`.
template <int kLanes, bool kSquare, typename T>
GQ_HD void quantize_standard_rows(const T* x, int64_t count, int64_t block, const int32_t* norms,
                                  int bits, int levels, const Dither& dither, int64_t start,
                                  int32_t* payload) {
  const int lanes = kLanes > 0 ? kLanes : 32 / bits;
  const int walk = kLanes > 0 ? kGroupRows : walk_rows(lanes);
  const float limit = limit_of<kSquare>(levels);
  const int64_t rows = rows_of(count);
  for (int64_t first = warp() * walk; first < rows; first += warps() * walk) {
    int32_t* to = payload + first / walk * (walk / lanes) * kRow + column();
    RowNorms row_norms(norms, block, first);
    Scale scale = {1.0f, 0.0f};
    uint32_t word = 0;
    int lane = 0;
    const int64_t end = minimum(first + walk, rows);
    for (int64_t row = first; row < end; row += kGroupRows) {
      float values[kGroupRows];
      load_group(x, row, count, values);
      uint32_t words[4];
      const int64_t group = start + row / kGroupRows;
      random_column(dither.random, group, dither_mask(dither, static_cast<uint64_t>(group)), words);
#pragma unroll
      for (int h = 0; h < kGroupRows; ++h) {
        if (kLanes > 0) lane = h % lanes;
        // Beyond the last row values are zero, and zero under any scale gives the code zero.
        if (row + h < rows && row_norms.advance()) scale = scale_down(row_norms.current, limit);
        const int32_t code =
            quantize_level<kSquare>(values[h], scale, limit, random_bits(words[h / 2], h));
        word += static_cast<uint32_t>(code) << (bits * lane);
        if (lane == lanes - 1) {
          if (row + h - lane < rows) *to = static_cast<int32_t>(word);
          to += kRow;
          word = 0;
        }
        if (kLanes == 0) lane = lane == lanes - 1 ? 0 : lane + 1;
      }
    }
    // Rows of the last groups ended inside a payload row.
    if (kLanes == 0 && lane > 0) {
      const int64_t after = first + (end - first + kGroupRows - 1) / kGroupRows * kGroupRows;
      if (after - lane < rows) *to = static_cast<int32_t>(word);
    }
  }
}

template <int kBits, typename T>
GQ_HD void quantize_exponential_rows(const T* x, int64_t count, int64_t block, const int32_t* norms,
                                     int headroom, const Random& random, uint8_t* codes) {
  constexpr int kPerByte = 8 / kBits;
  const uint32_t top_bits = static_cast<uint32_t>(127 - headroom) << 23;  // 2^-headroom
  const int64_t rows = rows_of(count);
  for (int64_t row = warp() * kGroupRows; row < rows; row += warps() * kGroupRows) {
    float values[kGroupRows];
    load_group(x, row, count, values);
    uint32_t words[4];
    random_column(random, row / kGroupRows, 0, words);
    RowNorms row_norms(norms, block, row);
    Scale scale = {1.0f, 0.0f};
    uint8_t* to = codes + row / kPerByte * kRow + column();
    uint32_t byte = 0;
#pragma unroll
    for (int h = 0; h < kGroupRows; ++h) {
      const int k = h % kPerByte;
      if (row + h < rows && row_norms.advance()) scale = scale_down(row_norms.current, 1.0f);
      byte |= quantize_exponential<kBits>(values[h], scale, top_bits, random_bits(words[h / 2], h))
              << (kBits * k);
      if (k == kPerByte - 1) {
        if (row + h - k < rows) to[h / kPerByte * kRow] = static_cast<uint8_t>(byte);
        byte = 0;
      }
    }
  }
}

// ----------------------------------------------------------------------------------- dequantizing

template <typename T>
GQ_HD void dequantize_standard_rows(const int32_t* payload, int64_t count, int64_t block,
                                    const int32_t* norms, int bits, bool square, int64_t divisor,
                                    T* out) {
  const int lanes = 32 / bits;
  const int walk = walk_rows(lanes);
  const int64_t rows = rows_of(count);
  for (int64_t first = warp() * walk; first < rows; first += warps() * walk) {
    const int32_t* from = payload + first / walk * (walk / lanes) * kRow + column();
    RowNorms row_norms(norms, block, first);
    Scale scale = {1.0f, 0.0f};
    const int64_t end = minimum(first + walk, rows);
    for (int64_t row = first; row < end;) {
      int32_t word = *from;
      from += kRow;
      for (int k = 0; k < lanes && row < end; ++k, ++row) {
        if (row_norms.advance()) scale = scale_up(row_norms.current, static_cast<float>(divisor));
        const int32_t code = lowest_lane(word, bits);
        word = drop_lane(word, code, bits);
        const int64_t i = row * kRow + column();
        const int32_t level = level_of(code, square);
        if (i < count)
          store(out + i, dequantize_standard(level, scale, norm_of(row_norms.current)));
      }
    }
  }
}

template <int kBits, typename T>
GQ_HD void dequantize_exponential_rows(const uint8_t* codes, int64_t count, int64_t block,
                                       const int32_t* norms, int headroom, T* out) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kByteRows = kGroupRows / kPerByte;
  const float raise = float_of(static_cast<uint32_t>(127 + headroom) << 23);  // 2^headroom
  const int64_t rows = rows_of(count);
  for (int64_t row = warp() * kGroupRows; row < rows; row += warps() * kGroupRows) {
    const uint8_t* from = codes + row / kPerByte * kRow + column();
    int32_t packed[kByteRows];
#pragma unroll
    for (int p = 0; p < kByteRows; ++p)
      packed[p] = row + p * kPerByte < rows ? static_cast<int8_t>(from[p * kRow]) : 0;
    RowNorms row_norms(norms, block, row);
    float norm = 0.0f;
#pragma unroll
    for (int h = 0; h < kGroupRows; ++h) {
      if (row + h < rows && row_norms.advance()) norm = norm_of(row_norms.current);
      const int32_t code = packed[h / kPerByte] >> (kBits * (h % kPerByte));
      const float value = decode_exponential<kBits>(code) * raise * norm;
      const int64_t i = (row + h) * kRow + column();
      // A GPU makes one NaN of all of them; a CPU keeps the norm's.
      if (i < count) store(out + i, norm == norm ? value : norm);
    }
  }
}

// ----------------------------------------------------------------------- the mean of several codes

// The mean of a lane in this thread's column, from the sum of all inputs' levels.
GQ_HD void store_mean(int32_t sum, float ranks_levels, int64_t row, int64_t count, float norm,
                      float* out) {
  // Divided first: where all ranks are at the largest level, the mean is the norm exactly.
  const float mean = static_cast<float>(sum) / ranks_levels * norm;
  const int64_t i = row * kRow + column();
  if (i < count) out[i] = smaller(larger(mean, -norm), norm);
}

// Levels by the same norms are added as integers, which is exact. kLanes is the number of lanes
// where sums of all of them are kept in registers, 0 elsewhere.
template <int kLanes>
GQ_HD void mean_standard_rows(const int32_t* const* payloads, int inputs, int64_t count,
                              int64_t block, const int32_t* norms, int bits, bool square,
                              int64_t divisor, float* out) {
  const int lanes = kLanes > 0 ? kLanes : 32 / bits;
  const float ranks_levels = static_cast<float>(divisor);
  const int64_t rows = rows_of(count);
  for (int64_t first = warp() * lanes; first < rows; first += warps() * lanes) {
    const int64_t at = first / lanes * kRow + column();
    RowNorms row_norms(norms, block, first);
    int32_t sums[kLanes > 0 ? kLanes : 1] = {};
    if (kLanes > 0) {
      for (int i = 0; i < inputs; ++i) {
        int32_t word = payloads[i][at];
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          const int32_t code = lowest_lane(word, bits);
          word = drop_lane(word, code, bits);
          sums[k] += level_of(code, square);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < (kLanes > 0 ? kLanes : lanes); ++k) {
      if (first + k >= rows) break;
      row_norms.advance();
      if (kLanes == 0) {
        sums[0] = 0;
        for (int i = 0; i < inputs; ++i) {
          int32_t word = payloads[i][at];
          for (int below = 0; below < k; ++below)
            word = drop_lane(word, lowest_lane(word, bits), bits);
          sums[0] += level_of(lowest_lane(word, bits), square);
        }
      }
      store_mean(sums[kLanes > 0 ? k : 0], ranks_levels, first + k, count,
                 norm_of(row_norms.current), out);
    }
  }
}

// --------------------------------------------------------------------- reducing exponential codes

// This thread's bytes of a group of rows; zeros beyond the end.
template <int kByteRows>
GQ_HD void load_bytes(const uint8_t* codes, int64_t begin, int64_t bytes,
                      uint8_t column_bytes[kByteRows]) {
  const int64_t after = bytes - begin - column();
#pragma unroll
  for (int p = 0; p < kByteRows; ++p)
    column_bytes[p] = p * kRow < after ? codes[begin + p * kRow + column()] : uint8_t{0};
}

// The contents of a group of two inputs mixed into 64 bits. The host adds up words of four bytes;
// here every byte stands in a thread of its own.
template <int kByteRows>
GQ_HD uint64_t content_key(const uint8_t a[kByteRows], const uint8_t b[kByteRows]) {
  uint64_t key = 0;
#pragma unroll
  for (int p = 0; p < kByteRows; ++p) {
    uint32_t word = (static_cast<uint32_t>(a[p]) + b[p]) << (8 * (column() % 4));
    word += __shfl_xor_sync(kAllThreads, word, 1);
    word += __shfl_xor_sync(kAllThreads, word, 2);
    key += content_term(word, (p * kRow + column()) / 4);
  }
  for (int offset = 4; offset < kRow; offset *= 2) key += __shfl_xor_sync(kAllThreads, key, offset);
  return key;
}

// Decodes this thread's bytes of one input and adds them to `sums`.
template <int kBits>
GQ_HD void add_decoded(const uint8_t* column_bytes, bool first, float sums[kGroupRows]) {
  constexpr int kPerByte = 8 / kBits;
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    const int32_t code =
        static_cast<int8_t>(column_bytes[h / kPerByte]) >> (kBits * (h % kPerByte));
    const float value = decode_exponential<kBits>(code);
    sums[h] = first ? value : sums[h] + value;
  }
}

// Rounds `sums` once and writes this thread's bytes.
template <int kBits>
GQ_HD void store_rounded(const float sums[kGroupRows], float factor, const Random& random,
                         int64_t group, int64_t begin, int64_t bytes, uint8_t* out) {
  constexpr int kPerByte = 8 / kBits;
  uint32_t words[4];
  random_column(random, group, 0, words);
  const int64_t after = bytes - begin - column();
  uint32_t byte = 0;
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    const int k = h % kPerByte;
    // The host adds 4-bit codes as integers, which have one zero: none of a sum's has a sign.
    const float mean = kBits == 4 ? sums[h] * factor + 0.0f : sums[h] * factor;
    byte |= encode_exponential<kBits>(mean, bits_of(mean), kOneBits, random_bits(words[h / 2], h))
            << (kBits * k);
    if (k == kPerByte - 1) {
      const int offset = h / kPerByte * kRow;
      if (offset < after) out[begin + offset + column()] = static_cast<uint8_t>(byte);
      byte = 0;
    }
  }
}

// Of `bytes` bytes from `place` on, which have the random numbers of the group `start` and of those
// that follow.
template <int kBits>
GQ_HD void reduce_exponential_rows(const uint8_t* const* codes, int inputs, int64_t bytes,
                                   float factor, const Random& random, int64_t place, int64_t start,
                                   uint8_t* out) {
  constexpr int kByteRows = kGroupRows * kBits / 8;
  constexpr int kGroupBytes = kByteRows * kRow;
  for (int64_t group = warp(); group * kGroupBytes < bytes; group += warps()) {
    const int64_t begin = group * kGroupBytes;
    float sums[kGroupRows];
    for (int i = 0; i < inputs; ++i) {
      uint8_t own[kByteRows];
      load_bytes<kByteRows>(codes[i] + place, begin, bytes, own);
      add_decoded<kBits>(own, i == 0, sums);
    }
    store_rounded<kBits>(sums, factor, random, start + group, begin, bytes, out + place);
  }
}

// The stream of a group's dither, keyed by its contents.
template <int kByteRows>
GQ_HD Random keyed(const Random& random, const uint8_t a[kByteRows], const uint8_t b[kByteRows]) {
  const uint64_t key = content_key<kByteRows>(a, b);
  return {{random.key[0], random.key[1]},
          {random.stream[0] ^ static_cast<uint32_t>(key),
           random.stream[1] ^ static_cast<uint32_t>(key >> 32)}};
}

// The operation of MPI: inout = round(in + inout), its dither keyed by the two.
GQ_HD void add_exponential_rows(const uint8_t* in, uint8_t* inout, int64_t bytes,
                                const Random& random) {
  constexpr int kGroupBytes = kGroupRows * kRow;
  for (int64_t group = warp(); group * kGroupBytes < bytes; group += warps()) {
    const int64_t begin = group * kGroupBytes;
    uint8_t a[kGroupRows], b[kGroupRows];
    load_bytes<kGroupRows>(in, begin, bytes, a);
    load_bytes<kGroupRows>(inout, begin, bytes, b);
    const Random stream = keyed<kGroupRows>(random, a, b);
    float sums[kGroupRows];
    add_decoded<8>(a, true, sums);
    add_decoded<8>(b, false, sums);
    store_rounded<8>(sums, 1.0f, stream, group, begin, bytes, inout);
  }
}

// The same for two 4-bit codes to a byte. A Philox block has a byte for each of sixteen codes; they
// stand in the order of memory, so a thread finds its own in the blocks of other columns.
GQ_HD void add_packed_rows(const uint8_t* in, uint8_t* inout, int64_t bytes, const Random& random) {
  constexpr int kGroupBytes = kGroupRows * kRow;
  for (int64_t group = warp(); group * kGroupBytes < bytes; group += warps()) {
    const int64_t begin = group * kGroupBytes;
    uint8_t a[kGroupRows], b[kGroupRows];
    load_bytes<kGroupRows>(in, begin, bytes, a);
    load_bytes<kGroupRows>(inout, begin, bytes, b);
    uint32_t words[4];
    random_column(keyed<kGroupRows>(random, a, b), group, 0, words);
    const int64_t after = bytes - begin - column();
#pragma unroll 1  // and bytes read again: registers for all of them at once would spill
    for (int p = 0; p < kGroupRows; ++p) {
      const int source = (p % 4) * (kRow / 4) + column() / 4;
      const uint32_t low = __shfl_sync(kAllThreads, p < 4 ? words[0] : words[1], source, kRow);
      const uint32_t high = __shfl_sync(kAllThreads, p < 4 ? words[2] : words[3], source, kRow);
      if (p * kRow >= after) continue;
      const int64_t i = begin + p * kRow + column();
      const int shift = 8 * (column() % 4);
      const uint8_t sums[2] = {
          add_codes(nibble(in[i], 0), nibble(inout[i], 0), static_cast<uint8_t>(low >> shift)),
          add_codes(nibble(in[i], 1), nibble(inout[i], 1), static_cast<uint8_t>(high >> shift))};
      inout[i] = static_cast<uint8_t>(sums[0] | (sums[1] << 4));
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------- kernels

// The parameters are those of the host library (SIGNATURES in interface.py), but for the norms, for
// the dither, which comes by value, and for parts of a tensor: `start` is the group in its dither
// that they begin with, `place` where they lie in all codes. `bits` has been checked.

// GQ_THREADS is the size of a thread block. Half of an SM's threads or more fit into its registers,
// which hides the latency of memory.
#define GQ_KERNEL extern "C" __global__ void __launch_bounds__(GQ_THREADS, 1024 / GQ_THREADS)

#if defined(GQ_ELEMENT)  // the C++ type of the elements: a module for each

using Element = GQ_ELEMENT;

GQ_KERNEL gq_absmax(const Element* x, int64_t count, int64_t block, int64_t segment,
                    int32_t* norms) {
  absmax(x, count, block, segment, norms);
}

GQ_KERNEL gq_l2norm(const Element* x, int64_t count, int64_t block, int64_t segment,
                    double* partial, int32_t* norms) {
  l2norm(x, count, block, segment, partial, norms);
}

GQ_KERNEL gq_l2norm_of_partial(const double* partial, int64_t count, int64_t block, int64_t segment,
                               int32_t* norms) {
  l2norm_of_partial<Element>(partial, count, block, segment, norms);
}

// A kernel for each number of lanes that divides a group, and one for all others: in one kernel
// their registers would add up. And for square levels, which have eight bits or less.
#define GQ_QUANTIZE_STANDARD(NAME, LANES, SQUARE)                                                \
  GQ_KERNEL NAME(const Element* x, int64_t count, int64_t block, const int32_t* norms, int bits, \
                 int levels, int, uint64_t key, uint64_t stream, int32_t* payload,               \
                 int64_t start) {                                                                \
    quantize_standard_rows<LANES, SQUARE>(x, count, block, norms, bits, levels,                  \
                                          dither_of(random_of(key, stream)), start, payload);    \
  }
GQ_QUANTIZE_STANDARD(gq_quantize_standard_2, 2, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_4, 4, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_8, 8, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard, 0, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_4_square, 4, true)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_8_square, 8, true)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_square, 0, true)

GQ_KERNEL gq_dequantize_standard(const int32_t* payload, int64_t count, int64_t block,
                                 const int32_t* norms, int bits, int square, int64_t divisor,
                                 Element* out) {
  dequantize_standard_rows(payload, count, block, norms, bits, square != 0, divisor, out);
}

GQ_KERNEL gq_quantize_exponential(const Element* x, int64_t count, int64_t block,
                                  const int32_t* norms, int bits, int headroom, uint64_t key,
                                  uint64_t stream, uint8_t* codes) {
  const Random random = random_of(key, stream);
  if (bits == 8)
    quantize_exponential_rows<8>(x, count, block, norms, headroom, random, codes);
  else
    quantize_exponential_rows<4>(x, count, block, norms, headroom, random, codes);
}

GQ_KERNEL gq_dequantize_exponential(const uint8_t* codes, int64_t count, int64_t block,
                                    const int32_t* norms, int bits, int headroom, Element* out) {
  if (bits == 8)
    dequantize_exponential_rows<8>(codes, count, block, norms, headroom, out);
  else
    dequantize_exponential_rows<4>(codes, count, block, norms, headroom, out);
}

#else  // codes have no element type: one module for them

GQ_KERNEL gq_reduce_exponential(const uint8_t* const* codes, int inputs, int64_t bytes, int bits,
                                float factor, uint64_t key, uint64_t stream, uint8_t* out,
                                int64_t place, int64_t start) {
  const Random random = random_of(key, stream);
  if (bits == 8)
    reduce_exponential_rows<8>(codes, inputs, bytes, factor, random, place, start, out);
  else
    reduce_exponential_rows<4>(codes, inputs, bytes, factor, random, place, start, out);
}

#define GQ_MEAN_STANDARD(NAME, LANES)                                                            \
  GQ_KERNEL NAME(const int32_t* const* payloads, int inputs, int64_t count, int64_t block,       \
                 const int32_t* norms, int bits, int square, int64_t divisor, float* out) {      \
    mean_standard_rows<LANES>(payloads, inputs, count, block, norms, bits, square != 0, divisor, \
                              out);                                                              \
  }
GQ_MEAN_STANDARD(gq_mean_standard_2, 2)
GQ_MEAN_STANDARD(gq_mean_standard_4, 4)
GQ_MEAN_STANDARD(gq_mean_standard_8, 8)
GQ_MEAN_STANDARD(gq_mean_standard, 0)

// The smaller one of each two norms, where the second is finite.
GQ_KERNEL gq_bound_norms(int32_t* own, const int32_t* norms, int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < count; i += threads)
    if (norm_is_finite(norms[i]) && norms[i] < own[i]) own[i] = norms[i];
}

GQ_KERNEL gq_add_exponential(const uint8_t* in, uint8_t* inout, int64_t bytes, int bits,
                             uint64_t key, uint64_t stream) {
  const Random random = random_of(key, stream);
  if (bits == 8)
    add_exponential_rows(in, inout, bytes, random);
  else
    add_packed_rows(in, inout, bytes, random);
}

#endif
