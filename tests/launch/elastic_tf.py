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

import gq_horovod.tensorflow as plugin
from gq_horovod.tensorflow import GlobalQSGD
from mpi_ops import codec

keras = tf.keras


class State(story.Told, hvd.elastic.KerasState):  # type: ignore[misc]
    pass


def trained(model: Any, optimizer: Any) -> Iterator[np.ndarray]:
    """What all replicas must have the same of: weights and momentum."""
    for variable in [*model.variables, *optimizer.variables]:
        yield variable.numpy()


def make_step(way: str, model: Any, compression: GlobalQSGD) -> tuple[Any, Callable[[], float]]:
    """The optimizer, and what makes one step and returns the loss before it."""
    inputs, targets = map(tf.constant, story.batch())
    optimizer = keras.optimizers.SGD(story.RATE, momentum=story.MOMENTUM)

    def loss_of(targets: Any, outputs: Any) -> Any:
        return tf.reduce_sum(tf.square(outputs - targets))

    if way == "keras":
        optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
        model.compile(optimizer, loss=loss_of)
        step = lambda: model.train_on_batch(inputs, targets)  # noqa: E731
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

    optimizer.build(
        model.trainable_variables
    )  # a newcomer needs variables to be sent others' state
    return optimizer, step


def note_levels() -> list[int]:
    """The levels of the last quantization, as the only member."""
    levels, quantize = [0], codec.quantize

    def noting(x: Any, norms: Any, plan: Any, *rest: Any, **options: Any) -> Any:
        levels[0] = plan.level_count
        return quantize(x, norms, plan, *rest, **options)

    plugin.codec.quantize = noting
    return levels


def main() -> None:
    parser = story.parser()
    parser.add_argument("--way", choices=["tape", "eager", "keras"], default="tape")
    options = parser.parse_args()
    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    story.begin(hvd)
    model = keras.Sequential(
        [keras.Input((story.DIMENSION,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.set_weights([story.weights()[:, None]])
    compression = GlobalQSGD(levels=options.levels, bits=8)
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
                (counter,) = compression._counters.values()
                first = int(counter.last())
                say("START", story.HOST, state.step, hvd.size(), first, same)
            say("STEP", story.HOST, state.step, hvd.size(), levels[0], loss)
            story.ask(state.step, options, hvd.rank())
            state.step += 1
            if state.step % story.COMMIT_EVERY == 0:
                state.commit()

    train(State(model, optimizer, step=0))
    inputs, targets = story.batch()
    final = float(np.square(inputs @ model.get_weights()[0] - targets).sum())
    say("DONE", final, digest(trained(model, optimizer)), None)


if __name__ == "__main__":
    main()
