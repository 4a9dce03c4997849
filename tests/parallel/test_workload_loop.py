"""examples/common: every method learns, and a resumed run continues the curve bit for bit."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import horovod.torch as hvd
import pytest
import torch
from common import loop, methods
from helpers import check_replicas
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from gq_horovod.torch import GlobalQSGD

STEPS, PAUSE, EVERY = 20, 13, 5  # in all; where the run is ended; between checkpoints


class Interruption(Exception):
    """What ends a run in the middle."""


class Digits(loop.Workload):
    """Handwritten digits, with all that a step may depend on beside the parameters."""

    NAME = "digits"
    METRIC = "accuracy"
    HIGHER_IS_BETTER = True
    PRESETS: ClassVar = {"small": {"batch_size": 48, "lr": 0.01, "epochs": 9, "eval_every": 8}}
    clip_norm = 2.0
    end_before: int | None = None  # the step that is not taken

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--noise", type=float, default=0.1, help="of the inputs")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        digits = load_digits()
        self._images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
        self._labels = torch.tensor(digits.target)
        self.steps_per_epoch = 10
        self._steps = 0
        self._seen = torch.zeros(10)  # labels on this rank, which weigh the loss: workload's state

    def model(self) -> nn.Module:
        hidden = nn.Linear(64, 96)
        return nn.Sequential(
            hidden, nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 10)
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.options.lr)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int | None) -> Any:
        assert steps == 90
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = loop.shuffled(1400, self.options.seed, epoch)
        for number in range(skip, 10):
            if 10 * epoch + number == self.end_before:
                raise Interruption
            size = self.options.batch_size
            mine = order[number * size * hvd.size() :][hvd.rank() :: hvd.size()][:size]
            yield self._images[mine], self._labels[mine]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        self._seen += torch.bincount(labels, minlength=10)
        images = images + self.options.noise * torch.randn_like(images)
        return functional.cross_entropy(model(images), labels, 1 / self._seen.clamp(min=1))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        mine = slice(1400 + hvd.rank(), None, hvd.size())
        right = (model(self._images[mine]).argmax(dim=1) == self._labels[mine]).double()
        return {"accuracy": loop.mean_over_ranks(float(right.sum()), len(right), "accuracy")}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = state["seen"]


def run(folder: Path, end_before: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Train, in a folder that all ranks share; what rank 0 has written, or [] on the others."""
    metrics = folder / "metrics.jsonl"
    options = {"metrics": metrics, "max_steps": STEPS, **options}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    workload = Digits(loop.parse(Digits, arguments))
    workload.end_before = end_before
    if end_before is None:
        loop.train(workload)
    else:
        with pytest.raises(Interruption):
            loop.train(workload)
    lines = metrics.read_text().splitlines() if hvd.rank() == 0 else []
    return [json.loads(line) for line in lines]


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that all ranks see."""
    folder = Path(hvd.broadcast_object(str(tmp_path), name="test.folder"))
    yield folder
    hvd.barrier()


def curve(events: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """What was measured of each step, but for times and bytes; the last word counts."""
    found: dict[int, list[Any]] = {}
    for event in events:
        if event["event"] == "start":
            resumed_from = event.get("resumed_from", 0)
            found = {step: own for step, own in found.items() if step <= resumed_from}
        elif event["event"] == "step":
            found[event["step"]] = [event["loss"]]
        elif event["event"] == "eval":
            found[event["step"]] += [event["accuracy"], event["train_losses"]]
    return found


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_resumed_run_continues_the_curve(method: str, shared: Path) -> None:
    through = run(shared / "through", compression=method)
    checkpoint = {"checkpoint": shared / "checkpoint", "checkpoint_every": EVERY}
    torch.manual_seed(1)  # neither run may depend on it
    before = run(shared / "twice", PAUSE, compression=method, **checkpoint)
    torch.manual_seed(2)
    if hvd.rank() == 0:
        with (shared / "twice" / "metrics.jsonl").open("a") as file:
            file.write('{"event": "step", "st')  # where a killed run was
    after = run(shared / "twice", compression=method, **checkpoint)
    again = run(shared / "finished", compression=method, **checkpoint)
    if hvd.rank() > 0:
        return
    assert before[-1]["step"] == PAUSE
    (resumed,) = (event["resumed_from"] for event in after if event.get("resumed_from"))
    assert resumed == PAUSE // EVERY * EVERY
    assert list(curve(after)) == list(range(1, STEPS + 1))
    # (What "auto" decides depends on times; but not within these steps.)
    assert curve(after) == curve(through)
    assert through[-1]["replicas_equal"]
    assert after[-1]["replicas_equal"]
    # A run that is complete is only evaluated.
    assert [event["event"] for event in again] == ["start", "eval", "final"]
    assert again[-1]["accuracy"] == through[-1]["accuracy"]
    # And it has learned.
    losses = [event["loss"] for event in through if event["event"] == "step"]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert through[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("left_out", ["compression", "generators", "buffers", "workload"])
def test_each_part_of_a_checkpoint_is_needed(
    left_out: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parts that each rank has of its own; what the curve shows, or what is saved next."""
    options = {"compression": "exponential", "checkpoint": shared / "checkpoint"}
    options["checkpoint_every"] = EVERY
    run(shared / "through", compression="exponential", checkpoint=shared / "other")
    through = torch.load(
        shared / "other" / f"step-{STEPS:08d}" / f"rank-{hvd.rank()}.pt", weights_only=True
    )
    run(shared / "twice", PAUSE, **options)
    load = loop.Checkpoints.load

    def forgetful(self: loop.Checkpoints) -> Any:
        found = load(self)
        assert found is not None
        shared, own = found
        fresh = {"compression": {}, "generators": loop.generators(), "buffers": {}}
        fresh["workload"] = {"seen": torch.zeros(10)}
        return shared, {**own, left_out: fresh[left_out]}

    monkeypatch.setattr(loop.Checkpoints, "load", forgetful)
    run(shared / "twice", **options)
    after = torch.load(
        shared / "checkpoint" / f"step-{STEPS:08d}" / f"rank-{hvd.rank()}.pt", weights_only=True
    )
    same = all(
        torch.equal(value, after["buffers"][name]) for name, value in through["buffers"].items()
    )
    assert not same


def test_tensorboard_has_the_metrics(shared: Path) -> None:
    pytest.importorskip("tensorboard")
    events = run(shared, compression="standard", tensorboard=shared / "board", max_steps=9)
    if hvd.rank() > 0:
        return
    from tensorboard.backend.event_processing import event_accumulator

    found = event_accumulator.EventAccumulator(str(shared / "board"))
    found.Reload()
    assert "tensorflow" not in sys.modules  # it takes seconds to import
    losses = {item.step: item.value for item in found.Scalars("step/loss")}
    assert losses == pytest.approx(
        {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    )
    assert [item.step for item in found.Scalars("eval/accuracy")] == [8, 9]


def message_of_refusal(**options: Any) -> str:
    """The text of the CheckpointError, the same on every rank."""
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    with pytest.raises(loop.CheckpointError) as caught:
        loop.train(Digits(loop.parse(Digits, arguments)))
    texts = hvd.allgather_object(str(caught.value), name="test.texts")
    assert texts == [texts[0]] * hvd.size()
    return texts[0]


def test_a_checkpoint_that_cannot_be_used(shared: Path) -> None:
    options: dict[str, Any] = {"checkpoint": shared / "checkpoint", "max_steps": 3}
    run(shared, **options)
    text = message_of_refusal(**options, lr=0.02)
    assert "expected lr to be 0.01 as in the run that wrote step-00000003, got 0.02" in text
    text = message_of_refusal(**options, noise=0.2)
    assert "expected noise to be 0.1" in text
    text = message_of_refusal(**options, compression="fp16")
    assert "expected compression to be 'none'" in text
    # The file of one rank is damaged, or gone: every rank hears of it.
    last = shared / "checkpoint" / "step-00000003" / f"rank-{hvd.size() - 1}.pt"
    if hvd.rank() == 0:
        last.write_bytes(last.read_bytes()[:-100])
    hvd.barrier()
    text = message_of_refusal(**options)
    assert f"rank {hvd.size() - 1}: --checkpoint: expected a complete file {last}" in text
    hvd.barrier()
    if hvd.rank() == 0:
        last.unlink()
    hvd.barrier()
    assert "got FileNotFoundError" in message_of_refusal(**options)
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(shared / "checkpoint")
    hvd.barrier()
    run(shared, **options)


def test_the_newest_checkpoint_alone_is_kept(shared: Path) -> None:
    run(shared, 12, checkpoint=shared / "checkpoint", checkpoint_every=3)
    hvd.barrier()
    if hvd.rank() == 0:
        assert {path.name for path in (shared / "checkpoint").iterdir()} == {
            "latest",
            "step-00000012",
        }
        kept = {path.name for path in (shared / "checkpoint" / "step-00000012").iterdir()}
        assert kept == {"shared.pt", *(f"rank-{rank}.pt" for rank in range(hvd.size()))}


def test_data_that_ends_before_a_step(shared: Path) -> None:
    workload = Digits(loop.parse(Digits, ["--epochs=1"]))
    workload.batches = lambda epoch, skip: iter(())  # type: ignore[method-assign]
    workload.schedule = lambda optimizer, steps: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="digits: expected data for one step at least"):
        loop.train(workload)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        (
            "none",
            {"bits": 4},
            "'none': bits must be left out, got 4; it is an option of qsgd, qsgd-e",
        ),
        ("powersgd", {"transport": "mpi"}, "transport must be left out, got 'mpi'"),
        ("standard", {"rank": 4}, "rank must be left out, got 4; it is an option of powersgd"),
        ("exponential", {"bits": 5}, "bits must be"),
    ],
)
def test_options_that_a_method_does_not_have(
    method: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        methods.make(method, seed=3, **options)


def test_options_reach_the_method() -> None:
    assert methods.make("powersgd", rank=2, seed=5).config.seed == 5
    assert methods.make("two-hop", bits=4, seed=5).config.bits == 4
    assert methods.make("none", seed=5) is hvd.Compression.none
    for levels in ("standard", "exponential"):
        preset = getattr(GlobalQSGD, f"paper_{levels}").config
        assert methods.make(f"paper-{levels}").config == preset
        assert methods.make(f"paper-{levels}", seed=5).config == replace(preset, seed=5)
    assert loop.compression_of(loop.parse(Digits, ["--compression=auto"])).config.levels == "auto"


@pytest.mark.parametrize("argument", ["--batch-size=0", "--preset=large", "--compression=best"])
def test_arguments_that_cannot_work(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loop.parse(Digits, [argument])
    assert f"argument {argument.split('=')[0]}" in capsys.readouterr().err.replace(
        "error: --", "error: argument --"
    )


def test_replicas_that_differ_are_found() -> None:
    model = nn.Linear(3, 2)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    check_replicas(*model.parameters())
    assert loop.replicas_equal(model)
    if hvd.rank() == hvd.size() - 1:
        model.weight.data[1, 2] += 1
    assert loop.replicas_equal(model) == (hvd.size() == 1)
