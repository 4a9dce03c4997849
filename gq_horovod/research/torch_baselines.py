"""Baselines for PyTorch: other compressors in the place of `GlobalQSGD`, to compare it with.

    import horovod.torch as hvd
    from gq_horovod.torch_baselines import QSGD

    opt = hvd.DistributedOptimizer(
        opt, named_parameters=model.named_parameters(), compression=QSGD(bits=8)
    )

Each is used like `gq_horovod.torch.GlobalQSGD`, as a class or as an instance, and shares its
pipeline. Gradients on a GPU are staged through host memory. None of them works with hvd.join().
What each is and how it differs from its paper is in docs/baselines.md.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from mpi_ops.kernels.host import Buffer

from ..frontend import per_process
from ..guards import replicas
from ..path.config import DEFAULT_MIN_ELEMENTS
from ..path.pipeline import Method
from ..torch import TorchFrontend
from ..torch.buckets import Settled
from .baselines import (
    GATHER,
    GATHER_ELIAS,
    GATHER_POWERS_OF_TWO,
    NEAREST,
    NaturalConfig,
    NearestConfig,
    PowerSGDConfig,
    QSGDConfig,
    TernGradConfig,
)
from .int_sgd import IntSGDConfig, begin, follow, int_sgd
from .power_sgd import power_sgd

__all__ = ["QSGD", "IntSGD", "NaturalCompression", "NearestRounding", "PowerSGD", "TernGrad"]


class _Baseline(TorchFrontend):
    """What the baselines share: they read host memory, and decode to float32."""

    RESULT_DTYPE = torch.float32
    STAGED_DTYPE: ClassVar[torch.dtype | None] = None  # in which they are read; None: the tensor's

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", self.STAGED_DTYPE or tensor.dtype).contiguous()


# ------------------------------------------------------------------------------------- quantization


class QSGD(_Baseline):
    """QSGD (Alistarh et al., NeurIPS 2017): codes by each rank's own norms, gathered by all ranks.

    Unbiased. Every rank decodes the codes of all n ranks and adds them up in the same order, so all
    get the same bytes. Each receives n - 1 times the compressed size.
    """

    CONFIG = QSGDConfig

    def __init__(
        self,
        *,
        bits: int = 8,
        block_size: int | None = 512,
        norm: Literal["max", "l2"] = "max",
        coding: Literal["fixed", "elias"] = "fixed",
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it.

        Arguments:
            bits: bits per element, 2 to 16; 2**(bits-1) - 1 levels on each side of zero.
            block_size: elements that share a norm (a bucket of the paper), a multiple of 32; None
                for one norm per tensor.
            norm: "max", as in the paper's experiments, or "l2", as in its theorems.
            coding: how codes travel: "fixed" in `bits` bits each, "elias" in Elias gamma codes, 1
                to 2 * bits bits each. Both give the same result, bit for bit.
            min_elements, seed, process_set: as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = QSGDConfig(
            bits=bits,
            block_size=block_size,
            norm=norm,
            coding=coding,
            min_elements=min_elements,
            seed=seed,
        )
        super().__init__(config, process_set)

    def _method(self) -> Method:
        assert isinstance(self.config, QSGDConfig)
        return GATHER_ELIAS if self.config.coding == "elias" else GATHER


class TernGrad(_Baseline):
    """TernGrad (Wen et al., NeurIPS 2017): signs times each rank's largest element, or zeros.

    Unbiased. Two bits per element, gathered and added up like those of QSGD.
    """

    CONFIG = TernGradConfig

    def __init__(
        self,
        *,
        block_size: int | None = None,
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it.

        Arguments:
            block_size: elements that share a norm, a multiple of 32; None, as in the paper, for one
                norm per tensor.
            min_elements, seed, process_set: as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = TernGradConfig(block_size=block_size, min_elements=min_elements, seed=seed)
        super().__init__(config, process_set)

    def _method(self) -> Method:
        return GATHER


class NaturalCompression(_Baseline):
    """Natural compression (Horvath et al., 2019): each element rounded to a power of two.

    Unbiased. Eight bits per element, gathered and added up like those of QSGD.
    """

    CONFIG = NaturalConfig

    def __init__(
        self,
        *,
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it; the arguments are as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        super().__init__(NaturalConfig(min_elements=min_elements, seed=seed), process_set)

    def _method(self) -> Method:
        return GATHER_POWERS_OF_TWO


class NearestRounding(_Baseline):
    """What not to do: Global-QSGD's standard levels, but rounded to the nearest.

    Biased: what is less than half a level away from zero on all ranks is lost in every step.
    """

    CONFIG = NearestConfig
    STAGED_DTYPE = torch.float32  # rounded by NumPy

    def __init__(
        self,
        *,
        bits: int = 8,
        block_size: int | Literal["auto"] | None = "auto",
        norm: Literal["max", "l2"] = "max",
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        process_set: Any = None,
    ) -> None:
        """Configure it; the arguments are as in GlobalQSGD, but nothing is random.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = NearestConfig(
            bits=bits, block_size=block_size, norm=norm, min_elements=min_elements
        )
        super().__init__(config, process_set)

    def _method(self) -> Method:
        return NEAREST


# ----------------------------------------------------------------------------------------- integers


class IntSGD(_Baseline):
    """IntSGD (Mishchenko et al., ICLR 2022): integers by a factor that needs no communication.

    Each rank rounds alpha * gradient to integers, without bias; they are summed by Allreduce. alpha
    follows from how far the tensor's parameter has moved lately, which every rank knows. An integer
    beyond 127 // n (8 bits, n ranks) is clipped, which is a bias; `clipped()` counts it.

    The first step is reduced as float32, and so is every step up to the first in which something
    moves, and one with a learning rate of zero. Loss scaling does not suit `scale="update"`: it
    multiplies gradients and not updates.

    Memory: a copy of each compressed parameter in float32, with `scale="update"`.
    """

    CONFIG = IntSGDConfig
    STAGED_DTYPE = torch.float32

    def __init__(
        self,
        *,
        bits: int | None = 8,
        scale: Literal["update", "gradient"] = "update",
        beta: float = 0.9,
        epsilon: float = 1e-8,
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it.

        Arguments:
            bits: bits of an integer on the wire, 2 to 16, as in GlobalQSGD; None grows with the
                number of ranks.
            scale: what alpha follows: "update", the parameter's as in the paper; "gradient", the
                averaged gradients, as in the authors' code. They agree for plain SGD. Choose
                "gradient" for optimizers like Adam, whose updates are not as large as gradients.
                Tensors that no DistributedOptimizer handed over have no parameter, and follow the
                gradient.
            beta: weight of the past in the moving average of their squares, 0 up to 1.
            epsilon: bounds alpha where nothing moves, more than 0.
            min_elements, seed, process_set: as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = IntSGDConfig(
            bits=bits,
            scale=scale,
            beta=beta,
            epsilon=epsilon,
            min_elements=min_elements,
            seed=seed,
        )
        super().__init__(config, process_set)

    def clipped(self) -> dict[str, float]:
        """The share of elements that was clipped so far, of all ranks, by the tensor's name.

        Of a tensor that several process sets reduce, in all of them. Tensors that have not been
        reduced as integers are left out.
        """
        clipped, rounded = Counter[str](), Counter[str]()
        for group in self._groups.values():
            for key, memory in group.memories.items():
                clipped[key] += memory.get("clipped", 0)
                rounded[key] += memory.get("rounded", 0)
        return {key: clipped[key] / count for key, count in rounded.items() if count}

    def _method(self) -> Method:
        assert isinstance(self.config, IntSGDConfig)
        return int_sgd(self.config)

    @per_process
    def _places(self) -> weakref.WeakKeyDictionary[Any, tuple[int, dict[torch.Tensor, int]]]:
        """Of each optimizer: how many param_groups it had, and in which one each parameter is."""
        return weakref.WeakKeyDictionary()

    def _rate(self, optimizer: Any, parameter: torch.Tensor) -> float:
        """The learning rate of a parameter in the coming step."""
        groups = optimizer.param_groups
        count, places = self._places.get(optimizer, (0, {}))
        if count != len(groups) or parameter not in places:
            places = {own: at for at, group in enumerate(groups) for own in group["params"]}
            self._places[optimizer] = len(groups), places
        # By its place, as load_state_dict() makes new groups.
        return float(groups[places[parameter]]["lr"])

    def _arrive(
        self, tensor: torch.Tensor, settled: Settled, optimizer: Any, parameter: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        config = self.config
        assert isinstance(config, IntSGDConfig)
        name = optimizer._parameter_names[parameter]
        if config.scale == "update" and self._eligible(name, tensor):
            key = settled.key(name, optimizer)
            memory = settled.group.memories.setdefault(key, {})
            begin(memory, parameter.numel())
            x = parameter.detach().to("cpu", torch.float32).flatten().clone()
            if "x" in memory:
                moved = x - memory["x"]
                buffer = Buffer(moved.data_ptr(), "float32", moved.numel(), moved)
                follow(memory, buffer, config)
            memory["x"] = x
            # As numbers, so that a checkpoint can be loaded with weights_only=True.
            memory["digest"] = replicas.digest(x.numpy().view(np.uint8)).tolist()
            memory["rate"] = self._rate(optimizer, parameter)
        return super()._arrive(tensor, settled, optimizer, parameter)


# ----------------------------------------------------------------------------------------- low rank


class PowerSGD(_Baseline):
    """PowerSGD (Vogels et al., NeurIPS 2019): a mean of low rank, its factors by Allreduce.

    Biased; the error of a step is added to the next. A gradient is a matrix as in the paper: its
    first dimension by all others. Where the factors are not smaller than the matrix, and where
    there is one dimension only, Horovod reduces the gradient itself, uncompressed.

    Memory: each rank keeps an error of the gradient's size for every compressed tensor, in float32,
    in which it computes. A step in which a gradient is not finite gives NaN on every rank and
    leaves the memory as it was. Replicas are equal bit for bit if Horovod's Allreduce gives the
    same bytes on every rank, and torch computes the same on every host.
    """

    CONFIG = PowerSGDConfig
    STAGED_DTYPE = torch.float32

    def __init__(
        self,
        *,
        rank: int = 4,
        warm_start: bool = True,
        error_feedback: bool = True,
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it.

        Arguments:
            rank: columns of the two factors, 1 or more.
            warm_start: begin a step with the factor of the step before; else with random numbers.
            error_feedback: add what a step leaves out of a rank's gradient to its next one.
            seed: of the random numbers, which are the same on every rank.
            min_elements, process_set: as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = PowerSGDConfig(
            rank=rank,
            warm_start=warm_start,
            error_feedback=error_feedback,
            min_elements=min_elements,
            seed=seed,
        )
        super().__init__(config, process_set)

    def _method(self) -> Method:
        assert isinstance(self.config, PowerSGDConfig)
        return power_sgd(self.config)

    def _eligible(self, name: str, tensor: torch.Tensor) -> bool:
        assert isinstance(self.config, PowerSGDConfig)
        matrix = self.config.shape(tuple(tensor.shape))
        return matrix is not None and super()._eligible(name, tensor)
