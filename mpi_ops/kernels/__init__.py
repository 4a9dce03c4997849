"""Quantization kernels. `host` runs on CPUs."""
