"""A small real training: handwritten digits, with and without compression."""

from __future__ import annotations

from typing import Any, NamedTuple

import horovod.torch as hvd
import pytest
import torch
from helpers import check_replicas, compressor
from sklearn.datasets import load_digits

STEPS = 25
BATCH = 96  # of all ranks together


class Outcome(NamedTuple):
    first_loss: float
    last_loss: float
    accuracy: float
    test_images: int


def train(compression: Any) -> Outcome:
    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    training, test = slice(0, 1400), slice(1400, None)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    def loss_of(part: slice) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(images[part]), labels[part]))

    first_loss = loss_of(training)
    for step in range(STEPS):
        mine = (step * BATCH + torch.arange(BATCH)[hvd.rank() :: hvd.size()]) % 1400
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
    check_replicas(*model.parameters())
    with torch.no_grad():
        right = model(images[test]).argmax(dim=1) == labels[test]
    return Outcome(first_loss, loss_of(training), float(right.float().mean()), len(right))


@pytest.fixture(scope="module")
def uncompressed() -> Outcome:
    return train(hvd.Compression.none)


@pytest.mark.parametrize(("levels", "bits"), [("standard", 8), ("exponential", 8), ("two-hop", 4)])
def test_digits_are_learned_as_without_compression(
    levels: str, bits: int, uncompressed: Outcome
) -> None:
    ours = train(compressor(levels, bits, min_elements=1000))
    assert ours.first_loss == uncompressed.first_loss
    assert uncompressed.last_loss < 0.2 * uncompressed.first_loss  # training does work
    # The loss may not miss more than a tenth of its fall.
    fall = uncompressed.first_loss - uncompressed.last_loss
    assert ours.last_loss < uncompressed.last_loss + 0.1 * fall
    # Two models of equal quality differ by the noise of two samples of test images.
    p = uncompressed.accuracy
    sigma = (2 * p * (1 - p) / uncompressed.test_images) ** 0.5
    assert ours.accuracy > p - 3 * sigma
