// The kernels of device.cu for one element type (GQ_ELEMENT), or those for codes, as a library.

#include "cuda.h"
// cuda.h has to come first.
#include "device.cu"

// Runs a kernel over its whole grid; nullptr, or what is wrong with the launch.
extern "C" const char* emulate(const char* name, unsigned grid, unsigned block, int count,
                               const char* kinds, const int* bytes, const void* const* values) {
  const emulation::Launch launch = {grid, block, count, kinds, bytes, values};
#define GQ_RUN(kernel) \
  if (std::strcmp(name, #kernel) == 0) return emulation::run_kernel(kernel, launch)
#if defined(GQ_ELEMENT)
  GQ_RUN(gq_absmax);
  GQ_RUN(gq_l2norm);
  GQ_RUN(gq_l2norm_of_partial);
  GQ_RUN(gq_quantize_standard_2);
  GQ_RUN(gq_quantize_standard_4);
  GQ_RUN(gq_quantize_standard_8);
  GQ_RUN(gq_quantize_standard);
  GQ_RUN(gq_quantize_standard_4_square);
  GQ_RUN(gq_quantize_standard_8_square);
  GQ_RUN(gq_quantize_standard_square);
  GQ_RUN(gq_quantize_standard_5_dense);
  GQ_RUN(gq_quantize_standard_6_dense);
  GQ_RUN(gq_quantize_standard_10_dense);
  GQ_RUN(gq_dequantize_standard);
  GQ_RUN(gq_dequantize_standard_dense);
  GQ_RUN(gq_quantize_exponential);
  GQ_RUN(gq_dequantize_exponential);
  GQ_RUN(gq_pack);
  GQ_RUN(gq_unpack);
#else
  GQ_RUN(gq_reduce_exponential);
  GQ_RUN(gq_add_exponential);
  GQ_RUN(gq_mean_standard_2);
  GQ_RUN(gq_mean_standard_4);
  GQ_RUN(gq_mean_standard_8);
  GQ_RUN(gq_mean_standard);
  GQ_RUN(gq_mean_standard_5_dense);
  GQ_RUN(gq_mean_standard_6_dense);
  GQ_RUN(gq_mean_standard_10_dense);
  GQ_RUN(gq_add);
#endif
  return "no such kernel";
}
