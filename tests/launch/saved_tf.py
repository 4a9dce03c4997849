"""What a training with TensorFlow leaves on disk, and other processes that load it.

    saved_tf.py save DIRECTORY CHOICE ...           in every rank; CHOICE is "none" or levels, and a
                                                    folder of DIRECTORY
    saved_tf.py load DIRECTORY MODULE CHOICE ...    one process that has called no hvd.init()
    saved_tf.py train DIRECTORY                     in every rank: goes on with a loaded step

`load` imports MODULE, or nothing for "nothing", before it loads. It prints a line for every
choice and artifact: "ok", or the type of the error and its text.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rank import digest, say

FEATURES = 70
KERAS_2 = os.environ.get("TF_USE_LEGACY_KERAS") == "1"


def samples(rank: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((64, FEATURES)).astype(np.float32)
    return x, np.tile(x.sum(axis=1, keepdims=True), FEATURES)


class Trainer(tf.Module):
    """A module with a traced training step, and one that only infers."""

    def __init__(self, compression: Any) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.zeros([FEATURES, FEATURES]))
        self._compression = compression

    @tf.function(input_signature=[tf.TensorSpec([None, FEATURES])] * 2)
    def step(self, x: Any, y: Any) -> Any:
        import horovod.tensorflow as hvd

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.infer(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=self._compression)
        (gradient,) = tape.gradient(loss, [self.kernel])
        self.kernel.assign_sub(0.1 * gradient)
        return gradient

    @tf.function(input_signature=[tf.TensorSpec([None, FEATURES])])
    def infer(self, x: Any) -> Any:
        return x @ self.kernel


def keras_2(directory: Path, compression: Any) -> Any:
    """A Keras 2 model that fit() trained, and all that can be written of it."""
    import horovod.tensorflow.keras as hvd

    keras = tf.keras
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(FEATURES)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), compression=compression)
    model.compile(optimizer=optimizer, loss="mse")
    x, y = samples(hvd.rank())
    written = keras.callbacks.ModelCheckpoint(str(directory / "written by fit"))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[written])
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    model.save(directory / "saved")
    model.save(directory / "without gradients", options=options)
    model.save(directory / "without traces", save_traces=False)
    model.save(directory / "without the optimizer", include_optimizer=False)
    model.save(directory / "model.keras")
    model.save(directory / "model.h5")
    model.export(str(directory / "exported"))
    tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(directory / "checkpoint"))
    config = optimizer.get_config()
    again = type(optimizer).from_config(config)
    assert again.get_config() == config
    copy = keras.models.clone_model(model)  # trains on, with an optimizer made from the config
    copy.set_weights(model.get_weights())
    copy.compile(optimizer=again, loss="mse")
    copy.fit(x, y, batch_size=16, verbose=0)
    say("copy", digest(copy.get_weights()))
    return model


def keras_3(directory: Path, compression: Any) -> Any:
    """A Keras 3 model that fit() and a tape trained, and all that can be written of it."""
    import horovod.tensorflow as hvd
    import keras

    from gq_horovod.tensorflow.keras import DistributedOptimizer

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(FEATURES)])
    optimizer = DistributedOptimizer(keras.optimizers.Adam(0.01), compression=compression)
    model.compile(optimizer=optimizer, loss=keras.losses.MeanSquaredError())  # .h5 has no "mse"
    x, y = samples(hvd.rank())

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        variables = [variable.value for variable in model.trainable_variables]
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.01 * gradient)

    for _ in range(4):
        step(tf.constant(x), tf.constant(y))
    written = keras.callbacks.ModelCheckpoint(str(directory / "model.by fit.keras"))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[written])
    model.save(directory / "model.keras")
    model.save(directory / "model.h5")
    model.export(str(directory / "exported"))
    model.step = step  # an attribute that is saved with it
    tf.saved_model.save(model, str(directory / "saved"))
    return model


def save(directory: Path, *choices: str) -> None:
    import horovod.tensorflow as hvd

    hvd.init()
    for choice in choices:
        save_one(directory / choice, choice)


def save_one(directory: Path, choice: str) -> None:
    import horovod.tensorflow as hvd

    from gq_horovod.tensorflow import GlobalQSGD

    directory = directory / str(hvd.rank())
    directory.mkdir(parents=True)
    compression = hvd.Compression.none if choice == "none" else GlobalQSGD(levels=choice)
    x, y = samples(hvd.rank())
    trainer = Trainer(compression)
    for _ in range(2):
        trainer.step(x, y)
    tf.saved_model.save(trainer, str(directory / "module"))
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(trainer, str(directory / "module without gradients"), options=options)
    model = (keras_2 if KERAS_2 else keras_3)(directory, compression)
    expected = {"module": trainer.infer(x), "model": model(x)}
    np.savez(directory / "expected.npz", x=x, **{key: np.array(y) for key, y in expected.items()})
    say("weights", digest([*model.get_weights(), trainer.kernel.numpy()]))


def outcome(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        text = str(error) if isinstance(error, tf.errors.OpError) else repr(error)
        return f"{type(error).__name__}: {' '.join(text.split())[:400]}"
    return "ok"


def load(directory: Path, module: str, *choices: str) -> None:
    if module != "nothing":
        importlib.import_module(module)
    for choice in choices:
        load_one(directory / choice / "1", module, choice)


def load_one(directory: Path, module: str, choice: str) -> None:
    found = np.load(directory / "expected.npz")
    x = found["x"]

    def infer(artifact: str) -> None:
        path = directory / artifact
        if artifact.startswith("model.") and KERAS_2:
            result = tf.keras.models.load_model(path, compile=False)(x)
        elif artifact.startswith("model."):
            model = tf.keras.models.load_model(path)
            assert type(model.optimizer) is tf.keras.optimizers.Adam
            assert int(model.optimizer.iterations) == 4
            result = model(x)
        elif artifact.startswith("module"):
            module = tf.saved_model.load(str(path))
            result = module.infer(x)
        elif artifact == "exported" or not KERAS_2:
            module = tf.saved_model.load(str(path))
            (result,) = module.signatures["serving_default"](tf.constant(x)).values()
        elif artifact == "checkpoint":
            layer = tf.keras.layers.Dense(FEATURES)
            model = tf.keras.Sequential([tf.keras.layers.Input((FEATURES,)), layer])
            tf.train.Checkpoint(model=model).read(str(path)).expect_partial()
            result = model(x)
        else:
            result = tf.keras.models.load_model(path, compile=False)(x)
        key = "module" if artifact.startswith("module") else "model"
        np.testing.assert_allclose(result, found[key], rtol=1e-5, atol=1e-5)

    artifacts = {path.name for path in directory.iterdir()}
    artifacts = {"checkpoint" if "checkpoint." in name else name for name in artifacts}
    for artifact in sorted(artifacts - {"expected.npz"}):
        say(f"{choice}/{artifact}: {outcome(lambda: infer(artifact))}")  # noqa: B023
    if module != "nothing":
        trained = tf.saved_model.load(str(directory / "module"))
        say(f"{choice}/step: {outcome(lambda: trained.step(x, x))}")


def train(directory: Path) -> None:
    """Two graphs of the step at once: the loaded one, and one that this process has traced."""
    import horovod.tensorflow as hvd

    from gq_horovod.tensorflow import GlobalQSGD

    hvd.init()
    x, y = samples(hvd.rank())
    loaded = tf.saved_model.load(str(directory / "module"))
    fresh = Trainer(GlobalQSGD(levels="standard"))
    for _ in range(3):
        gradients = loaded.step(x, y), fresh.step(x, y)
    norms = [float(tf.norm(gradient)) for gradient in gradients]
    say("norms", *norms)
    say("weights", digest([loaded.kernel.numpy(), fresh.kernel.numpy()]))


if __name__ == "__main__":
    tf.config.threading.set_inter_op_parallelism_threads(4)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    {"save": save, "load": load, "train": train}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
