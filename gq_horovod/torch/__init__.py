"""Global-QSGD for Horovod's PyTorch API.

    import horovod.torch as hvd
    from gq_horovod.torch import GlobalQSGD

    opt = hvd.DistributedOptimizer(
        opt, named_parameters=model.named_parameters(), compression=GlobalQSGD
    )

One gradient's way, from its backward hook on:

1. `frontend`: the hook calls `GlobalQSGD.compress(gradient)`. Tensors that do not qualify
   (integers, sparse, fewer than `min_elements`) are left to Horovod.
2. `caller`: which parameter it is, found on the stack. `group`: how often it was reduced among
   these ranks, which have compared their options (`gq_horovod.path.agreement`).
3. `buckets`: it waits for the others of its bucket, which are reduced together. Horovod gets a
   token to reduce in its place (`gq_horovod.path.token`).
4. `gq_horovod.path.pipeline`: the norms of all blocks go out as one asynchronous Max-allreduce
   (from a GPU, once it is done with the gradients). Whenever a later hook calls, the norms that
   have arrived are used: the codes go out (`collectives`, `numbering`).
5. `frontend`: `decompress(token)` waits for the codes, and returns the mean, or what else the
   user's `op` and scaling make of it.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gq_horovod.torch: PyTorch is not installed; `pip install 'gq-horovod[torch]'`, or import "
        "GlobalQSGD from the module of the framework that you use."
    ) from error
try:
    from horovod.torch import mpi_ops, optimizer  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gq_horovod.torch: Horovod with PyTorch support is not installed; build it with "
        "HOROVOD_WITH_PYTORCH=1 (its `horovodrun --check-build` shows what it has)."
    ) from error

from .frontend import GlobalQSGD, TorchFrontend, allreduce

__all__ = ["GlobalQSGD", "TorchFrontend", "allreduce"]
