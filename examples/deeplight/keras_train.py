"""Train DeepFwFM on the flights with Keras and Horovod: one rank of it.

    mpirun -np 4 python keras_train.py --compression standard
    mpirun -np 4 python keras_train.py --compression standard --loop tape

The first trains with model.fit and callbacks, the second in a loop of its own with
DistributedGradientTape. Both run with Keras 3, and with Keras 2 where TF_USE_LEGACY_KERAS=1. Rank 0
prints what it measured as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import data
import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from keras_model import DeepFwFM
from sklearn.metrics import log_loss, roc_auc_score

from gq_horovod.tensorflow.keras import (
    BroadcastGlobalVariablesCallback,
    DistributedOptimizer,
    GlobalQSGD,
    MetricAverageCallback,
)


def choose_compression(name: str, seed: int) -> Any:
    """Return Horovod's `compression=` argument for a method's name."""
    if name == "none":
        return hvd.Compression.none
    if name == "fp16":
        return hvd.Compression.fp16
    return GlobalQSGD(levels=name, seed=seed)


def fit(model: DeepFwFM, optimizer: Any, batches: tf.data.Dataset, compression: Any) -> None:
    """Train with Keras."""
    model.compile(
        optimizer=DistributedOptimizer(optimizer, compression=compression, sparse_as_dense=True),
        loss=tf.keras.losses.BinaryCrossentropy(from_logits=True),
    )
    callbacks = [BroadcastGlobalVariablesCallback(0), MetricAverageCallback()]
    model.fit(batches, epochs=1, shuffle=False, callbacks=callbacks, verbose=0)


def for_horovod(variables: list[Any]) -> list[Any]:
    """TensorFlow's variables, which Keras 3 keeps inside its own."""
    return [own if isinstance(own, tf.Variable) else own.value for own in variables]


def loop(model: DeepFwFM, optimizer: Any, batches: tf.data.Dataset, compression: Any) -> None:
    """Train without Keras' loop."""
    loss_of = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    variables = for_horovod(model.trainable_variables)

    @tf.function
    def step(fields: Any, late: Any) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(late, model(fields, training=True))
        tape = hvd.DistributedGradientTape(tape, compression=compression, sparse_as_dense=True)
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    hvd.broadcast_variables(for_horovod(model.weights), root_rank=0)
    optimizer.build(variables)
    for fields, late in batches:
        step(fields, late)


def evaluate(model: DeepFwFM, fields: np.ndarray, late: np.ndarray) -> tuple[float, float]:
    """Return (AUC, mean loss) on the test flights; this rank computes its share of the logits."""
    logits = np.concatenate([model(part).numpy() for part in np.array_split(fields, 32)])
    logits = hvd.allgather(tf.constant(logits)).numpy()
    late = hvd.allgather(tf.constant(late)).numpy()
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return float(roc_auc_score(late, logits)), float(log_loss(late, probabilities))


def replicas_equal(model: DeepFwFM) -> bool:
    """Whether all ranks hold the same parameters, bit for bit."""
    checksum = 0
    for weights in model.get_weights():
        checksum = zlib.crc32(weights.tobytes(), checksum)
    checksums = hvd.allgather(tf.constant([checksum], tf.int64)).numpy()
    return bool((checksums == checksum).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    methods = ["none", "fp16", "standard", "exponential", "two-hop"]
    parser.add_argument("--compression", choices=methods, default="none")
    parser.add_argument("--loop", choices=["fit", "tape"], default="fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=512, help="samples per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="falls linearly to 0")
    parser.add_argument("--max-steps", type=int, help="stop early, for a quick trial")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    arguments = parser.parse_args()

    tf.config.threading.set_inter_op_parallelism_threads(4)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    if rank == 0:
        data.load(arguments.cache)
    hvd.broadcast_object(None, root_rank=0)  # the others wait until the cache is there
    train, test = data.load(arguments.cache)
    tf.keras.utils.set_random_seed(arguments.seed)

    # The same order on every rank, and every size-th sample of it.
    order = np.random.default_rng(arguments.seed).permutation(len(train.late))
    steps = len(order) // (arguments.batch_size * size)
    steps = min(steps, arguments.max_steps or steps)
    rows = order[: steps * arguments.batch_size * size][rank::size]
    batches = tf.data.Dataset.from_tensor_slices((train.fields[rows], train.late[rows]))
    batches = batches.batch(arguments.batch_size)

    model = DeepFwFM(data.TABLE_ROWS, data.NUM_FIELDS)
    schedule = tf.keras.optimizers.schedules.PolynomialDecay(arguments.lr, steps, 0.0)
    compression = choose_compression(arguments.compression, arguments.seed)
    began = time.perf_counter()
    training = fit if arguments.loop == "fit" else loop
    training(model, tf.keras.optimizers.Adam(schedule, epsilon=1e-8), batches, compression)
    seconds = time.perf_counter() - began

    auc, loss = evaluate(model, test.fields[rank::size], test.late[rank::size])
    equal = replicas_equal(model)
    if rank == 0:
        result = {"loop": arguments.loop, "compression": arguments.compression, "auc": auc}
        result |= {"test_loss": loss, "replicas_equal": equal, "ranks": size, "steps": steps}
        print(json.dumps({**result, "seed": arguments.seed, "seconds": round(seconds, 1)}))
    hvd.shutdown()


if __name__ == "__main__":
    main()
