// Random and hostile inputs for the host kernels, under AddressSanitizer and UBSan (test_fuzz.py).
//
//     kernels SECONDS SEED
//
// Every buffer is exactly as large as the kernel may touch, so one byte beyond is a report. Any
// payload must decode to finite numbers under a finite norm, as far as the type can hold them.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#define GQ_ISA baseline
#include "../../../mpi_ops/kernels/host.cpp"

namespace {

std::mt19937_64 source;

int64_t below(int64_t end) { return static_cast<int64_t>(source() % static_cast<uint64_t>(end)); }

template <typename T>
struct Heap {
  explicit Heap(int64_t size) : size(size), data(new T[static_cast<size_t>(size)]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
};

Heap<uint8_t> random_bytes(int64_t size) {
  Heap<uint8_t> bytes(size);
  for (int64_t i = 0; i < size; ++i) bytes.data[i] = static_cast<uint8_t>(source());
  return bytes;
}

float special() {
  const float values[] = {0.0f,
                          -0.0f,
                          std::numeric_limits<float>::denorm_min(),
                          std::numeric_limits<float>::min(),
                          std::numeric_limits<float>::max(),
                          -std::numeric_limits<float>::max(),
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN(),
                          1.0f};
  return values[below(10)];
}

constexpr int64_t kItemBytes[] = {4, 8, 2, 2};

// A tensor of any bit patterns; float32 also with values that are special more often than chance.
Heap<uint8_t> tensor(int dtype, int64_t count) {
  Heap<uint8_t> bytes = random_bytes(count * kItemBytes[dtype]);
  if (dtype == kFloat32 && below(2) == 0)
    for (int64_t i = 0; i < count; ++i)
      if (below(3) == 0) {
        const float value = special();
        __builtin_memcpy(bytes.data.get() + 4 * i, &value, 4);
      }
  return bytes;
}

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

// One random case through all kernels.
void once() {
  const int dtype = static_cast<int>(below(4));
  const int64_t count = below(3) == 0 ? below(4) : below(3000);
  const int64_t rows = (count + kRow - 1) / kRow;
  const int64_t block = kRow * (1 + below(12));
  const int64_t blocks = (count + block - 1) / block;
  uint32_t random[4];
  for (uint32_t& word : random) word = static_cast<uint32_t>(source());

  const Heap<uint8_t> x = tensor(dtype, count);
  Heap<int32_t> norms(blocks);
  if (below(2) == 0)
    gq_absmax_baseline(dtype, x.data.get(), count, block, norms.data.get());
  else
    gq_l2norm_baseline(dtype, x.data.get(), count, block, norms.data.get());
  for (int64_t b = 0; b < blocks; ++b) require(norms.data[b] >= 0, "a norm has a sign");
  // As if other ranks had larger norms, or any.
  if (below(3) == 0)
    for (int64_t b = 0; b < blocks; ++b) norms.data[b] = static_cast<int32_t>(source() >> 33);

  const int bits = 2 + static_cast<int>(below(15));
  const int64_t lanes = 32 / bits;
  Heap<int32_t> words((rows + lanes - 1) / lanes * kRow);
  const int levels = 1 + static_cast<int>(below((1 << (bits - 1)) - 1));
  gq_quantize_standard_baseline(dtype, x.data.get(), count, block, norms.data.get(), bits, levels,
                                random, words.data.get());
  Heap<uint8_t> out(count * kItemBytes[dtype]);
  gq_dequantize_standard_baseline(dtype, words.data.get(), count, block, norms.data.get(), bits,
                                  levels, out.data.get());

  const int narrow = below(2) == 0 ? 4 : 8;
  const int64_t size = (rows + 8 / narrow - 1) / (8 / narrow) * kRow;
  Heap<uint8_t> codes(size);
  gq_quantize_exponential_baseline(dtype, x.data.get(), count, block, norms.data.get(), narrow,
                                   static_cast<int>(below(9)), random, codes.data.get());

  // Arbitrary bytes: reduced with those codes, and decoded.
  const int inputs = 1 + static_cast<int>(below(5));
  Heap<Heap<uint8_t>*> owners(inputs);
  Heap<const uint8_t*> pieces(inputs);
  for (int i = 0; i < inputs; ++i) {
    owners.data[i] = new Heap<uint8_t>(random_bytes(size));
    pieces.data[i] = owners.data[i]->data.get();
  }
  gq_reduce_exponential_baseline(pieces.data.get(), inputs, size, narrow, 1.0f / inputs, random,
                                 codes.data.get());
  gq_add_exponential_baseline(pieces.data[0], codes.data.get(), size, narrow, random);
  for (int i = 0; i < inputs; ++i) delete owners.data[i];

  Heap<float> decoded(count);
  const Heap<uint8_t> noise = random_bytes(4 * words.size);
  Heap<int32_t> payload(words.size);
  __builtin_memcpy(payload.data.get(), noise.data.get(), static_cast<size_t>(noise.size));
  const int32_t largest = 0x7f800000;
  for (const bool standard : {true, false}) {
    if (standard)  // lanes beyond the levels may leave the range by that much
      gq_dequantize_standard_baseline(kFloat32, payload.data.get(), count, block, norms.data.get(),
                                      bits, int64_t{1} << (bits - 1), decoded.data.get());
    else
      gq_dequantize_exponential_baseline(kFloat32, codes.data.get(), count, block, norms.data.get(),
                                         narrow, 0, decoded.data.get());
    for (int64_t i = 0; i < count; ++i)
      if (norms.data[i / block] < largest)
        require(std::isfinite(decoded.data[i]), "a finite norm gave a number that is not");
      else
        require(std::isnan(decoded.data[i]), "a norm that is not finite did not give NaN");
  }
}

}  // namespace

int main(int, char** arguments) {
  const auto end =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[1]));
  source.seed(std::strtoull(arguments[2], nullptr, 10));
  long long inputs = 0;
  for (; std::chrono::steady_clock::now() < end; ++inputs) once();
  std::printf("%lld inputs\n", inputs);
}
