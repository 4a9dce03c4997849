"""The path of a gradient, for every framework: what a training step runs.

- `config`: the options, and the plan that follows from them for a number of ranks.
- `agreement`: all ranks compare their options before the first gradient moves.
- `pipeline`: norm, quantize, reduce, dequantize, with many tensors in flight.
- `token`: what Horovod itself reduces in place of a gradient.
- `auto`: tries several ways on the first steps, and stays with the fastest.
- `mpi`: codes as messages between ranks, beside Horovod's operations.
"""
