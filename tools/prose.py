#!/usr/bin/env python3
"""List sentences of documents that are too long to be read once, and lines that are too wide.

    .venv/bin/python tools/prose.py             # counts for each document
    .venv/bin/python tools/prose.py FILE ...    # the sentences and lines themselves
    .venv/bin/python tools/prose.py --wrap FILE ...     # paragraphs with wide lines are wrapped

Sentences have at most 30 words, lines of prose at most 100 characters (CONTRIBUTING.md). Code,
formulas (which are indented as code is), tables and headings are left out. Exit status 1 where
something was found.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_WORDS = 30
MOST_CHARACTERS = 100
# All documents; a test keeps them so. Those of examples/ are not among them.
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))

_FENCE = re.compile(r"^\s*(```|~~~)")
_NO_PROSE = ("|", "#", ":::", "<!--")  # tables, headings, what others put in
_ITEM = re.compile(r"^(\s*)(?:[-*+]|\d+\.)\s+")
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^()\s]+\)")
# An end of a sentence, not that of "e.g." or "1.5", and not inside of a name such as file.py.
_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!et al\.)[)*_\"]*\s+(?=[\"(*_`\[]*[A-Z0-9])")


class Found(NamedTuple):
    """Something too long."""

    line: int
    what: str
    text: str


def paragraphs(text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of prose that belong together, with the number of the first; no code, no table."""
    begin, lines = 0, list[str]()
    fenced = in_item = False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence, item = _FENCE.match(line), _ITEM.match(line)
        other = fence or fenced or not line.strip() or line.lstrip().startswith(_NO_PROSE)
        if lines and (other or item):
            yield begin, lines
            lines = []
        if fence:
            fenced = not fenced
        if other:
            in_item = in_item and not line.startswith("#")  # a heading ends a list
            continue
        if not lines:  # the first of a paragraph
            in_item = bool(item) or (in_item and line.startswith(" "))
            if line.startswith("    ") and not in_item:
                continue  # code
            begin = number
        lines.append(line)


def sentences(lines: list[str]) -> Iterator[str]:
    """Those of a paragraph, with links as the words that are read."""
    joined = _LINK.sub(r"\1", " ".join(_ITEM.sub("", line).strip() for line in lines))
    yield from _END.split(joined)


def check(text: str) -> list[Found]:
    """What is too long in a document."""
    found = []
    for begin, lines in paragraphs(text):
        for offset, line in enumerate(lines):
            if len(line) > MOST_CHARACTERS:
                found.append(Found(begin + offset, f"{len(line)} characters", line.strip()))
        for sentence in sentences(lines):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > MOST_WORDS:
                found.append(Found(begin, f"{len(words)} words", sentence))
    return found


def wrapped(text: str) -> str:
    """The document with wide paragraphs wrapped; what it says and how it is shown stay the same."""
    lines = text.splitlines()
    for begin, own in reversed(list(paragraphs(text))):
        if max(map(len, own)) > MOST_CHARACTERS:
            item = _ITEM.match(own[0])
            first = item[0] if item else re.match(" *", own[0])[0]
            words = " ".join(line.strip() for line in [own[0][len(first) :], *own[1:]])
            # A word that would begin a list or a title in front of a line stays where it is.
            glued = re.sub(r" (?=(?:[-+*|>]|#+|\d+[.)])( |$))", "\0", words)
            lines[begin - 1 : begin - 1 + len(own)] = textwrap.wrap(
                glued,
                MOST_CHARACTERS,
                initial_indent=first,
                subsequent_indent=re.match(" *", own[1])[0] if own[1:] else " " * len(first),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines).replace("\0", " ") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all documents, counts alone")
    parser.add_argument("--wrap", action="store_true", help="rewrite the files")
    options = parser.parse_args()
    failed = False
    for path in options.files if options.wrap else ():
        path.write_text(wrapped(path.read_text()))
    for path in options.files or DOCUMENTS:
        found = check(path.read_text())
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        failed = failed or bool(found)
        if options.files:
            for each in found:
                print(f"{name}:{each.line}: {each.what}: {each.text}")
        elif found:
            lines = sum(each.what.endswith("characters") for each in found)
            print(f"{name}: {len(found) - lines} sentences, {lines} lines")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
