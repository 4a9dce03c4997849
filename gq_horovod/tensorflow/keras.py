"""Global-QSGD for Horovod's Keras API, beside `horovod.tensorflow.keras`.

import horovod.tensorflow.keras as hvd
from gq_horovod.tensorflow.keras import GlobalQSGD

opt = hvd.DistributedOptimizer(opt, compression=GlobalQSGD)
model.compile(optimizer=opt, ...)
model.fit(..., callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

It is the class of `gq_horovod.tensorflow`: Keras reduces gradients through horovod.tensorflow.
"""

from . import GlobalQSGD

__all__ = ["GlobalQSGD"]
