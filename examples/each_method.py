"""Run a training command once for each method, one after the other, and report on all of them.

    python examples/each_method.py --methods "none fp16 standard exponential-4" -- \
        mpirun -np 2 python examples/deeplight/train.py --compression=all \
        --metrics=results/deeplight-all.jsonl --checkpoint=results/checkpoints/deeplight-all

What stands behind `--` is the command. In its --compression, --metrics and --checkpoint the word
`all` stands for a method; a number behind a method's name is its bits.

A method that fails does not stop the others. At the end there is a report of all runs in the folder
of the metrics (report.txt, and plots), and the exit status is 1 if any method has failed. Started
again with the same command, it leaves out the methods that have finished; one that was cut off
resumes from its checkpoint, or begins anew where the command has no --checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from common import methods

from gq_horovod.research import report

ALL = "all"
# The options that name the method, and how often they have to be there.
_NAMING = {"--compression": {1}, "--metrics": {1}, "--checkpoint": {0, 1}}
_ALL = re.compile(rf"\b{ALL}\b(?=[^/]*$)")  # in the last part of a path


def command_for(method: str, command: Sequence[str]) -> list[str]:
    """The command of one method.

    Arguments:
        method: a name that --compression takes, and -BITS behind it where bits are meant.
        command: with `all` in each of the options that name the method.

    Raises ValueError where one of them has no `all` in it, or is missing; --checkpoint may be.
    """
    made, seen = [], []
    for word in command:
        option, _, value = word.partition("=")
        if option in _NAMING:
            seen.append(option)
            if not _ALL.search(value):
                raise ValueError(f"{option}: expected the word {ALL} in its name, got {value!r}.")
            if option == "--compression":
                made += methods.options_of(method)
                continue
            word = f"{option}={_ALL.sub(method, value)}"
        made.append(word)
    for option, often in _NAMING.items():
        if seen.count(option) not in often:
            raise ValueError(
                f"{option}: expected it once in the command, as {option}=...{ALL}..., got it "
                f"{seen.count(option)} times."
            )
    return made


def metrics_of(command: Sequence[str]) -> Path:
    """The file of metrics that a command for one method writes."""
    (value,) = (word.partition("=")[2] for word in command if word.startswith("--metrics="))
    return Path(value)


def finished(command: list[str]) -> bool:
    """Whether this very command has ended well, and its metrics are there."""
    metrics = metrics_of(command)
    try:
        before = json.loads(_marker(metrics).read_text())
        return before == command and report.read(metrics).final is not None
    except (OSError, ValueError):  # never finished, or somebody removed or damaged a file
        return False


def _marker(metrics: Path) -> Path:
    return metrics.with_suffix(".finished")


# What a terminal or the system ends a program with.
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Runner:
    """Starts one command after another, and passes signals that end this process on to them."""

    def __init__(self) -> None:
        self.stopped: int | None = None  # the signal
        self._child: subprocess.Popen[bytes] | None = None
        for number in _PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        if self._child is not None:
            self._child.send_signal(number)

    def run(self, command: Sequence[str]) -> str | None:
        """Run a command to its end; returns why it failed, or None."""
        try:
            # Of its own session: Ctrl-C in a terminal reaches a whole group, and would come twice.
            self._child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            return f"{error}"
        if self.stopped is not None:  # between two commands
            self._child.send_signal(self.stopped)
        status = self._child.wait()
        self._child = None
        return None if status == 0 else f"status {status}"


def run_all(methods: Sequence[str], command: Sequence[str], runner: Runner) -> dict[str, str]:
    """Run the command for every method; returns those that failed, and why."""
    commands = {method: command_for(method, command) for method in methods}
    failed = {}
    for method, own in commands.items():
        if finished(own):
            _say(f"{method}: has finished before, and is left out")
            continue
        metrics = metrics_of(own)
        _marker(metrics).unlink(missing_ok=True)
        _say(f"{method}: begins")
        reason = runner.run(own)
        if runner.stopped is not None:
            return failed
        if reason is None:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            _marker(metrics).write_text(json.dumps(own))
        else:
            failed[method] = reason
        _say(f"{method}: {'has finished' if reason is None else f'failed, {reason}'}")
    return failed


def write_report(folder: Path) -> bool:
    """Print the report of a folder's runs, and leave it there; returns whether there is one."""
    command = [sys.executable, "-m", "gq_horovod", "report", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode == 0:
        (folder / "report.txt").write_text(done.stdout)
    return done.returncode == 0


def _say(text: str) -> None:
    print(f"each_method: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a method or the report has failed, 128 and a signal's number after one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", required=True, help="with spaces between them, in their order")
    parser.add_argument("command", nargs="+", help="behind --: what trains, with `all` in it")
    options = parser.parse_args(arguments)
    methods = options.methods.split()
    if not methods or len(set(methods)) < len(methods):
        parser.error(f"--methods: expected names, each once, got {options.methods!r}")
    try:
        folder = metrics_of(command_for(methods[0], options.command)).parent
    except ValueError as error:
        parser.error(str(error))
    runner = Runner()
    failed = run_all(methods, options.command, runner)
    if runner.stopped is not None:
        _say(f"stopped by signal {runner.stopped}; started again, it goes on")
        return 128 + runner.stopped
    reported = write_report(folder)
    for method, reason in failed.items():
        _say(f"{method} failed: {reason}")
    return 0 if reported and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
