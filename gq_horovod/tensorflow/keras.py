"""Global-QSGD for Horovod's Keras API, with Keras 2 and Keras 3.

    import horovod.tensorflow.keras as hvd
    from gq_horovod.tensorflow import keras as gq

    opt = gq.DistributedOptimizer(opt, compression=gq.GlobalQSGD)
    model.fit(..., callbacks=[gq.BroadcastGlobalVariablesCallback(0), gq.MetricAverageCallback()])

For Keras 2 these are Horovod's own. Horovod 0.28.1 does not know Keras 3: its DistributedOptimizer
reduces nothing there, and its callbacks raise. For Keras 3 these are those of `keras3`.
GlobalQSGD is the class of `gq_horovod.tensorflow`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import horovod._keras
import horovod.tensorflow.keras as hvd
import keras
import tensorflow as tf

from . import GlobalQSGD, keras3

__all__ = [
    "BroadcastGlobalVariablesCallback",
    "DistributedOptimizer",
    "GlobalQSGD",
    "MetricAverageCallback",
]


def DistributedOptimizer(
    optimizer: Any,
    *,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = hvd.Average,
    groups: int | list[list[Any]] | None = None,
    process_set: Any = hvd.global_process_set,
    **options: Any,
) -> Any:
    """Make an optimizer reduce gradients over ranks before it applies them.

    Arguments:
        optimizer: of Keras 2 or Keras 3, without a reduction of its own.
        name: begins the names of operations, the same on every rank; two optimizers of one class
            that work at the same time need two. Default: "Distributed" and the optimizer's class.
        device_dense, device_sparse: where Horovod reduces; default: where it was built for.
        compression: GlobalQSGD, an instance of it, or one of hvd.Compression.
        sparse_as_dense: reduce sparse gradients as dense ones.
        gradient_predivide_factor: divides before the sum, and multiplies the mean.
        op: hvd.Average or hvd.Sum.
        groups: the number of groups of gradients, at least 1, or lists of variables.
        process_set: the ranks that take part.
        options: others of horovod.tensorflow.keras.DistributedOptimizer, with Keras 2 only.

    Returns, for Keras 2, what Horovod's function of this name returns. For Keras 3, `optimizer`
    itself with its state, in a class of its own that is a subclass of the one that it had; `save`
    writes the one that it had, so files load without Horovod. With one rank it computes what it
    computed before, bit for bit. Raises ValueError for an argument out of range, an optimizer that
    is distributed already, and a backend of Keras 3 other than TensorFlow.
    """
    known = {
        "name": name,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "gradient_predivide_factor": gradient_predivide_factor,
        "op": op,
        "groups": groups,
        "process_set": process_set,
    }
    if not _is_keras_3(optimizer):
        return hvd.DistributedOptimizer(optimizer, **known, **options)
    _require(optimizer, gradient_predivide_factor, op, groups, options)
    known["name"] = name or f"Distributed{type(optimizer).__name__}"
    return keras3.distribute(optimizer, keras3.Reduction(**known))


def _is_keras_3(optimizer: Any) -> bool:
    """Whether an optimizer is one of Keras 3, whatever tf.keras is."""
    return int(keras.__version__.split(".")[0]) >= 3 and isinstance(
        optimizer, keras.optimizers.Optimizer
    )


def _require(
    optimizer: Any, predivide: float, op: int, groups: Any, options: dict[str, Any]
) -> None:
    """Raise ValueError for arguments that Keras 3 or Horovod cannot have."""
    problem = None
    if options:
        problem = f"no option {sorted(options)} with Keras 3"
        if "backward_passes_per_step" in options:
            problem += "; set gradient_accumulation_steps of the optimizer in place of it"
        if "num_groups" in options:
            problem += "; use groups in place of num_groups"
    elif op not in (hvd.Average, hvd.Sum):
        problem = f"op must be hvd.Average or hvd.Sum, got {op!r}"
    elif predivide != 1.0 and op != hvd.Average:
        problem = f"gradient_predivide_factor must be 1.0 with hvd.Sum, got {predivide!r}"
    elif not (groups is None or isinstance(groups, list) or groups >= 1):
        problem = f"groups must be None, at least 1, or lists of variables, got {groups!r}"
    if problem is not None:
        raise ValueError(f"{keras3.FUNCTION}: {problem}.")


if hasattr(tf.keras.optimizers.Optimizer, "compute_gradients"):  # Keras 2
    from horovod.tensorflow.keras.callbacks import BroadcastGlobalVariablesCallback

    class MetricAverageCallback(hvd.callbacks.MetricAverageCallback):
        """Horovod's callback, with the backend of the Keras that TensorFlow has.

        Horovod takes it from the package `keras`, which may be Keras 3, and raises.
        """

        def __init__(self, device: str = "") -> None:
            super().__init__(device)
            self.backend = tf.keras.backend

else:
    from .keras3 import BroadcastGlobalVariablesCallback, MetricAverageCallback


def _warn_of_horovods() -> None:
    """Let Horovod's DistributedOptimizer warn where it reduces nothing."""
    plain = horovod._keras.create_distributed_optimizer

    @functools.wraps(plain)
    def create(keras: Any, optimizer: Any, *arguments: Any, **options: Any) -> Any:
        if _is_keras_3(optimizer):
            warnings.warn(
                "horovod.tensorflow.keras.DistributedOptimizer: optimizer is one of Keras 3, whose "
                "gradients Horovod 0.28.1 does not reduce, with any compression; use "
                f"{keras3.FUNCTION} (docs/tensorflow.md).",
                RuntimeWarning,
                stacklevel=3,
            )
        return plain(keras, optimizer, *arguments, **options)

    horovod._keras.create_distributed_optimizer = create


_warn_of_horovods()
