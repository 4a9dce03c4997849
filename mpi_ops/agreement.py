"""Descriptions of what each rank is about to do, compared before anything is reduced."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scheme import ConfigMismatchError

_LENGTH_BYTES = 4


def encode(description: dict[str, Any]) -> NDArray[np.uint8]:
    """A description as bytes that can be gathered and taken apart again: length, then JSON."""
    text = json.dumps(description, sort_keys=True).encode()
    data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return np.frombuffer(data, dtype=np.uint8).copy()


def decode(gathered: NDArray[np.uint8], stride: int | None = None) -> list[dict[str, Any]]:
    """The descriptions of all ranks, in rank order; `stride` bytes apart, or without gaps."""
    data = gathered.tobytes()
    descriptions = []
    while data:
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        descriptions.append(json.loads(data[_LENGTH_BYTES:end]))
        data = data[stride or end :]
    return descriptions


def require_same(descriptions: list[dict[str, Any]], function: str = "GlobalQSGD") -> None:
    """Raise ConfigMismatchError, with the same text on every rank, unless all are equal."""
    failed = {
        rank: description["error"]
        for rank, description in enumerate(descriptions)
        if "error" in description
    }
    if failed:
        listed = "; ".join(f"rank {rank}: {error}" for rank, error in failed.items())
        raise ConfigMismatchError(f"{function}: not every rank could start. {listed}")
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
            f"{function}: the ranks are configured differently: {'; '.join(differences)}. "
            "Pass the same options, and install the same version, on every rank."
        )
