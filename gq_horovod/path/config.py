"""Options of GlobalQSGD: the quantizers' (`mpi_ops.scheme`) and those of the plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mpi_ops.scheme import ConfigMismatchError, Plan, Scheme, one_of

from .buckets import DEFAULT_BUCKET_BYTES, DEFAULT_FIRST_BUCKET_BYTES

__all__ = ["Config", "ConfigMismatchError", "Plan"]

# Below this the latency of the extra operations costs more than the bytes that they save.
DEFAULT_MIN_ELEMENTS = 4096

# As long as PyTorch's own process groups wait over Gloo: longer than validating on one rank takes
# in most trainings, shorter than a night of paid machines that do nothing.
DEFAULT_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Config(Scheme):
    """Options of GlobalQSGD. Raises ValueError or TypeError on values that cannot work."""

    FUNCTION: ClassVar[str] = "GlobalQSGD"
    LEVELS: ClassVar[tuple[str, ...]] = (*Scheme.LEVELS, "auto")  # "auto": see gq_horovod.path.auto

    # Smaller tensors go through Horovod's own Allreduce, uncompressed.
    min_elements: int = DEFAULT_MIN_ELEMENTS
    # Bytes of gradients that are reduced together, and of those that come first. 0: each by itself.
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    first_bucket_bytes: int = DEFAULT_FIRST_BUCKET_BYTES
    # What carries the codes: Horovod's own operations, or MPI messages beside them.
    transport: Literal["horovod", "mpi"] = "horovod"
    # Seconds without any movement after which a rank ends; None: never. See guards.watchdog.
    timeout: float | None = DEFAULT_TIMEOUT
    # Compare parameters between ranks every so many steps; None: never. See guards.replicas.
    check_replicas: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, remedy in (
            ("min_elements", "0 compresses every tensor"),
            ("bucket_bytes", "0 reduces each tensor by itself"),
            ("first_bucket_bytes", "0 begins with a bucket of one tensor"),
        ):
            value = getattr(self, name)
            self._require_integer(name, value)
            if value < 0:
                self._fail(name, "0 or more", value, remedy)
        if self.levels == "auto" and self.bits is not None:
            self._fail("bits", "None with levels='auto'", self.bits, "leave it out, or set levels")
        if self.transport not in ("horovod", "mpi"):
            self._fail("transport", "'horovod' or 'mpi'", self.transport, "choose one of them")
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

    def describe_results(self) -> dict[str, Any]:
        """The options that results depend on: a resumed run may have others of the rest."""
        rest = ("timeout", "check_replicas", "bucket_bytes", "first_bucket_bytes")
        return {key: value for key, value in self.describe().items() if key not in rest}

    def plan(self, world_size: int) -> Plan:
        """The settings for `world_size` ranks. Raises ValueError if `bits` cannot hold the sum."""
        if self.levels == "auto":
            expected = f"{one_of(Scheme.LEVELS)} for a plan"
            self._fail("levels", expected, "auto", "replace them by one of those")
        return super().plan(world_size)


# The settings of the paper's runs (arXiv 2305.18627, section 5): 8 bits and one norm for a tensor.
# Its 127/n levels are rounded down here, because rounded up they overflow int8 (docs/design.md).
PAPER_STANDARD = Config(levels="standard", bits=8, block_size=None)
PAPER_EXPONENTIAL = Config(levels="exponential", bits=8, block_size=None)

AUTO = Config(levels="auto")
