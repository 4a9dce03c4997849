"""Options by layer: each tensor is reduced as by an instance that has these options for all."""

from __future__ import annotations

import io
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, gradient

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.torch import GlobalQSGD

SHAPES = {
    "body.weight": (100, 60),
    "body.bias": (100,),
    "embedding.weight": (500, 8),
    "head.weight": (64, 64),
    "head.bias": (64,),
    "small.weight": (30, 30),
}
COMMON = {"min_elements": 64, "transport": TRANSPORT}
RULES: dict[str, Any] = {
    "body.bias": None,
    "embedding*": {"levels": "standard", "bits": 4},
    "head.*": {"bits": 4, "block_size": 64},
    "small.*": {"min_elements": 1000},
    "*.bias": {"bits": 16},  # that of the head has had its rule
}
# Beside trials each rule has to name its levels.
FIXED = {"body.bias": None, "head.*": {"levels": "standard", "bits": 4, "block_size": 64}}
# What RULES say of each tensor; None: Horovod reduces it.
OPTIONS: dict[str, dict[str, Any] | None] = {
    "body.weight": {},
    "body.bias": None,
    "embedding.weight": {"levels": "standard", "bits": 4},
    "head.weight": {"bits": 4, "block_size": 64},
    "head.bias": {"bits": 4, "block_size": 64},
    "small.weight": None,
}


def train(
    compression: Any, steps: int = 2, begin: int = 0, **options: Any
) -> list[dict[str, torch.Tensor]]:
    """The reduced gradients of each step, by name; those of step `begin` come first."""
    named = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    if options.pop("grouped", False):
        options["groups"] = [list(named.values())[:4], list(named.values())[4:]]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=0.0),
        named_parameters=named.items(),
        compression=compression,
        **options,
    )
    found = []
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        own = {name: gradient(hvd.rank(), shape, tag=step) for name, shape in SHAPES.items()}
        torch.stack([(named[name] * own[name]).sum() for name in named]).sum().backward()
        optimizer.synchronize()
        found.append({name: value.grad.clone() for name, value in named.items()})  # type: ignore[union-attr]
    return found


def check_same(found: torch.Tensor, expected: torch.Tensor, left: bool) -> None:
    """`left`: by Horovod, whose sums of more than two ranks depend on what is fused with them."""
    exact = not left or hvd.size() <= 2
    torch.testing.assert_close(
        found, expected, rtol=0.0 if exact else 1e-5, atol=0.0 if exact else 1e-6
    )


def alone(name: str, **options: Any) -> list[torch.Tensor]:
    """The same of one tensor, where all have its options."""
    own = OPTIONS[name]
    compression = hvd.Compression.none if own is None else GlobalQSGD(**{**COMMON, **own})
    return [step[name] for step in train(compression, **options)]


@pytest.mark.parametrize("options", [{}, {"grouped": True}, {"op": hvd.Sum}], ids=str)
def test_each_tensor_has_its_options(options: dict[str, Any]) -> None:
    found = train(GlobalQSGD(rules=RULES, **COMMON), **options)
    for name in SHAPES:
        expected = alone(name, **options)
        for step, mean in zip(found, expected, strict=True):
            check_same(step[name], mean, left=OPTIONS[name] is None)


@pytest.mark.usefixtures("several_ranks")
def test_they_make_a_difference() -> None:
    plain, ruled = train(GlobalQSGD(**COMMON)), train(GlobalQSGD(rules=RULES, **COMMON))
    same = {name for name in SHAPES if torch.equal(plain[0][name], ruled[0][name])}
    assert same == {"body.weight"}


def test_tensors_of_a_call(name: str) -> None:
    """They have no parameters, and are known by the names of their operations."""
    own = [gradient(hvd.rank(), 5000, tag=10 + place) for place in range(3)]
    rules = {"*.1": None, "*.2": {"levels": "exponential"}}
    found = hvd.grouped_allreduce(own, name=name, compression=GlobalQSGD(rules=rules, **COMMON))
    everything = {}, None, {"levels": "exponential"}
    for place, options in enumerate(everything):
        compression: Any = hvd.Compression.none
        if options is not None:
            compression = GlobalQSGD(**{**COMMON, **options})
        mean = hvd.allreduce(own[place], name=f"{name}.{place}", compression=compression)
        check_same(found[place], mean, left=options is None)


def test_beside_trials() -> None:
    """Tensors with rules take no part in what levels="auto" tries."""
    steps = 9  # warm-up, and the first ones of a trial, which Horovod reduces alone
    found = train(GlobalQSGD(levels="auto", rules=FIXED, **COMMON), steps)
    expected = train(GlobalQSGD(levels="standard", bits=4, block_size=64, **COMMON), steps)
    plain = train(hvd.Compression.none, steps)
    for place in range(steps):
        assert torch.equal(found[place]["head.weight"], expected[place]["head.weight"])
        check_same(found[place]["body.bias"], plain[place]["body.bias"], left=True)


def test_a_restart_goes_on() -> None:
    """The state knows the rules, and the steps of all tensors."""
    through = train(GlobalQSGD(rules=RULES, **COMMON), 3)
    compression = GlobalQSGD(rules=RULES, **COMMON)
    train(compression, 2)
    file = io.BytesIO()
    torch.save(compression.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, anew = GlobalQSGD(rules=RULES, **COMMON), GlobalQSGD(rules=RULES, **COMMON)
    again.load_state_dict(state)
    (found,), (other,) = train(again, 1, begin=2), train(anew, 1, begin=2)
    for name in SHAPES:
        check_same(found[name], through[2][name], left=OPTIONS[name] is None)
    if hvd.size() > 1:  # it is the state that did it
        assert not torch.equal(other["head.weight"], found["head.weight"])
    with pytest.raises(ValueError, match="rules must be"):
        GlobalQSGD(**COMMON).load_state_dict(state)


@pytest.mark.usefixtures("several_ranks")
def test_ranks_with_other_rules() -> None:
    rules = {"body*": None if hvd.rank() else {"bits": 4}}
    with pytest.raises(ConfigMismatchError, match="rules"):
        train(GlobalQSGD(rules=rules, **COMMON))
    train(GlobalQSGD(**COMMON))  # the others go on
