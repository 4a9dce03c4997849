"""The ways of sending gradients that examples and benchmarks choose between, by name.

The only lines that know about Global-QSGD: each way is a `compression=` of Horovod.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


def _horovods(name: str) -> Any:
    import horovod.torch as hvd

    return getattr(hvd.Compression, name)


def _ours(levels: str, **options: Any) -> Any:
    from gq_horovod.torch import GlobalQSGD

    return GlobalQSGD(levels=levels, **options)  # type: ignore[arg-type]


def _papers(levels: str, **options: Any) -> Any:
    """The paper's preset of these levels, GlobalQSGD.paper_..., with a seed of one's own."""
    from gq_horovod.torch import GlobalQSGD

    preset = getattr(GlobalQSGD, f"paper_{levels}").config
    given = {own.name: (getattr(preset, own.name), own.default) for own in fields(preset)}
    changed = {name: value for name, (value, default) in given.items() if value != default}
    return GlobalQSGD(**{**changed, **options})


def _baseline(name: str, **options: Any) -> Any:
    from gq_horovod.research import torch_baselines

    return getattr(torch_baselines, name)(**options)


@dataclass(frozen=True)
class Method:
    """What makes a `compression=`, and the options that it takes."""

    make: Callable[..., Any]
    takes: tuple[str, ...] = ()


_OURS = ("bits", "seed", "transport", "min_elements", "hierarchical")

METHODS = {
    "none": Method(lambda: _horovods("none")),
    "fp16": Method(lambda: _horovods("fp16")),
    "qsgd": Method(lambda **options: _baseline("QSGD", **options), ("bits", "seed")),
    "qsgd-elias": Method(
        lambda **options: _baseline("QSGD", coding="elias", **options), ("bits", "seed")
    ),
    # The examples' Adam makes updates that are not as large as its gradients.
    "intsgd": Method(
        lambda **options: _baseline("IntSGD", scale="gradient", **options), ("bits", "seed")
    ),
    "powersgd": Method(lambda **options: _baseline("PowerSGD", **options), ("rank", "seed")),
    **{
        levels: Method(lambda levels=levels, **options: _ours(levels, **options), _OURS)
        for levels in ("standard", "exponential", "two-hop")
    },
    **{
        f"paper-{levels}": Method(
            lambda levels=levels, **options: _papers(levels, **options), ("seed",)
        )
        for levels in ("standard", "exponential")
    },
    "auto": Method(lambda **options: _ours("auto", **options), _OURS[1:-1]),
}


def options_of(label: str) -> list[str]:
    """The options of a training script for a method's name, and -BITS behind it if it has some."""
    name, _, bits = label.rpartition("-")
    return (
        [f"--compression={name}", f"--bits={bits}"]
        if bits.isdecimal()
        else [f"--compression={label}"]
    )


def make(name: str, **options: Any) -> Any:
    """Return the `compression=` argument of DistributedOptimizer for a method's name.

    Arguments:
        name: a key of METHODS.
        options: of the method; those that are None take its defaults. `seed` is for the methods
            that have one, so that it can be given with any.

    Raises ValueError for an option that the method does not take, or not with this value.
    """
    method = METHODS[name]
    given = {key: value for key, value in options.items() if value is not None}
    if "seed" not in method.takes:
        given.pop("seed", None)
    for key, value in given.items():
        if key not in method.takes:
            takers = [other for other in METHODS if key in METHODS[other].takes]
            raise ValueError(
                f"compression {name!r}: {key} must be left out, got {value!r}; it is an option of "
                f"{', '.join(takers) or 'no method'}."
            )
    return method.make(**given)
