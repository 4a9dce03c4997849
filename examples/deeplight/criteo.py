"""Reader of Criteo's click logs (Display Advertising Challenge, Terabyte): tab-separated files.

A line is a label (0 or 1), thirteen whole numbers (counts, some negative) and 26 categories (up to
eight hexadecimal digits), each of which may be missing. Files ending in .gz are read as they are.

A sample becomes 13 numbers and 26 rows of its fields' tables, to which the categories are hashed.
Nothing is read ahead and nothing is kept but a window of batches, so files may be of any length. A
line that is none of these is left out, named in a warning with file and line, and counted; too many
of them are an error.

`synthetic` makes samples of the same form without a file. It knows no Horovod.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from common.rejects import Rejects

NUMBERS, CATEGORIES = 13, 26
NUM_FIELDS = NUMBERS + CATEGORIES

# Rows of the fields' tables in the runs of arXiv 2305.18627 (the authors' repository
# sands-lab/global-qsgd, commit 13d702f).
ROWS = (
    *(1,) * NUMBERS,
    *(15_040_574, 35_017, 17_195, 7_374, 20_127, 4, 7_111, 1_397, 63, 10_260_959, 939_647),
    *(285_463, 11, 2_210, 10_874, 117, 5, 971, 15, 15_604_226, 4_668_632, 13_476_290, 357_276),
    *(12_277, 100, 35),
)

# One line in ten is held out where there is no file of held-out lines: Criteo's own test files have
# no labels.
HELD_OUT_EVERY = 10

# Lines that a rank may leave out beside their share: one bad line among ten is no tenth of a file.
FIRST_REJECTS = 100

# Bytes of a line. Forty fields as above have 500 at most; what is longer is wrong, and a file
# without line ends must not be read into memory.
LONGEST = 4096

# (N, NUM_FIELDS) int64, numbers and rows; (N,) float32 labels
Samples = tuple[np.ndarray, np.ndarray]

_LINE = re.compile(
    rb"([01])((?:\t(?:-?[0-9]{1,18})?){%d})((?:\t[0-9a-fA-F]{0,8}){%d})" % (NUMBERS, CATEGORIES)
)
_NUMBER = re.compile(rb"(?:-?[0-9]{1,18})?")
_CATEGORY = re.compile(rb"[0-9a-fA-F]{0,8}")

# Values of a field are below 2**40, so fields and values do not mix before they are hashed.
_FIELD_BITS = 40
_MISSING = 2**36  # is no category


def complaint(line: bytes) -> str | None:
    """What is wrong with a line (without its end); None for a good one."""
    fields = line.split(b"\t")
    if len(fields) != 1 + NUM_FIELDS:
        return f"expected {1 + NUM_FIELDS} fields separated by tabs, got {len(fields)}"
    if fields[0] not in (b"0", b"1"):
        return f"expected a label 0 or 1, got {_quoted(fields[0])}"
    for number, field in enumerate(fields[1:]):
        if number < NUMBERS and not _NUMBER.fullmatch(field):
            return f"field I{number + 1}: expected a whole number or nothing, got {_quoted(field)}"
        if number >= NUMBERS and not _CATEGORY.fullmatch(field):
            name = f"C{number - NUMBERS + 1}"
            return f"field {name}: expected up to 8 hexadecimal digits, got {_quoted(field)}"
    return None


def _quoted(field: bytes) -> str:
    return repr(field[:20].decode(errors="backslashreplace")) + ("..." if len(field) > 20 else "")


def values(line: bytes) -> tuple[int, list[int]] | None:
    """The label and the values of all fields of a line; None for a line with a complaint()."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    label, numbers, categories = match.groups()
    found = [int(text) if text else 0 for text in numbers.split(b"\t")[1:]]
    found += [int(text, 16) if text else _MISSING for text in categories.split(b"\t")[1:]]
    return int(label), found


def shrunk(factor: int) -> tuple[int, ...]:
    """The sizes of ROWS divided by a factor, 2 or more where there was more than one row."""
    return tuple(own if own == 1 else max(own // factor, 2) for own in ROWS)


def hashed(found: list[list[int]], rows: Sequence[int]) -> np.ndarray:
    """Samples (N, NUM_FIELDS) int64: numbers as they are, categories as rows of their tables.

    The hash is pandas' for integers, the same in every process. It is of value and field, so that
    fields of equal size do not put the same values together.
    """
    samples = np.array(found, dtype=np.int64).reshape(-1, NUM_FIELDS)
    keys = samples[:, NUMBERS:].astype(np.uint64)
    keys += np.arange(NUMBERS, NUM_FIELDS, dtype=np.uint64) << np.uint64(_FIELD_BITS)
    codes = pd.util.hash_array(keys.ravel()).reshape(keys.shape)
    samples[:, NUMBERS:] = codes % np.array(rows[NUMBERS:], dtype=np.uint64)
    return samples


def synthetic(count: int, rows: Sequence[int], seed: Sequence[int]) -> Samples:
    """Samples of Criteo's form, made from a seed.

    Categories follow Zipf's law, as clicks do roughly: the k-th of a field is 1/k as frequent as
    the first, so most rows of a large table are never touched. Numbers are log-normal. The label
    depends on all fields a little, so that there is something to learn.
    """
    random = np.random.default_rng(seed)
    samples = np.empty((count, NUM_FIELDS), dtype=np.int64)
    samples[:, :NUMBERS] = np.exp(random.normal(1.5, 1.5, (count, NUMBERS)))
    sizes = np.array(rows[NUMBERS:], dtype=np.float64)
    share = random.random((count, CATEGORIES))
    samples[:, NUMBERS:] = np.minimum((sizes + 1) ** share - 1, sizes - 1)
    logit = 0.2 * (np.log1p(samples[:, :NUMBERS]) - 1.5).sum(axis=1) - 1
    keys = samples[:, NUMBERS:].astype(np.uint64) + np.arange(CATEGORIES, dtype=np.uint64) * 2**40
    weights = pd.util.hash_array(keys.ravel()).reshape(keys.shape) / 2**64 - 0.5
    logit += weights.sum(axis=1)
    return samples, (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)


class Lines:
    """The lines of a file, plain or .gz: numbers from 0 on, and lines without their ends.

    A line that is too long is cut. `position` is how far the file itself has been read.
    """

    def __init__(self, path: Path, number: int = 0, offset: int = 0) -> None:
        """Open nothing yet.

        Arguments:
            path: the file.
            number: of the first line that is wanted.
            offset: where that line begins in a file that is not compressed; not used for others.
        """
        self._path, self._first = path, number
        self.offset = 0 if path.suffix == ".gz" else offset  # behind the last line
        self.position = 0  # bytes of the file

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Raises ValueError for compressed data that ends early."""
        compressed = self._path.suffix == ".gz"
        with self._path.open("rb") as raw:
            raw.seek(self.offset)
            file: IO[bytes] = gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[assignment]
            number = 0 if compressed else self._first
            try:
                while line := file.readline(LONGEST):
                    rest, self.offset = line, self.offset + len(line)
                    while len(rest) == LONGEST and not rest.endswith(b"\n"):
                        rest = file.readline(LONGEST)
                        self.offset += len(rest)
                    self.position = raw.tell() if compressed else self.offset
                    if number >= self._first:
                        yield number, line.rstrip(b"\r\n")
                    number += 1
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{self._path}:{number + 1}: expected complete gzip data, got {error}; fetch "
                    "the file again."
                ) from error


class Reader:
    """One rank's lines of a file.

    Which lines a rank reads is decided before it looks at them: with n ranks and batches of B, the
    lines of a part are taken B * n at a time, and each n-th is a rank's. So all ranks have as many
    batches, whatever they have to leave out of them.
    """

    def __init__(
        self, path: Path, rows: Sequence[int], rank: int, size: int, max_rejected: float
    ) -> None:
        """Open nothing yet.

        Arguments:
            path: the file.
            rows: of the fields' tables.
            rank, size: which of how many ranks reads.
            max_rejected: share of this rank's lines that may be left out, beside the first
                FIRST_REJECTS.
        """
        self._path, self._rows, self._rank, self._size = path, rows, rank, size
        self._share = max_rejected
        self._read = 0  # lines of this rank, the largest number in one pass
        self.rejects = Rejects(FIRST_REJECTS)

    def samples(self, keep: Callable[[int], bool], limit: int) -> Samples:
        """This rank's share of the first `limit` lines that `keep` says yes to.

        Raises ValueError for compressed data that ends early, TooManyRejectedError.
        """
        lines = islice((each for each in Lines(self._path) if keep(each[0])), limit)
        own = [each for place, each in enumerate(lines) if self._mine(place)]
        return self._parsed(own)

    def batches(
        self,
        keep: Callable[[int], bool],
        batch: int,
        window: int,
        skip: int = 0,
        seed: Sequence[int] = (0,),
    ) -> Iterator[Samples]:
        """This rank's batches of the lines that `keep` says yes to, but for the first `skip`.

        Arguments:
            keep: whether the line of a number, from 0 on, belongs to this part of the file.
            batch: lines of a batch of this rank; a batch has fewer samples if some are left out.
            window: batches whose samples are shuffled together.
            skip: batches that are not wanted. What lies before their window is not parsed.
            seed: numbers of 0 or more, of the shuffling.

        Lines at the end that fill no batch of all ranks are left over. Raises ValueError for
        compressed data that ends early and for a window with fewer samples than batches,
        TooManyRejectedError.
        """
        lines = (each for each in Lines(self._path) if keep(each[0]))
        group = batch * self._size
        for first in count(0, window):
            wanted = first + window > skip
            own, taken = [], 0
            for each in islice(lines, window * group):
                if wanted and self._mine(taken):
                    own.append(each)
                taken += 1
            whole = taken // group
            if wanted and whole:
                parts = self._shuffled(own[: whole * batch], whole, (*seed, first, self._rank))
                yield from parts[max(skip - first, 0) :]
            if whole < window:
                return

    def _mine(self, place: int) -> bool:
        return place % self._size == self._rank

    def _parsed(self, lines: list[tuple[int, bytes]]) -> Samples:
        labels, found = [], []
        self._read = max(self._read, lines[-1][0] // self._size if lines else 0)
        self.rejects.allowed = FIRST_REJECTS + int(self._share * self._read)
        for number, line in lines:
            sample = values(line)
            if sample is None:
                reason = complaint(line)
                assert reason is not None, line
                self.rejects.add(f"{self._path}:{number + 1}", reason)
                continue
            labels.append(sample[0])
            found.append(sample[1])
        return hashed(found, self._rows), np.array(labels, dtype=np.float32)

    def _shuffled(
        self, lines: list[tuple[int, bytes]], parts: int, seed: Sequence[int]
    ) -> list[Samples]:
        """The samples of some lines in a random order, in parts of equal size or one apart."""
        fields, labels = self._parsed(lines)
        if len(labels) < parts:
            raise ValueError(
                f"{self._path}:{lines[0][0] + 1}: expected a sample at least for each of {parts} "
                f"batches up to line {lines[-1][0] + 1}, got {len(labels)}; repair these lines."
            )
        order = np.random.default_rng(seed).permutation(len(labels))
        return [(fields[rows], labels[rows]) for rows in np.array_split(order, parts)]
