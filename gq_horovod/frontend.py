"""What the modules of all frameworks share: the class that users pass to Horovod, its refusals.

It knows no framework. `hvd` stands for horovod.torch or horovod.tensorflow.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from types import MethodType
from typing import Any, ClassVar, Literal

from mpi_ops import wire
from mpi_ops.kernels import host
from mpi_ops.scheme import Scheme, one_of

from . import __version__, log
from .guards import stats as statistics
from .path.buckets import DEFAULT_FIRST_BUCKET_BYTES
from .path.config import (
    AUTO,
    DEFAULT_MIN_ELEMENTS,
    DEFAULT_TIMEOUT,
    PAPER_EXPONENTIAL,
    PAPER_STANDARD,
    Config,
    Plan,
    Rules,
)

__all__ = [
    "ClassOrInstance",
    "Compression",
    "Frontend",
    "Preset",
    "per_process",
    "require_linear",
    "require_name",
]

_log = log.Log(__name__)

# Here, because all that a training imports begins with this module: a variable that is wrong ends a
# rank before it has begun.
log.configure()


_making = threading.RLock()  # of what exists once


class per_process(cached_property[Any]):
    """A cached property that belongs to this process: threads share one, copies begin anew."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with _making:
            return super().__get__(instance, owner)


class ClassOrInstance:
    """A method that Horovod may call on the class, which then stands for its default instance."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, instance: Frontend | None, owner: type[Frontend]) -> MethodType:
        if instance is None:
            instance = owner.shared(owner.CONFIG())
        return MethodType(self._function, instance)


class Preset:
    """A configured instance as an attribute of the class."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __get__(self, instance: Frontend | None, owner: type[Frontend]) -> Any:
        return owner.shared(self._config)


class Frontend:
    """What users pass to Horovod as `compression=`: a class or an instance, of any method."""

    HVD: ClassVar[Any]  # Horovod's module for the framework
    CONFIG: ClassVar[type[Config]] = Config  # the options
    FORMAT: ClassVar[int | str]  # of state_dict()

    _instances: ClassVar[dict[tuple[type, Config], Any]] = {}

    def __init__(self, config: Config, process_set: Any) -> None:
        if process_set is not None and not isinstance(process_set, self.HVD.ProcessSet):
            raise TypeError(
                f"{config.FUNCTION}: process_set must be a {self.HVD.__name__}.ProcessSet or None, "
                f"got {process_set!r} of type {type(process_set).__name__}; see "
                "hvd.add_process_set."
            )
        self.config = config
        self.process_set = process_set

    @classmethod
    def shared(cls, config: Config) -> Any:
        """The instance that stands for the class, or for one of its presets."""
        key = (cls, config)  # a subclass has instances of its own
        if key not in cls._instances:
            with _making:
                if key not in cls._instances:
                    cls._instances[key] = cls(**config.describe())
        return cls._instances[key]

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy take: the options. A copy begins anew, as in another process."""
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.config.describe().items())
        return f"{type(self).__name__}({options})"

    def begin_log(self, process_set: Any, plan: Plan, ranks_per_node: int = 1) -> log.Census | None:
        """Log what the ranks of a process set have agreed on; None on all ranks but its first.

        The census of their tensors is for the others to see.
        """
        if process_set.rank() != 0:
            return None
        options = self.config.describe()
        known = {"bits": plan.bits, "block_size": "bucket" if plan.one_norm else plan.block_size}
        if options.get("levels") != "auto":
            options |= {key: value for key, value in known.items() if key in options}
            if "levels" in options:
                options["levels_per_side"] = plan.level_count
        listed = ", ".join(f"{key}={value!r}" for key, value in options.items())
        number = process_set.process_set_id
        kernels, instructions = host.fingerprint(), host.best_instruction_set()
        ranks = plan.world_size * ranks_per_node
        nodes = f" on {plan.world_size} nodes" if ranks_per_node > 1 else ""
        _log.say(
            logging.INFO,
            "plan",
            f"{self.config.FUNCTION}: {ranks} ranks{nodes}, process set {number}, agreed on "
            f"{listed}; gq-horovod {__version__}, kernels {kernels}, instruction set "
            f"{instructions} on this rank",
            function=self.config.FUNCTION,
            world_size=ranks,
            nodes=plan.world_size if nodes else None,
            process_set=number,
            options=options,
            version=__version__,
            kernels=kernels,
            instruction_set=instructions,
        )
        trials = self.config.levels == "auto"
        return log.Census(_log, self.config.FUNCTION, self.config.patterns, timed=not trials)

    def takes(self, name: str, elements: int) -> bool:
        """Whether the options say to compress a tensor of this name and size."""
        own = self.config.of(name)
        return own is not None and elements >= max(own.min_elements, 1)

    def plan_for(self, name: str, plan: Plan) -> Plan:
        """How a tensor is reduced: as `plan` says, unless a rule has another one for its name."""
        own = self.config.of(name)
        return plan if own is None or own is self.config else own.plan(plan.world_size)

    def reason(self, name: str, elements: int, dtype: str, supported: bool) -> str:
        """Why a tensor is left to Horovod, for the log; `supported` says whether its dtype is."""
        if not supported:
            return f"the dtype {dtype}"
        own = self.config.of(name)
        if own is None:
            return "a name that a rule leaves to it"
        if elements < max(own.min_elements, 1):
            return f"fewer than min_elements={own.min_elements}"
        return "a shape in which there is nothing to save"

    def wire_bytes(self, name: str, elements: int, plan: Plan) -> float | None:
        """What a rank sends for a tensor, for the log; None where it is not known."""
        return None

    def describe_state(self) -> dict[str, Any]:
        """What state_dict() begins with: where it may be loaded."""
        return {
            "format": self.FORMAT,
            "compression": self.config.FUNCTION,
            "options": self.config.describe_results(),
        }

    def require_own_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for the state of another method, of other options or another version."""
        own, other = self.describe_state(), {"options": {}, **state}
        # What an earlier version has not had.
        hierarchical = own["options"].get("hierarchical")
        added = {"rules": [], "hierarchical": hierarchical, "error_feedback": False}
        if state.get("format") == self.FORMAT:
            known = {key: value for key, value in added.items() if key in own["options"]}
            other["options"] = {**known, **other["options"]}
        expected = {**own, **own["options"]}
        got = {**{key: other.get(key) for key in own}, **other["options"]}
        for key in {**expected, **got}:
            if key != "options" and expected.get(key) != got.get(key):
                raise ValueError(
                    f"{self.config.FUNCTION}.load_state_dict: {key} must be {expected.get(key)!r} "
                    f"as in this instance, got a state with {got.get(key)!r}; configure it as in "
                    "the run that saved the state, and use the same version."
                )

    def require_process_set(self, callers: Any) -> None:
        """Raise ValueError if Horovod reduces over no ranks, or others than `process_set`."""
        if callers.process_set_id is None:
            raise ValueError(
                f"{self.config.FUNCTION}: process_set must be one that hvd.init or "
                f"hvd.add_process_set knows, got one of ranks {callers.ranks} that was removed or "
                "never added; add it on every rank."
            )
        if self.process_set is not None and not _same(self.process_set, callers):
            raise ValueError(
                f"{self.config.FUNCTION}: process_set must be that of the caller, ranks "
                f"{callers.ranks}, got ranks {self.process_set.ranks}; pass the same process_set "
                "to both, or only to Horovod."
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two process sets have the same ranks; a copy is not known to Horovod by its id."""
    return one is other or (bool(one.ranks) and one.ranks == other.ranks)


class Compression(Frontend):
    """Horovod compression by Global-QSGD: unbiased, and the same result on every rank bit for bit.

    Pass the class itself for the defaults, or an instance.
    """

    # Those that the framework's class has.
    TRANSPORTS: ClassVar[tuple[str, ...]] = ("horovod",)
    LEVELS: ClassVar[tuple[str, ...]] = Scheme.LEVELS
    HIERARCHICAL: ClassVar[tuple[bool | str, ...]] = ("auto", False)
    ERROR_FEEDBACK: ClassVar[tuple[bool, ...]] = (False,)

    paper_standard = Preset(PAPER_STANDARD)
    """The paper's standard dithering: 8 bits, one norm for each bucket of 25 MiB."""
    paper_exponential = Preset(PAPER_EXPONENTIAL)
    """The paper's exponential dithering: 8 bits, one norm for each bucket of 25 MiB."""
    auto = Preset(AUTO)
    """What is fastest here, tried during the first steps: levels="auto"."""

    def __init__(
        self,
        *,
        levels: Literal["standard", "exponential", "two-hop", "auto"] = "two-hop",
        bits: int | None = None,
        block_size: int | Literal["auto", "bucket"] | None = "auto",
        norm: Literal["max", "l2"] = "max",
        min_elements: int = DEFAULT_MIN_ELEMENTS,
        seed: int = 0,
        process_set: Any = None,
        bucket_bytes: int | None = None,
        first_bucket_bytes: int = DEFAULT_FIRST_BUCKET_BYTES,
        transport: Literal["horovod", "mpi"] = "horovod",
        hierarchical: bool | Literal["auto"] = "auto",
        error_feedback: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
        check_replicas: int | None = None,
        stats: bool | int = False,
        rules: Rules | Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Configure it.

        Arguments:
            levels: "two-hop" (squares of evenly spaced numbers, by Alltoall and Allgather; the most
                accurate at its width for any number of ranks; from 9 bits on evenly spaced ones),
                "standard" (evenly spaced levels, summed by Allreduce) or "exponential" (powers of
                two, an error that does not grow with the number of ranks). "auto" tries standard
                and two-hop levels, standard ones of 16 bits and no compression on the first 99
                steps (TensorFlow: 75), and then stays with what was fastest (see
                gq_horovod.path.auto).
            bits: bits per element on the wire, 2 to 16, 4 or 8 for exponential levels. None takes
                8, and for standard levels 10 from 19 ranks and 16 from 74 ranks on. Two-hop levels
                of 3, 5 and 6 bits send 3.2, 5.3 and 6.4; 7 are 8, 9 are 10, and 11 to 15 are 16.
            block_size: elements that share a norm, a multiple of 32; None for one norm per tensor;
                "auto" takes 256, and None for 8-bit exponential levels; "bucket" has one norm for
                all tensors of a bucket, as the paper's runs had.
            norm: "max" or "l2", the norm of a block on one rank; the global norm is the largest.
            min_elements: tensors with fewer elements go through Horovod's own Allreduce.
            seed: key of the dither; runs that share it (and everything else) are reproducible.
            process_set: the process set whose ranks reduce; by default that of the caller.
            bucket_bytes: gradients of an optimizer that are reduced together, in bytes; 0 for each
                by itself. Results do not depend on it, unless block_size is "bucket". None takes 8
                MiB, and for two-hop and exponential levels 0.5 MiB for each rank if that is more.
            first_bucket_bytes: the same of those that come first.
            transport: "horovod" (its Allreduce, Alltoall and Allgather, over MPI, Gloo or NCCL) or
                "mpi" (messages between ranks through mpi4py beside Horovod, in chunks that overlap;
                PyTorch only; needs Horovod's MPI controller and MPI_THREAD_MULTIPLE).
            hierarchical: True adds gradients exactly inside each node, and quantizes what goes
                between nodes, with levels for as many ranks as there are nodes (PyTorch only). With
                Horovod's transport that takes process sets, which it adds at the first gradient
                where HOROVOD_DYNAMIC_PROCESS_SETS=1. Horovod has no two of the same ranks: add
                yours of a node, or of a place in all nodes, before that, and keep them. "auto" does
                so where codes stay on GPUs, and there are several nodes with as many ranks each,
                more than one; not in elastic jobs, of which Horovod ends all workers when one is
                lost and there are process sets.
            error_feedback: add what this rank's codes leave out of a gradient to the next gradient
                of that name, and round codes to the nearest level. For 2 to 4 bits; not unbiased.
                It did not help in the runs of docs/quality.md. Every name keeps memory of its
                tensor's size and dtype: those of an optimizer until the optimizer is gone, others
                until Horovod is started anew, so names have to recur. For "standard" and "two-hop"
                levels, without nodes (PyTorch only).
            timeout: seconds after which a reduction that does not move ends this rank with an error
                (see gq_horovod.guards.watchdog), None for never.
            check_replicas: compare the optimizer's parameters (TensorFlow: the variables whose
                gradients a step has) between ranks every so many steps, and raise
                ReplicaMismatchError where they differ; None for never.
            stats: whether to measure what quantization does to each tensor, every 100th step or
                every `stats`-th one; the attribute `stats` has the newest figures by tensor name,
                and gq_horovod.stats.write() hands them to TensorBoard. Ranks may differ. There are
                none where gradients are reduced by nodes, which the log says.
            rules: options by layer, {pattern: options}. Of the patterns that the name of a tensor
                matches (as file names: "*.bias", "embedding?.*"), the first counts. Options are a
                dictionary of levels (but for "auto"), bits, block_size, norm and min_elements, in
                place of those above; None leaves a tensor to Horovod. Names are those of the
                parameters (TensorFlow: of the variables, without ":0"), else of the operations. So
                Horovod has to be given named_parameters; a pattern that no tensor of the first step
                matches is a warning in the log.

        Raises ValueError or TypeError for options that cannot work.
        """
        config = Config(
            levels=levels,
            bits=bits,
            block_size=block_size,
            norm=norm,
            min_elements=min_elements,
            seed=seed,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            transport=transport,
            hierarchical=hierarchical,
            error_feedback=error_feedback,
            timeout=timeout,
            check_replicas=check_replicas,
            rules=rules,
        )
        interval = statistics.check(config.FUNCTION, stats)
        limited: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("transport", transport, self.TRANSPORTS),
            ("levels", levels, self.LEVELS),
            ("hierarchical", hierarchical, self.HIERARCHICAL),
            ("error_feedback", error_feedback, self.ERROR_FEEDBACK),
        ]
        for argument, value, choices in limited:
            if value not in choices:
                raise ValueError(
                    f"GlobalQSGD: {argument} must be {one_of(choices)} with {self.HVD.__name__}, "
                    f"got {value!r}; leave it out."
                )
        super().__init__(config, process_set)
        self.stats_interval = interval

    @per_process
    def stats(self) -> dict[str, statistics.TensorStats]:
        """The newest figures of each tensor, by its name."""
        return {}

    def wire_bytes(self, name: str, elements: int, plan: Plan) -> float | None:
        """Codes and norms; None with levels="auto", which tries several ways."""
        own = self.config.of(name)
        if own is None or own.levels == "auto":
            return None
        return wire.wire(elements, plan, self.config.transport).sent


def require_name(name: str | None, function: str = "GlobalQSGD") -> str:
    """The name that the caller gave to an operation; raises ValueError if there is none."""
    if name is None:
        raise ValueError(
            f"hvd.allreduce with compression={function}: name must be a string that is the same on "
            "every rank, got None; pass name=."
        )
    return name


def require_linear(hvd: Any, op: int, name: str | None, function: str = "GlobalQSGD") -> None:
    """Raise ValueError unless sums of codes can express `op` for the tensor `name`."""
    if op not in (hvd.Average, hvd.Sum):
        names = {hvd.Adasum: "Adasum", hvd.Min: "Min", hvd.Max: "Max", hvd.Product: "Product"}
        raise ValueError(
            f"{function}: op must be hvd.Average or hvd.Sum, got "
            f"hvd.{names.get(op, op)} for tensor {name!r}; use Horovod's own "
            "compression for it."
        )
