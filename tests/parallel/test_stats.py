"""GlobalQSGD(stats=...): figures of what quantization does, beside what it really did."""

from __future__ import annotations

import math

import horovod.torch as hvd
import pytest
import torch
from helpers import CONFIGURATIONS, TRANSPORT, gradients

from gq_horovod.guards import stats
from gq_horovod.torch import GlobalQSGD, allreduce

ELEMENTS = 100_003


@pytest.mark.parametrize(("levels", "bits"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_figures(levels: str, bits: int | None, dtype: torch.dtype, name: str) -> None:
    compression = GlobalQSGD(levels=levels, bits=bits, transport=TRANSPORT, stats=True)
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(ELEMENTS, generator=generator).to(dtype) for _ in range(hvd.size())]
    own = inputs[hvd.rank()].clone()
    result = allreduce(own, name, compression=compression)
    assert torch.equal(own, inputs[hvd.rank()])
    (found,) = compression.stats.values()
    assert list(compression.stats) == [name]
    assert (found.step, found.elements) == (0, ELEMENTS)
    width = compression.config.plan(hvd.size()).bits
    assert width <= found.bits < 1.1 * 32 / (32 // width) + 0.3
    # The estimate of the mean's error beside the error itself; bfloat16 adds its own rounding.
    truth = torch.stack(inputs).double().mean(dim=0)
    error = float((result.double() - truth).square().sum() / truth.square().sum())
    signal = float(result.double().square().sum() / truth.square().sum())
    slack = 2.0**-16 if dtype == torch.bfloat16 else 0.0
    # Means of few powers of two do not lie anywhere in an octave.
    rel = 0.3 if levels == "exponential" else 0.15
    assert found.mean_error * signal == pytest.approx(error, rel=rel, abs=slack)
    assert 0 < found.relative_error < 10
    if hvd.size() == 1 and levels == "standard":
        assert found.relative_error == pytest.approx(error, rel=1e-4, abs=slack)
    blocks = -(-ELEMENTS // compression.config.plan(hvd.size()).block_for(ELEMENTS))
    assert found.saturated >= 0
    assert hvd.size() > 1 or found.saturated >= blocks  # each block's largest element
    assert found.to_zero < ELEMENTS
    assert (found.to_zero > 0) == (levels != "exponential" or bits == 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_figures_of_heavy_tails_and_square_levels(bits: int, name: str) -> None:
    """Widths of levels differ between ranks, so that dithers that repel each other gain less."""
    compression = GlobalQSGD(levels="two-hop", bits=bits, transport=TRANSPORT, stats=True)
    generator = torch.Generator().manual_seed(4)
    shape = (hvd.size(), 4, ELEMENTS)  # Student t3: a normal over the root of three squares
    normal = torch.randn(shape, generator=generator)
    inputs = normal[:, 0] / (normal[:, 1:].square().mean(dim=1)).sqrt()
    result = allreduce(inputs[hvd.rank()].clone(), name, compression=compression)
    truth = inputs.double().mean(dim=0)
    error = float((result.double() - truth).square().sum())
    (found,) = compression.stats.values()
    assert found.mean_error * float(result.double().square().sum()) == pytest.approx(error, rel=0.1)


def test_sampled_steps_and_what_the_reduction_gives(name: str) -> None:
    plain = GlobalQSGD(min_elements=0, transport=TRANSPORT)
    watched = GlobalQSGD(min_elements=0, transport=TRANSPORT, stats=2)
    steps = []
    for step in range(5):
        x = gradients(5000, tag=step)[hvd.rank()]
        same = allreduce(x, f"{name}", compression=plain)
        assert torch.equal(same, allreduce(x, name, compression=watched))
        steps.append(watched.stats[name].step)
    assert steps == [0, 0, 2, 2, 4]
    assert plain.stats == {}


def test_zeros_and_what_is_not_finite(name: str) -> None:
    compression = GlobalQSGD(min_elements=0, transport=TRANSPORT, stats=1)
    allreduce(torch.zeros(5000), name, compression=compression)
    found = compression.stats[name]
    assert (found.relative_error, found.mean_error, found.saturated, found.to_zero) == (0, 0, 0, 0)
    allreduce(torch.full((5000,), torch.nan), name, compression=compression)
    assert math.isnan(compression.stats[name].relative_error)
    assert math.isnan(compression.stats[name].mean_error)


def test_one_rank_alone_collects(name: str) -> None:
    compression = GlobalQSGD(min_elements=0, transport=TRANSPORT, stats=hvd.rank() == 0)
    allreduce(gradients(5000)[hvd.rank()], name, compression=compression)
    assert len(compression.stats) == (hvd.rank() == 0)


def test_tensorboard_gets_every_figure(name: str) -> None:
    points = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            points.append((tag, scalar_value, global_step))

    compression = GlobalQSGD(min_elements=0, transport=TRANSPORT, stats=True)
    allreduce(gradients(5000)[hvd.rank()], name, compression=compression)
    stats.write(Writer(), compression.stats, 7)
    tags = [tag for tag, _, step in points if step == 7]
    quantities = ("bits", "relative_error", "mean_error", "saturated", "to_zero")
    assert tags == [f"gq/{quantity}/{name}" for quantity in quantities]


def test_an_optimizers_gradients() -> None:
    if hvd.size() == 1:
        pytest.skip("Horovod's optimizer reduces nothing on one rank")
    model = torch.nn.Linear(100, 100)
    compression = GlobalQSGD(transport=TRANSPORT, stats=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression
    )
    model(torch.randn(3, 100)).square().sum().backward()
    optimizer.step()
    assert list(compression.stats) == ["weight"]  # the bias is too small to be compressed


def test_refusals() -> None:
    with pytest.raises(ValueError, match="GlobalQSGD: stats must be a number of steps, 1 or more"):
        GlobalQSGD(stats=0)
    with pytest.raises(TypeError, match="stats must be True, False or a number of steps, got 'a'"):
        GlobalQSGD(stats="a")  # type: ignore[arg-type]
