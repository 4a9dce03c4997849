"""Pruning while training, as DeepLight has it: small weights become zeros, slowly more of them.

Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in
Ad Serving", WSDM 2021, algorithm 1: k steps after the warm start, the share S (1 - D^(k/Ω)) of the
weights with the smallest magnitudes is set to zero. They go on being trained, so some come back
until the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

DAMPING, PERIOD = 0.99, 100.0  # D and Ω


def share_at(step: int, sparsity: float) -> float:
    """The share that is zero `step` steps after pruning has begun.

    Arguments:
        step: k, 0 or more.
        sparsity: S, the share in the end, 0 to 1.
    """
    return sparsity * (1.0 - DAMPING ** (step / PERIOD))


def parts(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """What is pruned, each by itself, and its magnitudes: tables, pairs of fields, deep layers.

    Biases, the first order and tables of a single row, which numbers multiply, are not. A pair has
    one weight however it is kept: both places of a matrix go together.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings > 1:
            yield module.weight, module.weight.abs()
    pairs = model.get_parameter("pair_weight")
    yield pairs, (pairs + pairs.T).abs() if pairs.dim() == 2 else pairs.abs()
    for module in model.get_submodule("deep").modules():
        if isinstance(module, nn.Linear):
            yield module.weight, module.weight.abs()


@torch.no_grad()
def prune(weights: Iterable[tuple[Tensor, Tensor]], share: float) -> None:
    """Set the share of smallest magnitude in each tensor to zero, in place.

    A function of the weights alone, so replicas stay equal. Of weights as large as the smallest one
    that stays, none is set to zero.
    """
    for weight, magnitude in weights:
        count = int(share * weight.numel())
        if count:
            least = magnitude.flatten().kthvalue(min(count + 1, weight.numel())).values
            weight.masked_fill_(magnitude < least, 0.0)


@torch.no_grad()
def zeros(weights: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of all these weights that is zero."""
    both = [(int((weight == 0).sum()), weight.numel()) for weight, _ in weights]
    return sum(zero for zero, _ in both) / sum(size for _, size in both)
