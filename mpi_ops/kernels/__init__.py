"""Quantization kernels. `host` runs on CPUs, `device` on NVIDIA GPUs; both give the same bytes."""
