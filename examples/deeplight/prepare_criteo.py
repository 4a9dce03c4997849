"""Prepare a file of Criteo's for training: checked once, split once, read by all ranks.

    python examples/deeplight/prepare_criteo.py train.txt.gz --output criteo
    mpirun ... python examples/deeplight/train.py --preset criteo --data criteo

The file is the user's: the licence of Criteo's data lets nobody else hand it on. It stays as it is.
The folder gets train.txt and test.txt, lines of the same format without those that are malformed,
and prepared.json, which counts them. Every tenth line is held out, as train.py does without this.

The preset "paper" keeps the 32,768 samples of the paper's runs, which train.py repeats 100 times
(--repeat); "whole" keeps all. One that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import criteo
from common.rejects import Rejects

TRAIN, TEST, DONE, PROGRESS = "train.txt", "test.txt", "prepared.json", "progress.json"
LOCK = "prepare.lock"
# Lines between two notes of how far it is: some seconds.
EVERY = 250_000

# What a preset keeps: lines for training (0: all), and held-out ones.
PRESETS = {"paper": (32_768, 65_536), "whole": (0, 2**20)}


def files_of(folder: Path) -> tuple[Path, Path]:
    """The lines for training, and the held-out ones, of a folder that is ready.

    Raises ValueError for one that is not.
    """
    if not (folder / DONE).exists():
        begun = ", which prepare_criteo.py has begun" if (folder / PROGRESS).exists() else ""
        raise ValueError(
            f"--data {folder}: expected a folder with {DONE}, as prepare_criteo.py leaves it, got "
            f"one without{begun}; run `prepare_criteo.py FILE --output {folder}` to its end."
        )
    return folder / TRAIN, folder / TEST


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it. Raises ValueError where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    # A file of its own, which nobody renames; open for writing, as NFS asks of an exclusive lock.
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--output {folder}: expected no other prepare_criteo.py that writes there, got "
                f"one; wait for its end (if there is none any more, remove {folder / LOCK})."
            ) from error
        yield


@dataclass
class Progress:
    """How far it is, as in progress.json: what lies behind these bytes is void."""

    line: int = 0  # the next to be read
    offset: int = 0  # where it begins, in a file that is not compressed
    train: int = 0  # lines
    test: int = 0
    train_bytes: int = 0
    test_bytes: int = 0
    rejected: int = 0


class Preparation:
    """The making of one folder."""

    def __init__(
        self, source: Path, output: Path, samples: int, eval_rows: int, max_rejected: float
    ) -> None:
        """Read how far an earlier one came.

        Arguments:
            source: Criteo's file, .gz or plain.
            output: the folder.
            samples: lines for training; 0 for all.
            eval_rows: held-out lines at most.
            max_rejected: share of malformed lines that may be left out, beside the first ones.

        Raises ValueError for a folder that was begun with another file or other options.
        """
        self.source, self.output = source, output
        self._samples, self._eval_rows, self._share = samples, eval_rows, max_rejected
        status = source.stat()
        self._of: dict[str, Any] = {
            "source": source.name,
            "source_bytes": status.st_size,
            "samples": samples,
            "eval_rows": eval_rows,
        }
        self._size = status.st_size
        self.done = (output / DONE).exists()
        self.progress = Progress()
        for name in (DONE, PROGRESS):
            if (output / name).exists():
                found = json.loads((output / name).read_text())
                self._require_same(found, name)
                self.progress = Progress(**found["progress"])
                break

    def _require_same(self, found: dict[str, Any], name: str) -> None:
        for key, value in self._of.items():
            if found.get(key) != value:
                raise ValueError(
                    f"--output {self.output}: expected {key} {found.get(key)!r} as in {name}, got "
                    f"{value!r}; name another folder, or remove this one."
                )

    def run(self) -> None:
        """Read the file, from where an earlier one stopped, until enough lines are found.

        The folder is there, and `locked`. Raises ValueError for a file of another format or lines
        that another program has changed meanwhile, TooManyRejectedError.
        """
        now, rejects = self.progress, Rejects(criteo.FIRST_REJECTS)
        lines = criteo.Lines(self.source, now.line, now.offset)
        before = now.rejected
        with (
            self._opened(TRAIN, now.train_bytes) as train,
            self._opened(TEST, now.test_bytes) as test,
        ):
            for number, line in lines:
                now.line = number + 1
                self._keep(number, line, train, test, rejects)
                now.offset, now.rejected = lines.offset, before + len(rejects)
                rejects.allowed = criteo.FIRST_REJECTS + int(self._share * now.line) - before
                if now.line % EVERY == 0:
                    self._save(train, test)
                    _say(self._state(lines.position))
                if self._enough():
                    break
            self._save(train, test)
        _say(self._state(lines.position))
        self._check()
        for name in (TRAIN, TEST):
            (self.output / f"{name}.partial").replace(self.output / name)
        (self.output / PROGRESS).replace(self.output / DONE)

    def _opened(self, name: str, size: int) -> IO[bytes]:
        """A file to append to, cut to what counts of it."""
        path = self.output / f"{name}.partial"
        if not path.exists() and (self.output / name).exists():  # stopped at the very end
            (self.output / name).replace(path)
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(
                f"{path}: expected {size} bytes or more, as {PROGRESS} has it, got "
                f"{path.stat().st_size}; remove the folder."
            )
        os.truncate(path, size)
        return path.open("ab")

    def _keep(
        self, number: int, line: bytes, train: IO[bytes], test: IO[bytes], rejects: Rejects
    ) -> None:
        now, held_out = self.progress, number % criteo.HELD_OUT_EVERY == 0
        if (reason := criteo.complaint(line)) is not None:
            if number == 0:
                raise ValueError(
                    f"{self.source}:1: {reason}; expected Criteo's train.txt, of which each line "
                    "has a label, 13 numbers and 26 categories (its test.txt has no labels)."
                )
            rejects.add(f"{self.source}:{number + 1}", reason)
        elif held_out and now.test < self._eval_rows:
            now.test, now.test_bytes = now.test + 1, now.test_bytes + test.write(line + b"\n")
        elif not held_out and not (self._samples and now.train == self._samples):
            now.train, now.train_bytes = now.train + 1, now.train_bytes + train.write(line + b"\n")

    def _enough(self) -> bool:
        now = self.progress
        return 0 < self._samples == now.train and now.test == self._eval_rows

    def _save(self, *files: IO[bytes]) -> None:
        """Note how far it is, once all before has reached the disk."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        partial = self.output / f"{PROGRESS}.partial"
        partial.write_text(json.dumps({**self._of, "progress": asdict(self.progress)}))
        partial.replace(self.output / PROGRESS)

    def _check(self) -> None:
        now = self.progress
        if now.train < max(self._samples, 1) or now.test == 0:
            raise ValueError(
                f"{self.source}: expected {self._samples or 'some'} lines for training and some "
                f"held-out ones, got {now.train} and {now.test}; fetch the whole file, or lower "
                "--samples."
            )
        for name, size in ((TRAIN, now.train_bytes), (TEST, now.test_bytes)):
            path = self.output / f"{name}.partial"
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path}: expected the {size} bytes that were written, got "
                    f"{path.stat().st_size}; another program has changed it: see that none does, "
                    "and remove the folder."
                )

    def _state(self, position: int) -> str:
        now = self.progress
        return (
            f"{now.line:,} lines read, {position / max(self._size, 1):.0%} of the file: "
            f"{now.train:,} for training, {now.test:,} held out, {now.rejected:,} malformed"
        )


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} prepare_criteo: {text}", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    _say(f"stopped by signal {number}; started again, it goes on")
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after an error of one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="Criteo's train.txt, or train.txt.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder for what train.py reads")
    parser.add_argument("--preset", choices=list(PRESETS), default="paper")
    parser.add_argument("--samples", type=int, help="lines for training; 0 for all")
    parser.add_argument("--eval-rows", type=int, help="held-out lines at most")
    parser.add_argument(
        "--max-rejected", type=float, default=0.001, help="share of malformed lines (0.001)"
    )
    options = parser.parse_args(arguments)
    samples, eval_rows = PRESETS[options.preset]
    samples = samples if options.samples is None else options.samples
    eval_rows = eval_rows if options.eval_rows is None else options.eval_rows
    if samples < 0 or eval_rows < 1:
        parser.error(
            f"--samples, --eval-rows: expected 0 or more, and 1 or more, got {samples}, {eval_rows}"
        )
    try:
        if options.source.is_dir() or not options.source.exists():
            raise ValueError(f"{options.source}: expected a file of Criteo's, got none there.")
        with locked(options.output):
            made = Preparation(
                options.source, options.output, samples, eval_rows, options.max_rejected
            )
            if made.done:
                _say(f"{options.output} is ready: {made.progress.train:,} lines for training")
                return 0
            if made.progress.line:
                _say(f"goes on after line {made.progress.line:,}")
            made.run()
    except (ValueError, OSError) as error:
        print(f"prepare_criteo: error: {error}", file=sys.stderr)
        return 2
    _say(f"{options.output} is ready; train.py --preset criteo --data {options.output}")
    return 0


if __name__ == "__main__":
    # A container's first process ignores the signals that it has no handler for.
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
