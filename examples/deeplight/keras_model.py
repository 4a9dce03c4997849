"""DeepFwFM (model.py) in Keras: the same parts, names and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


class DeepFwFM(tf.keras.Model):
    """logit = bias + linear part + field-weighted interactions + deep part.

    Args:
        num_rows: rows of the embedding table that all fields share by hashing.
        num_fields: fields of a sample, F.
        dim: length k of an embedding.
        hidden: widths of the hidden layers of the deep part.

    Lookups give sparse gradients; Horovod's sparse_as_dense=True reduces them as dense ones, which
    are almost all of what a data-parallel step has to communicate.
    """

    def __init__(
        self, num_rows: int, num_fields: int, dim: int = 12, hidden: tuple[int, ...] = (256, 256)
    ) -> None:
        super().__init__()
        self.bias = self.add_weight(name="bias", shape=(1,), initializer="zeros")
        self.linear = self.add_weight(name="linear", shape=(num_rows, 1), initializer="zeros")
        self.embedding = self.add_weight(
            name="embedding",
            shape=(num_rows, dim),
            initializer=tf.keras.initializers.RandomNormal(stddev=0.01),
        )
        # One weight for each pair of fields i < j, kept as a vector of F(F-1)/2.
        self.pairs = tf.constant(np.stack(np.triu_indices(num_fields, k=1), axis=1), tf.int32)
        self.pair_weight = self.add_weight(
            name="pair_weight", shape=(len(self.pairs),), initializer="ones"
        )
        self.num_fields, self.dim = num_fields, dim
        layers = [tf.keras.layers.Dense(units, activation="relu") for units in hidden]
        self.deep = tf.keras.Sequential([*layers, tf.keras.layers.Dense(1)])
        self.deep.build((None, num_fields * dim))

    def interactions(self, vectors: Any) -> Any:
        """Sum over the pairs i < j of r_ij <v_i, v_j>; vectors is (B, F, k), the result (B,)."""
        shape = [self.num_fields, self.num_fields]
        weight = tf.scatter_nd(self.pairs, self.pair_weight, shape)
        # <v_i, sum_j r_ij v_j>: two small matrix products in place of F(F-1)/2 inner products.
        return tf.reduce_sum(vectors * tf.matmul(weight, vectors), axis=[1, 2])

    def call(self, fields: Any) -> Any:
        """Return the logits (B,) float32 of the samples `fields` (B, F), int32 or int64."""
        vectors = tf.gather(self.embedding, fields)
        linear = tf.reduce_sum(tf.gather(self.linear, fields), axis=[1, 2])
        flat = tf.reshape(vectors, [-1, self.num_fields * self.dim])
        deep = tf.squeeze(self.deep(flat), axis=1)
        return self.bias + linear + self.interactions(vectors) + deep
