"""One network, trained without and with compression: mpirun -np 2 python train_keras.py"""

import horovod.tensorflow.keras as hvd
import keras
import numpy as np

from gq_horovod.tensorflow import keras as gq

hvd.init()
random = np.random.default_rng(hvd.rank())  # every rank has samples of its own
samples = random.standard_normal((2048, 64), np.float32)
classes = np.linalg.norm(samples[:, :32], axis=1) > np.linalg.norm(samples[:, 32:], axis=1)

for compression in (hvd.Compression.none, gq.GlobalQSGD):
    keras.utils.set_random_seed(0)  # all begin with the same weights
    layers = [keras.layers.Dense(256, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    optimizer = gq.DistributedOptimizer(keras.optimizers.Adam(0.003), compression=compression)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)  # XLA compiles no reduction
    callbacks = [gq.BroadcastGlobalVariablesCallback(0), gq.MetricAverageCallback()]
    history = model.fit(
        samples, classes, batch_size=256, epochs=12, verbose=0, shuffle=False, callbacks=callbacks
    )
    if hvd.rank() == 0:
        print(f"{compression.__name__:15} loss of epoch 12: {history.history['loss'][-1]:.4f}")
