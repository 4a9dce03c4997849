"""Global-QSGD for Horovod's TensorFlow API.

    import horovod.tensorflow as hvd
    from gq_horovod.tensorflow import GlobalQSGD

    tape = hvd.DistributedGradientTape(tape, compression=GlobalQSGD)

Horovod calls `compress` and `decompress` while the graph is built. What they insert into it, for
the gradients of a bucket:

1. The norms of their blocks, reduced by a Max-allreduce; and a token for each gradient, which
   Horovod has in place of it (see `token`). No result depends on a token's value, so TensorFlow
   removes its operation when it optimizes the graph: only eagerly it is sent.
   The step travels with the norms: it is what the dither depends on, and a worker that joins an
   elastic job learns it from the others. So do checksums of the settings and of the tensors, and
   whether a rank has called hvd.join().
2. The codes, reduced by a Sum-allreduce (standard levels), or by an alltoall, one rounding and an
   allgather (exponential and two-hop levels).
3. The means, or what else the user's `op` and scaling make of them.

TensorFlow runs these as their inputs arrive, so many gradients are in flight at once. The kernels
are ordinary functions of their inputs, the step among them, and are declared so: TensorFlow would
run stateful operations one after the other. What depends on the ranks (their number, this rank, the
levels) they look up when they run: in an elastic job a graph outlives them. Nothing in a graph
belongs to the process that has built it, so that it can be saved, and loaded by another one.

Eagerly each operation waits for all ranks, and the token goes first.
"""

try:
    import tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gq_horovod.tensorflow: TensorFlow is not installed; "
        "`pip install 'gq-horovod[tensorflow]'`, or import GlobalQSGD from the module of the "
        "framework that you use."
    ) from error

try:
    from horovod.tensorflow import mpi_ops  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gq_horovod.tensorflow: Horovod with TensorFlow support is not installed; build it with "
        "HOROVOD_WITH_TENSORFLOW=1 (its `horovodrun --check-build` shows what it has)."
    ) from error

from .frontend import GlobalQSGD, allreduce, write_stats

__all__ = ["GlobalQSGD", "allreduce", "write_stats"]
