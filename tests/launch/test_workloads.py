"""A rank of examples/deeplight is killed; the job that is started again continues the curve."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launcher import Job, launch

pytest.importorskip("sklearn")
pytest.importorskip("horovod")

# Some ten times what a run takes on two idle cores.
LIMIT_SECONDS = 120
STEPS, EVERY, KILL_AFTER = 120, 10, 25


def write_clicks(path: Path) -> None:
    """A file in Criteo's format, in which the first category and the first number matter."""
    generator = random.Random(0)
    lines = []
    for _ in range(STEPS * 2 * 32 * 10 // 9 + 200):
        category, number = generator.randrange(8), generator.randrange(50)
        click = generator.random() < (0.8 if category < 4 else 0.1)
        numbers = [str(number), *(str(generator.randrange(9)) for _ in range(12))]
        categories = [f"{category:08x}", *(f"{generator.randrange(99):08x}" for _ in range(25))]
        lines.append("\t".join([str(int(click)), *numbers, *categories]))
    lines[100] = "not a click"
    path.write_text("\n".join(lines) + "\n")


def train(folder: Path, data: Path) -> Job:
    """Run the example in two ranks, with its output in a folder."""
    logs = folder / f"log-{len(list(folder.glob('log-*')))}"
    logs.mkdir(parents=True)
    small = [
        "--shrink=10000",
        "--samples=0",
        "--dim=4",
        "--units=16",
        "--layers=1",
        "--lr=0.01",
        "--batch-size=32",
    ]
    command = ["examples/deeplight/train.py", "--preset=criteo", f"--data={data}", *small]
    command += [f"--max-steps={STEPS}", "--compression=exponential", "--eval-every=30"]
    command += [f"--checkpoint={folder / 'checkpoint'}", f"--checkpoint-every={EVERY}"]
    command += [f"--metrics={folder / 'metrics.jsonl'}"]
    return launch("mpirun", 2, command, LIMIT_SECONDS, logs)


def events_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_a_rank(folder: Path, killed: list[int]) -> None:
    """Send SIGKILL to one rank as soon as the run has taken KILL_AFTER steps."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        steps = [event["step"] for event in events_of(folder) if event["event"] == "step"]
        if steps and steps[-1] >= KILL_AFTER:
            ranks = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.cmdline()[1:2] == ["examples/deeplight/train.py"]
            ]
            killed.append(len(ranks))
            ranks[-1].kill()
            return
        time.sleep(0.005)


def measured(events: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Losses and AUC of each step, the last that were written."""
    found: dict[int, list[Any]] = {}
    for event in events:
        if event["event"] == "step":
            found[event["step"]] = [event["loss"]]
        elif event["event"] == "eval":
            found[event["step"]] += [event["train_losses"], event["auc"], event["test_loss"]]
    return found


def test_a_killed_run_continues_its_curve(tmp_path: Path) -> None:
    data = tmp_path / "train.txt"
    write_clicks(data)
    job = train(tmp_path / "through", data)
    assert job.status == 0, job.report()
    through = events_of(tmp_path / "through")

    killed: list[int] = []
    folder = tmp_path / "killed"
    watcher = threading.Thread(target=kill_a_rank, args=(folder, killed))
    watcher.start()
    job = train(folder, data)
    watcher.join()
    assert killed == [2], job.report()
    assert job.status != 0
    assert not job.timed_out, job.report()
    last = events_of(folder)[-1]
    assert last["event"] != "final", "the run had ended before the rank was killed"

    job = train(folder, data)
    assert job.status == 0, job.report()
    after = events_of(folder)
    resumed = [event["resumed_from"] for event in after if "resumed_from" in event]
    assert len(resumed) == 1
    assert resumed[0] % EVERY == 0
    assert KILL_AFTER - EVERY < resumed[0] < STEPS
    curve = measured(after)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve == measured(through)

    for final in (through[-1], after[-1]):
        assert final["event"] == "final"
        assert final["replicas_equal"]
        assert final["rejected_lines"] == 1
        assert final["auc"] > 0.8
    losses = [own[0] for own in curve.values()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_paper_s_model_on_synthetic_data(tmp_path: Path) -> None:
    """Of its structure, with small tables: what anybody can run."""
    command = ["examples/deeplight/train.py", "--preset=criteo-small", "--data=synthetic"]
    command += ["--shrink=20000", "--samples=2048", "--repeat=4", "--lr=0.003"]
    command += ["--compression=two-hop", f"--metrics={tmp_path / 'metrics.jsonl'}"]
    job = launch("mpirun", 2, command, LIMIT_SECONDS, tmp_path)
    assert job.status == 0, job.report()
    start, *_, final = events_of(tmp_path)
    assert start["synthetic"] is True
    assert final["replicas_equal"]
    assert final["steps"] == 4 * 2048 // (2 * 64)
    assert final["auc"] > 0.55  # of other samples
    losses = [own[0] for own in measured(events_of(tmp_path)).values()]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


def test_pruning_leaves_replicas_equal(tmp_path: Path) -> None:
    """From the third epoch on, on both ranks alike."""
    command = ["examples/deeplight/train.py", "--preset=criteo-small", "--data=synthetic"]
    command += ["--shrink=20000", "--samples=1024", "--repeat=4", "--epochs=4", "--eval-every=32"]
    command += ["--prune-every=1", "--eval-rows=512"]
    command += ["--compression=standard", f"--metrics={tmp_path / 'metrics.jsonl'}"]
    job = launch("mpirun", 2, command, LIMIT_SECONDS, tmp_path)
    assert job.status == 0, job.report()
    events = events_of(tmp_path)
    zeros = {event["step"]: event.get("zeros") for event in events if event["event"] == "eval"}
    # 32 steps of an epoch; after 64 of pruning the share is 0.9 (1 - 0.99^0.64).
    assert (zeros[32], zeros[64]) == (None, None)
    assert 0 < zeros[96] < zeros[128]
    final = events[-1]
    assert final["replicas_equal"]
    assert final["zeros"] == zeros[128]
    assert abs(zeros[128] - 0.9 * (1 - 0.99**0.64)) < 0.001
