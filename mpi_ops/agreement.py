"""Descriptions of what each rank is about to do, compared before anything is reduced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scheme import ConfigMismatchError

_LENGTH_BYTES = 4


def encode(description: dict[str, Any], limit: int | None = None) -> NDArray[np.uint8]:
    """A description as bytes that can be gathered and taken apart again: length, then JSON.

    Where that takes more than `limit` bytes, an error that quotes the beginning.
    """
    text = json.dumps(description, sort_keys=True).encode()
    if limit is not None and _LENGTH_BYTES + len(text) > limit:
        said = description.get("error", f"its description is too long: {text.decode()}")
        # Escapes take up to six bytes for a character.
        text = json.dumps({"error": f"{said[: limit // 8]} ..."}).encode()
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


def require_same(
    descriptions: Sequence[dict[str, Any] | None], function: str = "GlobalQSGD"
) -> None:
    """Raise ConfigMismatchError, with the same text on every rank, unless all are equal.

    None stands for a rank that was not asked.
    """
    given = {rank: own for rank, own in enumerate(descriptions) if own is not None}
    failed = {rank: own["error"] for rank, own in given.items() if "error" in own}
    if failed:
        listed = "; ".join(f"{ranks}: {error}" for error, ranks in by_value(failed).items())
        raise ConfigMismatchError(f"{function}: not every rank could start. {listed}")
    differences = []
    for key in sorted(set().union(*given.values())):
        having = by_value({rank: repr(own.get(key)) for rank, own in given.items()})
        if len(having) > 1:
            listed = ", ".join(f"{value} on {ranks}" for value, ranks in having.items())
            differences.append(f"{key} is {listed}")
    if differences:
        raise ConfigMismatchError(
            f"{function}: the ranks are configured differently: {'; '.join(differences)}. "
            "Pass the same options, and install the same version, on every rank."
        )


def by_value(values: dict[int, str]) -> dict[str, str]:
    """Each of the ranks' values, and "rank 1" or "ranks 0, 2" that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return {value: in_words(having) for value, having in ranks.items()}


def in_words(ranks: Sequence[int]) -> str:
    """Ranks as messages name them: "rank 1" or "ranks 0, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
