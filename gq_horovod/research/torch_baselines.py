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

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer, Tensors

from ..path.config import DEFAULT_MIN_ELEMENTS
from ..path.pipeline import Deliver, Method, Reduction, Task
from ..torch import TorchFrontend
from .baselines import (
    GATHER,
    GATHER_POWERS_OF_TWO,
    NEAREST,
    NaturalConfig,
    NearestConfig,
    PowerSGDConfig,
    QSGDConfig,
    TernGradConfig,
)

__all__ = ["QSGD", "NaturalCompression", "NearestRounding", "PowerSGD", "TernGrad"]


class _Baseline(TorchFrontend):
    """What the baselines share: they read host memory, and decode to float32."""

    RESULT_DTYPE = torch.float32

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu").contiguous()


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
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
    ) -> None:
        """Configure it.

        Arguments:
            bits: bits per element on the wire, 2 to 16; 2**(bits-1) - 1 levels on each side of
                zero.
            block_size: elements that share a norm (a bucket of the paper), a multiple of 32; None
                for one norm per tensor.
            norm: "max", as in the paper's experiments, or "l2", as in its theorems.
            min_elements, seed, process_set: as in GlobalQSGD.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = QSGDConfig(
            bits=bits, block_size=block_size, norm=norm, min_elements=min_elements, seed=seed
        )
        super().__init__(config, process_set)

    def _method(self) -> Method:
        return GATHER


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

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", torch.float32).contiguous()  # rounded by NumPy


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

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", torch.float32).contiguous()


def power_sgd(config: PowerSGDConfig) -> Method:
    """PowerSGD as a way through the pipeline, for tasks whose buffers belong to torch tensors."""
    return Method(partial(_reduce_factors, config=config), _multiply_factors)


def _reduce_factors(task: Task, deliver: Deliver, config: PowerSGDConfig) -> Reduction:
    """One step of power iteration on the mean of all ranks' matrices (algorithm 1 of the paper)."""
    matrix = _matrix(task.tensor)
    shape = list(matrix.shape)
    if task.state.get("shape") != shape:  # what was kept is that of another tensor
        task.state.clear()
        task.state["shape"] = shape
    if "error" in task.state:
        matrix = matrix + task.state["error"]  # a new one: until it is decoded, x must not change
    right = task.state.get("right")
    if right is None:
        right = _random(task, (matrix.shape[1], config.rank))

    with _own_precision():
        left = matrix @ right
    left = torch.from_numpy((yield task.collectives.allreduce_sum(left.numpy(), f"{task.name}.p")))
    left = _orthonormal(left)
    with _own_precision():
        own = matrix.T @ left
    right = own.clone()  # the reduction overwrites it
    right = torch.from_numpy(
        (yield task.collectives.allreduce_sum(right.numpy(), f"{task.name}.q"))
    )
    right /= task.plan.world_size

    # A gradient that is not finite is lost on every rank alike, and must not stay in the memory.
    if bool(right.isfinite().all()):
        if config.error_feedback:
            with _own_precision():
                task.state["error"] = torch.addmm(matrix, left, own.T, alpha=-1)
        if config.warm_start:
            task.state["right"] = right
    deliver(None, (left, right))


def _multiply_factors(
    task: Task, part: None, factors: tuple[torch.Tensor, torch.Tensor], out: Tensors
) -> None:
    """The mean from its two factors, into `out`."""
    left, right = factors
    mean = _matrix(task.buffer(out))
    if bool(right.isfinite().all()):
        with _own_precision():
            torch.mm(left, right.T, out=mean)
    else:
        mean.fill_(torch.nan)


def _matrix(buffer: Buffer) -> torch.Tensor:
    """A buffer's tensor as a matrix that shares its memory: the first dimension by all others."""
    tensor = buffer.owner
    assert isinstance(tensor, torch.Tensor)
    return tensor.view(tensor.shape[0], -1)


def _own_precision() -> torch.autocast:
    """Inside, matrices are multiplied as they are, also in a region of torch.autocast."""
    return torch.autocast("cpu", enabled=False)


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of the matrix; NaN where one of them is not finite.

    By Householder reflections: columns that are zero or depend on others become any that complete
    the rest, in place of a division by zero.
    """
    if not bool(matrix.isfinite().all()):
        return torch.full_like(matrix, torch.nan)
    return torch.linalg.qr(matrix).Q


def _random(task: Task, shape: tuple[int, int]) -> torch.Tensor:
    """Normal numbers, the same on every rank, and others for every tensor and step."""
    words: NDArray[np.uint32] = dither(task.seed, task.name, task.step, 0, Stage.QUANTIZE)
    return torch.from_numpy(np.random.default_rng(words).standard_normal(shape, dtype=np.float32))
