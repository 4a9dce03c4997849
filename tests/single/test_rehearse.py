"""tools/rehearse.py: the command that a job's launcher has, for ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_report import events, write

from gq_horovod.cli import output
from gq_horovod.research import report
from tools import ranks as launcher
from tools import rehearse

WORDS = ["mpirun", "--bind-to", "none", "-x", "OMP_NUM_THREADS", "-x", "LD_LIBRARY_PATH", "python"]
WORDS += ["/opt/gq-horovod/examples/$(EXAMPLE)/train.py", "--preset=$(PRESET)", "--interface=eth0"]
WORDS += ["--cache=/data", "--metrics=/results/$(RUN).jsonl", "--eval-every=7"]
WORDS += ["--checkpoint=/results/checkpoints/$(RUN)", "--data=synthetic"]
SETTINGS = {"EXAMPLE": "deeplight", "PRESET": "criteo", "RUN": "deeplight-all"}
SETTINGS |= {"OMP_NUM_THREADS": "3", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
JOB = """
kind: ConfigMap
data: {EXAMPLE: deeplight, DEVICE: cuda, OMP_NUM_THREADS: "10", BATCH_SIZE: "512"}
---
kind: MPIJob
spec:
  mpiReplicaSpecs:
    Launcher:
      template:
        spec:
          containers: [{command: [gq-launch], args: [mpirun, -x, OMP_NUM_THREADS, python, x.py,
            --device=$(DEVICE), --batch-size=$(BATCH_SIZE)]}]
"""


def test_the_command_is_the_launcher_s_with_this_machine_s_paths(tmp_path: Path) -> None:
    made = rehearse.command(WORDS, SETTINGS, 3, tmp_path)
    at = made.index(sys.executable)
    assert made[at:] == [
        sys.executable,
        f"{rehearse.ROOT}/examples/deeplight/train.py",
        "--preset=criteo",
        "--interface=lo",
        f"--cache={tmp_path}/data",
        f"--metrics={tmp_path}/deeplight-all.jsonl",
        "--eval-every=7",
        f"--checkpoint={tmp_path}/checkpoints/deeplight-all",
        "--data=synthetic",
    ]
    # mpirun with this machine's options, then the manifest's.
    assert made[made.index("-np") + 1] == "3"
    assert "--oversubscribe" in made
    assert made[at - 6 : at] == WORDS[1:7]


def test_options_replace_those_of_the_manifest(tmp_path: Path) -> None:
    more = ["--eval-every=2", "--max-steps=4"]
    made = rehearse.command(WORDS, SETTINGS, 2, tmp_path, more, checkpoints=False)
    assert made[-2:] == more
    assert "--eval-every=7" not in made
    assert not any(word.startswith("--checkpoint") for word in made)


def test_ranks_get_the_variables_that_the_manifest_passes() -> None:
    several = rehearse.environment(WORDS, SETTINGS, 2)
    assert (several["OMP_NUM_THREADS"], several["LD_LIBRARY_PATH"]) == ("3", "")
    assert several["PYTHONPATH"].startswith(str(rehearse.ROOT))
    assert "PRESET" not in several
    # Horovod gives a single rank no hooks, so nothing would be compressed.
    alone = rehearse.environment(WORDS, SETTINGS, 1)
    assert (alone["HOROVOD_ELASTIC"], several.get("HOROVOD_ELASTIC")) == ("1", None)


def test_ranks_that_wait_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = launcher.patience(tmp_path, 2000)
    program = "import os, time; t = time.perf_counter(); os.sched_yield()\n"
    program += "print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) >= 2e-3
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        launcher.patience(tmp_path, 2000)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would be started."""
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(words: list[str], env: dict[str, str]) -> Done:
        commands.append(words)
        return Done()

    monkeypatch.setattr(rehearse, "kustomized", lambda folder: JOB)
    monkeypatch.setattr(launcher, "patience", lambda folder, microseconds: {})
    monkeypatch.setattr(rehearse.subprocess, "run", run)
    return commands


def test_jobs_of_several_sizes_have_the_same_samples_in_a_step(
    tmp_path: Path, started: list[list[str]]
) -> None:
    for ranks in (4, 64):
        write(tmp_path / f"{ranks}-ranks" / "a.jsonl", complete(ranks=ranks))
    arguments = ["a/b/all", "--ranks", "4", "64", "--samples=2048", f"--output={tmp_path}"]
    assert rehearse.main([*arguments, "--", "--max-steps=2"]) == 0
    few, many = started
    assert few[-3:] == ["--device=cpu", "--batch-size=512", "--max-steps=2"]
    assert many[-3:] == ["--device=cpu", "--batch-size=32", "--max-steps=2"]
    text = (tmp_path / "rehearsal.txt").read_text()
    assert "64 ranks on 4 hosts" in text


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--samples=6", "--ranks=4"], "--samples"),
        (["--set", "BATCHSIZE=1"], "BATCHSIZE"),
        (["--set", "BATCH_SIZE"], "KEY=VALUE"),
        (["--methods=none"], "METHODS"),  # not a job of all methods
    ],
)
def test_mistakes(
    option: list[str], named: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rehearse.main(["a/b/none", *option])
    assert named in capsys.readouterr().err
    assert not started


def complete(method: str = "none", **changes: object) -> list[dict[str, object]]:
    """A run of six steps whose losses, means of all ranks, are 6, 5, ... 1."""
    found = events(method, **changes)
    losses = iter(range(6, 0, -1))
    for event in found:
        if event["event"] == "eval":
            event["train_losses"] = [float(next(losses)), float(next(losses))]
    found[-1] |= {"peak_memory": 2_500_000_000, "test_loss": 0.5}
    return found


def test_losses_of_the_first_and_last_steps(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", complete("standard", bytes=3e6))
    write(tmp_path / "b.jsonl", complete("none"))
    write(tmp_path / "c.jsonl", complete("fp16")[:-1])  # has not ended
    rows = rehearse.rows_of(report.collect(tmp_path)[0], 2)
    assert [row["method"] for row in rows] == ["none", "standard"]
    assert (rows[1]["first"], rows[1]["last"]) == (5.5, 1.5)
    assert (rows[1]["samples"], rows[1]["held_out"]) == (4 * 512, 0.5)
    console = Console(width=140, record=True)
    rehearse.print_losses(rows, 2, console, output.rich()[1])
    text = console.export_text()
    assert all(figure in text for figure in ("5.5000", "1.5000", "0.5000", "3.00", "2.50"))
