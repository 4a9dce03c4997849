"""Global-QSGD for Horovod's PyTorch API.

    import horovod.torch as hvd
    from gq_horovod.torch import GlobalQSGD

    opt = hvd.DistributedOptimizer(
        opt, named_parameters=model.named_parameters(), compression=GlobalQSGD
    )

What happens to a gradient, from its backward hook on:

1. The hook calls `GlobalQSGD.compress(gradient)`. Tensors that do not qualify (integers, sparse,
   fewer than `min_elements`) are left to Horovod.
2. The norms of its blocks go out as an asynchronous Max-allreduce under the parameter's name (from
   a GPU, once it is done with the gradient), and Horovod gets a token to reduce in place of the
   gradient (see `token`).
3. Whenever a later hook calls, the norms that have arrived are used: the codes go out.
4. `decompress(token)` waits for the codes, and returns the mean, or what else the user's `op` and
   scaling make of it.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
import zlib
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from types import FrameType
from typing import Any, ClassVar, NamedTuple

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

from mpi_ops.chunks import Chunk
from mpi_ops.kernels.host import Buffer

from . import agreement, log, replicas, token, watchdog
from .auto import Trials, Way
from .config import Config, ConfigMismatchError, Plan
from .frontend import ClassOrInstance, Compression, Frontend, require_linear, require_name
from .pipeline import Array, Exchanges, InFlight, Method, Pipeline, Task
from .stats import Sample

__all__ = ["GlobalQSGD", "TorchFrontend", "allreduce"]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_STEP = "step"  # of what ranks tell each other when they compare configurations: may differ

# Held by a hook: autograd has a thread for each device that parameters lie on. Of the module, since
# instances may be copied and pickled.
_HOOKS = threading.RLock()


# -------------------------------------------------------------------------------------- collectives


class _Written(NamedTuple):
    """What a GPU had to do when a gradient was handed over; `Handle` of the pipeline."""

    event: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


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

    def allreduce_sum(self, array: Array, name: str) -> _Handle:
        return self._allreduce(array, name, hvd.Sum)

    def _allreduce(self, array: Array, name: str, op: int) -> _Handle:
        tensor = torch.from_numpy(array)
        return _Handle(hvd.allreduce_async_(tensor, name=name, op=op, process_set=self.process_set))

    def alltoall(self, array: Array, name: str) -> _Handle:
        tensor = torch.from_numpy(array)
        return _Handle(hvd.alltoall_async(tensor, name=name, process_set=self.process_set))

    def allgather(self, array: Array, name: str) -> _Handle:
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
    optimizer: Any = None


_HOOK = hvd_optimizer._DistributedOptimizer._allreduce_grad_async.__code__
_GROUPED_HOOK = hvd_optimizer._DistributedOptimizer._grouped_allreduce_grad_async.__code__
_ADASUM_HOOK = hvd_optimizer._DistributedAdasumOptimizer._allreduce_grad_async.__code__
_ALLREDUCE = hvd_ops.allreduce.__code__
_GROUPED_ALLREDUCE = hvd_ops.grouped_allreduce.__code__


def _find_caller(tensor: torch.Tensor, frame: FrameType | None, function: str) -> _Caller:
    """Identify the Horovod function that called compress(tensor), by its code object.

    Names have to come from the parameter, never from a counter: ranks may run their hooks in
    different orders. `frame` is that of the caller of compress(), `function` what errors name.
    """
    for _ in range(2):  # the function itself, or a comprehension inside it
        if frame is None:
            break
        code, variables = frame.f_code, frame.f_locals
        if code is _HOOK:
            return _optimizer_caller(variables["self"], variables["p"], function)
        if code is _GROUPED_HOOK:
            owner = next(p for p in variables["ps"] if p.grad is tensor)
            return _optimizer_caller(variables["self"], owner, function)
        if code is _ADASUM_HOOK:
            raise ValueError(
                f"{function}: op must be hvd.Average or hvd.Sum, got hvd.Adasum, which combines "
                "gradients in a way that quantized sums cannot express; choose another op."
            )
        if code is _ALLREDUCE:
            return _function_caller(variables, variables["name"], function)
        if code is _GROUPED_ALLREDUCE:
            name, tensors = variables["name"], variables["tensors"]
            index = next(i for i, member in enumerate(tensors) if member is tensor)
            member_name = None if name is None else f"{name}.{index}"
            return _function_caller(variables, member_name, function)
        frame = frame.f_back
    raise RuntimeError(
        f"{function}: compress() must be called by Horovod's DistributedOptimizer or allreduce, "
        "which tell it the name of the tensor; to reduce a tensor yourself use "
        "gq_horovod.torch.allreduce."
    )


def _optimizer_caller(optimizer: Any, parameter: torch.Tensor, function: str) -> _Caller:
    # gradient_predivide_factor only divides before the sum what it multiplies after it.
    name = optimizer._parameter_names[parameter]
    require_linear(hvd, optimizer.op, name, function)
    return _Caller(name, optimizer.op, optimizer.process_set, in_place=True, optimizer=optimizer)


def _function_caller(variables: dict[str, Any], name: str | None, function: str) -> _Caller:
    op = hvd_ops.handle_average_backwards_compatibility(variables["op"], variables["average"])
    scaling = variables["prescale_factor"] * variables["postscale_factor"]
    name = require_name(name, function)
    require_linear(hvd, op, name, function)
    return _Caller(name, op, variables["process_set"], scaling)


# -------------------------------------------------------------------------------------------- group


@dataclass
class _Group:
    """What belongs to one process set between one hvd.init() and the next."""

    session: object  # identifies that hvd.init()
    rank: int
    plan: Plan
    collectives: _Collectives
    exchanges: Exchanges | None
    pipeline: Pipeline
    trials: Trials | None  # where levels="auto"
    census: log.Census | None  # of its tensors, on the rank that logs them
    # Of the first reduction of each tensor. Not 0 in a session that follows another one, such as
    # after a lost worker: the dither of steps that were is not used again.
    first_step: int
    steps: dict[str, int] = field(default_factory=dict)  # the next one of each tensor, by its name
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)  # of methods, by tensor name
    # Steps of the optimizers, where their parameters are compared between ranks.
    checked: weakref.WeakKeyDictionary[Any, replicas.Steps] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    checks: list[replicas.Check] = field(default_factory=list)  # of those, under way

    def next_step(self, name: str) -> int:
        step = self.steps.get(name, self.first_step)
        self.steps[name] = step + 1
        return step

    def end_step(self) -> int:
        """A step that no tensor has reached."""
        return max(self.steps.values(), default=self.first_step)

    def state_dict(self) -> dict[str, Any]:
        """What TorchFrontend.state_dict() has of this group."""
        return {
            "rank": self.rank,
            "world_size": self.plan.world_size,
            "first_step": self.first_step,
            "steps": dict(self.steps),
            "memories": {name: dict(memory) for name, memory in self.memories.items()},
            "trials": None if self.trials is None else self.trials.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned on this rank of a group of this size."""
        self.first_step = state["first_step"]
        self.steps = dict(state["steps"])
        self.memories = {name: dict(memory) for name, memory in state["memories"].items()}
        if self.trials is not None:
            self.trials.load_state_dict(state["trials"])


class _Context(NamedTuple):
    """What decompress() has to know about a tensor."""

    group: _Group
    reduction: InFlight
    token: tuple[float, ...]
    factor: float  # result = mean over ranks * factor
    strides: tuple[int, ...] | None  # of the result; None: contiguous
    dtype: torch.dtype
    device: torch.device
    sample: Sample | None  # of a step whose statistics are collected


class TorchFrontend(Frontend):
    """Horovod's interface for PyTorch, for methods of any kind."""

    HVD = hvd
    RESULT_DTYPE: ClassVar[torch.dtype | None] = None  # of what is decoded; None: the tensor's own

    @cached_property
    def _groups(self) -> dict[int, _Group]:
        """What belongs to the process sets, by their ids."""
        return {}

    @cached_property
    def _handed(self) -> dict[str, weakref.ref[torch.Tensor]]:
        """What Horovod was last given to reduce for a tensor, by its name."""
        return {}

    @cached_property
    def _loaded(self) -> dict[int, dict[str, Any]]:
        """Of load_state_dict(), for process sets that have reduced nothing since, by their ids."""
        return {}

    # ------------------------------------------------------------------ what depends on the method

    def _method(self) -> Method | None:
        """The way that tensors go. None: one of Global-QSGD's, which follow from the options."""
        return None

    def _eligible(self, tensor: torch.Tensor) -> bool:
        """Whether to compress a tensor; Horovod reduces the others."""
        return tensor.numel() >= max(self.config.min_elements, 1) and tensor.dtype in _DTYPES

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy, contiguous and where the method can read it."""
        return _readable(tensor)

    def _sample(self, values: torch.Tensor, step: int) -> Sample | None:
        """What to collect statistics of this step in, if it is one of those."""
        return None

    def _collect(self, task: Task, sample: Sample) -> None:
        """Keep the statistics of a reduction that is done."""

    @property
    def decisions(self) -> dict[int, Way | None]:
        """With levels="auto": what was decided for each process set, by its id; None before."""
        trials = {number: group.trials for number, group in self._groups.items()}
        return {number: own.decision for number, own in trials.items() if own is not None}

    # -------------------------------------------------------------------------- Horovod's interface

    def _compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start reducing `tensor`, which must not change until decompress(), and return a token."""
        caller = _find_caller(tensor, sys._getframe(1), self.config.FUNCTION)
        with _HOOKS:
            handed, context = self._start(tensor, caller)
            self._handed[caller.name] = weakref.ref(handed)
        return handed, context

    def _start(self, tensor: torch.Tensor, caller: _Caller) -> tuple[torch.Tensor, Any]:
        """What Horovod is to reduce in place of `tensor`, and what decompress() has to know."""
        function = self.config.FUNCTION
        eligible = self._eligible(tensor)
        if eligible and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{function}: tensor {caller.name!r} must not require gradients, because the "
                "quantized mean is not differentiable; pass tensor.detach()."
            )
        group = self._group(caller.process_set)
        if self.config.check_replicas is not None and caller.optimizer is not None:
            self._compare_replicas(group, caller, self.config.check_replicas)
        if group.census is not None and group.census.wanted:
            self._see(group.census, tensor, caller.name, eligible, group.plan)
        if not eligible:
            return _left_to_horovod(tensor)
        step = group.next_step(caller.name)
        plan = group.plan
        if group.trials is not None:
            way = group.trials.way(step - group.first_step, tensor.numel())
            if way.plan is None:
                return _left_to_horovod(tensor, way.half)
            plan = way.plan
        dtype = _DTYPES[tensor.dtype]
        strides = None
        if not tensor.is_contiguous():
            # Those of a dense tensor, also where this one is not.
            like = torch.empty_like(tensor, device="meta")
            strides = None if like.is_contiguous() else like.stride()
        values = self._stage(tensor.detach())
        result_dtype = self.RESULT_DTYPE or values.dtype
        # The optimizer's gradient is reduced where it lies, as by Horovod itself.
        ours = caller.in_place or values.data_ptr() != tensor.data_ptr()
        ours = ours and values.dtype == result_dtype
        sample = self._sample(values, step)
        task = Task(
            name=f"gq.{caller.name}",
            x=_buffer(values),
            new_output=lambda: _buffer(values if ours else _new_output(values, result_dtype)),
            plan=plan,
            collectives=group.collectives,
            rank=group.rank,
            seed=self.config.seed,
            step=step,
            written=_written(values),
            exchanges=group.exchanges,
            method=self._method(),
            memory=group.memories.setdefault(caller.name, {}),
            observe=None if sample is None else partial(_observe, sample),
        )
        mark = token.make(caller.name, values.numel(), dtype)
        reduction = group.pipeline.submit(task)
        factor = caller.scaling * (group.plan.world_size if caller.op == hvd.Sum else 1)
        context = _Context(
            group, reduction, mark, factor, strides, tensor.dtype, tensor.device, sample
        )
        return torch.from_numpy(np.array(mark)), context

    def _decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The reduced gradient for the token that Horovod reduced."""
        self._finish_checks()
        if ctx is None:
            return tensor
        if isinstance(ctx, torch.dtype):
            return tensor.to(ctx)
        assert isinstance(ctx, _Context)
        try:
            token.check(
                tensor.tolist(),
                ctx.token,
                ctx.reduction.name,
                ctx.group.plan.world_size,
                self.config.FUNCTION,
            )
        except ConfigMismatchError:
            ctx.group.pipeline.give_up()
            raise
        mean = ctx.group.pipeline.finish(ctx.reduction).owner
        assert isinstance(mean, torch.Tensor)
        if ctx.sample is not None:
            self._collect(ctx.reduction.task, ctx.sample)
        if ctx.factor != 1:
            mean.mul_(ctx.factor)
        if ctx.strides is not None:
            # A channels_last gradient stays one: its optimizer state has these strides too.
            mean = torch.empty_strided(mean.shape, ctx.strides, dtype=ctx.dtype).copy_(mean)
        return mean.to(ctx.device, ctx.dtype)

    compress = ClassOrInstance(_compress)
    decompress = ClassOrInstance(_decompress)

    def _see(
        self, census: log.Census, tensor: torch.Tensor, name: str, eligible: bool, plan: Plan
    ) -> None:
        """Log a tensor that comes by for the first time."""
        count, dtype = tensor.numel(), str(tensor.dtype).removeprefix("torch.")
        census.see(
            name,
            count,
            dtype,
            reason=None if eligible else self.reason(count, dtype, tensor.dtype in _DTYPES),
            wire_bytes=self.wire_bytes(count, plan) if eligible else None,
        )

    # --------------------------------------------------------------------------------------- guards

    def _compare_replicas(self, group: _Group, caller: _Caller, every: int) -> None:
        """Where a step begins with this gradient, and it is its turn: start comparing."""
        optimizer = caller.optimizer
        steps = group.checked.setdefault(optimizer, replicas.Steps())
        step = steps.begin(caller.name)
        if step is None or step % every:
            return
        parameters = [p for part in optimizer.param_groups for p in part["params"]]
        names = [optimizer._parameter_names[parameter] for parameter in parameters]
        ranks = caller.process_set.ranks or list(range(hvd.size()))
        digests = [replicas.digest(_bytes(parameter)) for parameter in parameters]
        own = replicas.table(digests, group.rank, len(ranks))
        handle = group.collectives.allreduce_max(own, f"gq.replicas.{names[0]}")
        group.checks.append(replicas.Check(names, ranks, step, handle))

    def _finish_checks(self) -> None:
        """Compare what has been gathered. What a session that is over began is never complete."""
        for group in self._groups.values():
            while group.checks and group.session is hvd_ops._handle_map:
                group.checks.pop().finish(self.config.FUNCTION)

    @cached_property
    def _watchdog(self) -> Any:
        """The thread that ends this rank when nothing moves; None without a timeout."""
        if self.config.timeout is None:
            return None
        own = weakref.ref(self)

        def waiting() -> watchdog.Waiting | None:
            frontend = own()
            return None if frontend is None else frontend._waiting()

        return watchdog.start(self.config.timeout, hvd.rank, self.config.FUNCTION, waiting)

    def _waiting(self) -> watchdog.Waiting:
        """What this rank waits for: Horovod's operations for our tensors, and our own loops."""
        given = {id(reference()): name for name, reference in list(self._handed.items())}
        handles = hvd_ops._handle_map
        waiting: dict[Any, str] = {}
        for number, (tensors, *_) in list(handles.items()):  # of an alltoall there are three
            for tensor in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
                if tensor is not None and id(tensor) in given and not _complete(number):
                    waiting[id(handles), number] = given[id(tensor)]
        for group in list(self._groups.values()):
            if (idle := group.pipeline.idle) is not None:
                waiting[idle] = idle[0]
        return waiting

    # ---------------------------------------------------------------------------------- checkpoints

    def _state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know to go on as this one would, bit for bit.

        That is how often each tensor was reduced, which the dither depends on, what a method keeps
        of a tensor (PowerSGD: its error and its factor), and what levels="auto" has tried or
        decided. Call it between two steps, with no reduction under way.

        Returns plain tensors (which are not copied), numbers, texts, lists and dictionaries, for
        torch.save and torch.load(weights_only=True). PowerSGD's and "auto"'s differ between ranks:
        each rank has to save its own. The other methods' are the same on every rank.
        """
        sets = {number: group.state_dict() for number, group in self._groups.items()}
        return {
            "compression": self.config.FUNCTION,
            "options": self.config.describe_results(),
            "process_sets": {**sets, **self._loaded},
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned on this rank of a job of this size.

        Call it on every rank, between two steps or before the first one. It takes effect with the
        next gradient of each process set; there all ranks compare what they have loaded, and raise
        ConfigMismatchError if one of them has loaded nothing, the state of another step, rank or
        world size. Raises ValueError for the state of another method, or of other options.
        """
        function = self.config.FUNCTION
        expected = {"compression": function, **self.config.describe_results()}
        got = {"compression": state.get("compression"), **state.get("options", {})}
        for key in {**expected, **got}:
            if expected.get(key) != got.get(key):
                raise ValueError(
                    f"{function}.load_state_dict: {key} must be {expected.get(key)!r} as in this "
                    f"instance, got a state with {got.get(key)!r}; configure it as in the run that "
                    "saved the state."
                )
        self._loaded.clear()
        self._loaded.update(state["process_sets"])
        self._groups.clear()

    state_dict = ClassOrInstance(_state_dict)
    load_state_dict = ClassOrInstance(_load_state_dict)

    # --------------------------------------------------------------------------------------- groups

    def _group(self, process_set: Any) -> _Group:
        """State for a process set; on first use, checks that its ranks are configured alike."""
        self.require_process_set(process_set)
        session = hvd_ops._handle_map  # replaced by every hvd.init()
        number = process_set.process_set_id
        group = self._groups.get(number)
        if group is not None and group.session is session:
            return group
        trying = self.config.levels == "auto"
        fixed = replace(self.config, levels="standard") if trying else self.config
        plan = fixed.plan(process_set.size())
        collectives = _Collectives(process_set)
        log.identify(hvd.rank(), hvd.size())
        loaded = self._loaded.get(number)
        before = 0 if group is None else group.end_step()
        first_step = self._agree(collectives, _describe_loaded(loaded, process_set), before)
        exchanges = None
        pipeline = Pipeline(self.config.FUNCTION)
        if self.config.transport == "mpi":
            from . import mpi

            exchanges = mpi.Messages(process_set.ranks or list(range(hvd.size())))
            mpi.serve(pipeline)
        trials = None
        if trying:

            def agree(own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
                return agreement.wait(collectives.allreduce_max(own, name))

            speaks = process_set.rank() == 0
            trials = Trials(self.config, plan.world_size, agree, speaks=speaks)
        group = _Group(
            session,
            process_set.rank(),
            plan,
            collectives,
            exchanges,
            pipeline,
            trials,
            self.begin_log(process_set, plan),
            first_step,
        )
        if loaded is not None:
            group.load_state_dict(loaded)
            del self._loaded[number]
        self._groups[number] = group
        _ = self._watchdog  # starts with the first group
        return group

    def _agree(self, collectives: _Collectives, loaded: dict[str, Any], before: int) -> int:
        """Compare the ranks' configurations, and return the first step, the same on every rank.

        `before` is the one that this rank's sessions before have not reached. A worker that joins
        an elastic job has had none, and takes the rank, and so the dither, of another one.
        """
        function = self.config.FUNCTION
        description = {**agreement.describe(self.config), **loaded}
        if self.config.transport == "mpi" and (problem := _mpi_problem()):
            remedy = "leave transport out to use Horovod's own operations."
            description = {"error": f"transport='mpi' cannot be used, {problem}; or {remedy}"}
        own = agreement.encode({**description, _STEP: before})
        handle = collectives.allgather(own, "gq.configuration")
        gathered = agreement.decode(agreement.wait(handle, function))
        steps = [each.pop(_STEP, 0) for each in gathered]  # another version may not have it
        agreement.require_same(gathered, function)
        return max(steps)


class GlobalQSGD(TorchFrontend, Compression):
    """Horovod compression by Global-QSGD: unbiased, and the same result on every rank bit for bit.

    Pass the class itself for the defaults, or an instance. Works with op Average and Sum,
    `gradient_predivide_factor`, `backward_passes_per_step`, `groups`, `sparse_as_dense` and process
    sets.

    float16, bfloat16, float32 and float64 are compressed (float64 at the range of float32),
    anything else is left to Horovod. A NaN or Inf on any rank makes its block NaN on every rank; a
    block of zeros stays zeros. As without compression, an optimizer's gradients are replaced where
    they lie, and tensors of hvd.allreduce are left alone. Gradients on a GPU are quantized there
    with CuPy, and only codes and norms pass through host memory; without CuPy they are staged there
    whole.

    Raises ConfigMismatchError at the first step, on every rank, if the ranks are configured
    differently.
    """

    TRANSPORTS = ("horovod", "mpi")
    LEVELS = Config.LEVELS
    WATCHES = True

    def _sample(self, values: torch.Tensor, step: int) -> Sample | None:
        if not self._stats_interval or step % self._stats_interval:
            return None
        return Sample(values.flatten().to("cpu", torch.float32, copy=True).numpy())

    def _collect(self, task: Task, sample: Sample) -> None:
        self.stats[task.name.removeprefix("gq.")] = sample.stats(task, self.config.transport)


def _observe(sample: Sample, task: Task, chunk: Chunk, output: Buffer) -> None:
    """Add a chunk to the statistics of a step."""
    assert isinstance(output.owner, torch.Tensor)
    part = output.owner.detach().flatten()[chunk.start : chunk.stop]
    sample.add(task, chunk, part.to("cpu", torch.float32).numpy())


def _describe_loaded(state: dict[str, Any] | None, process_set: Any) -> dict[str, Any]:
    """What ranks compare of a process set's state that was loaded; an error if it is not its."""
    if state is None:
        return {"state loaded": "none"}
    before, now = (state["rank"], state["world_size"]), (process_set.rank(), process_set.size())
    if before != now:
        return {
            "error": f"load_state_dict: expected the state of rank {now[0]} of {now[1]}, got that "
            f"of rank {before[0]} of {before[1]}; load on each rank what it saved, in a job of "
            "the same size"
        }
    steps: dict[str, int] = state["steps"]
    checksum = zlib.crc32(json.dumps(steps, sort_keys=True).encode())
    text = f"{sum(steps.values())} reductions of {len(steps)} tensors ({checksum:08x})"
    return {"state loaded": text}


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


def _left_to_horovod(
    tensor: torch.Tensor, half: bool = False
) -> tuple[torch.Tensor, torch.dtype | None]:
    """What Horovod reduces by itself: contiguous tensors; it knows float16 but not bfloat16."""
    if half and tensor.dtype in (torch.float32, torch.float64):
        return tensor.half().contiguous(), tensor.dtype
    if tensor.dtype == torch.bfloat16:
        return tensor.float().contiguous(), tensor.dtype
    return tensor.contiguous(), None


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, where kernels can read it, contiguous."""
    if tensor.is_cuda and _cupy_is_there():
        return tensor.contiguous()
    return tensor.to("cpu").contiguous()


def _written(tensor: torch.Tensor) -> _Written | None:
    """What has to be complete before anybody else's kernels read a tensor of this moment.

    PyTorch gives a GPU its work far ahead. A hook that waited for it would leave the GPU without
    work afterwards, until the next layer's is there.
    """
    if not tensor.is_cuda:
        return None
    return _Written(torch.cuda.current_stream(tensor.device).record_event())


def _new_output(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a mean, which kernels may write to at once."""
    output = torch.empty_like(like, dtype=dtype)
    if output.is_cuda:
        # What had this memory before may not be done with it on PyTorch's stream.
        torch.cuda.current_stream(output.device).synchronize()
    return output


def _bytes(parameter: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of any dtype and strides, on any device."""
    flat = parameter.detach().to("cpu").contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array


def _complete(number: int) -> bool:
    """Whether a Horovod operation is; the main thread may take it away meanwhile."""
    try:
        return bool(hvd.poll(number))
    except Exception:
        return True


@cache
def _cupy_is_there() -> bool:
    try:
        from mpi_ops.kernels import device  # noqa: F401
    except ImportError:
        return False
    return True


def _buffer(tensor: torch.Tensor) -> Buffer:
    memory, stream = "host", None
    if tensor.is_cuda:
        from mpi_ops.kernels import device  # imports CuPy

        memory, stream = "device", device.own_stream(tensor.get_device())
    return Buffer(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.numel(), tensor, memory, stream)


def allreduce(
    tensor: torch.Tensor,
    name: str,
    *,
    op: int = hvd.Average,
    compression: type[TorchFrontend] | TorchFrontend = GlobalQSGD,
    process_set: Any = hvd.global_process_set,
) -> torch.Tensor:
    """Average or sum a tensor over ranks with Global-QSGD, without an optimizer.

    Arguments:
        tensor: any shape, dtype and strides; not modified.
        name: identifies the operation, the same on every rank. Repeated calls may reuse it.
        op: hvd.Average or hvd.Sum.
        compression: GlobalQSGD or an instance of it (or of one of the `torch_baselines`).
        process_set: the ranks that take part.

    Returns a new tensor of the same shape and dtype, equal on every rank bit for bit. Blocks until
    it is there. Raises ValueError for a missing name, another op or a tensor that requires
    gradients.
    """
    result: torch.Tensor = hvd.allreduce(
        tensor, name=name, op=op, compression=compression, process_set=process_set
    )
    return result
