"""transport="mpi" when MPI ends: what was sent is received, and what is missing is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import pytest


def exchange(polls: float, error: Exception | None = None) -> Iterator[None]:
    """The steps of one that is complete after some polls; or never, or fails."""
    while polls > 0:
        polls -= 1
        yield
    if error is not None:
        raise error


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for that of this process, which goes on."""
    if not hvd.mpi_enabled():
        pytest.skip("needs Horovod over MPI")
    from gq_horovod.path import mpi

    own = mpi._Library()
    monkeypatch.setattr(mpi, "_mpi", own)
    monkeypatch.setattr(mpi, "_running", set())
    monkeypatch.setattr(mpi, "_LAST_SECONDS", 0.1)
    return own


def running(*arguments: Any) -> Any:
    from gq_horovod.path import mpi

    return mpi.Running(exchange(*arguments))


def test_what_others_have_sent_is_received_first(library: Any) -> None:
    """A rank that is done with the last step may end while this one still reads its messages."""
    own = running(20)
    assert not own.ready()
    library._end()
    assert library.ended
    assert own.ready()
    own.wait()


def test_what_never_comes_is_an_error(library: Any) -> None:
    whole, missing = running(5), running(float("inf"))
    library._end()
    assert whole.ready()
    with pytest.raises(RuntimeError, match="MPI was shut down while codes were on their way"):
        missing.ready()


def test_an_error_of_an_exchange_is_told_to_its_owner(library: Any) -> None:
    own = running(2, MemoryError("of a test"))
    library._end()
    assert library.ended
    assert own.failed
    with pytest.raises(RuntimeError, match="MPI was shut down"):
        own.ready()
