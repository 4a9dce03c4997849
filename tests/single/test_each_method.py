"""examples/each_method.py: one command for every method, what failed, and what had finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import each_method  # noqa: E402

COMMAND = ["mpirun", "x.py", "--compression=all", "--lr=1", "--metrics=/all/run-all.jsonl"]
COMMAND += ["--checkpoint=/all/checkpoints/run-all"]

# In the place of a training: writes the metrics of a complete run, or fails as its method says.
TRAIN = """
import json, os, signal, sys, time
options = dict(word.partition("=")[::2] for word in sys.argv[1:])
method, path = options["--compression"], options["--metrics"]
with open(os.path.join(os.path.dirname(path), "started"), "a") as file:
    file.write(method + options.get("--bits", "") + "\\n")
if method == "broken":
    sys.exit(3)
start = dict(event="start", workload="deeplight", preset="flights", compression=method, seed=0)
start.update(ranks=2, hosts=1, batch_size=8, parameters=9, metric="auc")
events = [start, dict(event="step", step=1, loss=1.0, seconds=1.0)]
if method == "cut":
    time.sleep(60)
if method == "counts":
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: caught.append(number))
    with open(os.path.join(os.path.dirname(path), "counting"), "w"):
        pass
    end = time.monotonic() + 60
    while not caught and time.monotonic() < end:
        time.sleep(0.05)
    end = time.monotonic() + 2
    while time.monotonic() < end:  # a second one would come by now
        time.sleep(0.05)
    with open(os.path.join(os.path.dirname(path), "caught"), "w") as file:
        json.dump(caught, file)
    sys.exit(1)
if method != "without-end":
    events.append(dict(event="final", steps=1, step_seconds=1.0, bytes_per_step=1.0, seconds=1.0,
                       auc=0.5, replicas_equal=True))
with open(path, "a") as file:
    file.writelines(json.dumps(event) + "\\n" for event in events)
"""


def arguments(folder: Path, methods: str, *more: str) -> list[str]:
    (folder / "train.py").write_text(TRAIN)
    command = [sys.executable, str(folder / "train.py"), "--compression=all"]
    command += [f"--metrics={folder}/run-all.jsonl", f"--checkpoint={folder}/checkpoints/run-all"]
    return [f"--methods={methods}", "--", *command, *more]


def run(folder: Path, methods: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "each_method.py"),
            *arguments(folder, methods, *more),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().split()


def test_a_method_is_put_where_all_stands() -> None:
    for method, options in (
        ("two-hop", ["--compression=two-hop"]),
        ("two-hop-4", ["--compression=two-hop", "--bits=4"]),
    ):
        assert each_method.command_for(method, COMMAND) == [
            *("mpirun", "x.py", *options, "--lr=1", f"--metrics=/all/run-{method}.jsonl"),
            f"--checkpoint=/all/checkpoints/run-{method}",
        ]


def test_a_command_without_checkpoints() -> None:
    assert each_method.command_for("none", COMMAND[:-1]) == [
        *("mpirun", "x.py", "--compression=none", "--lr=1", "--metrics=/all/run-none.jsonl"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("--compression=all", "--compression=none", "--compression: expected the word all"),
        ("--metrics=/all/run-all.jsonl", "--metrics=/all/run.jsonl", "--metrics: expected the wo"),
        ("--metrics=/all/run-all.jsonl", "", "--metrics: expected it once .* 0 times"),
        (
            "--checkpoint=/all/checkpoints/run-all",
            "--checkpoint=/all/run",
            "--checkpoint: expected",
        ),
        ("--lr=1", "--compression=all", "--compression: expected it once .* 2 times"),
    ],
)
def test_commands_that_do_not_name_the_method(old: str, new: str, why: str) -> None:
    changed = [new if word == old else word for word in COMMAND]
    with pytest.raises(ValueError, match=why):
        each_method.command_for("none", changed)


def test_one_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "none broken exponential-4")
    assert done.returncode == 1, done.stderr
    assert started(tmp_path) == ["none", "broken", "exponential4"]
    assert done.stderr.splitlines()[-1] == "each_method: broken failed: status 3"
    # One report of what there is, in the log and beside the metrics.
    assert (tmp_path / "report.txt").read_text() == done.stdout
    assert "exponential" in done.stdout
    assert list(tmp_path.glob("report-*.png"))


def test_what_has_finished_is_not_repeated(tmp_path: Path) -> None:
    assert run(tmp_path, "none broken standard").returncode == 1
    assert run(tmp_path, "none broken standard fp16").returncode == 1
    assert started(tmp_path) == ["none", "broken", "standard", "broken", "fp16"]
    done = run(tmp_path, "none standard")
    assert done.returncode == 0, done.stderr
    assert "standard: has finished before" in done.stderr
    assert len(started(tmp_path)) == 5


@pytest.mark.parametrize("change", ["command", "no metrics", "no end", "damaged"])
def test_what_has_not_finished_runs_again(tmp_path: Path, change: str) -> None:
    """Other options, or metrics that are gone or incomplete: then nothing is taken for done."""
    assert run(tmp_path, "none").returncode == 0
    metrics = tmp_path / "run-none.jsonl"
    more = []
    if change == "command":
        more = ["--lr=2"]
    elif change == "no metrics":
        metrics.unlink()
    elif change == "no end":
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    else:
        (tmp_path / "run-none.finished").write_text("{")
    assert run(tmp_path, "none", *more).returncode == 0
    assert started(tmp_path) == ["none", "none"]


def test_a_command_that_does_not_start(tmp_path: Path) -> None:
    options = arguments(tmp_path, "none")
    options[2] = str(tmp_path / "nothing")
    assert each_method.main(options) == 1
    assert not (tmp_path / "run-none.finished").exists()


def test_without_any_run_there_is_no_report(tmp_path: Path) -> None:
    done = run(tmp_path, "broken")
    assert done.returncode == 1
    assert "expected files that end in .jsonl, got none" in done.stderr
    assert not (tmp_path / "report.txt").exists()


def begin(
    folder: Path, methods: str, hangup: signal.Handlers = signal.SIG_DFL
) -> subprocess.Popen[str]:
    """Start it as the first process of a group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "examples/each_method.py", *arguments(folder, methods)],
        cwd=ROOT,
        # One thread: a signal that finds all of them stopped goes to any, and only one is to wake.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_command_gets_a_signal_once(
    tmp_path: Path, whole_group: bool, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal goes to all its processes; mpirun kills its ranks at the second one."""
    process = begin(tmp_path, "counts")
    wait_until((tmp_path / "counting").exists)
    if whole_group:
        # What is passed on comes later than what the group gets: two at once would count as one.
        process.send_signal(signal.SIGSTOP)
        os.killpg(process.pid, number)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert json.loads((tmp_path / "caught").read_text()) == [number]


def test_a_terminal_that_closes_ends_nothing_below_nohup(tmp_path: Path) -> None:
    process = begin(tmp_path, "counts", signal.SIG_IGN)
    wait_until((tmp_path / "counting").exists)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert json.loads((tmp_path / "caught").read_text()) == [signal.SIGTERM]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_run_and_all_others(tmp_path: Path, number: signal.Signals) -> None:
    """As when the launcher's Pod is deleted: its ranks must not go on."""
    process = begin(tmp_path, "none cut standard")
    wait_until(lambda: (tmp_path / "started").exists() and "cut" in started(tmp_path))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert started(tmp_path) == ["none", "cut"]
    assert not (tmp_path / "run-cut.finished").exists()
    assert json.loads((tmp_path / "run-none.finished").read_text())


@pytest.mark.parametrize("methods", ["", " ", "none none"])
def test_methods_that_are_none(
    methods: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        each_method.main(arguments(tmp_path, methods))
    assert raised.value.code == 2
    assert "--methods: expected names, each once" in capsys.readouterr().err
