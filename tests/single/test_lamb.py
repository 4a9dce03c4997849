"""LAMB's step against its formula, and that it can be saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

torch = pytest.importorskip("torch")

from common.lamb import MOST, Lamb  # noqa: E402


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_steps_by_hand(scale: float) -> None:
    """Element by element in Python; with parameters longer than MOST, too."""
    weights = [scale * value for value in (0.5, -1.5, 2.0)]
    gradients = [[0.1, -0.2, 0.3], [0.4, 0.0, -0.1]]
    parameter = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    optimizer = Lamb([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.01)
    means, squares = [0.0] * 3, [0.0] * 3
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        means = [0.9 * m + 0.1 * g for m, g in zip(means, gradient, strict=True)]
        squares = [0.99 * v + 0.01 * g * g for v, g in zip(squares, gradient, strict=True)]
        update = [
            m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-3) + 0.01 * w
            for m, v, w in zip(means, squares, weights, strict=True)
        ]
        ratio = min(norm(weights), MOST) / norm(update)
        weights = [w - 0.1 * ratio * u for w, u in zip(weights, update, strict=True)]
        assert parameter.tolist() == pytest.approx(weights, rel=1e-9)


def test_where_a_norm_is_zero_the_ratio_is_one() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lamb([parameter], lr=0.5, eps=0.0)
    parameter.grad = torch.tensor([1.0, -3.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.5, 0.5], rel=1e-6)
    still = torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([still], lr=0.5)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert still.tolist() == [1, 1]


def test_its_state_goes_on() -> None:
    def parameter() -> torch.nn.Parameter:
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(7))

    def run(own: torch.nn.Parameter, optimizer: Lamb, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            own.grad = torch.randn(7, generator=generator)
            optimizer.step()

    one, other = parameter(), parameter()
    through, first = Lamb([one], lr=0.1), Lamb([other], lr=0.1)
    run(one, through, range(6))
    run(other, first, range(3))
    second = Lamb([other], lr=0.1)
    second.load_state_dict(first.state_dict())
    run(other, second, range(3, 6))
    assert torch.equal(one, other)
