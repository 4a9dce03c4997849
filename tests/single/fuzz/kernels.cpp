// Random and hostile inputs for the host kernels, under AddressSanitizer and UBSan (test_fuzz.py).
//
//     kernels -max_total_time=SECONDS -seed=SEED    tries inputs
//     kernels FILE...                               runs inputs again
//
// An input is a string of bytes that decides everything: `once` draws a case from it, runs it
// through all kernels, and ends the process where something is wrong. Two drivers call it.
// libFuzzer (clang++ -fsanitize=fuzzer -DGQ_LIBFUZZER) breeds strings by the code that they reach;
// `main` below draws them, for compilers without libFuzzer, and understands the same arguments.
// Both leave the input that failed in the file of -exact_artifact_path=FILE.
//
// Linked are the kernels of one or more instruction sets, host.cpp compiled as in setup.py but with
// sanitizers, and with -rdynamic, because they are found by their names. GQ_FUZZ_LIBRARY names a
// library whose kernels have to give the same bytes, that of the package.

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "../../../mpi_ops/kernels/elements.h"

namespace {

using namespace gq;

// As long as a kernel may touch and no longer, so one byte beyond is a report.
using Bytes = std::vector<uint8_t>;

template <typename T>
T* as(Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.data());
}
template <typename T>
const T* as(const Bytes& bytes) {
  return reinterpret_cast<const T*>(bytes.data());
}

// What is wrong, in up to three parts: checks of every element have no time to join them.
void require(bool good, const char* what, const char* more = "", const char* rest = "") {
  if (good) return;
  std::fprintf(stderr, "fuzz: %s%s%s\n", what, more, rest);
  std::abort();
}

// ----------------------------------------------------------------------------------- element types

// The codes of host.cpp.
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

struct Type {
  int64_t item;    // bytes
  double largest;  // finite number, as far as float32 goes
  double epsilon;  // what storing a float may add to it, relatively
  double tiny;     // and absolutely
};
const Type kTypes[] = {{4, 0x1.fffffep127, 0, 0},
                       {8, 0x1.fffffep127, 0, 0},
                       {2, 65504, 0x1p-10, 0x1p-24},
                       {2, 0x1.fep127, 0x1p-7, 0x1p-133}};

template <typename T>
float element(const Bytes& bytes, int64_t i) {
  T value;
  __builtin_memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof value), sizeof value);
  return load(value);
}

float element(int dtype, const Bytes& bytes, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return element<float>(bytes, i);
    case kFloat64:
      return element<double>(bytes, i);
    case kFloat16:
      return element<Half>(bytes, i);
    default:
      return element<BFloat16>(bytes, i);
  }
}

template <typename T>
void set_element(Bytes& bytes, int64_t i, float number) {
  T value;
  store(&value, number);
  __builtin_memcpy(bytes.data() + i * static_cast<int64_t>(sizeof value), &value, sizeof value);
}

void set_element(int dtype, Bytes& bytes, int64_t i, float number) {
  switch (dtype) {
    case kFloat32:
      return set_element<float>(bytes, i, number);
    case kFloat64:
      return set_element<double>(bytes, i, number);
    case kFloat16:
      return set_element<Half>(bytes, i, number);
    default:
      return set_element<BFloat16>(bytes, i, number);
  }
}

// ----------------------------------------------------------------------------------------- kernels

struct Kernels {
  std::string name;
  int (*absmax)(int, const void*, int64_t, int64_t, int32_t*);
  int (*l2norm)(int, const void*, int64_t, int64_t, int32_t*);
  int (*quantize_standard)(int, const void*, int64_t, int64_t, const int32_t*, int, int, int,
                           const uint32_t*, int32_t*);
  int (*dequantize_standard)(int, const int32_t*, int64_t, int64_t, const int32_t*, int, int,
                             int64_t, void*);
  int (*mean_standard)(const int32_t* const*, int, int64_t, int64_t, const int32_t*, int, int,
                       int64_t, float*);
  int (*quantize_exponential)(int, const void*, int64_t, int64_t, const int32_t*, int, int,
                              const uint32_t*, uint8_t*);
  int (*dequantize_exponential)(int, const uint8_t*, int64_t, int64_t, const int32_t*, int, int,
                                void*);
  int (*reduce_exponential)(const uint8_t* const*, int, int64_t, int, float, const uint32_t*,
                            uint8_t*);
  int (*add_exponential)(const uint8_t*, uint8_t*, int64_t, int, const uint32_t*);
  int (*encode_elias)(const int32_t*, int64_t, int, uint8_t*, int64_t*);
  int (*decode_elias)(const uint8_t*, int64_t, int64_t, int, int32_t*);
  int (*philox)(const uint32_t*, const uint32_t*, int, uint32_t*);
};

template <typename Function>
void find(Function*& function, void* library, const std::string& name) {
  function = reinterpret_cast<Function*>(dlsym(library, name.c_str()));
  require(function != nullptr, "there is no ", name.c_str());
}

void append(std::vector<Kernels>& all, void* library, const char* from, const std::string& isa) {
  Kernels k;
  k.name = isa + from;
  find(k.absmax, library, "gq_absmax_" + isa);
  find(k.l2norm, library, "gq_l2norm_" + isa);
  find(k.quantize_standard, library, "gq_quantize_standard_" + isa);
  find(k.dequantize_standard, library, "gq_dequantize_standard_" + isa);
  find(k.mean_standard, library, "gq_mean_standard_" + isa);
  find(k.quantize_exponential, library, "gq_quantize_exponential_" + isa);
  find(k.dequantize_exponential, library, "gq_dequantize_exponential_" + isa);
  find(k.reduce_exponential, library, "gq_reduce_exponential_" + isa);
  find(k.add_exponential, library, "gq_add_exponential_" + isa);
  find(k.encode_elias, library, "gq_encode_elias_" + isa);
  find(k.decode_elias, library, "gq_decode_elias_" + isa);
  find(k.philox, library, "gq_philox_" + isa);
  all.push_back(k);
}

// Faults that GQ_FUZZ_FAULT asks for, to show that each check can fail. `sound` does the work.
Kernels sound;
const std::string kDiffers = "codes of another instruction set";

template <typename... Arguments>
auto last(Arguments... arguments) {
  return std::get<sizeof...(arguments) - 1>(std::make_tuple(arguments...));
}

// The last byte of what a kernel writes, where it writes any, with the sign of the last element.
template <typename... Rest>
uint8_t* last_byte(int dtype, int64_t count, Rest... rest) {
  static uint8_t none[8];
  uint8_t* out = static_cast<uint8_t*>(static_cast<void*>(last(rest...)));
  return count == 0 ? none + 7 : out + count * kTypes[dtype].item - 1;
}

void commit(const std::string& fault, Kernels& k) {
  sound = k;
  if (fault == "writes beyond the end") {
    k.absmax = [](int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
      if (count > 0) norms[(count + block - 1) / block] = 0;
      return sound.absmax(dtype, x, count, block, norms);
    };
  } else if (fault == "reads beyond the end") {
    k.absmax = [](int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
      const volatile uint8_t* bytes = static_cast<const uint8_t*>(x);
      if (count > 0) (void)bytes[count * kTypes[dtype].item];
      return sound.absmax(dtype, x, count, block, norms);
    };
  } else if (fault == "signed overflow") {
    k.absmax = [](int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
      volatile int sum = std::numeric_limits<int>::max();
      sum = sum + 1;
      return sound.absmax(dtype, x, count, block, norms);
    };
  } else if (fault == "norm with a sign") {
    k.l2norm = [](int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
      const int status = sound.l2norm(dtype, x, count, block, norms);
      if (count > 0) norms[0] |= std::numeric_limits<int32_t>::min();
      return status;
    };
  } else if (fault == "norm that is lost") {
    k.l2norm = [](int dtype, const void* x, int64_t count, int64_t block, int32_t* norms) {
      const int status = sound.l2norm(dtype, x, count, block, norms);
      if (count > 0) norms[0] = 0;
      return status;
    };
  } else if (fault == "writes to x") {
    k.quantize_standard = [](int dtype, const void* x, int64_t count, auto... rest) {
      const int status = sound.quantize_standard(dtype, x, count, rest...);
      if (count > 0) *static_cast<uint8_t*>(const_cast<void*>(x)) ^= 1;
      return status;
    };
  } else if (fault == "wrong sign") {
    k.dequantize_standard = [](int dtype, const int32_t* payload, int64_t count, auto... rest) {
      const int status = sound.dequantize_standard(dtype, payload, count, rest...);
      *last_byte(dtype, count, rest...) ^= 0x80;
      return status;
    };
  } else if (fault == "not finite") {
    k.dequantize_exponential = [](int dtype, const uint8_t* codes, int64_t count, auto... rest) {
      const int status = sound.dequantize_exponential(dtype, codes, count, rest...);
      uint8_t* byte = last_byte(dtype, count, rest...);
      byte[0] = 0x7f;
      byte[-1] |= 0xf0;
      return status;
    };
  } else if (fault == "zero norm, no zero") {
    k.dequantize_exponential = [](int dtype, const uint8_t* codes, int64_t count, int64_t block,
                                  const int32_t* norms, auto... rest) {
      const int status = sound.dequantize_exponential(dtype, codes, count, block, norms, rest...);
      if (count > 0 && norms[(count - 1) / block] == 0) *last_byte(dtype, count, rest...) = 1;
      return status;
    };
  } else if (fault == "sum that depends on the order") {
    k.add_exponential = [](const uint8_t* in, uint8_t* inout, int64_t bytes, auto... rest) {
      const int status = sound.add_exponential(in, inout, bytes, rest...);
      if (bytes > 0) inout[0] = in[0];
      return status;
    };
  } else if (fault == "mean beyond the largest") {
    k.reduce_exponential = [](const uint8_t* const* codes, int inputs, int64_t bytes,
                              auto... rest) {
      const int status = sound.reduce_exponential(codes, inputs, bytes, rest...);
      if (bytes > 0) *last(rest...) = 0x7f;
      return status;
    };
  } else if (fault == "code that is lost") {
    k.decode_elias = [](const uint8_t* stream, int64_t bytes, int64_t count, int bits,
                        int32_t* payload) {
      const int status = sound.decode_elias(stream, bytes, count, bits, payload);
      if (count > 0) payload[0] ^= 1;
      return status;
    };
  } else if (fault == "reads beyond a stream") {
    k.decode_elias = [](const uint8_t* stream, int64_t bytes, auto... rest) {
      const volatile uint8_t* all = stream;
      if (bytes > 0) (void)all[bytes];
      return sound.decode_elias(stream, bytes, rest...);
    };
  } else if (fault == "stream that is cut") {
    k.encode_elias = [](const int32_t* payload, int64_t count, int bits, uint8_t* out,
                        int64_t* bytes) {
      const int status = sound.encode_elias(payload, count, bits, out, bytes);
      if (*bytes > 0) *bytes -= 8;
      return status;
    };
  } else if (fault == kDiffers) {
    k.quantize_exponential = [](int dtype, const void* x, int64_t count, auto... rest) {
      const int status = sound.quantize_exponential(dtype, x, count, rest...);
      if (count > 0) *last(rest...) ^= 1;
      return status;
    };
  } else {
    require(false, "GQ_FUZZ_FAULT: there is no fault ", fault.c_str());
  }
}

// Those that are linked, the baseline first, and those of the library that this CPU can run.
std::vector<Kernels> all_kernels() {
  std::vector<Kernels> all;
  const std::string isas[] = {"baseline", "x86_64_v3", "x86_64_v4"};
  for (const std::string& isa : isas)
    if (isa == isas[0] || dlsym(RTLD_DEFAULT, ("gq_absmax_" + isa).c_str()) != nullptr)
      append(all, RTLD_DEFAULT, "", isa);
  if (const char* path = std::getenv("GQ_FUZZ_LIBRARY")) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, "GQ_FUZZ_LIBRARY cannot be loaded: ", path);
    const char* (*best)() = nullptr;
    find(best, library, "gq_best_isa");
    for (const std::string& isa : isas) {
      append(all, library, " of the library", isa);
      if (isa == best()) break;
    }
  }
  if (all.size() == 1) all.push_back(all[0]);  // at least the same a second time
  if (const char* fault = std::getenv("GQ_FUZZ_FAULT")) {
    commit(fault, fault == kDiffers ? all.back() : all[0]);
    // Then in all of them: a check has to notice it, and not the comparison.
    if (fault != kDiffers) all.assign(2, all[0]);
  }
  return all;
}

// ------------------------------------------------------------------------------------------- input

// The bytes of an input. Parameters come first, each from a place of its own, so that a mutation
// changes one of them and leaves the others; where bytes are missing they are zeros, which choose
// the least case. Values follow. Beyond the end of the input they are those of a stream whose seed
// is the first parameter: inputs stay so short that mutations meet the parameters often, tensors
// are full of numbers nevertheless, and a byte more or less changes one number and not all.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : at_(data), end_(data + size), state_(number(4)) {}

  uint64_t number(int bytes) {
    uint64_t result = 0;
    for (int i = 0; i < bytes; ++i)
      if (at_ != end_) result |= static_cast<uint64_t>(*at_++) << (8 * i);
    return result;
  }

  // low .. high, the ends more often than chance.
  int64_t between(int64_t low, int64_t high) {
    const int64_t any = static_cast<int64_t>(number(4));
    if (any % 8 < 2) return any % 8 == 0 ? low : high;
    return low + any / 8 % (high - low + 1);
  }

  uint8_t value() {
    if (at_ != end_) return *at_++;
    return static_cast<uint8_t>(mix64(state_ += 0x9E3779B97F4A7C15u) >> 32);
  }

  Bytes values(int64_t size) {
    Bytes bytes(static_cast<size_t>(size));
    for (uint8_t& byte : bytes) byte = value();
    return bytes;
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
  uint64_t state_;
};

enum Values { kMoments, kSpecial, kAnyBits };
enum Norms { kLargest, kL2, kLarger, kAnyNorm };

struct Case {
  uint32_t random[4];
  int dtype;
  int64_t count;  // elements
  int64_t block;  // elements that share a norm
  int norms;      // which ones
  int bits, levels, square;
  bool dense;              // lanes, which no Elias codes are made of
  int64_t divisor, units;  // units: the norm as a multiple of what code 1 stands for
  int narrow, headroom;    // bits of exponential codes
  int inputs;              // of a reduction
  bool copies;             // all inputs are this rank's own codes
  int target;              // the input that is the output as well, or `inputs`
  bool average;
  int64_t cut;  // bytes of a stream that are not changed; of one that no rank has made: 0

  int64_t rows, blocks, words, codes;  // sizes that follow

  Bytes x, others;              // others: norms, as other ranks may have them
  Bytes tail;                   // of a stream
  std::vector<Bytes> payloads;  // words and codes that no rank has made
  std::vector<Bytes> pieces;

  auto read() const { return std::tie(x, others, tail, payloads, pieces); }
};

float special(uint8_t which) {
  const float numbers[] = {0.0f,
                           -0.0f,
                           std::numeric_limits<float>::denorm_min(),
                           std::numeric_limits<float>::min(),
                           std::numeric_limits<float>::max(),
                           -std::numeric_limits<float>::max(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           1.0f};
  return numbers[which % 10];
}

Bytes tensor(Source& source, int dtype, int64_t count, int kind, int exponent, int64_t zeros) {
  const int64_t size = count * kTypes[dtype].item;
  Bytes x = kind == kAnyBits ? source.values(size) : Bytes(static_cast<size_t>(size));
  for (int64_t i = 0; i < count; ++i)
    if (i < zeros) {
      set_element(dtype, x, i, 0.0f);
    } else if (kind != kAnyBits) {
      const uint8_t high = source.value(), low = source.value();
      const float fraction = static_cast<float>(static_cast<int8_t>(high) * 256 + low) / 32768;
      const bool chosen = kind == kSpecial && low % 4 == 0;
      set_element(dtype, x, i, chosen ? special(high) : std::ldexp(fraction, exponent));
    }
  return x;
}

Case draw(Source& source) {
  Case c;
  for (uint32_t& word : c.random) word = static_cast<uint32_t>(source.number(4));
  c.dtype = static_cast<int>(source.number(1) % 4);
  c.rows = source.between(0, 38);  // more than four groups of rows
  const int64_t last_row = source.between(1, kRow);
  c.count = c.rows == 0 ? 0 : (c.rows - 1) * kRow + last_row;
  c.block = kRow * source.between(1, 12);
  c.blocks = (c.count + c.block - 1) / c.block;
  const int kind = static_cast<int>(source.number(1) % 3);
  const int exponent = static_cast<int>(source.between(-140, 128));
  const bool begins_with_zeros = source.number(1) % 4 == 1;
  const int64_t zeros = source.between(0, c.count) * begins_with_zeros;
  c.norms = static_cast<int>(source.number(1) % 4);

  c.bits = static_cast<int>(source.between(2, 16));
  c.square = c.bits <= 8 && source.number(1) % 2 == 1;
  c.dense = c.square && gq::dense_of(c.bits).radix != 0;
  const uint32_t top = c.dense ? gq::dense_of(c.bits).radix / 2 : (1u << (c.bits - 1)) - 1;
  c.levels = static_cast<int>(source.between(1, top));
  c.units = int64_t{c.levels} * (c.square ? c.levels : 1);
  c.divisor = source.between(1, std::numeric_limits<int32_t>::max());
  c.words = (c.rows + 32 / c.bits - 1) / (32 / c.bits) * kRow;
  c.narrow = source.number(1) % 2 == 0 ? 8 : 4;
  c.headroom = static_cast<int>(source.between(0, 126));
  const int64_t per_byte = 8 / c.narrow;
  c.codes = (c.rows + per_byte - 1) / per_byte * kRow;

  c.inputs = static_cast<int>(source.between(1, 5));
  c.target = static_cast<int>(source.between(0, c.inputs));
  c.copies = source.number(1) % 2 == 1;
  c.average = source.number(1) % 2 == 0;
  const int64_t tail = source.between(0, 40);
  c.cut = source.between(0, c.count);

  c.x = tensor(source, c.dtype, c.count, kind, exponent, zeros);
  c.others = source.values(4 * c.blocks);
  for (int64_t b = 0; b < c.blocks; ++b) as<uint32_t>(c.others)[b] &= kAbsMask;
  for (int i = 0; i < c.inputs; ++i) {
    c.payloads.push_back(source.values(4 * c.words));
    c.pieces.push_back(source.values(c.codes));
  }
  c.tail = source.values(tail);
  return c;
}

// ----------------------------------------------------------------------------------------- results

// Whatever the kernels have written.
struct Results {
  Bytes largest, l2, norms;
  Bytes words, rounded, hostile;          // standard levels
  Bytes mean, mean_norms, second, share;  // two hops
  Bytes codes, decoded, hostile_codes;    // exponential levels
  Bytes reduced, added, swapped;
  Bytes stream, recoded, damaged, stream_again;  // Elias codes
  uint32_t philox[2][4];

  auto written() const {
    return std::tie(largest, l2, norms, words, rounded, hostile, mean, mean_norms, second, share,
                    codes, decoded, hostile_codes, reduced, added, swapped, stream, recoded,
                    damaged, stream_again);
  }
};

void good(int status) { require(status == 0, "a kernel refused its arguments"); }

// The norms that a case asks for, out of those that were measured.
Bytes choose(const Case& c, const Results& r) {
  Bytes norms = c.norms == kL2 ? r.l2 : r.largest;
  for (int64_t b = 0; b < c.blocks; ++b) {
    int32_t& norm = as<int32_t>(norms)[b];
    const int32_t other = as<int32_t>(c.others)[b];
    if (c.norms == kAnyNorm || (c.norms == kLarger && other > norm)) norm = other;
  }
  return norms;
}

// As codec.py does: no norm of the mean exceeds the one that it was decoded with.
void limit_norms(const Case& c, const Bytes& norms, Bytes& own) {
  for (int64_t b = 0; b < c.blocks; ++b) {
    const int32_t bound = as<int32_t>(norms)[b];
    if (norm_is_finite(bound) && as<int32_t>(own)[b] > bound) as<int32_t>(own)[b] = bound;
  }
}

Bytes encoded(const Kernels& k, const Case& c, const Bytes& words, uint8_t fill) {
  Bytes stream(static_cast<size_t>((c.count * 2 * c.bits + 63) / 64 * 8), fill);
  int64_t bytes = 0;
  good(k.encode_elias(as<int32_t>(words), c.count, c.bits, stream.data(), &bytes));
  require(0 <= bytes && bytes <= static_cast<int64_t>(stream.size()), "encode_elias: too long");
  stream.resize(static_cast<size_t>(bytes));
  stream.shrink_to_fit();
  return stream;
}

// Codes as a stream and back; then a stream whose end is another, which may be refused.
void run_elias(const Kernels& k, const Case& c, uint8_t fill, Results& r) {
  const auto decode = [&](const Bytes& stream, Bytes& words) {
    words = Bytes(static_cast<size_t>(4 * c.words), fill);
    const int64_t bytes = static_cast<int64_t>(stream.size());
    return k.decode_elias(stream.data(), bytes, c.count, c.bits, as<int32_t>(words)) == 0;
  };
  r.stream = encoded(k, c, r.words, fill);
  require(decode(r.stream, r.recoded), "elias: a stream was refused");
  require(r.recoded == r.words, "elias: other codes came back");
  const int64_t kept = std::min(c.cut, static_cast<int64_t>(r.stream.size()));
  Bytes hostile(r.stream.begin(), r.stream.begin() + kept);
  hostile.insert(hostile.end(), c.tail.begin(), c.tail.end());
  hostile.shrink_to_fit();
  const bool accepted = decode(hostile, r.damaged);
  if (!accepted) return r.damaged.clear();
  r.stream_again = encoded(k, c, r.damaged, fill);
  hostile.resize(r.stream_again.size());  // the last word may have been cut
  require(r.stream_again == hostile, "elias: a stream that is none was accepted");
}

// A case through all kernels. What a kernel should write and does not stays `fill`, by which the
// results of two calls then differ.
Results run(const Kernels& k, const Case& c, uint8_t fill) {
  const auto fresh = [fill](int64_t size) { return Bytes(static_cast<size_t>(size), fill); };
  const int64_t item = kTypes[c.dtype].item;
  Results r;
  r.largest = fresh(4 * c.blocks);
  r.l2 = fresh(4 * c.blocks);
  good(k.absmax(c.dtype, c.x.data(), c.count, c.block, as<int32_t>(r.largest)));
  good(k.l2norm(c.dtype, c.x.data(), c.count, c.block, as<int32_t>(r.l2)));
  r.norms = choose(c, r);
  const int32_t* norms = as<int32_t>(r.norms);

  r.words = fresh(4 * c.words);
  good(k.quantize_standard(c.dtype, c.x.data(), c.count, c.block, norms, c.bits, c.levels, c.square,
                           c.random, as<int32_t>(r.words)));
  r.codes = fresh(c.codes);
  good(k.quantize_exponential(c.dtype, c.x.data(), c.count, c.block, norms, c.narrow, c.headroom,
                              c.random, r.codes.data()));
  const auto kept = std::make_tuple(r.norms, r.words, r.codes);

  r.rounded = fresh(c.count * item);
  good(k.dequantize_standard(c.dtype, as<int32_t>(r.words), c.count, c.block, norms, c.bits,
                             c.square, c.units, r.rounded.data()));
  r.hostile = fresh(c.count * item);
  good(k.dequantize_standard(c.dtype, as<int32_t>(c.payloads[0]), c.count, c.block, norms, c.bits,
                             c.square, c.divisor, r.hostile.data()));
  r.decoded = fresh(c.count * item);
  good(k.dequantize_exponential(c.dtype, r.codes.data(), c.count, c.block, norms, c.narrow,
                                c.headroom, r.decoded.data()));
  r.hostile_codes = fresh(c.count * item);
  good(k.dequantize_exponential(c.dtype, c.pieces[0].data(), c.count, c.block, norms, c.narrow, 0,
                                r.hostile_codes.data()));

  std::vector<const int32_t*> payloads;
  for (const Bytes& words : c.payloads) payloads.push_back(as<int32_t>(c.copies ? r.words : words));
  r.mean = fresh(4 * c.count);
  good(k.mean_standard(payloads.data(), c.inputs, c.count, c.block, norms, c.bits, c.square,
                       c.units * c.inputs, as<float>(r.mean)));
  r.mean_norms = fresh(4 * c.blocks);
  const auto measure = c.norms == kL2 ? k.l2norm : k.absmax;
  good(measure(kFloat32, r.mean.data(), c.count, c.block, as<int32_t>(r.mean_norms)));
  limit_norms(c, r.norms, r.mean_norms);
  r.second = fresh(4 * c.words);
  good(k.quantize_standard(kFloat32, r.mean.data(), c.count, c.block, as<int32_t>(r.mean_norms),
                           c.bits, c.levels, c.square, c.random, as<int32_t>(r.second)));
  r.share = fresh(4 * c.count);
  good(k.dequantize_standard(kFloat32, as<int32_t>(r.second), c.count, c.block,
                             as<int32_t>(r.mean_norms), c.bits, c.square, c.units, r.share.data()));

  std::vector<const uint8_t*> pieces;
  for (const Bytes& codes : c.pieces) pieces.push_back((c.copies ? r.codes : codes).data());
  r.reduced = fresh(c.codes);
  if (c.target < c.inputs) {
    r.reduced = c.copies ? r.codes : c.pieces[static_cast<size_t>(c.target)];
    pieces[static_cast<size_t>(c.target)] = r.reduced.data();
  }
  const float factor = c.average ? 1.0f / static_cast<float>(c.inputs) : 1.0f;
  good(k.reduce_exponential(pieces.data(), c.inputs, c.codes, c.narrow, factor, c.random,
                            r.reduced.data()));
  r.added = c.pieces[0];
  good(k.add_exponential(r.codes.data(), r.added.data(), c.codes, c.narrow, c.random));
  r.swapped = r.codes;
  good(k.add_exponential(c.pieces[0].data(), r.swapped.data(), c.codes, c.narrow, c.random));

  if (!c.dense) run_elias(k, c, fill, r);
  good(k.philox(c.random, c.random + 2, 7, r.philox[0]));
  good(k.philox(c.random, c.random + 2, 10, r.philox[1]));
  require(kept == std::tie(r.norms, r.words, r.codes), "a kernel has written to its input");
  return r;
}

// ---------------------------------------------------------------------------------------- checking

void check_norms(const Case& c, const Results& r) {
  for (int64_t b = 0; b < c.blocks; ++b) {
    const int32_t largest = as<int32_t>(r.largest)[b], l2 = as<int32_t>(r.l2)[b];
    require(largest >= 0 && l2 >= 0, "a norm has a sign");
    require(norm_is_finite(largest) == norm_is_finite(l2), "one norm is finite, one is not");
    if (!norm_is_finite(largest)) continue;
    require(l2 >= largest, "the L2 norm is below the largest element");
    const double bound = std::sqrt(static_cast<double>(c.block)) * norm_of(largest);
    require(norm_of(l2) <= bound * (1 + 0x1p-20) + 0x1p-149, "the L2 norm is too large");
  }
}

struct Decoded {
  const char* what;
  int dtype;
  const Bytes& out;
  const Bytes& norms;
};

// Zeros by a norm of zero, NaN by one that is not finite, and nothing beyond `room` norms.
void check_range(const Case& c, const Decoded& d, double room) {
  const Type& type = kTypes[d.dtype];
  for (int64_t i = 0; i < c.count; ++i) {
    const int32_t bits = as<int32_t>(d.norms)[i / c.block];
    const double value = element(d.dtype, d.out, i);
    const double bound = norm_of(bits) * room;
    if (!norm_is_finite(bits)) {
      require(std::isnan(value), d.what, ": a norm that is not finite did not give NaN");
    } else if (bound <= type.largest) {
      require(std::isfinite(value), d.what, ": a finite norm gave a number that is not");
      require(bits != 0 || value == 0, d.what, ": a norm of zero did not give zero");
      require(std::fabs(value) <= bound * (1 + type.epsilon) + type.tiny, d.what, ": too large");
    } else {
      require(!std::isnan(value), d.what, ": a finite norm gave NaN");
    }
  }
}

// Each number stands for that of x, where it is one, cut off at the norm: rounding has moved it by
// one step at most. `step` is a part of the norm; in units of a number itself where `relative`.
void check_rounding(const Case& c, int dtype, const Bytes& x, const Decoded& d, double step,
                    bool relative) {
  const Type& type = kTypes[d.dtype];
  for (int64_t i = 0; i < c.count; ++i) {
    const int32_t bits = as<int32_t>(d.norms)[i / c.block];
    const float number = element(dtype, x, i);
    if (!norm_is_finite(bits) || std::isnan(number)) continue;
    const double norm = norm_of(bits);
    const double wanted = std::fmax(std::fmin(number, norm), -norm);
    const double value = element(d.dtype, d.out, i);
    double allowed = step * norm;
    if (relative) allowed = std::fmax(allowed, std::fabs(wanted));
    if (std::fmax(norm, 2 * allowed) > type.largest) continue;
    // Scales are rounded to floats, by which levels near the norm move a little.
    allowed += 0x1p-14 * allowed + 0x1p-20 * norm;
    allowed += std::fabs(value) * (type.epsilon + 0x1p-20) + type.tiny + 0x1p-147;
    require(std::fabs(value - wanted) <= allowed, d.what, ": off by over a step");
    if (relative) require(value * wanted >= 0, d.what, ": wrong sign");
  }
}

// The levels of reduced codes, against those of the inputs.
void check_levels(const char* what, int narrow, const std::vector<const Bytes*>& inputs,
                  const Bytes& out, int doublings) {
  const int top = (1 << (narrow - 1)) - 1;
  for (size_t i = 0; i < out.size(); ++i)
    for (int shift = 0; shift < 8; shift += narrow) {
      int largest = 0;
      bool plus = false, minus = false;
      for (const Bytes* codes : inputs) {
        const int code = (*codes)[i] >> shift;
        if ((code & top) == 0) continue;
        largest = (code & top) > largest ? code & top : largest;
        ((code & (top + 1)) != 0 ? minus : plus) = true;
      }
      const int code = out[i] >> shift, level = code & top;
      const int limit = largest == 0 ? 0 : largest + doublings;
      require(level <= limit, what, ": a level beyond those of the inputs");
      if (level == 0) continue;
      require((code & (top + 1)) != 0 ? minus : plus, what, ": a sign of no input");
    }
}

void check_reductions(const Case& c, const Results& r) {
  std::vector<const Bytes*> inputs;
  for (const Bytes& piece : c.pieces) inputs.push_back(c.copies ? &r.codes : &piece);
  check_levels("reduce_exponential", c.narrow, inputs, r.reduced, c.average ? 0 : 3);
  if (c.copies && c.average)  // and the other way round: the mean of equal codes is that code
    check_levels("the mean of copies", c.narrow, {&r.reduced}, r.codes, 0);
  check_levels("add_exponential", c.narrow, {&r.codes, &c.pieces[0]}, r.added, 1);
  require(r.added == r.swapped, "add_exponential: the order of the inputs matters");
}

void check(const Case& c, const Results& r) {
  check_norms(c, r);
  const double step = (c.square ? 2.0 * c.levels - 1 : 1.0) / static_cast<double>(c.units);
  const Decoded rounded = {"standard", c.dtype, r.rounded, r.norms};
  check_range(c, rounded, 1);
  check_rounding(c, c.dtype, c.x, rounded, step, false);
  check_range(c, {"words of no rank", c.dtype, r.hostile, r.norms}, 1);

  // The smallest level may lie above the norm, where there is more headroom than 4 bits have room.
  const double smallest = std::ldexp(1.0, c.headroom + (c.narrow == 4 ? -6 : -126));
  const Decoded decoded = {"exponential", c.dtype, r.decoded, r.norms};
  check_range(c, decoded, std::fmax(1.0, smallest));
  check_rounding(c, c.dtype, c.x, decoded, smallest, true);
  check_range(c, {"codes of no rank", c.dtype, r.hostile_codes, r.norms}, 1);

  const Decoded mean = {"mean", kFloat32, r.mean, r.norms};
  check_range(c, mean, 1);
  if (c.copies) check_rounding(c, c.dtype, c.x, mean, step, false);
  const Decoded share = {"two hops", kFloat32, r.share, r.mean_norms};
  check_range(c, share, 1);
  check_rounding(c, kFloat32, r.mean, share, step, false);
  check_reductions(c, r);
}

// ----------------------------------------------------------------------------------------- drivers

void once(const uint8_t* data, size_t size) {
  static const std::vector<Kernels> all = all_kernels();
  Source source(data, size);
  const Case c = draw(source);
  const Case before = c;
  const Results expected = run(all[0], c, 0xa5);
  require(c.read() == before.read(), "a kernel has written to its input");
  check(c, expected);
  for (size_t i = 1; i < all.size(); ++i) {
    const Results r = run(all[i], c, 0x5a);
    const bool same = r.written() == expected.written() &&
                      __builtin_memcmp(r.philox, expected.philox, sizeof r.philox) == 0;
    require(same, all[i].name.c_str(), " gives other bytes than ", all[0].name.c_str());
    require(c.read() == before.read(), "a kernel has written to its input");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  once(data, size);
  return 0;
}

#if !defined(GQ_LIBFUZZER)
namespace {

std::string option(const std::string& word, const std::string& name) {
  return word.compare(0, name.size(), name) == 0 ? word.substr(name.size()) : "";
}

// The file has each input before it is tried, so it is there whatever ends the process.
void try_inputs(double seconds, uint64_t seed, const std::string& path) {
  std::mt19937_64 engine(seed);
  const auto start = std::chrono::steady_clock::now();
  const auto end = start + std::chrono::duration<double>(seconds);
  long long runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    Bytes input(engine() % 4 == 0 ? engine() % 64 : 64 + engine() % 256);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(engine());
    std::ofstream(path, std::ios::binary)
        .write(as<char>(input), static_cast<std::streamsize>(input.size()));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::remove(path.c_str());
  std::fprintf(stderr, "Done %lld runs in %.0f second(s)\n", runs, seconds);
}

}  // namespace

int main(int count, char** words) {
  double seconds = 0;
  uint64_t seed = 1;
  std::string path = "crash-input";
  bool files = false;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (!option(word, "-max_total_time=").empty()) {
      seconds = std::stod(option(word, "-max_total_time="));
    } else if (!option(word, "-seed=").empty()) {
      seed = std::stoull(option(word, "-seed="));
    } else if (!option(word, "-exact_artifact_path=").empty()) {
      path = option(word, "-exact_artifact_path=");
    } else if (word[0] != '-') {
      files = true;
      std::ifstream file(word, std::ios::binary);
      require(file.good(), "cannot read ", word.c_str());
      const Bytes input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
      LLVMFuzzerTestOneInput(input.data(), input.size());
    }
  }
  if (!files) try_inputs(seconds, seed, path);
}
#endif
