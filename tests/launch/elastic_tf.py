"""Elastic training with TensorFlow of which one worker is killed; see elastic_job.py.

Run by test_elastic.py in every worker. --way says how it trains: "tape" (a DistributedGradientTape
in a tf.function, which is traced once in a worker's life), "eager" (the same without one) or
"keras" (a DistributedOptimizer, by train_on_batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import elastic_job as story
import horovod.tensorflow as hvd_tf
import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf
from rank import digest, say

from gq_horovod.tensorflow import GlobalQSGD
from mpi_ops import codec

keras = tf.keras


class State(story.Told, hvd.elastic.KerasState):  # type: ignore[misc]
    """Of what a commit keeps, and a newcomer is sent."""


def trained(model: Any, optimizer: Any) -> Iterator[np.ndarray]:
    """What all replicas must have the same of: weights and momentum."""
    for variable in [*model.variables, *optimizer.variables]:
        yield variable.numpy()


def linear() -> Any:
    """The model, in two parts, so that two gradients are on their way together."""
    features = keras.Input((story.DIMENSION,))
    parts = (features[:, : story.DIMENSION // 2], features[:, story.DIMENSION // 2 :])
    outputs = [keras.layers.Dense(1, use_bias=False)(part) for part in parts]
    model = keras.Model(features, outputs[0] + outputs[1])
    model.set_weights(np.split(story.weights()[:, None], 2))
    return model


def make_step(way: str, model: Any, compression: GlobalQSGD) -> tuple[Any, Callable[[], float]]:
    """The optimizer, and what makes one step and returns the loss before it."""
    inputs, targets = map(tf.constant, story.batch())
    optimizer = keras.optimizers.SGD(story.RATE, momentum=story.MOMENTUM)

    def loss_of(targets: Any, outputs: Any) -> Any:
        return tf.reduce_sum(tf.square(outputs - targets))

    if way == "keras":
        optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
        model.compile(optimizer, loss=loss_of)

        def step() -> float:
            return float(model.train_on_batch(inputs, targets))

    else:

        def gradients() -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                loss = loss_of(targets, model(inputs))
            tape = hvd_tf.DistributedGradientTape(tape, compression=compression)
            return loss, tape.gradient(loss, model.trainable_variables)

        reduced = tf.function(gradients) if way == "tape" else gradients

        def step() -> float:
            loss, found = reduced()
            optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))
            return float(loss)

    # So that a newcomer has variables to which the others' values can be sent.
    optimizer.build(model.trainable_variables)
    return optimizer, step


def note_levels() -> list[int]:
    """The levels of the last quantization, as the only member."""
    levels, quantize = [0], codec.quantize_parcel

    def noting(x: Any, segments: Any, norms: Any, plan: Any, out: Any) -> None:
        levels[0] = plan.level_count
        quantize(x, segments, norms, plan, out)

    codec.quantize_parcel = noting
    return levels


def main() -> None:
    parser = story.parser()
    parser.add_argument("--way", choices=["tape", "eager", "keras"], default="tape")
    options = parser.parse_args()
    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    story.begin(hvd)
    model = linear()
    bits = None if options.levels == "auto" else 8
    compression = GlobalQSGD(levels=options.levels, bits=bits, min_elements=1024)
    optimizer, step = make_step(options.way, model, compression)
    levels = note_levels()

    @hvd.elastic.run
    def train(state: Any) -> None:
        started = False
        while state.step < options.steps:
            same = digest(trained(model, optimizer))
            story.kill_one(state.step, options)
            loss = step()
            if not started:
                started = True
                first = max(int(counter.last()) for counter in compression._counters.values())
                say("START", story.HOST, state.step, hvd.size(), first, same)
            say("STEP", story.HOST, state.step, hvd.size(), levels[0], loss)
            story.ask(state.step, options, hvd.rank())
            state.step += 1
            if state.step % story.COMMIT_EVERY == 0:
                state.commit()

    train(State(model, optimizer, step=0))
    inputs, targets = story.batch()
    final = float(np.square(inputs @ np.concatenate(model.get_weights()) - targets).sum())
    decision = compression.decisions.get(0) if options.levels == "auto" else None
    say("DONE", final, digest(trained(model, optimizer)), decision)


if __name__ == "__main__":
    main()
