"""Options of GlobalQSGD: the quantizers' (`mpi_ops.scheme`) and those of the plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

from mpi_ops.scheme import ConfigMismatchError, Plan, Scheme, one_of

from .buckets import DEFAULT_FIRST_BUCKET_BYTES, SMALLEST_LIMIT, default_limit

__all__ = ["Config", "ConfigMismatchError", "Plan", "Rules"]

# By a pattern of names, the options that tensors have in place of the others; None: none are
# compressed.
Rules = Mapping[str, Mapping[str, Any] | None]

# Below this the latency of the extra operations costs more than the bytes that they save.
DEFAULT_MIN_ELEMENTS = 4096

# With error_feedback: those whose kernels round to the nearest level as well.
FEEDBACK_LEVELS = ("standard", "two-hop")

# As long as PyTorch's own process groups wait over Gloo: longer than validating on one rank takes
# in most trainings, shorter than a night of paid machines that do nothing.
DEFAULT_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Config(Scheme):
    """Options of GlobalQSGD. Raises ValueError or TypeError on values that cannot work."""

    FUNCTION: ClassVar[str] = "GlobalQSGD"
    LEVELS: ClassVar[tuple[str, ...]] = (*Scheme.LEVELS, "auto")  # "auto": see gq_horovod.path.auto

    # "bucket": one norm for all tensors of a bucket, the largest of theirs. Results then depend on
    # the buckets.
    block_size: int | Literal["auto", "bucket"] | None = "auto"  # type: ignore[assignment]
    # Smaller tensors go through Horovod's own Allreduce, uncompressed.
    min_elements: int = DEFAULT_MIN_ELEMENTS
    # Bytes of gradients that are reduced together, and of those that come first. 0: each by itself;
    # None: `buckets.default_limit`.
    bucket_bytes: int | None = None
    first_bucket_bytes: int = DEFAULT_FIRST_BUCKET_BYTES
    # What carries the codes: Horovod's own operations, or MPI messages beside them.
    transport: Literal["horovod", "mpi"] = "horovod"
    # Exact sums inside a node, and codes between nodes (`path.nodes`). "auto": where codes stay on
    # GPUs, and nodes have several ranks.
    hierarchical: bool | Literal["auto"] = "auto"
    # Add what a rank's codes leave out of its gradient to its next one, and round to the nearest
    # level (`path.feedback`). Not unbiased.
    error_feedback: bool = False
    # Seconds without any movement after which a rank ends; None: never. See guards.watchdog.
    timeout: float | None = DEFAULT_TIMEOUT
    # Compare parameters between ranks every so many steps; None: never. See guards.replicas.
    check_replicas: int | None = None
    # Pairs of a pattern and options, as `Rules` has them; the first that a name matches counts.
    rules: Rules | Sequence[tuple[str, Any]] = ()

    # What a rule may say of its tensors.
    RULE_OPTIONS: ClassVar[tuple[str, ...]] = (
        *("levels", "bits", "block_size", "norm", "min_elements"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, remedy in (
            ("min_elements", "0 compresses every tensor"),
            ("bucket_bytes", "0 reduces each tensor by itself"),
            ("first_bucket_bytes", "0 begins with a bucket of one tensor"),
        ):
            value = getattr(self, name)
            if value is None and name == "bucket_bytes":
                continue
            self._require_integer(name, value)
            if value < 0:
                self._fail(name, "0 or more", value, remedy)
        if self.levels == "auto" and self.bits is not None:
            self._fail("bits", "None with levels='auto'", self.bits, "leave it out, or set levels")
        if self.transport not in ("horovod", "mpi"):
            self._fail("transport", "'horovod' or 'mpi'", self.transport, "choose one of them")
        self._require_bool("error_feedback", self.error_feedback)
        self._check_error_feedback()
        if self.timeout is not None:
            if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)):
                raise TypeError(
                    f"{self.FUNCTION}: timeout must be a number of seconds or None, got "
                    f"{self.timeout!r} of type {type(self.timeout).__name__}; pass a number."
                )
            if not self.timeout > 0:
                self._fail("timeout", "more than 0 s", self.timeout, "None waits for ever")
        if self.check_replicas is not None:
            self._require_integer("check_replicas", self.check_replicas)
            if self.check_replicas < 1:
                expected = "1 or more steps"
                self._fail("check_replicas", expected, self.check_replicas, "None never checks")
        given: Any = self.hierarchical
        if not isinstance(given, bool) and given != "auto":  # 1 equals True, and would pass for it
            expected = "True, False or 'auto'"
            self._fail("hierarchical", expected, self.hierarchical, "leave it out for 'auto'")
        object.__setattr__(self, "rules", self._pairs)  # as tuples, which have a hash
        _ = self._by_pattern
        if self.hierarchical is True and (problem := self.no_nodes):
            self._fail("hierarchical", f"'auto' or False with {problem}", True, "leave it out")

    def _require_bool(self, argument: str, value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(
                f"{self.FUNCTION}: {argument} must be True or False, got {value!r} of type "
                f"{type(value).__name__}; pass a bool."
            )

    def _check_error_feedback(self) -> None:
        if self.error_feedback and self.levels not in FEEDBACK_LEVELS:
            expected = f"{one_of(FEEDBACK_LEVELS)} with error_feedback=True"
            self._fail("levels", expected, self.levels, "choose one of them")

    @property
    def no_nodes(self) -> str | None:
        """The option with which gradients are not reduced by nodes; None: they may be."""
        if self.levels == "auto":
            return "levels='auto', which tries other ways"
        if self._by_bucket:
            return "block_size='bucket', which has one norm for all ranks"
        if self.error_feedback:
            return "error_feedback=True, which is about each rank's own codes"
        return None

    @property
    def _by_bucket(self) -> bool:
        """Whether some tensors have one norm for a bucket."""
        every = (self, *self._by_pattern.values())
        return any(own is not None and own.block_size == "bucket" for own in every)

    @cached_property
    def _pairs(self) -> tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]:
        """The rules, read once. Raises TypeError or ValueError for what is none."""
        try:
            pairs = dict(self.rules)
            given = {own: None if x is None else dict(x) for own, x in pairs.items()}
            if not all(isinstance(own, str) for own in pairs):
                raise TypeError("a pattern that is no text")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.FUNCTION}: rules must be a dictionary with patterns of names as keys, and "
                f"dictionaries of options or None, got {self.rules!r} ({error}); pass for instance "
                "{'*.bias': None, 'embedding*': {'bits': 4}}."
            ) from None
        read: list[tuple[str, tuple[tuple[str, Any], ...] | None]] = []
        for pattern, options in given.items():
            if options is None:
                read.append((pattern, None))
                continue
            unknown = [key for key in options if key not in self.RULE_OPTIONS]
            if unknown:
                self._fail(
                    f"rules[{pattern!r}]",
                    f"None or a dictionary of {one_of(self.RULE_OPTIONS)}",
                    options,
                    f"leave {unknown[0]!r} out",
                )
            read.append((pattern, tuple(sorted(options.items()))))
        return tuple(read)

    @cached_property
    def _by_pattern(self) -> dict[str, Config | None]:
        """The options of each rule's tensors."""
        return {
            pattern: None if given is None else self._ruled(pattern, dict(given))
            for pattern, given in self._pairs
        }

    def _ruled(self, pattern: str, options: dict[str, Any]) -> Config:
        """These options with those of a rule. Other levels begin from their own defaults."""
        if "levels" in options:
            options = {"bits": None, "block_size": "auto", **options}
        try:
            own = replace(self, rules=(), **options)
        except (TypeError, ValueError) as error:
            problem = str(error).removeprefix(f"{self.FUNCTION}: ")
            raise type(error)(f"{self.FUNCTION}: in rules[{pattern!r}] {problem}") from None
        if own.levels == "auto":
            expected = f"{one_of(Scheme.LEVELS)} for the tensors of a rule"
            self._fail(f"rules[{pattern!r}]['levels']", expected, "auto", "name one of them")
        return own

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those of the rules."""
        return tuple(self._by_pattern)

    def of(self, name: str) -> Config | None:
        """The options for a tensor: these ones, unless a rule has others; None: not compressed."""
        pattern = _first_of(self.patterns, name)
        return self if pattern is None else self._by_pattern[pattern]

    def fixed(self, name: str) -> bool:
        """Whether a rule says how a tensor is reduced."""
        return self.of(name) is not self

    def _check_block_size(self) -> None:
        if self.block_size != "bucket":
            super()._check_block_size()
            return
        if self.levels not in ("standard", "exponential"):
            # A share of two-hop levels has a norm of its own, and "auto" tries other buckets.
            choices = one_of(("standard", "exponential"))
            self._fail("levels", f"{choices} with block_size='bucket'", self.levels, "name one")
        if self.norm != "max":
            remedy = "the norm of a bucket is the largest of its tensors'"
            self._fail("norm", "'max' with block_size='bucket'", self.norm, remedy)

    def _block_size(self, bits: int) -> int | None:
        return None if self.block_size == "bucket" else super()._block_size(bits)

    def describe(self) -> dict[str, Any]:
        """The options as plain data, which JSON gives back as it is."""
        rules = [[own, None if x is None else dict(x)] for own, x in self._pairs]
        return {**super().describe(), "rules": rules}

    def describe_results(self) -> dict[str, Any]:
        """The options that results depend on: a resumed run may have others of the rest."""
        rest = {"timeout", "check_replicas"}
        if not self._by_bucket:
            rest |= {"bucket_bytes", "first_bucket_bytes"}
        described = {key: value for key, value in self.describe().items() if key not in rest}
        if described.get("bucket_bytes", 0) is None and self.levels == "standard":
            described["bucket_bytes"] = SMALLEST_LIMIT  # for any number of ranks
        return described

    def plan(self, world_size: int) -> Plan:
        """The settings for `world_size` ranks. Raises ValueError if `bits` cannot hold the sum."""
        if self.levels == "auto":
            expected = f"{one_of(Scheme.LEVELS)} for a plan"
            self._fail("levels", expected, "auto", "replace them by one of those")
        return replace(
            super().plan(world_size),
            one_norm=self.block_size == "bucket",
            nearest=self.error_feedback,
        )

    def bucket_limit(self, plan: Plan) -> int:
        """Bytes of gradients with this plan that are reduced together; 0: each by itself."""
        return default_limit(plan) if self.bucket_bytes is None else self.bucket_bytes

    def require_plans(self, world_size: int) -> None:
        """Raise ValueError unless the tensors of all rules can be reduced over so many ranks."""
        for own in self._by_pattern.values():
            if own is not None:
                own.plan(world_size)


@lru_cache(maxsize=16384)  # the tensors of a large model
def _first_of(patterns: tuple[str, ...], name: str) -> str | None:
    """The first pattern that a name matches."""
    return next((own for own in patterns if fnmatchcase(name, own)), None)


# The settings of the paper's runs (arXiv 2305.18627, section 5; the granularity is that of the
# authors' code, sands-lab/global-qsgd, commit 13d702f): 8 bits, one norm for each bucket of
# PyTorch's DistributedDataParallel, whose first one has 1 MiB and whose others have 25, with all
# gradients in them. The paper's 127/n levels are rounded down here, because rounded up they
# overflow int8 (docs/design.md).
PAPER_STANDARD = Config(
    levels="standard",
    bits=8,
    block_size="bucket",
    min_elements=0,
    bucket_bytes=25 << 20,
    first_bucket_bytes=1 << 20,
)
PAPER_EXPONENTIAL = replace(PAPER_STANDARD, levels="exponential")

AUTO = Config(levels="auto")
