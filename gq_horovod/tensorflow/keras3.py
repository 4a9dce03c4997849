"""Distributed optimizers and callbacks for Keras 3, which Horovod 0.28.1 does not know.

Horovod overrides methods of optimizers that Keras 3 never calls. Here `apply` is overridden,
through which Keras 3 applies all gradients: those of `fit`, of `train_on_batch`, and of loops that
call `apply` or `apply_gradients`. Horovod's function for tapes reduces the gradients, with any
compression, before Keras looks at them: before loss scaling asks whether they are finite, before
they are unscaled, and before they are clipped.

Where Keras accumulates the gradients of several passes, their mean is reduced, once for each
update. A LossScaleOptimizer around a distributed optimizer looks at every pass, so every pass is
reduced there: else a NaN or Inf would skip a pass on one rank alone, and the ranks would no longer
reduce at the same time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from ..path.agreement import elastic
from .caller import labelled

FUNCTION = "gq_horovod.tensorflow.keras.DistributedOptimizer"


class Reduction:
    """Reduces the gradients of an optimizer over ranks."""

    def __init__(
        self,
        name: str,
        device_dense: str,
        device_sparse: str,
        compression: Any,
        sparse_as_dense: bool,
        op: int,
        gradient_predivide_factor: float,
        groups: int | list[list[Any]] | None,
        process_set: Any,
    ) -> None:
        """Take Horovod's options; a group of variables may have those of Keras."""
        if isinstance(groups, list):
            groups = [[_variable(own) for own in group] for group in groups]
        self._name, self._process_set, self._groups = name, process_set, groups
        self._make = functools.partial(
            hvd._make_allreduce_grads_fn,
            device_dense=device_dense,
            device_sparse=device_sparse,
            sparse_as_dense=sparse_as_dense,
            process_set=process_set,
        )
        self._means = functools.partial(
            self._make,
            name=name,
            compression=compression,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
        )
        self._done = False
        self._postponed: list[Any] | None = None

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Return the reduced gradients; None stays where a variable has no gradient."""
        gradients = self.of_overwritten(gradients, variables)
        own = [_variable(variable) for variable in variables]
        if isinstance(self._groups, list):
            _require_names(own)
        asked = [
            None if _is_overwritten(variable) else gradient
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        # Horovod caches the function. It is made at each call because graphs need another one.
        with labelled([getattr(variable, "path", variable.name) for variable in variables]):
            reduced = self._means()(asked, own)
        return [
            gradient if _is_overwritten(variable) else self._merged(mean)
            for gradient, mean, variable in zip(gradients, reduced, variables, strict=True)
        ]

    def of_overwritten(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Return the gradients, where those that Keras assigns to their variables are reduced.

        These are the scales and largest values of float8, no gradients at all, and their maximum
        over ranks is what a larger batch would have.
        """
        overwritten = list(map(_is_overwritten, variables))
        if not any(overwritten):
            return list(gradients)
        reduce = self._make(
            name=f"{self._name}_Overwritten",
            compression=hvd.Compression.none,
            op=hvd.Max,
            gradient_predivide_factor=1.0,
            groups=None,
        )
        pairs = list(zip(gradients, overwritten, strict=True))
        largest = reduce([gradient if own else None for gradient, own in pairs])
        return [
            value if own else gradient
            for (gradient, own), value in zip(pairs, largest, strict=True)
        ]

    def _merged(self, gradient: Any) -> Any:
        """Add the slices of a sparse gradient that several ranks have for one row.

        Horovod puts the slices of all ranks into a list, and the optimizers of Keras 3 expect that
        a row comes once: Adam would square the slices in place of their sum.
        """
        alone = not elastic() and self._process_set.size() == 1
        if alone or not isinstance(gradient, tf.IndexedSlices):
            return gradient
        rows, places = tf.unique(gradient.indices)
        values = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
        return tf.IndexedSlices(values, rows, gradient.dense_shape)

    @property
    def done(self) -> bool:
        """Whether what comes has been reduced, by a LossScaleOptimizer around the optimizer."""
        return self._done

    @contextlib.contextmanager
    def before(self) -> Iterator[None]:
        """Inside, gradients that come to the optimizer have been reduced before."""
        self._done = True
        try:
            yield
        finally:
            self._done = False

    @contextlib.contextmanager
    def postponed(self, variables: list[Any]) -> Iterator[None]:
        """Inside, the gradients of these variables are reduced when Keras clips them."""
        self._postponed = variables
        try:
            yield
            # A graph has both branches, with and without an update. Eagerly, one is run.
            if self._postponed is not None and not tf.executing_eagerly():
                raise RuntimeError(
                    f"{FUNCTION}: gradients are accumulated, but the optimizer reduced no mean of "
                    "them, because its class does not call _clip_gradients before an update; "
                    "remove gradient_accumulation_steps."
                )
        finally:
            self._postponed = None

    def clipped(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """What Keras shall clip: the gradients, which are reduced now if that was postponed."""
        if self._postponed is None:
            return gradients
        variables, self._postponed = self._postponed, None
        return self(gradients, variables)


class Distributed:
    """What the class of a distributed optimizer has in front of the class of the optimizer."""

    reduction: Reduction
    gradient_accumulation_steps: int | None

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Reduce the gradients over ranks, and apply the result."""
        apply: Any = super().apply  # type: ignore[misc]
        grads, trainable_variables, variables = _lists(self, grads, trainable_variables)
        if self.reduction.done or not variables:
            apply(grads, trainable_variables)
            return
        if not self.gradient_accumulation_steps:
            apply(self.reduction(grads, variables), trainable_variables)
            return
        grads = self.reduction.of_overwritten(grads, variables)
        remaining = [
            variable
            for gradient, variable in zip(grads, variables, strict=True)
            if gradient is not None and not _is_overwritten(variable)
        ]
        with self.reduction.postponed(remaining):
            apply(grads, trainable_variables)

    @tf.autograph.experimental.do_not_convert
    def _clip_gradients(self, grads: Any) -> Any:
        """Keras calls it with what it is about to apply: of several passes, with their mean."""
        return super()._clip_gradients(self.reduction.clipped(grads))  # type: ignore[misc]


def distribute(optimizer: Any, reduction: Reduction) -> Any:
    """Make an optimizer of Keras 3 a distributed one, and return it."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"{FUNCTION}: Keras 3 must have the backend 'tensorflow', got "
            f"'{keras.backend.backend()}'; set KERAS_BACKEND=tensorflow before Keras is imported."
        )
    if _reduction_of(optimizer) is not None:
        raise ValueError(
            f"{FUNCTION}: optimizer must be one that is not distributed, got a "
            f"{type(optimizer).__name__} whose gradients are reduced already; wrap it once."
        )
    _reduce_before_loss_scaling()
    base = type(optimizer)
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        # What Keras asks for when it saves an optimizer: files have the class that was given.
        "__class__": property(lambda self: base),
        "reduction": reduction,
    }
    distributed = type(base.__name__, (Distributed, base), attributes)
    # A config would leave out its state, variables without weight decay, and functions.
    object.__setattr__(optimizer, "__class__", distributed)
    return optimizer


def is_distributed(optimizer: Any) -> bool:
    """Whether `distribute` has made an optimizer, or one inside of it, a distributed one."""
    return _reduction_of(optimizer) is not None


def _reduction_of(optimizer: Any) -> Reduction | None:
    """What reduces the gradients of an optimizer, or of one inside of it."""
    while optimizer is not None:
        if isinstance(optimizer, Distributed):
            return optimizer.reduction
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


@functools.cache
def _reduce_before_loss_scaling() -> None:
    """Let a LossScaleOptimizer reduce gradients that an optimizer inside of it would reduce.

    It calls that optimizer only where all gradients are finite, on its own rank alone. Nobody else
    could do that where `compile` wraps an optimizer by itself, for the policy mixed_float16.
    """
    plain = keras.optimizers.LossScaleOptimizer.apply

    @functools.wraps(plain)
    @tf.autograph.experimental.do_not_convert
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        reduction = _reduction_of(self.inner_optimizer)
        grads, trainable_variables, variables = _lists(self, grads, trainable_variables)
        if reduction is None or reduction.done or not variables:
            plain(self, grads, trainable_variables)
            return
        with reduction.before():
            plain(self, reduction(grads, variables), trainable_variables)

    keras.optimizers.LossScaleOptimizer.apply = apply


def _lists(optimizer: Any, grads: Any, given: Any) -> tuple[list[Any], list[Any] | None, list[Any]]:
    """The arguments of `apply`, and the variables of the gradients.

    There are none where Keras applies nothing or raises.
    """
    grads, given = list(grads), None if given is None else list(given)
    variables = optimizer._trainable_variables if given is None else given
    if len(variables) == len(grads):
        return grads, given, variables
    if grads and given is not None:
        raise ValueError(
            f"{FUNCTION}: apply() must get a gradient, or None, for each variable, got "
            f"{len(grads)} for {len(given)} variables."
        )
    return grads, given, []


def _variable(variable: Any) -> Any:
    """TensorFlow's variable, which Keras 3 keeps inside its own."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _is_overwritten(variable: Any) -> bool:
    """Whether Keras assigns the gradient of a variable to it."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def _require_names(variables: Sequence[Any]) -> None:
    """Horovod looks the variables of groups up by their names."""
    names = [variable.name for variable in variables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{FUNCTION}: with groups of variables their names must differ, got {twice} more than "
            "once; name the layers, or pass a number as groups."
        )


# ---------------------------------------------------------------------------------------- callbacks


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Broadcast weights and the optimizer's variables of one rank to all, when `fit` begins.

    Each rank keeps the state of its random generators: they draw its own dropout.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        """Take the rank whose variables all ranks get, and Horovod's device for it."""
        super().__init__()
        self.root_rank, self.device, self.broadcast_done = root_rank, device, False

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast what is there, which is everything unless Keras cannot build the model yet.

        Raises ValueError if the training step would be compiled by XLA.
        """
        model = self.model
        if model.jit_compile and is_distributed(model.optimizer):
            raise ValueError(
                "gq_horovod.tensorflow.keras.BroadcastGlobalVariablesCallback: the model must have "
                "jit_compile=False, got True (the default 'auto' of compile() with a GPU); XLA "
                "cannot compile Horovod's operations: use model.compile(..., jit_compile=False)."
            )
        if not all(layer.built for layer in model._flatten_layers()):
            return
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast what was not there when `fit` began."""
        self._broadcast()

    def _broadcast(self) -> None:
        if self.broadcast_done:
            return
        variables = [*self.model.weights, *self.model.optimizer.variables]
        with tf.device(self.device):
            hvd.broadcast_variables(list(map(_variable, variables)), root_rank=self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Average the metrics of an epoch over ranks, for the callbacks behind it in the list."""

    def __init__(self, device: str = "") -> None:
        """Take Horovod's device for it."""
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Replace the metrics in `logs`."""
        for metric in sorted(logs or {}):
            value = tf.constant(logs[metric], tf.float64)
            mean = hvd.allreduce(value, op=hvd.Average, device_dense=self.device)
            logs[metric] = mean.numpy().tolist()
