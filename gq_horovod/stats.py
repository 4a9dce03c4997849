"""What `GlobalQSGD(stats=True)` measures, for TensorBoard: `gq_horovod.guards.stats`."""

from .guards.stats import TensorStats, write

__all__ = ["TensorStats", "write"]
