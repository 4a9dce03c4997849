"""The laboratory: what shows that the method does what it promises. No training step imports it.

- `theory`: closed forms of errors and convergence; docs/theory.md proves them.
- `simulation`: the bytes of a job of many ranks, in one process.
- `baselines`, `torch_baselines`: other methods (QSGD, PowerSGD) on the same path.
- `code_length`: how short codes could be.
- `report`: tables and plots beside published figures.
"""
