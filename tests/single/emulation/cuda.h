// As much of CUDA as device.cu uses, on one thread of a CPU.
//
// The 32 threads of a warp take turns: each runs until it needs the values of others (a shuffle or
// a vote) or ends. The scheduler checks that all threads of a warp come to the same number of
// those, which a GPU would answer with rubbish or with a deadlock.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __CUDACC__
#define __CUDA_ARCH__ 800
#define __global__
#define __launch_bounds__(...)
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

static inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline int64_t __double_as_longlong(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline double __longlong_as_double(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline int __float2int_rn(float value) { return static_cast<int>(__builtin_rintf(value)); }
static inline float __fsqrt_rn(float value) { return __builtin_sqrtf(value); }
static inline double __dsqrt_rn(double value) { return __builtin_sqrt(value); }
static inline int __popc(unsigned value) { return __builtin_popcount(value); }

static inline int atomicMax(int* address, int value) {
  const int old = *address;
  if (value > old) *address = value;
  return old;
}

namespace emulation {

constexpr int kWarp = 32;
constexpr int kStackBytes = 1 << 16;

struct Thread {
  ucontext_t context;
  int turn;  // number of shuffles and votes so far
  bool done;
};
static Thread threads[kWarp];
static char stacks[kWarp][kStackBytes];
static ucontext_t scheduler;
static int current;
// Two sets of what threads show each other: a fast one may come to its next shuffle before a slow
// one has read the values of this one.
static uint64_t shown[2][kWarp];

// What all threads show, after each has shown its value.
template <typename T>
const uint64_t* shown_with(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register or two");
  Thread& own = threads[current];
  uint64_t* values = shown[own.turn++ % 2];
  std::memcpy(&values[current], &value, sizeof value);
  swapcontext(&own.context, &scheduler);
  return values;
}

template <typename T>
T shuffle(T value, int source) {
  const uint64_t* values = shown_with(value);
  std::memcpy(&value, &values[source], sizeof value);
  return value;
}

struct Call {
  void (*run)(const void*);
  const void* arguments;
};
static Call call;

static void thread_main() {
  call.run(call.arguments);
  threads[current].done = true;
}

// False if the threads of the warp did not come to the same shuffles.
static bool run_warp(unsigned first_thread) {
  for (int i = 0; i < kWarp; ++i) {
    Thread& thread = threads[i];
    thread.turn = 0;
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[i];
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, thread_main, 0);
  }
  for (;;) {
    int done = 0;
    for (current = 0; current < kWarp; ++current) {
      threadIdx.x = first_thread + static_cast<unsigned>(current);
      swapcontext(&scheduler, &threads[current].context);
      done += threads[current].done;
    }
    if (done == kWarp) return true;
    if (done > 0) return false;
  }
}

struct Launch {
  unsigned grid, block;
  int count;
  const char* kinds;          // of the arguments: u unsigned or a pointer, i signed, f float
  const int* bytes;           // their sizes
  const void* const* values;  // and where they are
};

template <typename T>
const char* problem_with(const Launch& launch, int i) {
  constexpr bool kUnsigned = std::is_pointer<T>::value || std::is_unsigned<T>::value;
  constexpr char kind = std::is_floating_point<T>::value ? 'f' : kUnsigned ? 'u' : 'i';
  if (i >= launch.count) return "too few arguments";
  if (launch.kinds[i] != kind) return "an argument of another kind than the parameter";
  if (launch.bytes[i] != static_cast<int>(sizeof(T))) return "an argument of another size";
  return nullptr;
}

template <typename... Parameters, size_t... kPlaces>
const char* run_kernel(void (*kernel)(Parameters...), const Launch& launch,
                       std::index_sequence<kPlaces...>) {
  if (launch.count != sizeof...(Parameters)) return "another number of arguments";
  const char* problems[] = {problem_with<Parameters>(launch, kPlaces)...};
  for (const char* problem : problems)
    if (problem) return problem;
  const auto body = [&] { kernel(*static_cast<const Parameters*>(launch.values[kPlaces])...); };
  call.run = [](const void* arguments) { (*static_cast<decltype(&body)>(arguments))(); };
  call.arguments = &body;
  if (launch.block % kWarp != 0) return "a block that is no multiple of a warp";
  gridDim.x = launch.grid;
  blockDim.x = launch.block;
  for (blockIdx.x = 0; blockIdx.x < launch.grid; ++blockIdx.x)
    for (unsigned first = 0; first < launch.block; first += kWarp)
      if (!run_warp(first)) return "threads of a warp that came to different shuffles";
  return nullptr;
}

template <typename... Parameters>
const char* run_kernel(void (*kernel)(Parameters...), const Launch& launch) {
  return run_kernel(kernel, launch, std::index_sequence_for<Parameters...>{});
}

}  // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return emulation::shuffle(value, emulation::current ^ offset);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  return emulation::shuffle(value, emulation::current / width * width + source);
}
static inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* values = emulation::shown_with(static_cast<uint64_t>(value));
  unsigned votes = 0;
  for (int i = 0; i < emulation::kWarp; ++i) votes |= static_cast<unsigned>(values[i]) << i;
  return votes;
}
