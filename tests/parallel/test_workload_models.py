"""Transformer-XL and Wide-ResNet of examples/ train with every method, and can be resumed."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from common import loop
from common.rejects import TooManyRejectedError
from example_scripts import script
from torch.nn.functional import cross_entropy

TRANSFORMER, RESNET = script("transformer_xl"), script("wide_resnet")
LANGUAGE = ["--batch-size", "4", "--length", "24", "--warm-up", "2", "--lr", "0.004"]
LANGUAGE += ["--evaluation-tokens", "1024"]
WORKLOADS = {
    "transformer-xl": (TRANSFORMER.LanguageModel, ["--preset", "source", *LANGUAGE]),
    "wide-resnet": (
        RESNET.ImageClassifier,
        ["--preset", "digits", "--batch-size", "16", "--warm-up", "2", "--epochs", "2"],
    ),
}

_numbers = itertools.count()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that all ranks see; the first one removes it."""
    made = tempfile.mkdtemp() if hvd.rank() == 0 else None
    folder = Path(hvd.broadcast_object(made, root_rank=0, name=f"folder.{next(_numbers)}"))
    yield folder
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(folder)


def run(
    workload: type[loop.Workload], arguments: list[str], folder: Path, steps: int, *more: str
) -> list[dict[str, Any]]:
    """Train, and return the events on every rank."""
    metrics = folder / f"metrics-{next(_numbers)}.jsonl"
    fixed = ["--metrics", str(metrics), "--cache", str(folder / "cache"), "--eval-every", "1000"]
    options = loop.parse(workload, [*arguments, *fixed, "--max-steps", str(steps), *more])
    loop.train(workload(options))
    hvd.barrier()
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(events: list[dict[str, Any]]) -> list[float]:
    (found,) = (event["train_losses"] for event in events if event["event"] == "eval")
    return list(found)


# Some methods train both. Of the others those train one of them that see more than a row of
# numbers: shapes, or steps before; test_workload_loop.py trains with all.
BOTH = ("none", "standard", "two-hop")
OTHERS = {"powersgd": "wide-resnet", "intsgd": "transformer-xl", "auto": "wide-resnet"}


@pytest.mark.parametrize(
    ("name", "method"),
    [*itertools.product(WORKLOADS, BOTH), *((name, method) for method, name in OTHERS.items())],
)
def test_the_loss_goes_down(name: str, method: str, shared: Path) -> None:
    events = run(*WORKLOADS[name], shared, 12, "--compression", method)
    seen = losses(events)
    assert len(seen) == 12
    # Without compression the last four are 0.80 and 0.48 of the first two.
    assert sum(seen[-4:]) / 4 < 0.9 * sum(seen[:2]) / 2
    final = events[-1]
    assert final["event"] == "final"
    assert final["replicas_equal"]
    assert 1e8 < final["peak_memory"] < 1e10  # bytes: Python and libraries, and a small model
    metric = final[WORKLOADS[name][0].METRIC]
    assert 1 < metric < 100 if name == "transformer-xl" else 0 < metric <= 1


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_a_resumed_run_is_the_same_run(name: str, shared: Path) -> None:
    """Of two ranks, whose sums of floats do not depend on what Horovod fuses."""
    if hvd.size() > 2:
        pytest.skip("Horovod's sums of more ranks differ in the last bits from run to run")
    method = ("--compression", "exponential")
    whole = run(*WORKLOADS[name], shared, 6, *method)
    kept = ("--checkpoint", str(shared / "checkpoint"))
    run(*WORKLOADS[name], shared, 3, *method, *kept)
    resumed = run(*WORKLOADS[name], shared, 6, *method, *kept)
    assert resumed[0]["resumed_from"] == 3

    def later(events: list[dict[str, Any]]) -> list[tuple[int, float]]:
        return [(e["step"], e["loss"]) for e in events if e["event"] == "step" and e["step"] > 3]

    assert later(resumed) == later(whole)
    assert len(later(whole)) == 3
    for key in (WORKLOADS[name][0].METRIC, "validation_loss"):
        assert resumed[-1][key] == whole[-1][key]


def test_without_its_memory_a_resumed_run_is_another_one(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above does see whether the memory is kept."""
    workload, arguments = WORKLOADS["transformer-xl"]
    kept = ("--checkpoint", str(shared / "checkpoint"))
    whole = run(workload, arguments, shared, 4)
    run(workload, arguments, shared, 3, *kept)
    monkeypatch.setattr(workload, "load_state_dict", lambda self, state: None)
    resumed = run(workload, arguments, shared, 4, *kept)
    assert resumed[1]["loss"] != whole[4]["loss"]


def test_perplexity_is_that_of_one_rank(shared: Path) -> None:
    workload, arguments = WORKLOADS["transformer-xl"]
    options = loop.parse(workload, [*arguments, "--evaluation-streams", "5"])
    job = workload(options)
    torch.manual_seed(0)
    model = job.model().eval()
    streams = TRANSFORMER.corpus.Streams(
        TRANSFORMER.corpus.source_bytes().validation[:1024], 5, options.length
    )
    total, count, memory = 0.0, 0, model.empty_memory(5)
    with torch.no_grad():
        found = job.evaluate(model)
        for number in range(streams.segments):
            inputs, targets = (torch.from_numpy(part) for part in streams.segment(number, 0, 1))
            some, memory = model(inputs, targets, memory)
            total, count = total + some.double().sum().item(), count + some.numel()
    assert count == 5 * (1024 // 5 - 1)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_accuracy_is_that_of_one_rank(shared: Path) -> None:
    """With the mean of the running statistics of all ranks; training goes on with its own."""
    workload, arguments = WORKLOADS["wide-resnet"]
    job = workload(loop.parse(workload, arguments))
    torch.manual_seed(0)
    model = job.model()
    model(torch.randn(8, 1, 8, 8) * (1 + hvd.rank()))  # other statistics on every rank
    model.eval()
    digits = RESNET.Digits()
    images, labels = next(digits.validation_batches(iter([np.arange(digits.validation)])))
    own = torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])
    with torch.no_grad():
        found = job.evaluate(model)
        after = torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])
        assert torch.equal(own, after)
        with RESNET.averaged_statistics(model):
            mean = torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])
            logits = model(images)
    every = hvd.allgather(own[None], name="own.statistics")
    torch.testing.assert_close(mean, every.mean(dim=0))
    right = int((logits.argmax(dim=1) == labels).sum())
    # Images whose two best classes are as good as equal may count on one side or the other.
    assert found["accuracy"] == pytest.approx(right / len(labels), abs=1.5 / len(labels))
    assert found["validation_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)


def test_text_in_wikitexts_format(shared: Path) -> None:
    if hvd.rank() == 0:
        line = " the cat sat on the mat \n"
        (shared / "wiki.train.tokens").write_bytes(line.encode() * 2000 + b"\xff\n")
        (shared / "wiki.valid.tokens").write_text(line * 100)
    hvd.barrier()
    arguments = ["--preset", "text", *LANGUAGE, "--data", str(shared)]
    events = run(TRANSFORMER.LanguageModel, arguments, shared, 16)
    assert events[0]["vocabulary"] == 6
    assert events[-1]["rejected_lines"] == 1
    assert events[-1]["perplexity"] < 5  # a uniform guess has 6


def write_images(folder: Path) -> None:
    """24 images of two colours for training, 8 for validation, one of each broken."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 12), ("val", 4)):
        for colour in ("red", "blue"):
            (folder / part / colour).mkdir(parents=True)
            for number in range(count):
                buffer = io.BytesIO()
                image.new("RGB", (20 + number, 24), colour).save(buffer, "PNG")
                (folder / part / colour / f"{number}.png").write_bytes(buffer.getvalue())
        (folder / part / "red" / "0.png").write_bytes(b"broken")


@pytest.mark.parametrize("allowed", [2, 0])
def test_folders_of_images(allowed: int, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    if hvd.rank() == 0:
        write_images(shared)
    hvd.barrier()
    small = RESNET.Shape((1,), 2, width=8, large_images=True)
    monkeypatch.setattr(RESNET, "WIDE_RESNET_101_2", small)
    arguments = ["--preset", "imagenet", "--batch-size", "4", "--image-size", "32"]
    arguments += ["--threads", "2", "--warm-up", "1", "--lr", "0.02"]
    arguments += ["--data", str(shared), "--max-rejected", str(allowed)]
    if allowed:
        events = run(RESNET.ImageClassifier, arguments, shared, 9)
        assert events[0]["images"] == 24
        assert events[-1]["rejected_images"] == 2
        # Of 7 validation images.
        assert events[-1]["accuracy"] * 7 == pytest.approx(round(events[-1]["accuracy"] * 7))
        return
    # Every rank says so, whichever has met the broken file. In a job the first one ends it.
    options = loop.parse(RESNET.ImageClassifier, arguments)
    job = RESNET.ImageClassifier(options)
    if hvd.rank() == hvd.size() - 1:
        job._rejects.reasons["file"] = "broken"
    with pytest.raises(TooManyRejectedError, match=r"1 images cannot be read, and 0 may be left"):
        job.evaluate(job.model())


def test_synthetic_images_differ_between_ranks() -> None:
    options = SimpleNamespace(images=1000, image_size=8, seed=5)
    source, again = (RESNET.Synthetic(options, 10) for _ in range(2))
    rows = np.array([3, 700, 3 + source.IMAGES])
    ((images, labels),) = source.training_batches(iter([rows]), epoch=0)
    ((same, _),) = again.training_batches(iter([rows]), epoch=1)
    assert images.shape == (3, 3, 8, 8)
    assert int(labels.max()) < 10
    assert torch.equal(images, same)
    assert torch.equal(images[0], images[2])
    every = hvd.allgather(images[:1].reshape(1, -1), name="synthetic.images")
    assert len(torch.unique(every, dim=0)) == hvd.size()


def test_a_language_model_on_synthetic_text() -> None:
    """Whatever the preset, the loop runs on it as on text of the user's."""
    options = loop.parse(
        TRANSFORMER.LanguageModel,
        ["--preset", "text", "--data", "synthetic", "--tokens", "3000", *LANGUAGE[:-2]],
    )
    workload = TRANSFORMER.LanguageModel(options)
    assert workload.describe()["synthetic"]
    assert workload.describe()["vocabulary"] == 1000
    model = workload.model()
    batch = next(workload.batches(0, 0))
    assert batch[0].shape == (4, 24)
    assert math.isfinite(float(workload.loss(model, batch)))
