"""PowerSGD's reduction: a mean of low rank, its factors summed by Allreduce.

`torch_baselines` has the class that Horovod takes, docs/baselines.md how it differs from the paper.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer, Tensors

from ..path.pipeline import Deliver, Method, Reduction, Task
from .baselines import PowerSGDConfig

__all__ = ["power_sgd"]


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
