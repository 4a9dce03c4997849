"""Global-QSGD for Horovod's Keras API.

    import horovod.tensorflow.keras as hvd
    from gq_horovod.tensorflow.keras import GlobalQSGD

    opt = hvd.DistributedOptimizer(opt, compression=GlobalQSGD)

It is the class of `gq_horovod.tensorflow`, through which Horovod reduces the gradients of Keras.
"""

from __future__ import annotations

import warnings

import tensorflow as tf

from . import GlobalQSGD

__all__ = ["GlobalQSGD"]

# Horovod 0.28.1 overrides this method of optimizers, which Keras 3 neither has nor calls.
if not hasattr(tf.keras.optimizers.Optimizer, "compute_gradients"):
    warnings.warn(
        "gq_horovod.tensorflow.keras: tf.keras is Keras 3, where Horovod's DistributedOptimizer "
        "reduces no gradients, with any compression; install tf-keras and set "
        "TF_USE_LEGACY_KERAS=1, or use hvd.DistributedGradientTape (docs/tensorflow.md).",
        RuntimeWarning,
        stacklevel=2,
    )
