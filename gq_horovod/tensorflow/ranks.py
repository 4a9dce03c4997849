"""Ranks that come and go: elastic jobs, hvd.join(), and waiting for those that are late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops as hvd_ops
from numpy.typing import NDArray

from ..path.agreement import elastic

# Where this is in the text of an error of TensorFlow, Horovod's elastic.run takes it for a lost
# worker, and restores the state. It is in those of Horovod's operations that have no name yet.
LOSS = "HorovodAllreduce"


def largest(own: NDArray[np.int32], name: str, process_set: Any) -> NDArray[np.int32]:
    """The maximum over ranks, to which those that have called hvd.join() contribute zeros.

    In a graph of its own, because Horovod names operations after the nodes of graphs, and whether
    or not TensorFlow executes eagerly.
    """
    options = {"name": name, "ignore_name_scope": True, "process_set": process_set}
    settings = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.Graph().as_default(), tf.compat.v1.Session(config=settings) as session:
        shared: NDArray[np.int32] = session.run(
            hvd_ops._allreduce(tf.constant(own), op=hvd.Max, **options)
        )
    return shared


class Library:
    """Stands in for Horovod's library, to see hvd.join(), however a program has imported it."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.joined = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def horovod_join(self, *arguments: Any, **options: Any) -> Any:
        self.joined = True
        return self._library.horovod_join(*arguments, **options)


if not isinstance(hvd_ops.MPI_LIB, Library):
    hvd_ops.MPI_LIB = Library(hvd_ops.MPI_LIB)


def ranks_compare() -> bool:
    """Whether ranks that build their first graph compare their settings.

    Not where one of them may do so while others have built theirs: they would take no part. That is
    in an elastic job, and after hvd.join(). There what travels behind the norms has to tell.
    """
    return not (elastic() or hvd_ops.MPI_LIB.joined)


class Waiting:
    """A function that waits for other ranks, in a thread; `Handle` of the pipeline."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self._result = function(*arguments)
        except Exception as error:  # wait() raises it
            self._error = error

    def ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result
