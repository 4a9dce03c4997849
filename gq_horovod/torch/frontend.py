"""The classes that Horovod's PyTorch API takes as `compression=`, and allreduce."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops as hvd_ops

from mpi_ops import stages, wire
from mpi_ops.nodes import Placement

from .. import log
from ..frontend import ClassOrInstance, Compression, Frontend, per_process
from ..guards import replicas, watchdog
from ..guards.stats import Sample
from ..path import agreement, buckets, token
from ..path.auto import Trials, Way, any_plan
from ..path.config import Config, ConfigMismatchError, Plan
from ..path.pipeline import Method, Pipeline
from . import gpus, nodes, numbering, tensors
from .buckets import ALONE, Bucket, Context, Handed, Member, Settled, Together, describe
from .caller import Caller, find_caller, find_hook
from .collectives import Collectives, complete
from .compiled import CALL_CODE, never_traced
from .group import Group, describe_loaded

_settling = threading.RLock()  # of what belongs to an optimizer, which two threads may begin

# While the ranks of a process set compare their configurations, by its ranks: the operations of two
# threads, or of two instances, would have one name.
_agreeing: dict[tuple[int, ...], threading.RLock] = {}


class _Left(NamedTuple):
    """What decompress() has to know about a tensor that Horovod reduces by itself."""

    dtype: torch.dtype  # of the tensor; Horovod may get a wider one
    device: torch.device  # of the tensor; Horovod may get a copy in host memory


class TorchFrontend(Frontend):
    """Horovod's interface for PyTorch, for methods of any kind."""

    HVD = hvd
    FORMAT = 3
    RESULT_DTYPE: ClassVar[torch.dtype | None] = None  # of what is decoded; None: the tensor's own

    @per_process
    def _groups(self) -> dict[tuple[int, ...], Group]:
        """What belongs to the process sets, by their ranks; the global one's by ().

        Not by their ids, which Horovod gives to other sets when one was removed.
        """
        return {}

    @per_process
    def _optimizers(self) -> weakref.WeakKeyDictionary[Any, Settled]:
        """The buckets of each optimizer."""
        return weakref.WeakKeyDictionary()

    @per_process
    def _calls(self) -> dict[int, Together]:
        """The buckets of a call for several tensors that is under way, by its thread."""
        return {}

    @per_process
    def _handed(self) -> dict[int, tuple[weakref.ref[torch.Tensor], Handed]]:
        """What Horovod was given to reduce, by its id()."""
        return {}

    @per_process
    def _loaded(self) -> dict[tuple[int, ...], dict[str, Any]]:
        """Of load_state_dict(), for process sets that have reduced nothing since, as in _groups."""
        return {}

    # ------------------------------------------------------------------ what depends on the method

    def _method(self) -> Method | None:
        """The way that tensors go. None: one of Global-QSGD's, which follow from the options."""
        return None

    def _eligible(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether to compress a tensor; Horovod reduces the others."""
        known = tensor.dtype in tensors.DTYPES and tensors.dense(tensor)
        return known and self.takes(name, tensor.numel())

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy, contiguous and where the method can read it."""
        return tensors.readable(tensor)

    def _sample(self, values: torch.Tensor, step: int) -> Sample | None:
        """What to collect statistics of this step in, if it is one of those."""
        return None

    def _collect(self, key: str, sample: Sample, plan: Plan, step: int) -> None:
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
        if tensor.is_cuda:
            gpus.refuse_capture(tensor.device, self.config.FUNCTION)
        frame = sys._getframe(1)
        if frame.f_back is not None and frame.f_code is CALL_CODE:
            frame = frame.f_back
        hook = find_hook(tensor, frame)
        settled = None if hook is None else self._optimizers.get(hook[0])
        if hook is None or settled is None or not self._is_current(settled, hook[0].process_set):
            caller = find_caller(tensor, frame, self.config.FUNCTION)
            return self._start(tensor, caller)
        return self._arrive(tensor, settled, *hook)

    def _start(self, tensor: torch.Tensor, caller: Caller) -> tuple[torch.Tensor, _Left | Context]:
        """What Horovod is to reduce in place of `tensor`, and what decompress() has to know."""
        eligible = self._eligible(caller.name, tensor)
        if eligible and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.config.FUNCTION}: tensor {caller.name!r} must not require gradients, "
                "because the quantized mean is not differentiable; pass tensor.detach()."
            )
        group = self._group(caller.process_set, tensor.device)
        if caller.optimizer is not None:
            with _settling:
                settled = self._optimizers.get(caller.optimizer)
                if settled is None or not self._is_current(settled, caller.process_set):
                    settled = self._optimizers[caller.optimizer] = Settled(group)
            return self._arrive(tensor, settled, caller.optimizer, caller.parameter)
        self._guard(group, tensor, caller.name, eligible)
        if caller.together is not None and group.trials is None:
            arrived = self._arrive_in_call(tensor, caller, group)
            if arrived is not None:
                return arrived
        if not eligible:
            return self._left_to_horovod(tensor, caller.name)
        key = group.key(caller.name, None)
        step = group.next_step(key)
        plan = self._way(group, caller.name, step, tensor.numel()).plan
        if plan is None:
            return self._left_to_horovod(tensor, caller.name)
        plan = self.plan_for(caller.name, plan)
        member = describe(caller.name, key, tensor)
        like = (caller.op, caller.scaling)
        grouped = caller.together is not None
        bucket = Bucket(self, group, plan, [member], *like, grouped=grouped)
        return bucket.arrive(ALONE, 0, tensor, step)

    def _arrive(
        self, tensor: torch.Tensor, settled: Settled, optimizer: Any, parameter: torch.Tensor
    ) -> tuple[torch.Tensor, _Left | Context]:
        """The same for a gradient of an optimizer."""
        group = settled.group
        if group.trials is None:  # what follows, for a tensor that is known
            members = settled.known
            own = members.get(parameter)
            if own is not None and own.fits(tensor):
                name, key, *_ = own.described
                if self.config.check_replicas is not None or group.census is not None:
                    self._guard(group, tensor, name, True, optimizer)
                step = group.next_step(key)
                return settled.arrive(members, optimizer, parameter, tensor, step)
        name = optimizer._parameter_names[parameter]
        eligible = self._eligible(name, tensor)
        if eligible and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.config.FUNCTION}: the gradient of {name!r} must not require gradients, "
                "because the quantized mean is not differentiable; detach it."
            )
        self._guard(group, tensor, name, eligible, optimizer)
        if not eligible:
            return self._left_to_horovod(tensor, name)
        key = settled.key(name, optimizer)
        step = group.next_step(key)
        way = self._way(group, name, step, tensor.numel())
        if way.plan is None:
            return self._left_to_horovod(tensor, name)
        members = settled.members(way, optimizer, lambda: self._cut(optimizer, group, way))
        own = members.get(parameter)
        if own is not None and own.fits(tensor):
            return settled.arrive(members, optimizer, parameter, tensor, step)
        # One that its bucket was not made for: of another dtype than its parameter, or new.
        member = describe(name, key, tensor)
        grouped = optimizer._groups is not None
        plan = self.plan_for(name, way.plan)
        bucket = Bucket(
            *(self, group, plan, [member], optimizer.op), in_place=True, grouped=grouped
        )
        return bucket.arrive(ALONE, 0, tensor, step)

    def _way(self, group: Group, name: str, step: int, elements: int) -> Way:
        """How a tensor is reduced in a step, unless a rule has another plan for it."""
        if self.config.fixed(name):  # it takes no part in trials
            return group.fixed_way
        return group.way_of(step, elements)

    def _cut(
        self, optimizer: Any, group: Group, way: Way
    ) -> Iterator[tuple[Bucket, list[torch.Tensor]]]:
        """The buckets of an optimizer whose tensors go some way, and their parameters.

        They depend on nothing but what is the same on every rank.
        """
        assert way.plan is not None
        names = optimizer._parameter_names
        # Gradients come about in the reverse order of the model.
        parameters = [
            parameter
            for part in reversed(optimizer.param_groups)
            for parameter in reversed(part["params"])
            if parameter in optimizer._requires_update
            and self._eligible(names[parameter], parameter)
            and self._goes(group, way, names[parameter], parameter.numel())
        ]
        alike: dict[Any, list[torch.Tensor]] = {}
        for own in parameters:
            # A group of Horovod's is handed over as a whole.
            group_of = optimizer._p_to_group.get(own) if optimizer._groups is not None else None
            plan = self.plan_for(names[own], way.plan)
            kind = (id(group_of) if group_of else None, own.dtype, own.device, plan)
            alike.setdefault(kind, []).append(own)
        for (group_of, *_, plan), members in alike.items():
            limit = 0 if self._alone(plan) else self.config.bucket_limit(plan)
            sizes = [own.numel() * own.element_size() for own in members]
            if group_of is not None and limit:
                places = [range(len(members))]
            else:
                places = buckets.cut(sizes, self.config.first_bucket_bytes, limit)
            for chosen in places:
                own = [members[place] for place in chosen]
                described = [
                    describe(names[one], group.key(names[one], optimizer), one) for one in own
                ]
                grouped = optimizer._groups is not None
                bucket = Bucket(
                    *(self, group, plan, described, optimizer.op),
                    in_place=True,
                    grouped=grouped,
                )
                yield bucket, own

    def _goes(self, group: Group, way: Way, name: str, elements: int) -> bool:
        """Whether a tensor goes a way; those of rules go the fixed one, without the others."""
        if group.trials is None:
            return True
        if self.config.fixed(name) or way is group.fixed_way:
            return self.config.fixed(name) and way is group.fixed_way
        return elements >= way.min_elements

    def _arrive_in_call(
        self, tensor: torch.Tensor, caller: Caller, group: Group
    ) -> tuple[torch.Tensor, Context] | None:
        """The same for a tensor of a call for several; None if it is not compressed there."""
        thread = threading.get_ident()
        call = self._calls.get(thread)
        place = None if call is None else call.place_of(caller.together, tensor, caller.place)
        if call is None or place is None:
            call = self._calls[thread] = self._begin_call(caller, group)
            place = caller.place
        arrived = call.arrive(place, tensor, group.next_step)
        if call.complete:
            del self._calls[thread]  # and with it what it keeps alive
        return arrived

    def _begin_call(self, caller: Caller, group: Group) -> Together:
        """The buckets of a call for several tensors."""
        alike: dict[Any, list[int]] = {}
        base = caller.name.removesuffix(f".{caller.place}")
        for place, own in enumerate(caller.together):
            name = f"{base}.{place}"
            if self._eligible(name, own) and not own.requires_grad:
                kind = (own.dtype, own.device, self.plan_for(name, group.plan))
                alike.setdefault(kind, []).append(place)
        members: dict[int, Member] = {}
        for (*_, plan), places in alike.items():
            for chosen in [[place] for place in places] if self._alone(plan) else [places]:
                described = [
                    describe(name, group.key(name, None), caller.together[place])
                    for place in chosen
                    for name in [f"{base}.{place}"]
                ]
                # Tokens tell whether all ranks have these tensors; where they do not, what has
                # begun has to find its like, and not wait for ever.
                bucket = Bucket(
                    *(self, group, plan, described, caller.op, caller.scaling),
                    name=stages.tensor_name(f"{base}.{chosen[0]}"),
                    grouped=True,
                )
                members.update(zip(chosen, bucket.places(), strict=True))
        return Together(caller.together, members)

    def _alone(self, plan: Plan) -> bool:
        """Whether each tensor has to be reduced by itself: by another method, or by its shares."""
        return self._method() is not None or not plan.mixes_tensors

    def _is_current(self, settled: Settled, process_set: Any) -> bool:
        """Whether the ranks need not agree anew before an optimizer's next gradient."""
        group, library = settled.group, numbering.library()
        if library is None:
            current = _current(group, process_set)
        else:  # the same, quickly
            number = group.collectives.process_set.process_set_id
            current = library.session is group.session and library.joins == group.joins
            current = current and number == process_set.process_set_id is not None
            current = current and group.pipeline.closed is None
        known = self._groups.get(group.key_of_ranks) is group
        return current and known and settled.joins == group.joins

    def _guard(
        self, group: Group, tensor: torch.Tensor, name: str, eligible: bool, optimizer: Any = None
    ) -> None:
        """Compare replicas and log the tensor, where the options ask for it; changes nothing."""
        if self.config.check_replicas is not None and optimizer is not None:
            self._compare_replicas(group, optimizer, name, self.config.check_replicas)
        if group.census is not None and group.census.wanted:
            self._see(group, group.census, tensor, name, eligible, optimizer)

    def _left_to_horovod(self, tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, _Left]:
        """What Horovod reduces by itself: contiguous tensors; it does not know bfloat16."""
        # What Horovod does not know at all it refuses in its own words.
        handed = tensor.to(_handed_dtype(tensor))
        handed = handed.contiguous() if tensors.dense(tensor) else handed
        if tensor.is_cuda:
            gpus.say_once(tensor.get_device())
            if not gpus.horovod_takes_them():
                handed = handed.to("cpu")
        numbering.note_operation(gpus.reduces_there(handed.device))
        self._hand(handed, Handed(name, tensor.shape, tensor.dtype, False))
        return handed, _Left(tensor.dtype, tensor.device)

    def _hand(self, handed: torch.Tensor, own: Handed) -> None:
        """Remember what Horovod is given for a tensor."""
        known = self._handed
        number = id(handed)
        last = known.get(number)
        if last is None or last[0]() is not handed:
            known[number] = weakref.ref(handed, lambda _: known.pop(number, None)), own

    def _decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The reduced gradient for the token that Horovod reduced."""
        if self.config.check_replicas is not None:
            self._finish_checks()
        if ctx is None:  # a sparse gradient, about which Horovod has not asked compress()
            return tensor
        if isinstance(ctx, _Left):
            gpus.refuse_capture(ctx.device, self.config.FUNCTION)
            gpus.follow_horovod(tensor)
            return tensor.to(ctx.device, ctx.dtype)
        assert isinstance(ctx, Context)
        run, bucket = ctx.run, ctx.run.bucket
        gpus.refuse_capture(bucket.members[ctx.place].device, self.config.FUNCTION)
        if run.open:
            run.owner.flush()
        if bucket.factor != 0:  # with a factor of zero nothing comes back of a token
            own = bucket.members[ctx.place]
            try:
                token.check(
                    gpus.values_of(tensor),
                    bucket.marks[ctx.place],
                    stages.tensor_name(own.name),
                    bucket.group.ranks,
                    self.config.FUNCTION,
                )
            except ConfigMismatchError:
                bucket.group.pipeline.give_up()
                raise
        mean = run.take(ctx.place)
        if bucket.factor != 1:
            mean.mul_(bucket.factor)
        own = bucket.members[ctx.place]
        if mean.dtype is not own.dtype or mean.device != own.device:
            mean = mean.to(own.device, own.dtype)
        if ctx.strides is not None:
            # A channels_last gradient stays one: its optimizer state has these strides too.
            mean = mean.new_empty_strided(mean.shape, ctx.strides).copy_(mean)
        return mean

    compress = ClassOrInstance(never_traced(_compress))
    decompress = ClassOrInstance(never_traced(_decompress))

    def _see(
        self,
        group: Group,
        census: log.Census,
        tensor: torch.Tensor,
        name: str,
        eligible: bool,
        optimizer: Any,
    ) -> None:
        """Log a tensor that comes by for the first time."""
        count, dtype = tensor.numel(), _name(tensor.dtype)
        # By nodes: its part of what a node sends to others, whose ranks would else form a ring.
        per_node = 1 if group.nodes is None else group.nodes.ranks_per_node
        plain = wire.sent_bytes(count / per_node, group.ranks)
        census.see(
            name,
            count,
            dtype,
            reason=(
                None
                if eligible
                else self.reason(name, count, dtype, tensor.dtype in tensors.DTYPES)
            ),
            wire_bytes=(
                self.wire_bytes(name, -(-count // per_node), self.plan_for(name, group.plan))
                if eligible
                else plain * _handed_dtype(tensor).itemsize
            ),
            plain_bytes=plain * tensor.element_size(),
            owner=optimizer,
        )

    def explain(self, tensor: object) -> str | None:
        """What Horovod's error about an operation on `tensor` does not say; None: not ours.

        Horovod may know nothing but a token.
        """
        known = self._handed.get(id(tensor))
        if known is not None and known[0]() is tensor:
            handed = known[1]
            way = "left to Horovod"
            if handed.compressed:
                way = f"compressed: Horovod reduces a token of {token.NUMBERS} float64 for it"
            return (
                f"({self.config.FUNCTION}: on this rank tensor {handed.name!r} has the shape "
                f"{tuple(handed.shape)} and the dtype {_name(handed.dtype)}, and is {way}. "
                "Every rank has to reduce a tensor of the same name, shape and dtype.)"
            )
        return None

    def after_removal(self) -> None:
        """Horovod has removed a process set: where gradients went by it, the ranks settle anew."""
        for group in list(self._groups.values()):
            if group.session is not numbering.session() or group.nodes is None:
                continue
            if (ranks := nodes.lost(group.nodes)) is not None:
                group.pipeline.close(
                    f"gradients go by the process set of ranks {list(ranks)}, which was removed "
                    "meanwhile; remove process sets between two steps only"
                )

    # --------------------------------------------------------------------------------------- guards

    def _compare_replicas(self, group: Group, optimizer: Any, name: str, every: int) -> None:
        """Where a step begins with this gradient, and it is its turn: start comparing."""
        steps = group.checked.setdefault(optimizer, replicas.Steps())
        step = steps.begin(name)
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
        ranks = optimizer.process_set.ranks or list(range(hvd.size()))
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
        other ranks may have to complete before they begin those), and our own loops.
        """
        given = {number: own.name for number, (_, own) in list(self._handed.items())}
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
        of a tensor (PowerSGD: its error and its factor; IntSGD: its parameter and the average of
        its updates), and what levels="auto" has tried or decided. Call it between two steps, with
        no reduction under way.

        Returns plain tensors (which are not copied), numbers, texts, lists and dictionaries, for
        torch.save and torch.load(weights_only=True). Those of PowerSGD and IntSGD belong to a rank:
        each has to save its own. The other methods' may be saved by one rank and loaded on all. So
        may those of error_feedback=True; but only a rank that saves its own goes on with its
        residuals, which are as large as the gradients.
        """
        joins = _joins()
        saved = {key: group.state_dict(joins) for key, group in self._groups.items()}
        return {
            **self.describe_state(),
            "process_sets": {
                _as_text(key): state for key, state in {**saved, **self._loaded}.items()
            },
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned in a job of this size.

        Call it on every rank, between two steps or before the first one. It takes effect with the
        next gradient of each process set; there all ranks compare what they have loaded, and raise
        ConfigMismatchError if one of them has loaded nothing, the state of another step or world
        size, or what only another rank may go on from. Residuals of another rank are left out, and
        begin at zero. (After hvd.join() ranks may have saved
        different steps; then all go on from the highest.) Raises ValueError for the state of
        another method, of other options, or of another version.
        """
        self.require_own_state(state)
        self._loaded.clear()
        self._loaded.update((_as_ranks(key), own) for key, own in state["process_sets"].items())
        self._groups.clear()
        self._optimizers.clear()

    state_dict = ClassOrInstance(_state_dict)
    load_state_dict = ClassOrInstance(_load_state_dict)

    # --------------------------------------------------------------------------------------- groups

    def _group(self, process_set: Any, device: torch.device) -> Group:
        """State for a process set, whose ranks have compared how they are configured.

        `device` is that of the tensor that is to be reduced.
        """
        self.require_process_set(process_set)
        key = () if process_set.process_set_id == 0 else tuple(process_set.ranks)
        group = self._groups.get(key)
        if group is None or not _current(group, process_set):
            with _agreeing.setdefault(key, threading.RLock()):
                group = self._groups.get(key)  # another thread may have been faster
                if group is None or not _current(group, process_set):
                    group = self._agree(key, group, process_set, device)
        return group

    def _agree(
        self, key: tuple[int, ...], before: Group | None, process_set: Any, device: torch.device
    ) -> Group:
        """A group on whose state the ranks of the process set agree."""
        log.identify(hvd.rank(), hvd.size())
        numbering.install(speaks=hvd.rank() == 0)
        if (library := numbering.library()) is not None:
            library.frontends.add(self)
        joins = _joins()
        group = before
        if group is None or group.session is not numbering.session() or group.pipeline.closed:
            first = 0 if before is None else before.end_step
            group = self._new_group(key, process_set, first, device)
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
            [*group.numbers(), *nodes.table(group.rank, group.ranks)],
            group.rank,
            group.ranks,
            self.config.FUNCTION,
        )
        places = agreed[-nodes.numbers(group.ranks) :]
        could_stay = group.resident
        group.adopt(agreed[: -len(places)])
        if could_stay and not group.resident and group.rank == 0:
            gpus.say_that_others_cannot(self.config.FUNCTION)
        members, placed = process_set.ranks or list(range(hvd.size())), group.nodes
        if everyone and not group.placed:  # all ranks have to be there
            self._place(group, members, places)
        elif not group.placed and group.plan.world_size != group.ranks:
            group.reduce_by(None, self._plan(group.ranks))  # among all ranks until then
        group.joins = joins
        if library is not None:
            library.joined = not everyone
        if self.config.transport == "mpi" and everyone:
            # Until all ranks are there, codes travel through Horovod.
            from ..path import mpi

            if group.exchanges is None and group.nodes is None:
                group.exchanges = mpi.Messages(members)
            mpi.serve(group.pipeline)
        if self._groups.get(key) is not group or group.nodes is not placed:
            per_node = 1 if group.nodes is None else group.nodes.ranks_per_node
            group.census = self.begin_log(process_set, group.plan, per_node)
        self._groups[key] = group
        self._loaded.pop(key, None)
        _ = self._watchdog  # starts with the first group
        return group

    def _place(self, group: Group, members: list[int], places: list[int]) -> None:
        """Settle whether gradients are reduced by nodes; the same on every rank.

        Raises ValueError where options ask for it and it cannot be, or cannot be left out.
        """
        found = nodes.where(places) if self._wants_nodes(group.resident) else None
        own: Any = None
        if isinstance(found, Placement):
            # One node is no reason to leave out what was asked for.
            if found.has_levels or (self.config.hierarchical is True and found.ranks_per_node > 1):
                plan = self._plan(len(found.nodes), "nodes")  # before anything is begun for it
                own = nodes.reached(
                    *(found, group.rank, members, places, self.config.transport, group.resident)
                )
        else:
            own = found
        if isinstance(own, str):
            if self.config.hierarchical is True:
                raise ValueError(
                    f"{self.config.FUNCTION}: hierarchical=True cannot be had, because {own}; or "
                    "leave hierarchical out."
                )
            if group.rank == 0:
                nodes.say(self.config.FUNCTION, own)
        elif own is not None:
            group.reduce_by(own, plan)
            if own.exchanges is None:
                nodes.stay(group.collectives, members)
                if group.rank == 0 and agreement.elastic():
                    nodes.say_that_none_may_be_lost(self.config.FUNCTION)
        if group.nodes is None and group.plan.world_size != group.ranks:
            group.reduce_by(None, self._plan(group.ranks))
        group.placed = True

    def _wants_nodes(self, resident: bool) -> bool:
        """Whether options say to reduce by nodes; `resident`: whether codes stay on GPUs."""
        wanted = self.config.hierarchical is True or (
            self.config.hierarchical == "auto" and nodes.pays(resident) and not agreement.elastic()
        )
        return wanted and self._method() is None and not self.config.no_nodes

    def _plan(self, parties: int, what: str = "ranks") -> Plan:
        """The settings for so many ranks, or nodes. Raises ValueError if there are none."""
        try:
            self.config.require_plans(parties)
            return any_plan(self.config, parties)
        except ValueError as error:
            # Whose codes are added; the options know of ranks alone.
            text = str(error).replace(f"{parties} ranks", f"{parties} {what}")
            raise ValueError(text) from None

    def _new_group(
        self, key: tuple[int, ...], process_set: Any, before: int, device: torch.device
    ) -> Group:
        """A group that begins with what was loaded, or else after the step `before`."""
        ranks = process_set.size()
        try:
            plan = self._plan(ranks)
        except ValueError:
            # Among nodes codes of fewer parties are added, and where those are is not known yet.
            # Where no rank can have codes on a GPU, "auto" takes none: every rank knows by itself.
            if not self._wants_nodes(gpus.may_be_resident()):
                raise
            plan = self._plan(1)
        loaded = self._loaded.get(key)
        group = Group(
            function=self.config.FUNCTION,
            key_of_ranks=key,
            session=numbering.session(),
            rank=process_set.rank(),
            ranks=ranks,
            plan=plan,
            collectives=Collectives(process_set),
            pipeline=Pipeline(self.config.FUNCTION),
            loaded=describe_loaded(loaded, process_set.rank(), ranks),
            first_step=before,
            base=before,
            resident=(
                self.config.transport == "horovod"
                and self._method() is None
                and gpus.resident(device)
            ),
        )
        if self.config.levels == "auto":
            speaks = group.rank == 0
            group.trials = Trials(self.config, ranks, group.allreduce_max, speaks=speaks)
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
    with CuPy. Codes and norms stay there where Horovod has NCCL, and pass through host memory where
    it has not; without CuPy gradients are staged there whole. hvd.join() is refused where Horovod
    reduces on GPUs.

    Raises ConfigMismatchError at the first step, on every rank, if the ranks are configured
    differently.
    """

    TRANSPORTS = ("horovod", "mpi")
    LEVELS = Config.LEVELS
    HIERARCHICAL = ("auto", False, True)
    ERROR_FEEDBACK = (False, True)

    def begin_log(self, process_set: Any, plan: Plan, ranks_per_node: int = 1) -> log.Census | None:
        if self.stats_interval and ranks_per_node > 1 and process_set.rank() == 0:
            nodes.say_without_stats(self.config.FUNCTION)
        return super().begin_log(process_set, plan, ranks_per_node)

    def _sample(self, values: torch.Tensor, step: int) -> Sample | None:
        if not self.stats_interval or step % self.stats_interval:
            return None
        return Sample(values.flatten().to("cpu", torch.float32, copy=True).numpy())

    def _collect(self, key: str, sample: Sample, plan: Plan, step: int) -> None:
        self.stats[key] = sample.stats(plan, step, self.config.transport)


def _handed_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which Horovod reduces a tensor by itself."""
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _current(group: Group, process_set: Any) -> bool:
    """Whether the ranks of a group need not agree anew."""
    return (
        group.session is numbering.session()
        and group.collectives.process_set.process_set_id == process_set.process_set_id
        and group.joins == _joins()
        and group.pipeline.closed is None
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
        return f"because mpi4py does not import ({error}): `pip install 'gq-horovod[mpi]'`"
    reason = mpi.problem(hvd.rank(), hvd.size())
    return None if reason is None else f"because {reason}"


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
