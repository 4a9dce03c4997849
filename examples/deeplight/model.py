"""DeepFwFM, the click model that DeepLight trains and prunes; also with the paper's tables.

Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in
Ad Serving", WSDM 2021, equation 6; the field-weighted interactions are those of Pan et al.,
"Field-weighted Factorization Machines for Click-Through Rate Prediction", WWW 2018.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def interactions(vectors: Tensor, weight: Tensor) -> Tensor:
    """Sum over the pairs i, j of r_ij <v_i, v_j>; vectors is (B, F, k), the result (B,)."""
    # <v_i, sum_j r_ij v_j>: two small matrix products in place of F(F-1)/2 inner products.
    return (vectors * (weight @ vectors)).sum(dim=(1, 2))


def hidden_layers(width: int, units: Sequence[int], dropout: float) -> tuple[list[nn.Module], int]:
    """Layers of these widths, and the width of the last one."""
    layers: list[nn.Module] = []
    for own in units:
        layers += [nn.Linear(width, own), nn.ReLU(), nn.Dropout(dropout)]
        width = own
    return layers, width


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
        layers, width = hidden_layers(num_fields * dim, hidden, dropout)
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))

    def interactions(self, vectors: Tensor) -> Tensor:
        """Sum over the pairs i < j of r_ij <v_i, v_j>; vectors is (B, F, k), the result (B,)."""
        num_fields = vectors.shape[1]
        weight = vectors.new_zeros(num_fields, num_fields)
        weight[self.pairs[0], self.pairs[1]] = self.pair_weight
        return interactions(vectors, weight)

    def forward(self, fields: Tensor) -> Tensor:
        """Return the logits (B,) float32 of the samples `fields` (B, F), int32 or int64."""
        vectors = self.embedding(fields)
        linear = self.linear(fields).sum(dim=(1, 2))
        deep = self.deep(vectors.flatten(1)).squeeze(1)
        return self.bias + linear + self.interactions(vectors) + deep


class DeepLight(nn.Module):
    """DeepFwFM as in the runs of arXiv 2305.18627, with a table for each field.

    The sizes are those of the authors' code (sands-lab/global-qsgd, commit 13d702f). A field that
    is a number has one row, which the number multiplies. The first-order part of a field is linear
    in its embedding. `parameter_count` has the number of parameters.

    Args:
        rows: of each field's table, F of them; 1 for a number. Numbers come first.
        dim: length k of an embedding.
        hidden: widths of the hidden layers of the deep part.
        dropout: probability that a hidden unit is dropped while training.
    """

    def __init__(
        self,
        rows: Sequence[int],
        dim: int = 10,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.numbers = list(rows).count(1)
        if any(own == 1 for own in rows[self.numbers :]):
            raise ValueError(f"rows: expected fields of one row first, got {list(rows)}")
        self.tables = nn.ModuleList(nn.Embedding(own, dim) for own in rows)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)  # type: ignore[arg-type]
        self.first = nn.Parameter(torch.zeros(len(rows), dim))
        self.field_bias = nn.Parameter(torch.zeros(len(rows)))
        self.pair_weight = nn.Parameter(torch.ones(len(rows), len(rows)))
        self.bias = nn.Parameter(torch.zeros(1))
        layers, width = hidden_layers(len(rows) * dim, hidden, dropout)
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))

    def forward(self, fields: Tensor) -> Tensor:
        """Return the logits (B,) float32 of the samples `fields` (B, F) int64.

        Numbers as they are, of which the logarithm is taken, and rows of the other fields' tables.
        """
        numbers = torch.log1p(fields[:, : self.numbers].clamp(min=0).float())
        tables = list(self.tables)
        vectors = [
            number[:, None] * table.weight
            for number, table in zip(numbers.unbind(1), tables, strict=False)
        ]
        rest = zip(fields[:, self.numbers :].unbind(1), tables[self.numbers :], strict=True)
        vectors += [table(rows) for rows, table in rest]
        both = torch.stack(vectors, dim=1)
        linear = (both * self.first).sum(dim=(1, 2)) + self.field_bias.sum()
        # Half of the symmetric matrix without its diagonal: each pair counts once.
        weight = (self.pair_weight + self.pair_weight.T) / 4
        weight = weight - torch.diag(weight.diagonal())
        deep = self.deep(both.flatten(1)).squeeze(1)
        return self.bias + linear + interactions(both, weight) + deep


def parameter_count(rows: Sequence[int], dim: int, hidden: Sequence[int]) -> dict[str, int]:
    """The parameters of `DeepLight`, by part."""
    fields = len(rows)
    widths = [fields * dim, *hidden]
    return {
        "embeddings": sum(rows) * dim,
        "first order, and a bias of each field": fields * (dim + 1),
        "weights of pairs": fields * fields,
        "hidden layers": sum((before + 1) * after for before, after in itertools.pairwise(widths)),
        "output and bias": widths[-1] + 1,
    }
