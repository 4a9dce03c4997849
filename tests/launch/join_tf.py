"""A rank that calls hvd.join() after so many steps, and takes part again in the next epoch.

    join_tf.py MODE LEVELS STEPS         MODE is "eager" or "graph"

One join for each job: in TensorFlow the second hvd.join() of a process does not wait, with any
compression (Horovod 0.28.1).
"""

from __future__ import annotations

import faulthandler
import sys
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from rank import digest, say

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.tensorflow import GlobalQSGD, allreduce

LIMIT_SECONDS = 100
# The first is an allreduce of all ranks with the largest magnitude everywhere, hence exact.
SIZE, VALUE = 5000, 6.0


def reducer(mode: str, name: str, compression: Any) -> Any:
    def reduce() -> Any:
        return allreduce(tf.fill([SIZE], VALUE), name, compression=compression)

    return tf.function(reduce) if mode == "graph" else reduce


def check(result: Any, ranks: int) -> None:
    """The mean of so many ranks' values and zeros, within one level of the quantizer."""
    expected = VALUE * ranks / hvd.size()
    np.testing.assert_allclose(result, np.full(SIZE, expected), atol=VALUE / 32)


def message_of(function: Any) -> str:
    try:
        function()
    except (ValueError, ConfigMismatchError, tf.errors.InvalidArgumentError) as error:
        return next(line for line in str(error).splitlines() if "GlobalQSGD" in line)
    raise AssertionError("no error")


def main(mode: str, levels: str, steps: int) -> None:
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    hvd.init()
    compression = GlobalQSGD(levels=levels, min_elements=0)
    reduce = reducer(mode, "gradient", compression)
    joins = hvd.rank() == hvd.size() - 1
    for _ in range(steps):
        check(reduce(), hvd.size())
    if not joins:
        for _ in range(3):
            if levels in ("standard", "auto"):
                check(reduce(), hvd.size() - 1)
            else:
                say("refused", message_of(reduce))
        if steps == 0 and hvd.size() > 2:
            other = GlobalQSGD(min_elements=0, seed=hvd.rank())
            say("differs", message_of(lambda: allreduce(tf.ones(9), "x", compression=other)))
    say("joined", int(hvd.join()))
    result = reduce()
    check(result, hvd.size())
    # A rank that was absent has not compared its settings. The norms tell.
    other = GlobalQSGD(min_elements=0, seed=hvd.rank())
    say("differs", message_of(reducer(mode, "late", other)))
    step = int(compression._counters["gradient"].last())
    assert step >= steps + 3, step  # nobody uses a step for the second time
    say("result", digest([result.numpy()]), step)


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]))
