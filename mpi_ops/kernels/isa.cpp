// What the library is: the digest of the sources that it was built from (setup.py), and the best
// instruction set.

#if !defined(GQ_FINGERPRINT)
#define GQ_FINGERPRINT "unknown"
#endif

extern "C" __attribute__((visibility("default"))) const char* gq_fingerprint() {
  return GQ_FINGERPRINT;
}

// Names the best instruction set of this CPU among those that host.cpp was compiled for.

extern "C" __attribute__((visibility("default"))) const char* gq_best_isa() {
#if defined(GQ_X86_64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "x86_64_v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("fma"))
    return "x86_64_v3";
#endif
  return "baseline";
}
