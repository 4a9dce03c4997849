"""Bandwidths, durations, counts and shares: as people write them on a command line, and back."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from ..advisor import model
from ..advisor.model import MOST_RANKS

_DURATIONS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_BIT_RATES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_NUMBER = r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"  # as Python writes them
# Beyond these no cluster is meant, and the model would end in infinities, or not at all.
_MOST_PARAMETERS = 2 * 10**11
_MOST_BITS_PER_SECOND = 1e15
_MOST_SECONDS = 1e9


def bandwidth(text: str) -> float:
    """Bits per second of "1Gbit", "200 Mbit/s" or "25Gbps". Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(
        _NUMBER + r"\s*([kmgt]?)(?:bit|bits|bps|b/s)(?:/s|ps)?", text.strip(), re.I
    )
    # A capital B is a byte to most who write it; guessing would be wrong by a factor of 8.
    rate = 0.0
    if match is not None and not re.search("B(?!it)", text):
        rate = float(match[1]) * _BIT_RATES[match[2].lower()]
    if not 1 <= rate <= _MOST_BITS_PER_SECOND:
        raise argparse.ArgumentTypeError(
            "expected a positive rate in bits such as 1Gbit, 200Mbit or 25Gbps, from 1bit to "
            f"1000Tbit, got {text!r}; a rate in bytes times 8 is one in bits"
        )
    return rate


def duration(text: str) -> float:
    """Seconds of "120ms", "1.5s" or "50us". Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(_NUMBER + r"\s*(us|µs|ms|s|min)", text.strip())
    seconds = math.inf if match is None else float(match[1]) * _DURATIONS[match[2]]
    if seconds > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            "expected a duration with its unit such as 120ms, 1.5s or 50us, from 0s to "
            f"{_MOST_SECONDS:.0e}s, got {text!r}; append us, ms, s or min"
        )
    return seconds


def count(text: str, most: int = _MOST_PARAMETERS) -> int:
    """An integer such as "64", "607_959_381", "608M" or "6e8". Raises ArgumentTypeError."""
    match = re.fullmatch(_NUMBER + r"\s*([kmgb]?)", text.strip().replace("_", ""), re.I)
    value = Decimal(0)  # exact, as float is not beyond 2**53
    if match is not None:
        value = Decimal(match[1]) * _COUNTS[match[2].lower()]
    if not 1 <= value <= most or value != int(value):
        raise argparse.ArgumentTypeError(
            "expected a positive whole number such as 64, 608M or 6e8, of at most "
            f"{most:,}, got {text!r}"
        )
    return int(value)


def rank_count(text: str) -> int:
    """A number of ranks, see `count`."""
    return count(text, MOST_RANKS)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of such values with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def share(text: str) -> float:
    """A number from 0 to 1. Raises argparse.ArgumentTypeError."""
    value = float(text) if re.fullmatch(_NUMBER, text.strip()) else math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a share of the compute time from 0 to 1 such as 0.5, got {text!r}"
        )
    return value


def workload_compute(text: str) -> tuple[str, float]:
    """ "DeepLight=120ms" as name and seconds. Raises argparse.ArgumentTypeError."""
    name, _, value = text.partition("=")
    names = [workload.name for workload in model.WORKLOADS]
    if name not in names or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME=DURATION with a name of {', '.join(names)}, got {text!r}; "
            f"write {names[0]}=120ms"
        )
    return name, duration(value)


def named_number(text: str) -> tuple[str, float]:
    """ "pcie=12e9" as name and number. Raises argparse.ArgumentTypeError."""
    name, _, value = text.partition("=")
    if not name or not re.fullmatch(_NUMBER, value.strip()):
        raise argparse.ArgumentTypeError(
            f"expected NAME=NUMBER in the units of the list, such as pcie=12e9, got {text!r}"
        )
    return name, float(value)


def written_rate(rate: float) -> str:
    """A bandwidth for people."""
    if rate <= 0:
        return "never"
    if math.isinf(rate):
        return f"> {model.BANDWIDTHS[1] / 1e9:.0f} Gbit/s"
    unit, name = next((u, n) for u, n in ((1e9, "Gbit/s"), (1e6, "Mbit/s")) if rate >= u or u < 1e9)
    return f"{rate / unit:.3g} {name}"


def written_share(efficiency: model.Efficiency) -> str:
    """A share of the bandwidth for people, of payloads of growing size."""
    if not isinstance(efficiency, tuple):
        return f"{efficiency:.0%}"
    return ", ".join(f"{share:.0%} ({size / 2**20:.3g} MiB)" for size, share in efficiency)


def written_seconds(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
