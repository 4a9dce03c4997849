"""Global-QSGD for Horovod's PyTorch API.

    import horovod.torch as hvd
    from gq_horovod.torch import GlobalQSGD

    opt = hvd.DistributedOptimizer(
        opt, named_parameters=model.named_parameters(), compression=GlobalQSGD
    )

What happens to a gradient, from its backward hook on:

1. The hook calls `GlobalQSGD.compress(gradient)`. Tensors that do not qualify (integers, sparse,
   fewer than `min_elements`) are left to Horovod.
2. The norms of its blocks go out as an asynchronous Max-allreduce under the parameter's name, and
   Horovod gets a token to reduce in place of the gradient (see `token`).
3. Whenever a later hook calls, the norms that have arrived are used: the codes go out.
4. `decompress(token)` waits for the codes, and returns the mean, or what else the user's `op` and
   scaling make of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, MethodType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import torch
except ImportError as error:
    raise ImportError(
        "gq_horovod.torch: PyTorch is not installed; `pip install gq-horovod[torch]`, or import "
        "GlobalQSGD from the module of the framework that you use."
    ) from error
try:
    import horovod.torch as hvd
    from horovod.torch import mpi_ops as hvd_ops
    from horovod.torch import optimizer as hvd_optimizer
except ImportError as error:
    raise ImportError(
        "gq_horovod.torch: Horovod with PyTorch support is not installed; build it with "
        "HOROVOD_WITH_PYTORCH=1 (its `horovodrun --check-build` shows what it has)."
    ) from error

from mpi_ops.kernels.host import Buffer

from . import __version__, agreement, token
from .config import (
    DEFAULT_MIN_ELEMENTS,
    PAPER_EXPONENTIAL,
    PAPER_STANDARD,
    Config,
    ConfigMismatchError,
    Plan,
)
from .pipeline import Array, Exchanges, InFlight, Pipeline, Task

__all__ = ["GlobalQSGD", "allreduce"]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


# -------------------------------------------------------------------------------------- collectives


class _Handle(NamedTuple):
    """A Horovod operation in flight; `Handle` of the pipeline."""

    number: int

    def ready(self) -> bool:
        return bool(hvd.poll(self.number))

    def wait(self) -> Array:
        output = hvd.synchronize(self.number)
        if isinstance(output, tuple):  # alltoall also returns the received splits
            output = output[0]
        array: Array = output.numpy()
        return array


@dataclass(frozen=True)
class _Collectives:
    """Horovod's operations on NumPy arrays, among the ranks of one process set."""

    process_set: Any

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> _Handle:
        return self._allreduce(array, name, hvd.Max)

    def allreduce_sum(self, array: NDArray[np.int32], name: str) -> _Handle:
        return self._allreduce(array, name, hvd.Sum)

    def _allreduce(self, array: NDArray[np.int32], name: str, op: int) -> _Handle:
        tensor = torch.from_numpy(array)
        return _Handle(hvd.allreduce_async_(tensor, name=name, op=op, process_set=self.process_set))

    def alltoall(self, array: NDArray[np.uint8], name: str) -> _Handle:
        tensor = torch.from_numpy(array)
        return _Handle(hvd.alltoall_async(tensor, name=name, process_set=self.process_set))

    def allgather(self, array: NDArray[np.uint8], name: str) -> _Handle:
        tensor = torch.from_numpy(array)
        return _Handle(hvd.allgather_async(tensor, name=name, process_set=self.process_set))


# ------------------------------------------------------------------------------------------- caller


class _Caller(NamedTuple):
    """Who called compress(), as far as it matters: it is called with the gradient alone."""

    name: str  # of the operation, the same on every rank
    op: int
    process_set: Any
    scaling: float = 1.0  # of the result, beside what op does
    in_place: bool = False  # whether the result replaces the tensor


_HOOK = hvd_optimizer._DistributedOptimizer._allreduce_grad_async.__code__
_GROUPED_HOOK = hvd_optimizer._DistributedOptimizer._grouped_allreduce_grad_async.__code__
_ADASUM_HOOK = hvd_optimizer._DistributedAdasumOptimizer._allreduce_grad_async.__code__
_ALLREDUCE = hvd_ops.allreduce.__code__
_GROUPED_ALLREDUCE = hvd_ops.grouped_allreduce.__code__


def _find_caller(tensor: torch.Tensor, frame: FrameType | None) -> _Caller:
    """Identify the Horovod function that called compress(tensor), by its code object.

    Names have to come from the parameter, never from a counter: ranks may run their hooks in
    different orders. `frame` is that of the caller of compress().
    """
    for _ in range(2):  # the function itself, or a comprehension inside it
        if frame is None:
            break
        code, variables = frame.f_code, frame.f_locals
        if code is _HOOK:
            return _optimizer_caller(variables["self"], variables["p"])
        if code is _GROUPED_HOOK:
            owner = next(p for p in variables["ps"] if p.grad is tensor)
            return _optimizer_caller(variables["self"], owner)
        if code is _ADASUM_HOOK:
            raise ValueError(
                "GlobalQSGD: op must be hvd.Average or hvd.Sum, got hvd.Adasum, which combines "
                "gradients in a way that quantized sums cannot express; choose another op."
            )
        if code is _ALLREDUCE:
            return _function_caller(variables, variables["name"])
        if code is _GROUPED_ALLREDUCE:
            name, tensors = variables["name"], variables["tensors"]
            index = next(i for i, member in enumerate(tensors) if member is tensor)
            return _function_caller(variables, None if name is None else f"{name}.{index}")
        frame = frame.f_back
    raise RuntimeError(
        "GlobalQSGD: compress() must be called by Horovod's DistributedOptimizer or allreduce, "
        "which tell it the name of the tensor; to reduce a tensor yourself use "
        "gq_horovod.torch.allreduce."
    )


def _optimizer_caller(optimizer: Any, parameter: torch.Tensor) -> _Caller:
    # gradient_predivide_factor only divides before the sum what it multiplies after it.
    name = optimizer._parameter_names[parameter]
    return _checked(_Caller(name, optimizer.op, optimizer.process_set, in_place=True))


def _function_caller(variables: dict[str, Any], name: str | None) -> _Caller:
    if name is None:
        raise ValueError(
            "hvd.allreduce with compression=GlobalQSGD: name must be a string that is the same on "
            "every rank, got None; pass name=."
        )
    op = hvd_ops.handle_average_backwards_compatibility(variables["op"], variables["average"])
    scaling = variables["prescale_factor"] * variables["postscale_factor"]
    return _checked(_Caller(name, op, variables["process_set"], scaling))


def _checked(caller: _Caller) -> _Caller:
    if caller.op not in (hvd.Average, hvd.Sum):
        names = {hvd.Adasum: "Adasum", hvd.Min: "Min", hvd.Max: "Max", hvd.Product: "Product"}
        raise ValueError(
            "GlobalQSGD: op must be hvd.Average or hvd.Sum, got "
            f"hvd.{names.get(caller.op, caller.op)} for tensor {caller.name!r}; use Horovod's own "
            "compression for it."
        )
    return caller


# -------------------------------------------------------------------------------------------- group


@dataclass
class _Group:
    """What belongs to one process set between one hvd.init() and the next."""

    session: object  # identifies that hvd.init()
    rank: int
    plan: Plan
    collectives: _Collectives
    exchanges: Exchanges | None
    pipeline: Pipeline = field(default_factory=Pipeline)
    steps: dict[str, int] = field(default_factory=dict)  # reductions so far, by tensor name

    def next_step(self, name: str) -> int:
        step = self.steps.get(name, 0)
        self.steps[name] = step + 1
        return step


class _Context(NamedTuple):
    """What decompress() has to know about a tensor."""

    group: _Group
    reduction: InFlight
    token: tuple[float, ...]
    factor: float  # result = mean over ranks * factor
    template: torch.Tensor  # on the meta device: shape, dtype and strides, no memory
    device: torch.device


class _ClassOrInstance:
    """A method that Horovod may call on the class, which then stands for its default instance."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, instance: GlobalQSGD | None, owner: type[GlobalQSGD]) -> MethodType:
        return MethodType(self._function, owner._shared(Config()) if instance is None else instance)


class _Preset:
    """A configured instance as an attribute of the class."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __get__(self, instance: GlobalQSGD | None, owner: type[GlobalQSGD]) -> GlobalQSGD:
        return owner._shared(self._config)


class GlobalQSGD:
    """Horovod compression by Global-QSGD: unbiased, and the same result on every rank bit for bit.

    Pass the class itself for the defaults, or an instance. Works with op Average and Sum,
    `gradient_predivide_factor`, `backward_passes_per_step`, `groups`, `sparse_as_dense` and process
    sets.

    Arguments:
        levels: "standard" (evenly spaced levels, summed by Allreduce) or "exponential" (powers of
            two, an error that does not grow with the number of ranks).
        bits: bits per element on the wire, 2 to 16 (standard), 4 or 8 (exponential). None takes 8,
            and for standard levels 10 from 19 ranks and 16 from 74 ranks on.
        block_size: elements that share a norm, a multiple of 32; None for one norm per tensor;
            "auto" takes 256, and None for 8-bit exponential levels.
        norm: "max" or "l2", the norm of a block on one rank; the global norm is the largest.
        min_elements: tensors with fewer elements go through Horovod's own Allreduce.
        seed: key of the dither; runs that share it (and everything else) are reproducible.
        process_set: the process set whose ranks reduce; by default that of the optimizer.
        transport: "horovod" (its Allreduce, Alltoall and Allgather, over MPI, Gloo or NCCL) or
            "mpi" (messages between ranks through mpi4py beside Horovod, in chunks that overlap;
            needs Horovod's MPI controller, MPI_THREAD_MULTIPLE and no hvd.join()).

    A NaN or Inf on any rank makes its block NaN on every rank; a block of zeros stays zeros.
    float16, bfloat16, float32 and float64 are compressed (float64 at the range of float32),
    anything else is left to Horovod. As without compression, an optimizer's gradients are replaced
    where they lie, and tensors of hvd.allreduce are left alone. Gradients on a GPU are staged
    through host memory.

    Raises ValueError or TypeError for options that cannot work, and ConfigMismatchError at the
    first step, on every rank, if the ranks are configured differently.
    """

    paper_standard = _Preset(PAPER_STANDARD)
    """The paper's standard dithering: 8 bits, one norm per tensor."""
    paper_exponential = _Preset(PAPER_EXPONENTIAL)
    """The paper's exponential dithering: 8 bits, one norm per tensor."""

    _instances: ClassVar[dict[tuple[type, Config], GlobalQSGD]] = {}

    def __init__(
        self,
        *,
        levels: Literal["standard", "exponential"] = "standard",
        bits: int | None = None,
        block_size: int | Literal["auto"] | None = "auto",
        norm: Literal["max", "l2"] = "max",
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
        transport: Literal["horovod", "mpi"] = "horovod",
    ) -> None:
        if process_set is not None and not isinstance(process_set, hvd.ProcessSet):
            raise TypeError(
                "GlobalQSGD: process_set must be a horovod.torch.ProcessSet or None, got "
                f"{process_set!r} of type {type(process_set).__name__}; see hvd.add_process_set."
            )
        self.config = Config(
            levels=levels,
            bits=bits,
            block_size=block_size,
            norm=norm,
            min_elements=min_elements,
            seed=seed,
            transport=transport,
        )
        self._process_set = process_set
        self._groups: dict[int, _Group] = {}

    @classmethod
    def _shared(cls, config: Config) -> GlobalQSGD:
        """The instance that stands for the class, or for one of its presets."""
        key = (cls, config)  # a subclass has instances of its own
        if key not in cls._instances:
            cls._instances[key] = cls(**config.describe())
        return cls._instances[key]

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.config.describe().items())
        return f"{type(self).__name__}({options})"

    # -------------------------------------------------------------------------- Horovod's interface

    def _compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start reducing `tensor`, which must not change until decompress(), and return a token."""
        caller = _find_caller(tensor, sys._getframe(1))
        eligible = tensor.numel() >= max(self.config.min_elements, 1) and tensor.dtype in _DTYPES
        if eligible and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"GlobalQSGD: tensor {caller.name!r} must not require gradients, because the "
                "quantized mean is not differentiable; pass tensor.detach()."
            )
        group = self._group(caller.process_set)
        if not eligible:
            return _left_to_horovod(tensor)
        dtype = _DTYPES[tensor.dtype]
        device = tensor.device
        template = torch.empty_like(tensor, device="meta")
        values = tensor.detach().to("cpu").contiguous()
        # The optimizer's gradient is reduced where it lies, as by Horovod itself.
        ours = caller.in_place or values.data_ptr() != tensor.data_ptr()
        task = Task(
            name=f"gq.{caller.name}",
            x=_buffer(values),
            new_output=lambda: _buffer(values if ours else torch.empty_like(values)),
            plan=group.plan,
            collectives=group.collectives,
            rank=group.rank,
            seed=self.config.seed,
            step=group.next_step(caller.name),
            exchanges=group.exchanges,
        )
        mark = token.make(caller.name, values.numel(), dtype)
        reduction = group.pipeline.submit(task)
        factor = caller.scaling * (group.plan.world_size if caller.op == hvd.Sum else 1)
        context = _Context(group, reduction, mark, factor, template, device)
        return torch.tensor(mark, dtype=torch.float64), context

    def _decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The reduced gradient for the token that Horovod reduced."""
        if ctx is None:
            return tensor
        if isinstance(ctx, torch.dtype):
            return tensor.to(ctx)
        assert isinstance(ctx, _Context)
        try:
            token.check(tensor.tolist(), ctx.token, ctx.reduction.name, ctx.group.plan.world_size)
        except ConfigMismatchError:
            ctx.group.pipeline.give_up()
            raise
        mean = ctx.group.pipeline.finish(ctx.reduction).owner
        assert isinstance(mean, torch.Tensor)
        if ctx.factor != 1:
            mean.mul_(ctx.factor)
        if not ctx.template.is_contiguous():
            # A channels_last gradient stays one: its optimizer state has these strides too.
            strided = torch.empty_strided(mean.shape, ctx.template.stride(), dtype=mean.dtype)
            mean = strided.copy_(mean)
        return mean.to(ctx.device)

    compress = _ClassOrInstance(_compress)
    decompress = _ClassOrInstance(_decompress)

    # --------------------------------------------------------------------------------------- groups

    def _group(self, process_set: Any) -> _Group:
        """State for a process set; on first use, checks that its ranks are configured alike."""
        if self._process_set is not None and self._process_set != process_set:
            raise ValueError(
                f"GlobalQSGD: process_set must be that of the caller, ranks {process_set.ranks}, "
                f"got ranks {self._process_set.ranks}; pass the same process_set to both, or only "
                "to Horovod."
            )
        session = hvd_ops._handle_map  # replaced by every hvd.init()
        number = process_set.process_set_id
        group = self._groups.get(number)
        if group is not None and group.session is session:
            return group
        plan = self.config.plan(process_set.size())
        collectives = _Collectives(process_set)
        self._require_agreement(collectives)
        exchanges = None
        if self.config.transport == "mpi":
            from .mpi import Messages

            exchanges = Messages(process_set.ranks or list(range(hvd.size())))
        group = _Group(session, process_set.rank(), plan, collectives, exchanges)
        self._groups[number] = group
        return group

    def _require_agreement(self, collectives: _Collectives) -> None:
        description = {"gq-horovod version": __version__, **self.config.describe()}
        if self.config.transport == "mpi" and (problem := _mpi_problem()):
            remedy = "leave transport out to use Horovod's own operations."
            description = {"error": f"transport='mpi' cannot be used, {problem}; or {remedy}"}
        handle = collectives.allgather(agreement.encode(description), "gq.configuration")
        agreement.require_same(agreement.decode(agreement.wait(handle)))


def _mpi_problem() -> str | None:
    """Why transport="mpi" cannot be used on this rank, or None."""
    if not hvd.mpi_built() or not hvd.mpi_enabled():
        return "because Horovod does not use MPI: start the job with mpirun or horovodrun --mpi"
    if not hvd.mpi_threads_supported():
        return (
            "because Horovod's MPI does not support MPI_THREAD_MULTIPLE: install one that does, "
            "or unset HOROVOD_MPI_THREADS_DISABLE"
        )
    try:
        from . import mpi
    except ImportError as error:
        return f"because mpi4py does not import ({error}): `pip install gq-horovod[mpi]`"
    reason = mpi.problem(hvd.rank(), hvd.size())
    return None if reason is None else f"because {reason}"


def _left_to_horovod(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
    """What Horovod reduces by itself: contiguous tensors; it knows float16 but not bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.float().contiguous(), tensor.dtype
    return tensor.contiguous(), None


def _buffer(tensor: torch.Tensor) -> Buffer:
    return Buffer(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.numel(), tensor)


def allreduce(
    tensor: torch.Tensor,
    name: str,
    *,
    op: int = hvd.Average,
    compression: type[GlobalQSGD] | GlobalQSGD = GlobalQSGD,
    process_set: Any = hvd.global_process_set,
) -> torch.Tensor:
    """Average or sum a tensor over ranks with Global-QSGD, without an optimizer.

    Arguments:
        tensor: any shape, dtype and strides; not modified.
        name: identifies the operation, the same on every rank. Repeated calls may reuse it.
        op: hvd.Average or hvd.Sum.
        compression: GlobalQSGD or an instance of it.
        process_set: the ranks that take part.

    Returns a new tensor of the same shape and dtype, equal on every rank bit for bit. Blocks until
    it is there. Raises ValueError for a missing name, another op or a tensor that requires
    gradients.
    """
    result: torch.Tensor = hvd.allreduce(
        tensor, name=name, op=op, compression=compression, process_set=process_set
    )
    return result
