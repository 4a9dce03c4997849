"""Other methods for Horovod's PyTorch API: `gq_horovod.research.torch_baselines`."""

from .research.torch_baselines import QSGD, NaturalCompression, NearestRounding, PowerSGD, TernGrad

__all__ = ["QSGD", "NaturalCompression", "NearestRounding", "PowerSGD", "TernGrad"]
