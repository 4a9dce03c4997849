"""A training that ends with its last step. Run by test_ends.py in every rank: two nodes of two.

python ends_by_nodes.py exit|shutdown|error
"""

from __future__ import annotations

import sys
import time
from typing import Any

import horovod.torch as hvd
import torch
from rank import say

from gq_horovod.torch import GlobalQSGD, allreduce, collectives


def main(how: str) -> None:
    torch.set_num_threads(1)
    hvd.init(process_sets="dynamic")
    gather = collectives.Collectives.allgather

    def later(*arguments: Any) -> Any:
        """The second node is slower, with what each does by itself."""
        time.sleep(hvd.cross_rank())
        return gather(*arguments)

    collectives.Collectives.allgather = later  # type: ignore[method-assign]
    own = GlobalQSGD(hierarchical=True, min_elements=0)
    mean = allreduce(torch.full((1000,), float(hvd.rank())), "x", compression=own)
    say("MEAN", round(float(mean.mean()), 3))
    if how == "shutdown":
        hvd.shutdown()
    if how == "error" and hvd.cross_rank() == 1:
        raise ArithmeticError("of this rank")


if __name__ == "__main__":
    main(sys.argv[1])
