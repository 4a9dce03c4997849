"""check_replicas: digests, the table that travels, counting steps, and the error."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_horovod.guards.replicas import (
    Check,
    ReplicaMismatchError,
    Steps,
    digest,
    require_same,
    table,
)

NAMES = ["embedding", "fc.weight", "fc.bias"]


def gathered(parameters: list[list[bytes]], joined: tuple[int, ...] = ()) -> np.ndarray:
    """What the Max-allreduce gives, for the parameters of each rank."""
    ranks = len(parameters)
    tables = [
        table([digest(np.frombuffer(data, np.uint8)) for data in own], rank, ranks)
        for rank, own in enumerate(parameters)
        if rank not in joined
    ]
    return np.max(tables, axis=0)


class Arrived:
    """A handle of the pipeline."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def ready(self) -> bool:
        return True

    def wait(self) -> np.ndarray:
        return self._array


def finish(parameters: list[list[bytes]], joined: tuple[int, ...] = ()) -> None:
    ranks = [10 + rank for rank in range(len(parameters))]  # a process set
    Check(NAMES, ranks, 200, Arrived(gathered(parameters, joined))).finish("GlobalQSGD")


def test_equal_parameters() -> None:
    finish([[b"abc", b"", b"\0\0"]] * 4)


def test_tensor_and_ranks_are_named() -> None:
    parameters = [[b"abc", b"def", b"g"] for _ in range(4)]
    parameters[2][1] = b"deg"
    with pytest.raises(ReplicaMismatchError) as raised:
        finish(parameters)
    text = str(raised.value)
    assert re.search(
        r"GlobalQSGD\(check_replicas\): before step 200 the parameters differ between ranks "
        r"\(digests\): 'fc.weight' is \w{16} on ranks 10, 11, 13, \w{16} on rank 12\. Broadcast",
        text,
    ), text
    assert "embedding" not in text


def test_ranks_that_have_joined_are_left_out() -> None:
    parameters = [[b"abc", b"def", b"g"] for _ in range(3)]
    parameters[1] = [b"other"] * 3
    finish(parameters, joined=(1,))


def test_many_tensors_are_counted() -> None:
    found = np.arange(1, 1 + 2 * 20 * 2, dtype=np.int32).reshape(2, 20, 2)
    with pytest.raises(ReplicaMismatchError, match=r"; and 15 more tensors\. Broadcast"):
        require_same(found, [f"w{i}" for i in range(20)], [0, 1], 0, "GlobalQSGD")


@given(st.binary(max_size=64), st.integers(0, 63), st.integers(1, 255))
def test_any_changed_byte_is_seen(data: bytes, place: int, change: int) -> None:
    own = np.frombuffer(data, np.uint8)
    assert (digest(own) > 0).all()
    other = own.copy()
    if other.size:
        other[place % other.size] ^= change
        assert (digest(other) != digest(own)).any()


def test_steps_begin_with_the_first_gradient_in_any_order() -> None:
    steps = Steps()
    orders = [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")]
    for number, order in enumerate(orders):
        assert [steps.begin(name) for name in order] == [number, None, None]
    assert steps.begin("a") == 3
