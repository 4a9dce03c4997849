"""The classes that Horovod's PyTorch API takes as `compression=`, and allreduce."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from horovod.torch import mpi_ops as hvd_ops
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from mpi_ops import stages
from mpi_ops.chunks import Chunk
from mpi_ops.kernels.host import Buffer

from .. import log
from ..frontend import ClassOrInstance, Compression, Frontend, per_process
from ..guards import replicas, watchdog
from ..guards.stats import Sample
from ..path import agreement, token
from ..path.auto import Trials, Way
from ..path.config import Config, ConfigMismatchError, Plan
from ..path.pipeline import InFlight, Method, Pipeline, Task
from . import numbering, tensors
from .caller import Caller, find_caller
from .collectives import Collectives, complete, written
from .group import Group, describe_loaded

_FORMAT = 3  # of state_dict()

# While the ranks of a process set compare their configurations, by its ranks: the operations of two
# threads, or of two instances, would have one name.
_agreeing: dict[tuple[int, ...], threading.RLock] = {}


class _Handed(NamedTuple):
    """What Horovod reduces for a tensor: a token, or the tensor itself."""

    reference: weakref.ref[torch.Tensor]
    shape: torch.Size  # of the tensor
    dtype: torch.dtype
    compressed: bool


class _Left(NamedTuple):
    """What decompress() has to know about a tensor that Horovod reduces by itself."""

    dtype: torch.dtype  # of the tensor; Horovod may get a wider one


class _Context(NamedTuple):
    """What decompress() has to know about a tensor that is compressed."""

    group: Group
    reduction: InFlight
    token: tuple[float, ...]
    factor: float  # result = mean over ranks * factor
    strides: tuple[int, ...] | None  # of the result; None: contiguous
    dtype: torch.dtype
    device: torch.device
    sample: Sample | None  # of a step whose statistics are collected


def _never_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile runs as it is: what it does is no part of a graph.

    torch._dynamo takes a second to import, which whoever compiles has done by now.
    """
    untraced: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if get_eval_frame_callback() is None:  # outside of compiled regions
            return function(*arguments)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*arguments)

    return call


class TorchFrontend(Frontend):
    """Horovod's interface for PyTorch, for methods of any kind."""

    HVD = hvd
    RESULT_DTYPE: ClassVar[torch.dtype | None] = None  # of what is decoded; None: the tensor's own

    @per_process
    def _groups(self) -> dict[tuple[int, ...], Group]:
        """What belongs to the process sets, by their ranks; the global one's by ().

        Not by their ids, which Horovod gives to other sets when one was removed.
        """
        return {}

    @per_process
    def _handed(self) -> dict[str, _Handed]:
        """What Horovod was last given to reduce for a tensor, by its name."""
        return {}

    @per_process
    def _loaded(self) -> dict[tuple[int, ...], dict[str, Any]]:
        """Of load_state_dict(), for process sets that have reduced nothing since, as in _groups."""
        return {}

    # ------------------------------------------------------------------ what depends on the method

    def _method(self) -> Method | None:
        """The way that tensors go. None: one of Global-QSGD's, which follow from the options."""
        return None

    def _eligible(self, tensor: torch.Tensor) -> bool:
        """Whether to compress a tensor; Horovod reduces the others."""
        large = tensor.numel() >= max(self.config.min_elements, 1)
        return large and tensor.dtype in tensors.DTYPES and tensors.dense(tensor)

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy, contiguous and where the method can read it."""
        return tensors.readable(tensor)

    def _sample(self, values: torch.Tensor, step: int) -> Sample | None:
        """What to collect statistics of this step in, if it is one of those."""
        return None

    def _collect(self, task: Task, sample: Sample) -> None:
        """Keep the statistics of a reduction that is done."""

    @property
    def decisions(self) -> dict[int, Way | None]:
        """With levels="auto": what was decided for each process set, by its id; None before."""
        return {
            group.collectives.process_set.process_set_id: group.trials.decision
            for group in self._groups.values()
            if group.trials is not None
        }

    # -------------------------------------------------------------------------- Horovod's interface

    def _compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start reducing `tensor`, which must not change until decompress(), and return a token."""
        caller = find_caller(tensor, sys._getframe(1), self.config.FUNCTION)
        handed, context = self._start(tensor, caller)
        self._handed[caller.name] = _Handed(
            weakref.ref(handed), tensor.shape, tensor.dtype, isinstance(context, _Context)
        )
        return handed, context

    def _start(self, tensor: torch.Tensor, caller: Caller) -> tuple[torch.Tensor, _Left | _Context]:
        """What Horovod is to reduce in place of `tensor`, and what decompress() has to know."""
        eligible = self._eligible(tensor)
        if eligible and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.config.FUNCTION}: tensor {caller.name!r} must not require gradients, "
                "because the quantized mean is not differentiable; pass tensor.detach()."
            )
        group = self._group(caller.process_set)
        self._guard(group, tensor, caller, eligible)
        if not eligible:
            return _left_to_horovod(tensor)
        key = group.key(caller.name, caller.optimizer)
        step = group.next_step(key)
        plan = group.plan_of(step, tensor.numel())
        if plan is None:
            return _left_to_horovod(tensor)
        task, sample = self._task(tensor, caller, group, key, step, plan)
        mark = token.make(caller.name, tensor.shape, tensors.DTYPES[tensor.dtype])
        context = _Context(
            group=group,
            reduction=group.pipeline.submit(task),
            token=mark,
            factor=caller.scaling * (group.plan.world_size if caller.op == hvd.Sum else 1),
            strides=tensors.dense_strides(tensor),
            dtype=tensor.dtype,
            device=tensor.device,
            sample=sample,
        )
        return torch.from_numpy(np.array(mark)), context

    def _guard(self, group: Group, tensor: torch.Tensor, caller: Caller, eligible: bool) -> None:
        """Compare replicas and log the tensor, where the options ask for it; changes nothing."""
        if self.config.check_replicas is not None and caller.optimizer is not None:
            self._compare_replicas(group, caller, self.config.check_replicas)
        if group.census is not None and group.census.wanted:
            self._see(group.census, tensor, caller.name, eligible, group.plan)

    def _task(
        self, tensor: torch.Tensor, caller: Caller, group: Group, key: str, step: int, plan: Plan
    ) -> tuple[Task, Sample | None]:
        """The reduction of a tensor, and what collects its statistics, if it is their turn."""
        values = self._stage(tensor.detach())
        result_dtype = self.RESULT_DTYPE or values.dtype
        # The optimizer's gradient is reduced where it lies, as by Horovod itself.
        ours = caller.in_place or values.data_ptr() != tensor.data_ptr()
        ours = ours and values.dtype == result_dtype

        def new_output() -> Buffer:
            return tensors.buffer(values if ours else tensors.new_output(values, result_dtype))

        sample = self._sample(values, step)
        task = Task(
            name=stages.tensor_name(caller.name),
            key=stages.tensor_name(key),
            x=tensors.buffer(values),
            new_output=new_output,
            plan=plan,
            collectives=group.collectives,
            rank=group.rank,
            seed=self.config.seed,
            step=step,
            written=written(values),
            exchanges=group.exchanges,
            method=self._method(),
            memory=group.memories.setdefault(key, {}),
            observe=None if sample is None else partial(_observe, sample),
        )
        return task, sample

    def _decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The reduced gradient for the token that Horovod reduced."""
        self._finish_checks()
        if ctx is None:  # a sparse gradient, about which Horovod has not asked compress()
            return tensor
        if isinstance(ctx, _Left):
            return tensor.to(ctx.dtype)
        assert isinstance(ctx, _Context)
        if ctx.factor != 0:  # with a factor of zero nothing comes back of a token
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
        mean = mean.to(ctx.device, ctx.dtype)
        if ctx.strides is not None:
            # A channels_last gradient stays one: its optimizer state has these strides too.
            strided = torch.empty_strided(
                mean.shape, ctx.strides, dtype=mean.dtype, device=mean.device
            )
            mean = strided.copy_(mean)
        return mean

    compress = ClassOrInstance(_never_traced(_compress))
    decompress = ClassOrInstance(_never_traced(_decompress))

    def _see(
        self, census: log.Census, tensor: torch.Tensor, name: str, eligible: bool, plan: Plan
    ) -> None:
        """Log a tensor that comes by for the first time."""
        count, dtype = tensor.numel(), _name(tensor.dtype)
        census.see(
            name,
            count,
            dtype,
            reason=None if eligible else self.reason(count, dtype, tensor.dtype in tensors.DTYPES),
            wire_bytes=self.wire_bytes(count, plan) if eligible else None,
        )

    def explain(self, tensor: object) -> str | None:
        """What Horovod's error about an operation on `tensor` does not say; None: not ours.

        Horovod may know nothing but a token.
        """
        for name, handed in list(self._handed.items()):
            if handed.reference() is tensor:
                way = "left to Horovod"
                if handed.compressed:
                    way = f"compressed: Horovod reduces a token of {token.NUMBERS} float64 for it"
                return (
                    f"({self.config.FUNCTION}: on this rank tensor {name!r} has the shape "
                    f"{tuple(handed.shape)} and the dtype {_name(handed.dtype)}, and is {way}. "
                    "Every rank has to reduce a tensor of the same name, shape and dtype.)"
                )
        return None

    # --------------------------------------------------------------------------------------- guards

    def _compare_replicas(self, group: Group, caller: Caller, every: int) -> None:
        """Where a step begins with this gradient, and it is its turn: start comparing."""
        optimizer = caller.optimizer
        steps = group.checked.setdefault(optimizer, replicas.Steps())
        step = steps.begin(caller.name)
        if step is None or step % every:
            return
        # Those of a group that was added after the optimizer was wrapped have no names: Horovod
        # knows nothing of them, and reduces no gradients of theirs.
        parameters = {
            optimizer._parameter_names.get(own, f"param_groups[{place}]['params'][{index}]"): own
            for place, part in enumerate(optimizer.param_groups)
            for index, own in enumerate(part["params"])
        }
        names = list(parameters)
        ranks = caller.process_set.ranks or list(range(hvd.size()))
        digests = [replicas.digest(tensors.bytes_of(own)) for own in parameters.values()]
        own = replicas.table(digests, group.rank, len(ranks))
        handle = group.collectives.allreduce_max(own, f"gq.replicas.{names[0]}")
        group.checks.append(replicas.Check(names, ranks, step, handle))

    def _finish_checks(self) -> None:
        """Compare what has been gathered. What a session that is over began is never complete."""
        for group in list(self._groups.values()):
            while group.session is numbering.session():
                try:
                    check = group.checks.pop()
                except IndexError:
                    break
                try:
                    check.finish(self.config.FUNCTION)
                except replicas.ReplicaMismatchError:
                    # It is raised on every rank, and all of them have begun the same tensors. What
                    # some of them went on with later, and others did not, would wait for ever.
                    group.pipeline.drain()
                    raise

    @per_process
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
        """What this rank waits for.

        Horovod's operations for our tensors, all others while tensors of ours are in flight (which
        move only when this rank comes back from them), and our own loops.
        """
        given = {id(handed.reference()): name for name, handed in list(self._handed.items())}
        groups = list(self._groups.values())
        busy = any(group.pipeline.busy for group in groups)
        handles, library = hvd_ops._handle_map, numbering.library()
        waiting: dict[Any, str] = {}
        for number, (of, *_) in list(handles.items()):  # of an alltoall there are three
            members = of if isinstance(of, (tuple, list)) else (of,)
            found = next((given[id(own)] for own in members if id(own) in given), None)
            if (busy or found is not None) and not complete(number):
                name = f"operation {number}" if library is None else library.name(number)
                waiting[id(handles), number] = found or name
        for group in groups:
            for idle in list(group.pipeline.idle.values()):
                waiting[idle] = idle[0]
        return waiting

    # ---------------------------------------------------------------------------------- checkpoints

    def _state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know to go on as this one would, bit for bit.

        That is how often each tensor was reduced, which the dither depends on, what a method keeps
        of a tensor (PowerSGD: its error and its factor), and what levels="auto" has tried or
        decided. Call it between two steps, with no reduction under way.

        Returns plain tensors (which are not copied), numbers, texts, lists and dictionaries, for
        torch.save and torch.load(weights_only=True). Only PowerSGD's differs between ranks: each
        rank has to save its own. The other methods' may be saved by one rank and loaded on all.
        """
        joins = _joins()
        saved = {key: group.state_dict(joins) for key, group in self._groups.items()}
        return {
            "format": _FORMAT,
            "compression": self.config.FUNCTION,
            "options": self.config.describe_results(),
            "process_sets": {
                _as_text(key): state for key, state in {**saved, **self._loaded}.items()
            },
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned in a job of this size.

        Call it on every rank, between two steps or before the first one. It takes effect with the
        next gradient of each process set; there all ranks compare what they have loaded, and raise
        ConfigMismatchError if one of them has loaded nothing, the state of another step or world
        size, or what only another rank may go on from. (After hvd.join() ranks may have saved
        different steps; then all go on from the highest.) Raises ValueError for the state of
        another method, of other options, or of another version.
        """
        function = self.config.FUNCTION
        expected = {
            "format": _FORMAT,
            "compression": function,
            **self.config.describe_results(),
        }
        got = {
            "format": state.get("format"),
            "compression": state.get("compression"),
            **state.get("options", {}),
        }
        for key in {**expected, **got}:
            if expected.get(key) != got.get(key):
                raise ValueError(
                    f"{function}.load_state_dict: {key} must be {expected.get(key)!r} as in this "
                    f"instance, got a state with {got.get(key)!r}; configure it as in the run that "
                    "saved the state, and use the same version."
                )
        self._loaded.clear()
        self._loaded.update((_as_ranks(key), own) for key, own in state["process_sets"].items())
        self._groups.clear()

    state_dict = ClassOrInstance(_state_dict)
    load_state_dict = ClassOrInstance(_load_state_dict)

    # --------------------------------------------------------------------------------------- groups

    def _group(self, process_set: Any) -> Group:
        """State for a process set, whose ranks have compared how they are configured."""
        self.require_process_set(process_set)
        key = () if process_set.process_set_id == 0 else tuple(process_set.ranks)
        group = self._groups.get(key)
        if group is None or not _current(group, process_set):
            with _agreeing.setdefault(key, threading.RLock()):
                group = self._groups.get(key)  # another thread may have been faster
                if group is None or not _current(group, process_set):
                    group = self._agree(key, group, process_set)
        return group

    def _agree(self, key: tuple[int, ...], before: Group | None, process_set: Any) -> Group:
        """A group on whose state the ranks of the process set agree."""
        log.identify(hvd.rank(), hvd.size())
        numbering.install(speaks=hvd.rank() == 0)
        if (library := numbering.library()) is not None:
            library.explainers.add(self)
        joins = _joins()
        group = before
        if group is None or group.session is not numbering.session():
            group = self._new_group(key, process_set, 0 if before is None else before.end_step)
        elif group.collectives.process_set.process_set_id != process_set.process_set_id:
            group.pipeline.give_up()  # what a process set that was removed has begun
        group.collectives = Collectives(process_set)
        if self._groups.get(key) is group and group.joins == joins:
            return group
        description = {**agreement.describe(self.config), **group.loaded}
        if self.config.transport == "mpi" and (problem := _mpi_problem()):
            remedy = "leave transport out to use Horovod's own operations."
            description["error"] = f"transport='mpi' cannot be used, {problem}; or {remedy}"
        agreed, everyone = agreement.agree(
            group.allreduce_max,
            description,
            group.numbers(),
            group.rank,
            group.plan.world_size,
            self.config.FUNCTION,
        )
        group.adopt(agreed)
        group.joins = joins
        if self.config.transport == "mpi" and everyone and group.exchanges is None:
            # All ranks have to be there when it is made. Until then codes travel through Horovod.
            from ..path import mpi

            group.exchanges = mpi.Messages(process_set.ranks or list(range(hvd.size())))
            mpi.serve(group.pipeline)
        if self._groups.get(key) is not group:
            group.census = self.begin_log(process_set, group.plan)
        self._groups[key] = group
        self._loaded.pop(key, None)
        _ = self._watchdog  # starts with the first group
        return group

    def _new_group(self, key: tuple[int, ...], process_set: Any, before: int) -> Group:
        """A group that begins with what was loaded, or else after the step `before`."""
        trying = self.config.levels == "auto"
        fixed = replace(self.config, levels="standard") if trying else self.config
        plan = fixed.plan(process_set.size())
        loaded = self._loaded.get(key)
        group = Group(
            function=self.config.FUNCTION,
            session=numbering.session(),
            rank=process_set.rank(),
            plan=plan,
            collectives=Collectives(process_set),
            pipeline=Pipeline(self.config.FUNCTION),
            loaded=describe_loaded(loaded, process_set.rank(), plan.world_size),
            first_step=before,
            base=before,
        )
        if trying:
            speaks = group.rank == 0
            group.trials = Trials(self.config, plan.world_size, group.allreduce_max, speaks=speaks)
        if loaded is not None and "error" not in group.loaded:
            group.load_state_dict(loaded)
        return group


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
        self.stats[stages.user_name(task.key)] = sample.stats(task, self.config.transport)


def _observe(sample: Sample, task: Task, chunk: Chunk, output: Buffer) -> None:
    """Add a chunk to the statistics of a step."""
    assert isinstance(output.owner, torch.Tensor)
    part = output.owner.detach().flatten()[chunk.start : chunk.stop]
    sample.add(task, chunk, part.to("cpu", torch.float32).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _current(group: Group, process_set: Any) -> bool:
    """Whether the ranks of a group need not agree anew."""
    return (
        group.session is numbering.session()
        and group.collectives.process_set.process_set_id == process_set.process_set_id
        and group.joins == _joins()
    )


def _joins() -> int:
    """Calls of hvd.join() so far; after each of them ranks may have reduced unequally often."""
    library = numbering.library()
    return 0 if library is None else library.joins


def _as_text(ranks: tuple[int, ...]) -> str:
    """A process set's ranks as a key of a checkpoint."""
    return ",".join(map(str, ranks)) or "all"


def _as_ranks(text: str) -> tuple[int, ...]:
    return () if text == "all" else tuple(map(int, text.split(",")))


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
        from ..path import mpi
    except ImportError as error:
        return f"because mpi4py does not import ({error}): `pip install gq-horovod[mpi]`"
    reason = mpi.problem(hvd.rank(), hvd.size())
    return None if reason is None else f"because {reason}"


def _left_to_horovod(tensor: torch.Tensor) -> tuple[torch.Tensor, _Left]:
    """What Horovod reduces by itself: contiguous tensors; it does not know bfloat16."""
    left = _Left(tensor.dtype)
    if tensor.dtype == torch.bfloat16:
        return tensor.float().contiguous(), left
    # What Horovod does not know at all it refuses in its own words.
    return tensor.contiguous() if tensors.dense(tensor) else tensor, left


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
