// CUDA kernels: thin loops over elements.h, compiled at run time by device.py.
//
// A kernel works on a table of segments: the tensors of a bucket, or parts of them. What a warp
// does at one time is a task; tasks are numbered through all segments, and none has parts of two.
// So one launch serves any number of tensors.
//
// One thread stands for one column of the rows of 32 elements, so a warp reads and writes whole
// rows, wherever they begin. A thread walks down as many rows as fill both whole payload rows and
// whole groups of eight rows, so one Philox block serves its eight elements. Grids may be smaller
// than the data. Every loop that holds a shuffle or a vote runs the same number of times in all
// threads of a warp.

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
GQ_HD int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// ------------------------------------------------------------------------------------------- tasks

// A tensor, or a part of one. The same fields as SEGMENT in interface.py, and what device.py adds.
struct Segment {
  void* x;  // its elements; null: zeros, and no results
  int64_t elements;
  int64_t norms;       // place of its first norm
  int64_t payload;     // place of its codes
  int64_t stop;        // place where what follows the codes ends, which becomes zeros
  uint32_t random[4];  // its dither, with the number of steps since that of the launch
  int64_t group;       // the group of kGroupRows rows, in its dither, that it begins with
  int64_t task;        // the first one of its tasks
};

// The segment of a task: the last one that does not begin behind it. One without tasks begins where
// the next one does. The threads of a warp look at 32 places at once.
GQ_HD Segment segment_of(const Segment* segments, int count, int64_t task) {
  int first = 0;
  while (count > 1) {
    const int stride = (count + kRow - 1) / kRow;
    const int place = column() * stride;
    const bool begun = place < count && segments[first + place].task <= task;
    const int skipped = (__popc(__ballot_sync(kAllThreads, begun)) - 1) * stride;
    first += skipped;
    count = count - skipped < stride ? count - skipped : stride;
  }
  return segments[first];
}

// Calls body(s, number) for every task of this warp: the one of that number in segment s.
template <typename Body>
GQ_HD void for_tasks(const Segment* segments, int count, int64_t tasks, const Body& body) {
  for (int64_t task = warp(); task < tasks; task += warps()) {
    const Segment s = segment_of(segments, count, task);
    body(s, task - s.task);
  }
}

// The elements that are there.
GQ_HD int64_t present(const Segment& s) { return s.x == nullptr ? 0 : s.elements; }

// ------------------------------------------------------------------------------------------ norms

// Half a warp measures one piece of a block: one of the sixteen partial sums of the host to a
// thread, so blocks of one piece get the very L2 norm that the host computes.
constexpr int kHalf = 16;
constexpr int64_t kPiece = GQ_PIECE;

// The size of a segment's blocks; it is one block where `block` is 0, or more than it has.
GQ_HD int64_t block_of(const Segment& s, int64_t block) {
  const int64_t whole = maximum(rows_of(s.elements), 1) * kRow;
  return block > 0 && block < whole ? block : whole;
}

GQ_HD int64_t pieces_of(int64_t block) { return (block + kPiece - 1) / kPiece; }

// The piece of a half-warp. Pieces are numbered through all blocks, as many to each of them.
struct Piece {
  int64_t block;
  int64_t begin;  // not below the number of elements if there is no such piece
  int64_t end;
};

GQ_HD Piece piece_at(int64_t index, int64_t count, int64_t block) {
  const int64_t per_block = pieces_of(block);
  const int64_t number = per_block == 1 ? index : index / per_block;
  const int64_t begin = number * block + (index - number * per_block) * kPiece;
  return {number, begin, minimum(minimum(begin + kPiece, (number + 1) * block), count)};
}

// A norm, or the one of `bounds` at its place where that is smaller and finite; null: no bounds.
GQ_HD int32_t bounded(int32_t norm, const int32_t* bounds, int64_t place) {
  if (bounds == nullptr) return norm;
  const int32_t bound = bounds[place];
  return norm_is_finite(bound) && bound < norm ? bound : norm;
}

// A task is a pair of pieces. Where a block has several its norm must be zero before.
template <typename T>
GQ_HD void absmax(const Segment& s, int64_t number, int64_t block, const int32_t* bounds,
                  int32_t* norms) {
  const T* x = static_cast<const T*>(s.x);
  const int64_t size = block_of(s, block);
  const Piece own = piece_at(2 * number + column() / kHalf, s.elements, size);
  const int64_t end = x == nullptr ? own.begin : own.end;
  int32_t largest = 0;
#pragma unroll 8
  for (int64_t i = own.begin + column() % kHalf; i < end; i += kHalf) {
    const int32_t bits = static_cast<int32_t>(bits_of(load(x[i])) & kAbsMask);
    largest = bits > largest ? bits : largest;
  }
  for (int offset = kHalf / 2; offset > 0; offset /= 2) {
    const int32_t other = __shfl_xor_sync(kAllThreads, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (column() % kHalf == 0 && own.begin < s.elements) {
    const int64_t place = s.norms + own.block;
    largest = bounded(largest, bounds, place);
    if (size <= kPiece)
      norms[place] = largest;
    else
      atomicMax(norms + place, largest);  // of integers: the same in every order
  }
}

// Writes norms where a block is one piece, and else the sums of `pair` of pieces, to be finished.
template <typename T>
GQ_HD void l2norm(const Segment& s, int64_t number, int64_t block, double* pair,
                  const int32_t* bounds, int32_t* norms) {
  const T* x = static_cast<const T*>(s.x);
  const int64_t size = block_of(s, block);
  const int half = column() / kHalf;
  const Piece own = piece_at(2 * number + half, s.elements, size);
  const int64_t end = x == nullptr ? own.begin : own.end;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = own.begin + column() % kHalf; i < end; i += kHalf) {
    const double value = load(x[i]);
    sum += value * value;
  }
  double total = 0;
  for (int j = 0; j < kHalf; ++j) total += __shfl_sync(kAllThreads, sum, j, kHalf);
  if (column() % kHalf == 0 && own.begin < s.elements) {
    const int64_t place = s.norms + own.block;
    if (size <= kPiece)
      norms[place] = bounded(norm_of_squares<T>(total), bounds, place);
    else
      pair[half] = total;
  }
}

// A task is a block, whose pieces' sums are added in an order that depends on nothing else. Those
// of a segment begin at the place of its codes.
template <typename T>
GQ_HD void l2norm_of_partial(const Segment& s, int64_t number, int64_t block, const double* partial,
                             const int32_t* bounds, int32_t* norms) {
  const int64_t size = block_of(s, block), per_block = pieces_of(size);
  const int64_t used = minimum(per_block, (s.elements - number * size + kPiece - 1) / kPiece);
  const double* from = partial + s.payload + number * per_block;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = column(); i < used; i += kRow) sum += from[i];
  for (int offset = kRow / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(kAllThreads, sum, offset);
  const int64_t place = s.norms + number;
  if (column() == 0) norms[place] = bounded(norm_of_squares<T>(sum), bounds, place);
}

// --------------------------------------------------------------------------------------- row walk

// No walk comes to the end of so many rows, and an int that counts them saves registers.
constexpr int kEnough = 64;

// Gives the norm bits of the rows' blocks, row after row; one division for each walk.
struct RowNorms {
  const int32_t* next;
  int left;       // rows of the current block that follow
  int following;  // rows of the block at `next`
  int rows_per_block;
  int32_t current;

  // A block of 0 elements is the whole tensor.
  GQ_HD RowNorms(const int32_t* norms, int64_t block, int64_t row)
      : next(norms), left(0), following(kEnough), rows_per_block(kEnough), current(0) {
    if (block == 0) return;
    const int64_t rows = block / kRow;
    const int64_t number =
        static_cast<int64_t>(static_cast<uint64_t>(row) / static_cast<uint64_t>(rows));
    next += number;
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

// So many of what is left as a walk may need, and none below zero: an int saves registers.
GQ_HD int few(int64_t left) { return static_cast<int>(minimum(maximum(left, 0), kEnough * kRow)); }

// This thread's column of eight rows, of which `left` elements are there; zeros beyond.
template <typename T>
GQ_HD void load_group(const T* from, int left, float values[kGroupRows]) {
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) values[h] = h * kRow < left ? load(from[h * kRow]) : 0.0f;
}

GQ_HD Random random_of(const Segment& s, uint32_t step) {
  return {{s.random[0], s.random[1]}, {s.random[2] + step, s.random[3]}};
}

// This thread's words of a group of rows, each XOR `mask`.
GQ_HD void random_column(const Random& random, int64_t group, uint32_t mask, uint32_t words[4]) {
  random_block(random, static_cast<uint64_t>(group) * kRow + static_cast<uint64_t>(column()),
               words);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] ^= mask;
}

// ------------------------------------------------------------------------------------- quantizing

// Bytes or words of this thread's column, from a place of a segment on, that become codes, or zeros
// behind them.
GQ_HD int left_of(const Segment& s, int64_t codes, int64_t from) {
  return few(maximum(codes, s.stop - s.payload) - from - column());
}

// A task is a walk. kLanes is the number of lanes where it divides the eight rows of a group, or
// where lanes are dense, 0 elsewhere.
template <int kLanes, bool kSquare, bool kDense, typename T>
GQ_HD void quantize_standard_rows(const Segment& s, int64_t number, int64_t block,
                                  const int32_t* norms, int bits, int levels, uint32_t step,
                                  int32_t* payload) {
  const int lanes = kLanes > 0 ? kLanes : 32 / bits;
  constexpr bool kWhole = kLanes > 0 && kGroupRows % (kLanes > 0 ? kLanes : 1) == 0;
  const int walk = kWhole ? kGroupRows : walk_rows(lanes);
  const float limit = limit_of<kSquare>(levels);
  const int64_t count = present(s), first = number * walk;
  const int64_t place = number * (walk / lanes) * kRow;
  int left = left_of(s, (rows_of(count) + lanes - 1) / lanes * kRow, place);
  int32_t* to = payload + s.payload + place + column();
  const T* from = static_cast<const T*>(s.x) + first * kRow + column();
  int elements = few(count - first * kRow);
  int64_t group = s.group + first / kGroupRows;
  const Dither dither = dither_of(random_of(s, step));
  RowNorms row_norms(norms + s.norms, block, first);
  Scale scale = {1.0f, 0.0f};
  uint32_t word = 0;
  int lane = 0;
  for (int groups = walk / kGroupRows; groups > 0; --groups) {
    float values[kGroupRows];
    load_group(from, elements - column(), values);
    uint32_t words[4];
    if (dither.strata == kNearest) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = kHalves;
    } else {
      random_column(dither.random, group, dither_mask(dither, static_cast<uint64_t>(group)), words);
    }
#pragma unroll
    for (int h = 0; h < kGroupRows; ++h) {
      if (kWhole) lane = h % lanes;
      // Beyond the last row values are zero, and zero under any scale gives the code zero.
      if (h * kRow < elements && row_norms.advance()) scale = scale_down(row_norms.current, limit);
      const int32_t code =
          quantize_level<kSquare>(values[h], scale, limit, random_bits(words[h / 2], h));
      if constexpr (kDense)
        word = word * dense_of(32 / lanes).radix + words_of(code);
      else
        word += words_of(code) << (bits * lane);
      if (lane == lanes - 1) {
        if (left > 0) *to = static_cast<int32_t>(word);
        left -= kRow;
        to += kRow;
        word = 0;
      }
      if (!kWhole) lane = lane == lanes - 1 ? 0 : lane + 1;
    }
    from += kGroupRows * kRow;
    elements -= kGroupRows * kRow;
    ++group;
  }
}

// A task is a group of rows.
template <int kBits, typename T>
GQ_HD void quantize_exponential_rows(const Segment& s, int64_t number, int64_t block,
                                     const int32_t* norms, int headroom, uint32_t step,
                                     uint8_t* codes) {
  constexpr int kPerByte = 8 / kBits;
  const uint32_t top_bits = static_cast<uint32_t>(127 - headroom) << 23;  // 2^-headroom
  const int64_t count = present(s), row = number * kGroupRows;
  const int64_t place = row / kPerByte * kRow;
  const int left = left_of(s, (rows_of(count) + kPerByte - 1) / kPerByte * kRow, place);
  const int elements = few(count - row * kRow);
  float values[kGroupRows];
  load_group(static_cast<const T*>(s.x) + row * kRow + column(), elements - column(), values);
  uint32_t words[4];
  random_column(random_of(s, step), s.group + number, 0, words);
  RowNorms row_norms(norms + s.norms, block, row);
  Scale scale = {1.0f, 0.0f};
  uint8_t* to = codes + s.payload + place + column();
  uint32_t byte = 0;
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    const int k = h % kPerByte;
    if (h * kRow < elements && row_norms.advance()) scale = scale_down(row_norms.current, 1.0f);
    byte |= quantize_exponential<kBits>(values[h], scale, top_bits, random_bits(words[h / 2], h))
            << (kBits * k);
    if (k == kPerByte - 1) {
      if (h / kPerByte * kRow < left) to[h / kPerByte * kRow] = static_cast<uint8_t>(byte);
      byte = 0;
    }
  }
}

// ----------------------------------------------------------------------------------- dequantizing

// The code of the first lane of what is left of a word: as dense_fraction has made it if lanes are
// dense.
template <bool kDense>
GQ_HD int32_t take_lane(uint32_t& rest, int bits, const Dense& dense) {
  if constexpr (kDense) {
    return take_dense(rest, dense);
  } else {
    const int32_t code = lowest_lane(signed_of(rest), bits);
    rest = words_of(drop_lane(signed_of(rest), code, bits));
    return code;
  }
}

template <bool kDense>
GQ_HD uint32_t begin_lanes(int32_t word, const Dense& dense) {
  return kDense ? dense_fraction(word, dense) : words_of(word);
}

// A task is a walk.
template <bool kDense, typename T>
GQ_HD void dequantize_standard_rows(const Segment& s, int64_t number, int64_t block,
                                    const int32_t* norms, int bits, bool square, int64_t divisor,
                                    const int32_t* payload) {
  const int lanes = 32 / bits;
  const int walk = walk_rows(lanes);
  const int64_t first = number * walk;
  const int32_t* from = payload + s.payload + number * (walk / lanes) * kRow + column();
  T* to = static_cast<T*>(s.x) + first * kRow + column();
  int left = static_cast<int>(minimum(s.elements - first * kRow, walk * kRow));
  RowNorms row_norms(norms + s.norms, block, first);
  Scale scale = {1.0f, 0.0f};
  const Dense dense = dense_of(bits);
  while (left > 0) {
    uint32_t word = begin_lanes<kDense>(*from, dense);
    from += kRow;
    for (int k = 0; k < lanes && left > 0; ++k) {
      if (row_norms.advance()) scale = scale_up(row_norms.current, static_cast<float>(divisor));
      const int32_t level = level_of(take_lane<kDense>(word, bits, dense), square);
      if (column() < left) store(to, dequantize_standard(level, scale, norm_of(row_norms.current)));
      to += kRow;
      left -= kRow;
    }
  }
}

// A task is a group of rows.
template <int kBits, typename T>
GQ_HD void dequantize_exponential_rows(const Segment& s, int64_t number, int64_t block,
                                       const int32_t* norms, int headroom, const uint8_t* codes) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kByteRows = kGroupRows / kPerByte;
  const float raise = float_of(static_cast<uint32_t>(127 + headroom) << 23);  // 2^headroom
  const int64_t row = number * kGroupRows;
  const uint8_t* from = codes + s.payload + number * kByteRows * kRow + column();
  T* to = static_cast<T*>(s.x) + row * kRow + column();
  const int left = few(s.elements - row * kRow);
  int32_t packed[kByteRows];
#pragma unroll
  for (int p = 0; p < kByteRows; ++p)
    packed[p] = p * kPerByte * kRow < left ? static_cast<int8_t>(from[p * kRow]) : 0;
  RowNorms row_norms(norms + s.norms, block, row);
  float norm = 0.0f;
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    if (h * kRow < left && row_norms.advance()) norm = norm_of(row_norms.current);
    const int32_t code = packed[h / kPerByte] >> (kBits * (h % kPerByte));
    const float value = decode_exponential<kBits>(code) * raise * norm;
    // A GPU makes one NaN of all of them; a CPU keeps the norm's.
    if (h * kRow + column() < left) store(to + h * kRow, norm == norm ? value : norm);
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
// where sums of all of them are kept in registers, as of all dense ones, 0 elsewhere.
template <int kLanes, bool kDense>
GQ_HD void mean_standard_rows(const int32_t* const* payloads, int inputs, int64_t count,
                              int64_t block, const int32_t* norms, int bits, bool square,
                              int64_t divisor, float* out) {
  const int lanes = kLanes > 0 ? kLanes : 32 / bits;
  const Dense dense = dense_of(32 / lanes);
  const float ranks_levels = static_cast<float>(divisor);
  const int64_t rows = rows_of(count);
  for (int64_t first = warp() * lanes; first < rows; first += warps() * lanes) {
    const int64_t at = first / lanes * kRow + column();
    RowNorms row_norms(norms, block, first);
    int32_t sums[kLanes > 0 ? kLanes : 1] = {};
    if (kLanes > 0) {
      for (int i = 0; i < inputs; ++i) {
        uint32_t word = begin_lanes<kDense>(payloads[i][at], dense);
#pragma unroll
        for (int k = 0; k < kLanes; ++k)
          sums[k] += level_of(take_lane<kDense>(word, bits, dense), square);
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

// A task is a group of rows. An element of a segment is a byte here.
template <int kBits>
GQ_HD void reduce_exponential_rows(const Segment& s, int64_t number, const uint8_t* const* codes,
                                   int inputs, float factor, uint32_t step, uint8_t* out) {
  constexpr int kByteRows = kGroupRows * kBits / 8;
  const int64_t begin = number * kByteRows * kRow;
  float sums[kGroupRows];
  for (int i = 0; i < inputs; ++i) {
    uint8_t own[kByteRows];
    load_bytes<kByteRows>(codes[i] + s.payload, begin, s.elements, own);
    add_decoded<kBits>(own, i == 0, sums);
  }
  store_rounded<kBits>(sums, factor, random_of(s, step), s.group + number, begin, s.elements,
                       out + s.payload);
}

// The stream of a group's dither, keyed by its contents.
template <int kByteRows>
GQ_HD Random keyed(const Random& random, const uint8_t a[kByteRows], const uint8_t b[kByteRows]) {
  const uint64_t key = content_key<kByteRows>(a, b);
  return {{random.key[0], random.key[1]},
          {random.stream[0] ^ static_cast<uint32_t>(key),
           random.stream[1] ^ static_cast<uint32_t>(key >> 32)}};
}

// A task of `pack` and `unpack` is a group of rows: elements as floats times `factor`, one segment
// behind the other in `flat`, and zeros between; and what that has made, as elements again.
template <typename T>
GQ_HD void pack_rows(const Segment& s, int64_t number, float factor, float* flat) {
  const int64_t begin = number * kGroupRows * kRow + column();
  const int64_t elements = present(s), room = maximum(elements, s.stop - s.payload);
  const T* x = static_cast<const T*>(s.x);
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    const int64_t i = begin + h * kRow;
    if (i < room) flat[s.payload + i] = i < elements ? load(x[i]) * factor : 0.0f;
  }
}

template <typename T>
GQ_HD void unpack_rows(const Segment& s, int64_t number, const float* flat) {
  const int64_t begin = number * kGroupRows * kRow + column();
  const int64_t elements = present(s);
  T* x = static_cast<T*>(s.x);
#pragma unroll
  for (int h = 0; h < kGroupRows; ++h) {
    const int64_t i = begin + h * kRow;
    if (i < elements) store(x + i, flat[s.payload + i]);
  }
}

// The sum of several rows of floats, in their order; `out` may be one of them.
GQ_HD void add_rows(const float* const* rows, int inputs, int64_t count, float* out) {
  constexpr int64_t kTask = kGroupRows * kRow;
  for (int64_t task = warp(); task * kTask < count; task += warps()) {
    const int left = few(count - task * kTask - column());
    const int64_t begin = task * kTask + column();
    float sums[kGroupRows];
    load_group(rows[0] + begin, left, sums);
    for (int r = 1; r < inputs; ++r) {
      float own[kGroupRows];
      load_group(rows[r] + begin, left, own);
#pragma unroll
      for (int h = 0; h < kGroupRows; ++h) sums[h] += own[h];
    }
#pragma unroll
    for (int h = 0; h < kGroupRows; ++h)
      if (h * kRow < left) out[begin + h * kRow] = sums[h];
  }
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

// A table is its segments, their number, and that of all tasks. `block` is the size of a block; 0
// makes one of each segment. `step` is added to that of each segment's dither. `bits` has been
// checked.

// GQ_THREADS is the size of a thread block. Half of an SM's threads or more fit into its registers,
// which hides the latency of memory.
#define GQ_KERNEL extern "C" __global__ void __launch_bounds__(GQ_THREADS, 1024 / GQ_THREADS)

#if defined(GQ_ELEMENT)  // the C++ type of the elements: a module for each

using Element = GQ_ELEMENT;

GQ_KERNEL gq_absmax(const Segment* segments, int count, int64_t tasks, int64_t block,
                    const int32_t* bounds, int32_t* norms) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    absmax<Element>(s, number, block, bounds, norms);
  });
}

GQ_KERNEL gq_l2norm(const Segment* segments, int count, int64_t tasks, int64_t block,
                    double* partial, const int32_t* bounds, int32_t* norms) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    l2norm<Element>(s, number, block, partial + 2 * (s.task + number), bounds, norms);
  });
}

GQ_KERNEL gq_l2norm_of_partial(const Segment* segments, int count, int64_t tasks, int64_t block,
                               const double* partial, const int32_t* bounds, int32_t* norms) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    l2norm_of_partial<Element>(s, number, block, partial, bounds, norms);
  });
}

// A kernel for each number of lanes that divides a group, and one for all others: in one kernel
// their registers would add up. And for square levels, which have eight bits or less, and for each
// number of dense lanes.
#define GQ_QUANTIZE_STANDARD(NAME, LANES, SQUARE, DENSE)                                           \
  GQ_KERNEL NAME(const Segment* segments, int count, int64_t tasks, int64_t block,                 \
                 const int32_t* norms, int bits, int levels, int, uint32_t step,                   \
                 int32_t* payload) {                                                               \
    for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {                      \
      quantize_standard_rows<LANES, SQUARE, DENSE, Element>(s, number, block, norms, bits, levels, \
                                                            step, payload);                        \
    });                                                                                            \
  }
GQ_QUANTIZE_STANDARD(gq_quantize_standard_2, 2, false, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_4, 4, false, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_8, 8, false, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard, 0, false, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_4_square, 4, true, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_8_square, 8, true, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_square, 0, true, false)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_5_dense, 5, true, true)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_6_dense, 6, true, true)
GQ_QUANTIZE_STANDARD(gq_quantize_standard_10_dense, 10, true, true)

#define GQ_DEQUANTIZE_STANDARD(NAME, DENSE)                                                \
  GQ_KERNEL NAME(const Segment* segments, int count, int64_t tasks, int64_t block,         \
                 const int32_t* norms, int bits, int square, int64_t divisor,              \
                 const int32_t* payload) {                                                 \
    for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {              \
      dequantize_standard_rows<DENSE, Element>(s, number, block, norms, bits, square != 0, \
                                               divisor, payload);                          \
    });                                                                                    \
  }
GQ_DEQUANTIZE_STANDARD(gq_dequantize_standard, false)
GQ_DEQUANTIZE_STANDARD(gq_dequantize_standard_dense, true)

GQ_KERNEL gq_quantize_exponential(const Segment* segments, int count, int64_t tasks, int64_t block,
                                  const int32_t* norms, int bits, int headroom, uint32_t step,
                                  uint8_t* codes) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    if (bits == 8)
      quantize_exponential_rows<8, Element>(s, number, block, norms, headroom, step, codes);
    else
      quantize_exponential_rows<4, Element>(s, number, block, norms, headroom, step, codes);
  });
}

GQ_KERNEL gq_dequantize_exponential(const Segment* segments, int count, int64_t tasks,
                                    int64_t block, const int32_t* norms, int bits, int headroom,
                                    const uint8_t* codes) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    if (bits == 8)
      dequantize_exponential_rows<8, Element>(s, number, block, norms, headroom, codes);
    else
      dequantize_exponential_rows<4, Element>(s, number, block, norms, headroom, codes);
  });
}

GQ_KERNEL gq_pack(const Segment* segments, int count, int64_t tasks, float factor, float* flat) {
  for_tasks(segments, count, tasks,
            [=](const Segment& s, int64_t number) { pack_rows<Element>(s, number, factor, flat); });
}

GQ_KERNEL gq_unpack(const Segment* segments, int count, int64_t tasks, const float* flat) {
  for_tasks(segments, count, tasks,
            [=](const Segment& s, int64_t number) { unpack_rows<Element>(s, number, flat); });
}

#else  // codes have no element type: one module for them

GQ_KERNEL gq_add(const float* const* rows, int inputs, int64_t count, float* out) {
  add_rows(rows, inputs, count, out);
}

GQ_KERNEL gq_reduce_exponential(const Segment* segments, int count, int64_t tasks,
                                const uint8_t* const* codes, int inputs, int bits, float factor,
                                uint32_t step, uint8_t* out) {
  for_tasks(segments, count, tasks, [=](const Segment& s, int64_t number) {
    if (bits == 8)
      reduce_exponential_rows<8>(s, number, codes, inputs, factor, step, out);
    else
      reduce_exponential_rows<4>(s, number, codes, inputs, factor, step, out);
  });
}

// Those of one tensor have the parameters of the host library (SIGNATURES in interface.py), but for
// the dither, which comes by value.

#define GQ_MEAN_STANDARD(NAME, LANES, DENSE)                                                   \
  GQ_KERNEL NAME(const int32_t* const* payloads, int inputs, int64_t count, int64_t block,     \
                 const int32_t* norms, int bits, int square, int64_t divisor, float* out) {    \
    mean_standard_rows<LANES, DENSE>(payloads, inputs, count, block, norms, bits, square != 0, \
                                     divisor, out);                                            \
  }
GQ_MEAN_STANDARD(gq_mean_standard_2, 2, false)
GQ_MEAN_STANDARD(gq_mean_standard_4, 4, false)
GQ_MEAN_STANDARD(gq_mean_standard_8, 8, false)
GQ_MEAN_STANDARD(gq_mean_standard, 0, false)
GQ_MEAN_STANDARD(gq_mean_standard_5_dense, 5, true)
GQ_MEAN_STANDARD(gq_mean_standard_6_dense, 6, true)
GQ_MEAN_STANDARD(gq_mean_standard_10_dense, 10, true)

GQ_KERNEL gq_add_exponential(const uint8_t* in, uint8_t* inout, int64_t bytes, int bits,
                             uint64_t key, uint64_t stream) {
  const Random random = {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
                         {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}};
  if (bits == 8)
    add_exponential_rows(in, inout, bytes, random);
  else
    add_packed_rows(in, inout, bytes, random);
}

#endif
