"""state_dict() and load_state_dict(): another process goes on as this one would, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_replicas, gradient

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.research.torch_baselines import QSGD, IntSGD, PowerSGD
from gq_horovod.torch import GlobalQSGD, allreduce

STEPS, PAUSE = 5, 3  # steps in all, and before the other process
SHAPES = {"matrix": (64, 48), "vector": (5000,)}

METHODS: dict[str, Callable[[], Any]] = {
    levels: lambda levels=levels: GlobalQSGD(levels=levels, min_elements=0, transport=TRANSPORT)
    for levels in ("standard", "exponential", "two-hop", "auto")
} | {
    "error feedback": lambda: GlobalQSGD(
        levels="two-hop", bits=3, min_elements=0, transport=TRANSPORT, error_feedback=True
    ),
    "qsgd": lambda: QSGD(min_elements=0),
    "powersgd": lambda: PowerSGD(rank=2, min_elements=0),
    "intsgd": lambda: IntSGD(min_elements=0),
}


def reduce(compression: Any, steps: range, name: str) -> list[torch.Tensor]:
    """The means of some steps; the vector is reduced more often than the matrix."""
    results = []
    for step in steps:
        for key, shape in SHAPES.items():
            if key == "vector" or step % 2:
                own = gradient(hvd.rank(), shape, tag=300 + step)
                results.append(allreduce(own, f"{name}.{key}", compression=compression))
    return results


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """The state as another process reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("method", METHODS)
def test_another_instance_goes_on(method: str, name: str) -> None:
    through = reduce(METHODS[method](), range(STEPS), name)
    first = METHODS[method]()
    before = reduce(first, range(PAUSE), name)
    # Twice: a state that was loaded and not used yet is saved again as it is.
    second, third = METHODS[method](), METHODS[method]()
    second.load_state_dict(through_a_file(first.state_dict()))
    third.load_state_dict(through_a_file(second.state_dict()))
    after = reduce(third, range(PAUSE, STEPS), name)
    assert all(map(torch.equal, [*before, *after], through))
    check_replicas(*after)
    # It is the state that did it. (Of "auto", all of this is before the trials.)
    anew = reduce(METHODS[method](), range(PAUSE, STEPS), name)
    if method != "auto" and hvd.size() > 1:
        assert not all(map(torch.equal, anew, after))


def test_an_instance_goes_back(name: str) -> None:
    compression = METHODS["standard"]()
    reduce(compression, range(PAUSE), name)
    state = through_a_file(compression.state_dict())
    once = reduce(compression, range(PAUSE, STEPS), name)
    compression.load_state_dict(state)
    again = reduce(compression, range(PAUSE, STEPS), name)
    assert all(map(torch.equal, once, again))


def test_the_class_stands_for_its_default_instance(name: str) -> None:
    reduce(GlobalQSGD, range(1), name)
    (group,) = GlobalQSGD.state_dict()["process_sets"].values()
    # Tests that start Horovod again may have run before.
    assert group["steps"][f"{name}.vector"] == group["first_step"] + 1


def test_the_state_of_another_configuration() -> None:
    state = GlobalQSGD(bits=4).state_dict()
    with pytest.raises(ValueError, match="bits must be 8 as in this instance, got a state with 4"):
        GlobalQSGD(bits=8).load_state_dict(state)
    with pytest.raises(ValueError, match="compression must be 'GlobalQSGD'"):
        GlobalQSGD().load_state_dict(QSGD().state_dict())


@pytest.mark.usefixtures("several_ranks")
def test_states_that_do_not_belong_together(name: str) -> None:
    """The same error on every rank, before anything is reduced."""
    compression = METHODS["powersgd"]()
    reduce(compression, range(1), name)
    early = through_a_file(compression.state_dict())
    reduce(compression, range(1, 2), name)
    late = through_a_file(compression.state_dict())
    states = hvd.allgather_object(late, name="test.states")
    last = hvd.rank() == hvd.size() - 1

    def load_and_reduce(state: dict[str, Any] | None) -> str:
        other = METHODS["powersgd"]()
        if state is not None:
            other.load_state_dict(state)
        with pytest.raises(ConfigMismatchError) as caught:
            reduce(other, range(2, 3), name)
        texts = hvd.allgather_object(str(caught.value), name="test.texts")
        assert texts == [texts[0]] * hvd.size()
        return texts[0]

    assert "state loaded is" in load_and_reduce(None if last else late)
    assert "state loaded is" in load_and_reduce(early if last else late)
    text = load_and_reduce(states[0])
    assert "expected the state of rank 1 of" in text
    assert "got that of rank 0 of" in text
    check_replicas(*reduce(METHODS["powersgd"](), range(1), name))


# ------------------------------------------------------------------------ who saved it, and when


OF_ONE_RANK = ("powersgd", "intsgd", "error feedback")


@pytest.mark.parametrize("method", [key for key in METHODS if key not in OF_ONE_RANK])
def test_the_state_of_rank_0_is_that_of_all(method: str, name: str) -> None:
    """Most scripts save on rank 0 alone, and load or broadcast that everywhere."""
    first = METHODS[method]()
    reduce(first, range(PAUSE), name)
    state = hvd.broadcast_object(through_a_file(first.state_dict()), root_rank=0, name="test.state")
    second = METHODS[method]()
    second.load_state_dict(state)
    assert all(
        map(
            torch.equal,
            reduce(first, range(PAUSE, STEPS), name),
            reduce(second, range(PAUSE, STEPS), name),
        )
    )
    own = through_a_file(first.state_dict())["process_sets"]
    own = {key: {**group, "trials": None} for key, group in own.items()}  # which has own times
    assert hvd.allgather_object(own, name="test.own") == [own] * hvd.size()


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("method", ["standard", "exponential", "two-hop", "auto"])
@pytest.mark.parametrize("saved", ["by each rank", "by rank 0", "by the last rank"])
def test_states_after_epochs_of_unequal_length(method: str, saved: str, name: str) -> None:
    """Ranks that have joined early have counted fewer steps, and all go on from the highest."""
    first = METHODS[method]()
    last = hvd.size() - 1
    reduce(first, range(PAUSE if hvd.rank() != last else PAUSE - 2), name)
    hvd.join()
    state = through_a_file(first.state_dict())
    if saved != "by each rank":
        root = 0 if saved == "by rank 0" else last
        state = hvd.broadcast_object(state, root_rank=root, name="test.state")
    second = METHODS[method]()
    second.load_state_dict(state)
    check_replicas(*reduce(second, range(PAUSE, STEPS), name))
    steps = [group["steps"] for group in second.state_dict()["process_sets"].values()]
    everywhere = hvd.allgather_object(steps, name="test.steps")
    assert everywhere == [everywhere[0]] * hvd.size()


def test_a_state_of_another_version() -> None:
    state = METHODS["standard"]().state_dict()
    with pytest.raises(ValueError, match="format must be"):
        METHODS["standard"]().load_state_dict({**state, "format": 1})
    del state["format"]
    with pytest.raises(ValueError, match="format must be"):
        METHODS["standard"]().load_state_dict(state)
