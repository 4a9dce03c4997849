"""Other methods for Horovod's PyTorch API: `gq_horovod.research.torch_baselines`."""

from .research.torch_baselines import (
    QSGD,
    IntSGD,
    NaturalCompression,
    NearestRounding,
    PowerSGD,
    TernGrad,
)

__all__ = ["QSGD", "IntSGD", "NaturalCompression", "NearestRounding", "PowerSGD", "TernGrad"]
