"""DeepFwFM, the click model that DeepLight trains and prunes.

Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in
Ad Serving", WSDM 2021, equation 6; the field-weighted interactions are those of Pan et al.,
"Field-weighted Factorization Machines for Click-Through Rate Prediction", WWW 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DeepFwFM(nn.Module):
    """logit = bias + linear part + field-weighted interactions + deep part.

    Args:
        num_rows: rows of the embedding table that all fields share by hashing.
        num_fields: fields of a sample, F.
        dim: length k of an embedding.
        hidden: widths of the hidden layers of the deep part.
        dropout: probability that a hidden unit is dropped while training.

    The embeddings' gradients are dense tensors (sparse=False): almost all of what a data-parallel
    step has to communicate, although a batch touches only a few per cent of the rows.
    """

    def __init__(
        self,
        num_rows: int,
        num_fields: int,
        dim: int = 12,
        hidden: tuple[int, ...] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.linear = nn.Embedding(num_rows, 1)
        self.embedding = nn.Embedding(num_rows, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.embedding.weight, std=0.01)
        # One weight for each pair of fields i < j, kept as a vector of F(F-1)/2.
        pairs = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.pair_weight = nn.Parameter(torch.ones(pairs.shape[1]))
        layers: list[nn.Module] = []
        width = num_fields * dim
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))

    def interactions(self, vectors: Tensor) -> Tensor:
        """Sum over the pairs i < j of r_ij <v_i, v_j>; vectors is (B, F, k), the result (B,)."""
        num_fields = vectors.shape[1]
        weight = vectors.new_zeros(num_fields, num_fields)
        weight[self.pairs[0], self.pairs[1]] = self.pair_weight
        # <v_i, sum_j r_ij v_j>: two small matrix products in place of F(F-1)/2 inner products.
        return (vectors * (weight @ vectors)).sum(dim=(1, 2))

    def forward(self, fields: Tensor) -> Tensor:
        """Return the logits (B,) float32 of the samples `fields` (B, F), int32 or int64."""
        vectors = self.embedding(fields)
        linear = self.linear(fields).sum(dim=(1, 2))
        deep = self.deep(vectors.flatten(1)).squeeze(1)
        return self.bias + linear + self.interactions(vectors) + deep
