"""DeepLight's pruning: the formula, which weights become zeros, and that a resumed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

torch = pytest.importorskip("torch")

import pruning  # noqa: E402
from model import DeepFwFM, DeepLight  # noqa: E402

ROWS = (1, 1, 50, 7)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    made = DeepLight(ROWS, 4, (16, 8)) if kind == "DeepLight" else DeepFwFM(200, 5, 4, (16, 8))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_the_share_by_hand() -> None:
    assert pruning.share_at(0, 0.9) == 0
    assert pruning.share_at(100, 0.9) == pytest.approx(0.9 * 0.01)
    assert pruning.share_at(200, 0.5) == pytest.approx(0.5 * (1 - 0.99**2))
    assert pruning.share_at(10**6, 0.9) == pytest.approx(0.9)


def test_parts_of_the_models() -> None:
    """Tables, pairs and deep weights; no bias, no first order, nothing that numbers multiply."""
    for kind, names in (
        ("DeepLight", ["tables.2.weight", "tables.3.weight", "pair_weight"]),
        ("DeepFwFM", ["linear.weight", "embedding.weight", "pair_weight"]),
    ):
        model = model_of(kind)
        known = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [known[id(weight)] for weight, _ in pruning.parts(model)]
        deep = [f"deep.{place}.weight" for place in (0, 3, 6)]
        assert found == [*names, *deep]


@pytest.mark.parametrize("kind", ["DeepLight", "DeepFwFM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_the_smallest_become_zeros(kind: str, share: float) -> None:
    model = model_of(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    magnitudes = [own.detach().clone() for _, own in pruning.parts(model)]
    pruning.prune(pruning.parts(model), share)
    pruned = set()
    for (weight, _), magnitude in zip(pruning.parts(model), magnitudes, strict=True):
        zero = weight == 0
        assert abs(int(zero.sum()) - share * weight.numel()) <= 2  # a pair has two places
        if zero.any():
            assert magnitude[zero].max() < magnitude[~zero].min()
        pruned.add(id(weight))
    for name, parameter in model.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], before[name][kept])
        if id(parameter) not in pruned:
            assert torch.equal(parameter, before[name])


def test_a_pair_of_fields_goes_as_a_whole() -> None:
    model = model_of("DeepLight")
    pruning.prune(pruning.parts(model), 0.5)
    zero = model.pair_weight == 0
    assert torch.equal(zero, zero.T)


def test_weights_of_one_size_stay_together() -> None:
    """Ranks could choose different ones of them: either all or none becomes zero."""
    same = torch.ones(10)
    pruning.prune([(same, same.abs())], 0.5)
    assert bool((same == 1).all())
    some = torch.tensor([1.0, -1.0, 1.0, 2.0, 3.0, -3.0])
    pruning.prune([(some, some.abs())], 0.7)
    assert some.tolist() == [0, 0, 0, 0, 3, -3]


def test_what_is_zero_stays_counted() -> None:
    weight = torch.tensor([0.0, 0.0, 1.0, 2.0])
    pruning.prune([(weight, weight.abs())], 0.5)
    assert weight.tolist() == [0, 0, 1, 2]
    assert pruning.zeros([(weight, weight.abs()), (torch.ones(4), torch.ones(4))]) == 0.25


# ----------------------------------------------------------------------------------------- training


def workload_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    for name, value in (("rank", 0), ("size", 1)):
        monkeypatch.setattr(train.hvd, name, lambda value=value: value)
    options = ["--preset=criteo-small", "--data=synthetic", "--shrink=100000", "--samples=64"]
    return train.DeepLight(train.loop.parse(train.DeepLight, [*options, *arguments]))


def test_the_preset_has_the_authors_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    options = workload_of(monkeypatch).options
    assert (options.prune_from, options.l2, options.lr) == (3, 6e-7, 1e-3)


def test_pruning_begins_with_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(monkeypatch, "--prune-from=3", "--prune-every=2", "--sparsity=0.9")
    model = model_of("DeepLight")
    calls: list[float] = []
    monkeypatch.setattr(pruning, "prune", lambda parts, share: calls.append(share))
    for epoch in range(4):
        for _ in range(3):
            workload.after_step(model, epoch)
    assert calls == [pruning.share_at(k, 0.9) for k in (2, 4, 6)]


def test_a_resumed_run_goes_on_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--prune-from=1", "--prune-every=1")
    through, first, second = (workload_of(monkeypatch, *arguments) for _ in range(3))
    one, other = model_of("DeepLight"), model_of("DeepLight")
    for step in range(400):
        through.after_step(one, 0)
        (first if step < 150 else second).after_step(other, 0)
        if step == 149:
            second.load_state_dict(first.state_dict())
    assert pruning.zeros(pruning.parts(one)) > 0.02
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sparsity=0"], "--prune-from: expected --sparsity above 0 and below 1 .* got 0.0"),
        (["--sparsity=1"], "--prune-from: expected --sparsity above 0 and below 1 .* got 1.0"),
        (["--prune-every=0"], "--prune-every: expected 1 or more, got 0"),
    ],
)
def test_options_that_cannot_work(
    arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=why):
        workload_of(monkeypatch, *arguments)
