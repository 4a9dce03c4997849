"""IntSGD's reduction: integers that Allreduce sums, by a factor that every rank works out itself.

Mishchenko, Wang, Kovalev and Richtarik, "IntSGD: Adaptive floatless compression of stochastic
gradients", ICLR 2022 (arXiv 2102.08374). In step k each of n ranks rounds alpha * g to integers
without bias, and the mean is their sum divided by n * alpha, with

    alpha = rate * sqrt(d) / sqrt(2 * n * r + rate**2 * epsilon**2)
    r     = beta * r + (1 - beta) * (squared norm of the last update of the d parameters)

for each tensor (the paper's blocks). An integer is a code of Global-QSGD's standard levels, by the
norm levels / alpha: the same kernels, lanes and headroom, and a larger element is clipped there.

What a method remembers of a tensor (`Task.state`): "r"; "rate", the learning rate; "x", the last
parameters, and their "digest", where whoever hands over the gradients follows them
(`torch_baselines.IntSGD`); and how many of the elements that were "rounded", of all ranks, were
"clipped".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, lanes, stages
from mpi_ops.chunks import Chunk
from mpi_ops.codec import Norms
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer, Tensors

from ..guards import replicas
from ..path.config import Plan
from ..path.pipeline import Deliver, Method, Reduction, Task
from .baselines import BaselineConfig, array_of

__all__ = ["IntSGDConfig", "begin", "follow", "int_sgd"]

_LARGEST = 2**31 - 1

# What travels behind a chunk, and is summed like it: a one of each rank, and a checksum, two words,
# of what the ranks must have alike. Behind integers also whether an element is not finite, and how
# many were clipped.
_CHECK = 3
_TAIL = 2 + _CHECK
_EXACT = {"int32": _LARGEST, "float32": 2**24}  # the largest sum of such words


@dataclass(frozen=True)
class IntSGDConfig(BaselineConfig):
    """Options of IntSGD."""

    FUNCTION: ClassVar[str] = "IntSGD"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "bits",
        "scale",
        "beta",
        "epsilon",
        "min_elements",
        "seed",
    )

    bits: int | None = 8
    block_size: int | Any | None = None
    scale: Literal["update", "gradient"] = "update"  # what alpha follows
    beta: float = 0.9
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("update", "gradient"):
            self._fail("scale", "'update' or 'gradient'", self.scale, "choose one of them")
        for name in ("beta", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"{self.FUNCTION}: {name} must be a number, got {value!r} of type "
                    f"{type(value).__name__}; pass a float."
                )
        if not 0 <= self.beta < 1:
            self._fail("beta", "0 or more and below 1", self.beta, "the paper has 0.9")
        if not 0 < self.epsilon < math.inf:
            self._fail("epsilon", "more than 0, and finite", self.epsilon, "the paper has 1e-8")


def int_sgd(config: IntSGDConfig) -> Method:
    """IntSGD as a way through the pipeline, for tasks of float32."""
    return Method(partial(_reduce, config=config), partial(_decode, config=config))


def begin(state: dict[str, Any], count: int) -> None:
    """Forget what was kept of a tensor that had another number of elements."""
    if state.get("count") != count:
        state.clear()
        state["count"] = count


def follow(state: dict[str, Any], update: Buffer, config: IntSGDConfig) -> None:
    """Take the squared norm of an update into the moving average r.

    The kernel sums in one order on every machine. A norm that is not finite is left out: it would
    stay in r. The first square is r itself, as in the authors' code; an average that begins at zero
    would make alpha sqrt(10) times too large.
    """
    norms = host.l2norm(update, lanes.whole_tensor_block(update.size))
    (norm,) = norms.view(np.float32).tolist()
    if math.isfinite(norm):
        before, square = state.get("r"), norm**2
        state["r"] = config.beta * before + (1 - config.beta) * square if before else square


def _norm(state: dict[str, Any], plan: Plan, config: IntSGDConfig) -> Norms | None:
    """levels / alpha, the largest element that is not clipped; None where alpha is not known.

    Python's floats are those of IEEE 754, so all ranks get the same bits from the same state.
    """
    r, rate = state.get("r"), state.get("rate", 1.0)
    if not r or not rate:
        return None
    floor = rate * config.epsilon
    spread = math.sqrt(2 * plan.world_size * r + floor * floor)
    with np.errstate(over="ignore"):
        norm = np.float32(plan.level_count * spread / (abs(rate) * math.sqrt(state["count"])))
    if not 0 < norm < math.inf:
        return None
    return np.array([norm], dtype=np.float32).view(np.int32)


def _reduce(task: Task, deliver: Deliver, config: IntSGDConfig) -> Reduction:
    """Sum integers; or shares of the mean, in the steps for which there is no alpha."""
    begin(task.state, task.tensor.size)
    norms = _norm(task.state, task.plan, config)
    sums = []
    for chunk in task.chunks(np.zeros(1, np.int32) if norms is None else norms):
        own = _share(task, chunk) if norms is None else _integers(task, chunk)
        # One name for both: ranks that disagree get Horovod's error, and do not wait for ever.
        name = task.operation(stages.codes(chunk.index))
        sums.append((chunk, task.collectives.allreduce_sum(own, name)))
    for chunk, handle in sums:
        deliver(chunk, (yield handle))


def _share(task: Task, chunk: Chunk) -> NDArray[np.float32]:
    """This rank's share of the mean, and the tail.

    Divided first, so that no sum exceeds the largest element.
    """
    x = array_of(chunk.of(task.tensor))
    message = np.empty(x.size + _CHECK, dtype=np.float32)
    np.divide(x, np.float32(task.plan.world_size), out=message[: x.size])
    message[x.size :] = _check(task, None, message.dtype)
    return message


def _integers(task: Task, chunk: Chunk) -> NDArray[np.int32]:
    """This rank's integers in lanes, and the tail."""
    plan, x = task.plan, chunk.of(task.tensor)
    words = lanes.standard_words(x.size, plan.bits)
    message = np.empty(words + _TAIL, dtype=np.int32)
    # Ranks round independently of each other, as in the paper.
    name = f"{task.key}.{chunk.index}"
    random = dither(task.seed, name, task.step, task.rank, Stage.QUANTIZE)
    codec.quantize(x, chunk.norms, plan, random, out=message[:words])
    (norm,), (largest,) = chunk.norms, codec.norms(x, plan)
    clipped = 0
    if largest > norm:
        limit = chunk.norms.view(np.float32)
        clipped = min(int((np.abs(array_of(x)) > limit).sum()), _LARGEST // plan.world_size)
    bad = largest >= codec.INFINITY
    message[words:] = bad, clipped, *_check(task, chunk.norms, message.dtype)
    return message


def _check(task: Task, norms: Norms | None, dtype: Any) -> list[int]:
    """A one, and a checksum of the norm and the parameters; as many ranks as there are can add it.

    Both are in it: replicas that differ make nearly the same updates, and often the same alpha.
    """
    parts = [[] if norms is None else norms, task.state.get("digest", [])]
    words = replicas.digest(np.concatenate(parts, dtype=np.int32, casting="unsafe").view(np.uint8))
    return [1, *(words % (_EXACT[str(dtype)] // task.plan.world_size)).tolist()]


def _require_same(
    task: Task, norms: Norms | None, total: NDArray[Any], config: IntSGDConfig
) -> None:
    """Raise RuntimeError if a rank took no part, or the ranks' checksums differ."""
    ranks, name = task.plan.world_size, stages.user_name(task.key)
    present, *checksum = total.tolist()
    if present != ranks:
        raise RuntimeError(
            f"{config.FUNCTION}: all {ranks} ranks must reduce tensor {name!r}, got "
            f"{int(present)}: the others have called hvd.join(), after which ranks would have "
            "another alpha than these; give every rank as many batches."
        )
    if checksum != [ranks * word for word in _check(task, norms, total.dtype)[1:]]:
        raise RuntimeError(
            f"{config.FUNCTION}: the ranks must agree on alpha and on the parameters of tensor "
            f"{name!r}, got others on some rank; broadcast parameters and optimizer state before "
            "the first step (hvd.broadcast_parameters, hvd.broadcast_optimizer_state), and set "
            "the same learning rate on every rank."
        )


def _decode(
    task: Task, chunk: Chunk, total: NDArray[Any], means: Tensors, config: IntSGDConfig
) -> None:
    """Write the mean of a chunk to its part of `means`, float32."""
    plan, buffer = task.plan, task.buffer(means)
    out = chunk.of(buffer)
    if total.dtype == np.float32:
        _require_same(task, None, total[-_CHECK:], config)
        mean = array_of(out)
        np.copyto(mean, total[:-_CHECK])
        mean[~np.isfinite(mean)] = np.nan
    else:
        _require_same(task, chunk.norms, total[-_CHECK:], config)
        codes, (bad, clipped) = total[:-_TAIL], total[-_TAIL:-_CHECK].tolist()
        task.state["clipped"] = task.state.get("clipped", 0) + clipped
        task.state["rounded"] = task.state.get("rounded", 0) + out.size * plan.world_size
        if bad:
            array_of(out).fill(np.nan)
        else:
            codec.dequantize(codes, chunk.norms, plan, out)
    if chunk.stop == buffer.size and "x" not in task.state:
        follow(task.state, buffer, config)
