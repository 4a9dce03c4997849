"""Mistakes that get one clear error, the same on every rank, after which Horovod still works."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import check_mean, gradients

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.torch import GlobalQSGD, allreduce


def message_of(
    error: type[Exception], function: Callable[..., Any], *arguments: Any, **options: Any
) -> str:
    """The text of the error that the call raises; the same on every rank."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert caught.type is error
    texts = hvd.allgather_object(str(caught.value), name="test.texts")
    assert texts == [texts[0]] * hvd.size()
    return str(caught.value)


def check_it_still_works(name: str) -> None:
    compression = GlobalQSGD(min_elements=0)
    inputs = gradients(1000, tag=50)
    result = allreduce(inputs[hvd.rank()], f"{name}.after", compression=compression)
    check_mean(result, inputs, compression)


def on_one_rank(rank: int, value: Any, elsewhere: Any) -> Any:
    return value if hvd.rank() == rank else elsewhere


# ------------------------------------------------------------------------ ranks configured apart


def expected_difference(key: str, one: object, others: object) -> str:
    """The sentence about an option that is `one` on the last rank, and `others` on all others."""
    ranks = [str(rank) for rank in range(hvd.size() - 1)]
    listed = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
    return f"{key} is {others!r} on {listed}, {one!r} on rank {hvd.size() - 1}"


DIFFERENCES = [
    ("bits", 4, 8),
    ("levels", "exponential", "standard"),
    ("seed", 1, 2),
    ("block_size", None, 256),
    ("min_elements", 1000, 1001),
    ("norm", "l2", "max"),
]
OVER_GLOO = os.environ.get("HOROVOD_CONTROLLER") == "gloo"
if not OVER_GLOO:  # there a rank cannot even start with it
    DIFFERENCES.append(("transport", "mpi", "horovod"))


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(("key", "one", "others"), DIFFERENCES)
def test_ranks_with_different_options(key: str, one: Any, others: Any, name: str) -> None:
    compression = GlobalQSGD(**{key: on_one_rank(hvd.size() - 1, one, others)})
    for _ in range(2):  # it is not forgotten either
        text = message_of(
            ConfigMismatchError, allreduce, torch.ones(5000), name, compression=compression
        )
        difference = expected_difference(key, one, others)
        assert f"GlobalQSGD: the ranks are configured differently: {difference}. Pass the" in text
    check_it_still_works(name)


@pytest.mark.usefixtures("several_ranks")
def test_several_differences_are_listed_together(name: str) -> None:
    last = hvd.size() - 1
    compression = GlobalQSGD(bits=on_one_rank(last, 4, 8), seed=on_one_rank(last, 7, 0))
    text = message_of(
        ConfigMismatchError, allreduce, torch.ones(5000), name, compression=compression
    )
    assert f"{expected_difference('bits', 4, 8)}; {expected_difference('seed', 7, 0)}" in text


@pytest.mark.usefixtures("several_ranks")
def test_an_optimizer_finds_the_difference_at_its_first_backward(name: str) -> None:
    last = hvd.size() - 1
    weight = torch.nn.Parameter(torch.zeros(5000))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=0.1),
        named_parameters=[(name, weight)],
        compression=GlobalQSGD(bits=on_one_rank(last, 4, 8)),
    )
    text = message_of(ConfigMismatchError, weight.sum().backward)
    assert expected_difference("bits", 4, 8) in text
    optimizer.load_state_dict(optimizer.state_dict())
    check_it_still_works(name)


# -------------------------------------------------------------- mistakes seen before anything moves
#
# One rank alone makes them first. Had it communicated, the others would not be able to go on.


def refused(
    error: type[Exception], function: Callable[..., Any], *arguments: Any, **options: Any
) -> str:
    """As `message_of`, but one rank alone makes the mistake before all of them do."""
    if hvd.rank() == hvd.size() - 1:
        with pytest.raises(error):
            function(*arguments, **options)
    return message_of(error, function, *arguments, **options)


@pytest.mark.usefixtures("several_ranks")
def test_bits_that_cannot_hold_the_sum(name: str) -> None:
    smallest = {2: 3, 3: 3, 4: 4}[hvd.size()]
    x = torch.ones(5000)
    two = {"levels": "standard", "bits": 2}
    text = refused(
        ValueError, allreduce, x, name, compression=GlobalQSGD(**two, hierarchical=False)
    )
    # Codes are added of as many nodes as there are, which ranks first tell each other.
    assert message_of(ValueError, allreduce, x, name, compression=GlobalQSGD(**two)) == text
    assert text == (
        f"GlobalQSGD: bits must be at least {smallest} for standard levels on {hvd.size()} ranks "
        "(the sum of all codes has to fit its lane), got 2; "
        f"use bits={smallest} or more, or leave bits out."
    )
    result = allreduce(x, name, compression=GlobalQSGD(levels="standard", bits=smallest))
    assert torch.equal(result, x)
    check_it_still_works(name)


@pytest.mark.parametrize("op", ["Min", "Max", "Product", "Adasum"])
def test_functions_with_another_op(op: str, name: str) -> None:
    text = refused(
        ValueError,
        hvd.allreduce,
        torch.ones(5000),
        name=name,
        op=getattr(hvd, op),
        compression=GlobalQSGD,
    )
    assert text == (
        f"GlobalQSGD: op must be hvd.Average or hvd.Sum, got hvd.{op} for tensor {name!r}; "
        "use Horovod's own compression for it."
    )
    check_it_still_works(name)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("op", ["Min", "Max", "Product", "Adasum"])
def test_optimizers_with_another_op(op: str, name: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(5000))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=0.1),
        named_parameters=[(name, weight)],
        op=getattr(hvd, op),
        compression=GlobalQSGD,
    )
    text = message_of(ValueError, weight.sum().backward)
    assert text.startswith(f"GlobalQSGD: op must be hvd.Average or hvd.Sum, got hvd.{op}")
    del optimizer
    check_it_still_works(name)


@pytest.mark.parametrize(
    "function", [hvd.allreduce, hvd.grouped_allreduce], ids=lambda f: f.__name__
)
def test_functions_without_a_name(function: Callable[..., Any], name: str) -> None:
    tensor = torch.ones(5000)
    text = refused(
        ValueError,
        function,
        tensor if function is hvd.allreduce else [tensor],
        compression=GlobalQSGD,
    )
    assert text == (
        "hvd.allreduce with compression=GlobalQSGD: name must be a string that is the same on "
        "every rank, got None; pass name=."
    )
    check_it_still_works(name)


def test_a_tensor_that_requires_grad(name: str) -> None:
    allreduce(torch.ones(5000), name)  # so that the ranks have agreed before
    text = refused(ValueError, allreduce, torch.ones(5000, requires_grad=True), name)
    assert text == (
        f"GlobalQSGD: tensor {name!r} must not require gradients, because the quantized mean is "
        "not differentiable; pass tensor.detach()."
    )
    check_it_still_works(name)


def test_a_tensor_that_requires_grad_before_anything_moves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def communicate(*_: object) -> None:
        raise RuntimeError("the ranks were asked to agree")

    monkeypatch.setattr(GlobalQSGD, "_agree", communicate)
    fresh = GlobalQSGD()
    with pytest.raises(ValueError, match="must not require gradients"):
        allreduce(torch.ones(5000, requires_grad=True), name, compression=fresh)


def test_compress_called_by_hand(name: str) -> None:
    text = refused(RuntimeError, GlobalQSGD.compress, torch.ones(5000))
    assert text == (
        "GlobalQSGD: compress() must be called by Horovod's DistributedOptimizer or allreduce, "
        "which tell it the name of the tensor; to reduce a tensor yourself use "
        "gq_horovod.torch.allreduce."
    )
    check_it_still_works(name)


def test_a_process_set_that_is_none(name: str) -> None:
    text = refused(TypeError, GlobalQSGD, process_set=[0, 1])
    assert re.search(r"process_set must be .*ProcessSet or None, got \[0, 1\] of type list", text)


def test_another_process_set_than_the_optimizers(ends: hvd.ProcessSet, name: str) -> None:
    compression = GlobalQSGD(process_set=ends)
    text = refused(ValueError, allreduce, torch.ones(5000), name, compression=compression)
    assert re.search(
        rf"process_set must be that of the caller, ranks .*, got ranks \[0, {hvd.size() - 1}\]; "
        "pass the same process_set to both, or only to Horovod",
        text,
    )
    check_it_still_works(name)


# ---------------------------------------------------------------------------------------- transport


@pytest.mark.skipif(not OVER_GLOO, reason="Horovod does use MPI here")
def test_transport_mpi_without_mpi(name: str) -> None:
    compression = GlobalQSGD(transport="mpi")
    text = message_of(
        ConfigMismatchError, allreduce, torch.ones(5000), name, compression=compression
    )
    every = ", ".join(str(rank) for rank in range(hvd.size()))
    assert text == (
        f"GlobalQSGD: not every rank could start. rank{'s' if hvd.size() > 1 else ''} {every}: "
        "transport='mpi' cannot be used, because Horovod does not use MPI: start the job with "
        "mpirun or horovodrun --mpi; or leave transport out to use Horovod's own operations."
    )
    check_it_still_works(name)
