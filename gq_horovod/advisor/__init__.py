"""What tells a user which options to take, before or beside a training.

- `model`: predicts the time and the bytes of a step.
- `calibrate`: measures what the model has to know of a cluster; `replayed`: computation for it.
- `doctor`: what is wrong with an installation.
"""
