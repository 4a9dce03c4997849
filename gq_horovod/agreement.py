"""Whether all ranks run the same configuration: checked once, before the first gradient moves."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import ConfigMismatchError
from .pipeline import Handle

_LENGTH_BYTES = 4
_POLL_SECONDS = 1e-3
# Ranks may be minutes apart at the first step (data loading, compilation); for ever is a bug.
TIMEOUT_SECONDS = 600.0


def encode(description: dict[str, Any]) -> NDArray[np.uint8]:
    """A description as bytes that can be gathered and taken apart again: length, then JSON."""
    text = json.dumps(description, sort_keys=True).encode()
    data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return np.frombuffer(data, dtype=np.uint8).copy()


def decode(gathered: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """The descriptions of all ranks, in rank order."""
    data = gathered.tobytes()
    descriptions = []
    while data:
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        descriptions.append(json.loads(data[_LENGTH_BYTES:end]))
        data = data[end:]
    return descriptions


def require_same(descriptions: list[dict[str, Any]]) -> None:
    """Raise ConfigMismatchError, with the same text on every rank, unless all are equal."""
    differences = []
    for key in sorted(set().union(*descriptions)):
        values = [description.get(key) for description in descriptions]
        if any(value != values[0] for value in values):
            by_value: dict[str, list[str]] = {}
            for rank, value in enumerate(values):
                by_value.setdefault(repr(value), []).append(str(rank))
            listed = ", ".join(
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
                for value, ranks in by_value.items()
            )
            differences.append(f"{key} is {listed}")
    if differences:
        raise ConfigMismatchError(
            f"GlobalQSGD: the ranks are configured differently: {'; '.join(differences)}. "
            "Pass the same compression= options, and install the same version, on every rank."
        )


def wait(handle: Handle) -> NDArray[Any]:
    """The gathered descriptions; raises instead of waiting for ever."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not handle.ready():
        if time.monotonic() > deadline:
            raise ConfigMismatchError(
                f"GlobalQSGD: after {TIMEOUT_SECONDS:.0f} s not every rank has reported its "
                "configuration; pass compression=GlobalQSGD on every rank, and see the first error "
                "of the ranks that stopped."
            )
        time.sleep(_POLL_SECONDS)
    return handle.wait()
