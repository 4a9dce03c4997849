"""Quantizers of Global-QSGD and the reductions that need no framework: arrays, kernels, MPI.

Importing this package imports NumPy and nothing else: no MPI is started, no Horovod, torch or
TensorFlow is touched.
"""
