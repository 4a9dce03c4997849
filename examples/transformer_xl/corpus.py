"""Text as token ids: WikiText-103's files, or the sources of Python's own standard library.

WikiText-103 (Merity et al., arXiv 1609.07843) comes as wiki.train.tokens, wiki.valid.tokens and
wiki.test.tokens: UTF-8, one paragraph a line, tokens between spaces. Each line, an empty one too,
ends with the token <eos>, as Dai et al. read it. Files are read line by line, and ids are kept in
files of int32 that are mapped into memory, so a text may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common.rejects import Rejects

END, UNKNOWN = "<eos>", "<unk>"
# A file that is no text may have no end of line at all. The longest paragraphs of WikiText-103 have
# some ten thousand characters.
LONGEST_LINE = 2**20  # bytes
# Tokens that are gathered before they are written.
CHUNK = 2**20


def read_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without the end of line) of each line of a UTF-8 file.

    Lines that are no UTF-8, or longer than LONGEST_LINE bytes, go to `rejects`, which raises when
    they are too many.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                rejects.add(f"{path}:{number}", f"longer than {LONGEST_LINE} bytes")
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                rejects.add(f"{path}:{number}", f"no UTF-8: {error.reason} at byte {error.start}")
                continue
            yield number, text.rstrip("\r\n")


class Vocabulary:
    """Token ids by falling frequency, as adaptive embeddings want them."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.ids = {token: number for number, token in enumerate(tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def count(cls, path: Path, rejects: Rejects) -> Vocabulary:
        """The tokens of a text; equally frequent ones in the order of the text."""
        counts: Counter[str] = Counter()
        for _, line in read_lines(path, rejects):
            counts.update(line.split())
            counts[END] += 1
        return cls([token for token, _ in counts.most_common()])

    def write(self, path: Path) -> None:
        """Write one token a line, the most frequent first."""
        with _finished_file(path) as partial:
            partial.write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read what `write` wrote.

        Raises ValueError, with the file and line, for a line that is no UTF-8, is empty, has more
        than one token, or repeats one, and for a file without <eos>. None can be left out, since
        all later ids would change.
        """
        lines: dict[str, int] = {}  # in the order of the file
        rejects = Rejects(1)
        for number, line in read_lines(path, rejects):
            if line.split() != [line]:
                raise ValueError(f"{path}:{number}: expected one token, got {line[:80]!r}")
            if line in lines:
                raise ValueError(f"{path}:{number}: {line!r} is in line {lines[line]} already")
            lines[line] = number
        for where, why in rejects.reasons.items():
            raise ValueError(f"{where}: {why}; a vocabulary needs every line")
        if END not in lines:
            raise ValueError(f"{path}: expected a line {END}; delete the file to count anew")
        return cls(list(lines))


def encode(path: Path, vocabulary: Vocabulary, rejects: Rejects) -> Iterator[np.ndarray]:
    """Yield the ids of a text as int32 arrays of at least CHUNK elements, and one rest.

    A line with a token that the vocabulary lacks is read with <unk> in its place, or rejected where
    the vocabulary lacks that too.
    """
    ids, unknown, end = vocabulary.ids, vocabulary.ids.get(UNKNOWN), vocabulary.ids[END]
    chunk: list[int] = []
    for number, line in read_lines(path, rejects):
        found = [ids.get(token, unknown) for token in line.split()]
        if None in found:
            token = line.split()[found.index(None)]
            reason = f"{token[:80]!r} is not in the vocabulary, nor is {UNKNOWN}"
            rejects.add(f"{path}:{number}", reason)
            continue
        chunk += found  # type: ignore[arg-type]
        chunk.append(end)
        if len(chunk) >= CHUNK:
            yield np.array(chunk, np.int32)
            chunk = []
    yield np.array(chunk, np.int32)


@contextlib.contextmanager
def _finished_file(path: Path) -> Iterator[Path]:
    """The path of a file to write. It takes its name when finished, so none sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Corpus:
    """Two texts as ids in [0, vocabulary)."""

    train: np.ndarray  # (N,) int32 or uint8, perhaps mapped from a file
    validation: np.ndarray  # likewise
    vocabulary: int


def wikitext(folder: Path, cache: Path, rejects: Rejects) -> Corpus:
    """Return WikiText-103, or other text in its format, from `folder`.

    Reads wiki.train.tokens and wiki.valid.tokens. The vocabulary is `folder`/vocabulary.txt if that
    is there, and otherwise counted and kept in `cache`, where the ids are kept as well. Files are
    made anew when what they were made from has another size or time.

    Raises FileNotFoundError where a text is missing, ValueError where one is malformed.
    """
    texts = {part: folder / f"wiki.{part}.tokens" for part in ("train", "valid")}
    for text in texts.values():
        if not text.is_file():
            raise FileNotFoundError(
                f"{text}: expected WikiText-103's token file there; --data names the folder that "
                "the archive was unpacked into"
            )
    given = folder / "vocabulary.txt"
    words = given if given.is_file() else cache / f"vocabulary-{_mark(texts['train'])}.txt"
    if not words.is_file():
        Vocabulary.count(texts["train"], rejects).write(words)
    mark = _mark(words)
    files = {part: cache / f"{part}-{_mark(text)}-{mark}.i32" for part, text in texts.items()}
    vocabulary = functools.cache(lambda: Vocabulary.read(words))
    for part, text in texts.items():
        if not files[part].is_file():
            with _finished_file(files[part]) as partial, partial.open("wb") as output:
                for chunk in encode(text, vocabulary(), rejects):
                    output.write(chunk.tobytes())
        if not files[part].stat().st_size:
            raise ValueError(f"{text}: expected text, and there is none")
    train, validation = (np.memmap(files[part], np.int32, mode="r") for part in ("train", "valid"))
    with words.open("rb") as file:
        size = sum(1 for _ in file)
    return Corpus(train, validation, size)


def _mark(path: Path) -> str:
    """A word that changes when the file, or this module, does."""
    status = path.stat()
    text = f"{path.name} {status.st_size} {status.st_mtime_ns} {Path(__file__).read_text()}"
    return f"{zlib.crc32(text.encode()):08x}"


def python_sources() -> list[bytes]:
    """The modules of Python's own standard library, by name: text that is on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_bytes() for path in sorted(folder.glob("*.py"))]


def synthetic(vocabulary: int, tokens: int, held_out: int, seed: int) -> Corpus:
    """Return a text without any sense, made from a seed.

    Ids follow Zipf's law, as words do roughly: the k-th is 1/k as frequent as the first. Half of
    them are what the one before says, so that there is something to learn.
    """
    random = np.random.default_rng((seed, vocabulary))
    count = tokens + held_out
    zipf = (vocabulary + 1.0) ** random.random(count) - 1
    ids = np.minimum(zipf, vocabulary - 1).astype(np.int64)
    follows = random.random(count) < 0.5
    for _ in range(4):  # chains of more are one in sixteen, and end there
        ids[1:] = np.where(follows[1:], (31 * ids[:-1] + 7) % vocabulary, ids[1:])
    text = ids.astype(np.int32)
    return Corpus(text[:tokens], text[tokens:], vocabulary)


@functools.cache
def source_bytes() -> Corpus:
    """Python's sources byte by byte: every twentieth module is for validation.

    An id is the rank of a byte by how frequent it is.
    """
    modules = python_sources()
    parts = [
        np.frombuffer(b"".join(chosen), np.uint8)
        for chosen in (
            [module for number, module in enumerate(modules) if number % 20],
            modules[::20],
        )
    ]
    order = np.argsort(-np.bincount(parts[0], minlength=256), kind="stable")
    ids = np.empty(256, np.uint8)
    ids[order] = np.arange(256)
    return Corpus(ids[parts[0]], ids[parts[1]], 256)


class Streams:
    """A text cut into equally long streams that are read side by side, in segments.

    Segments of a stream follow on each other, which is what a memory is for. Which streams there
    are does not depend on the number of ranks: each takes some of them.
    """

    def __init__(self, ids: np.ndarray, streams: int, length: int) -> None:
        """Cut `ids` (N,) into `streams`, read in segments of `length` ids.

        Raises ValueError for a text that is too short for one segment.
        """
        self._each = len(ids) // streams
        if self._each < 2:
            raise ValueError(
                f"Streams: {len(ids)} tokens in {streams} streams: expected at least two for each; "
                "choose fewer streams or a longer text"
            )
        self._ids, self.streams, self.length = ids, streams, length

    @property
    def whole_segments(self) -> int:
        """Segments of the full length; the id after each of theirs is the target, in the stream."""
        return (self._each - 1) // self.length

    @property
    def segments(self) -> int:
        """Segments with the shorter last one."""
        return -(-(self._each - 1) // self.length)

    def segment(self, number: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and next ids, (B, T) int64, of a rank's streams rank, rank + ranks, ..."""
        first = number * self.length
        end = min(first + self.length, self._each - 1)
        starts = np.arange(rank, self.streams, ranks) * self._each
        window = self._ids[starts[:, None] + np.arange(first, end + 1)].astype(np.int64)
        return window[:, :-1], window[:, 1:]
