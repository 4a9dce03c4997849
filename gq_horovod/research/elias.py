"""Messages of QSGD in Elias gamma codes: what a rank sends of a chunk, and what it reads.

A message is little-endian words of 64 bits:

1. the number of words of the message, this one among them,
2. the number of words of each stream,
3. the norms, two to a word, filled up with a zero,
4. the streams, one for each piece of the chunk (`mpi_ops/kernels/elias.h` has their format).

Messages differ in length, so their length is the first thing in them. A message that does not fit
together raises DamagedMessageError; nothing outside it is read, whatever it has. All ranks gather
the same bytes, so all of them raise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ops.codec import Norms, Payload
from mpi_ops.kernels import host

__all__ = ["DamagedMessageError", "Message", "pack", "split"]

Words = NDArray[np.int64]


class DamagedMessageError(RuntimeError):
    """A message is not one that `pack` has made."""


def pack(norms: Norms, pieces: Sequence[tuple[Payload, int]], bits: int) -> Words:
    """The message of a chunk.

    Arguments:
        norms: int32, of its blocks.
        pieces: the payload of each piece, or more, and the number of its codes.
        bits: of a code, 2 to 16.
    """
    lengths = 1
    first = lengths + len(pieces)
    end = first + _norm_words(norms.size)
    room = end + sum(host.elias_words(count, bits) for _, count in pieces)
    message = np.empty(room, dtype=np.int64)
    message[first:end] = 0
    message[first:end].view(np.int32)[: norms.size] = norms
    for place, (payload, count) in enumerate(pieces):
        size = host.encode_elias(payload, count, bits=bits, out=message[end:])
        message[lengths + place] = size
        end += size
    message[0] = end
    return message[:end]


class Message(NamedTuple):
    """What one rank sent of a chunk."""

    norms: Norms
    streams: list[Words]
    sender: str  # what errors say

    def decode(self, piece: int, count: int, bits: int, out: Payload) -> None:
        """Write the payload of a piece of `count` codes to `out`, which may be longer."""
        if not host.decode_elias(self.streams[piece], count, bits=bits, out=out):
            raise _damaged(self.sender, f"{count} codes of {bits} bits in stream {piece}", "others")


def split(
    gathered: NDArray[Any], ranks: int, norms: int, pieces: int, tensor: str
) -> list[Message]:
    """The messages of so many ranks, one after the other, each of so many norms and pieces.

    `tensor` is what errors name.
    """
    messages = []
    rest: Words = gathered
    for rank in range(ranks):
        sender = f"of rank {rank} about {tensor!r}"
        size = _length(rest, 0, rest.size, sender, "words")
        own, rest = rest[:size], rest[size:]
        first = 1 + pieces
        begin = first + _norm_words(norms)
        if size < begin:
            raise _damaged(sender, f"{begin} words or more", size)
        streams = []
        for piece in range(pieces):
            length = _length(own, 1 + piece, size - begin, sender, f"words in stream {piece}")
            streams.append(own[begin : begin + length])
            begin += length
        if begin != size:
            raise _damaged(sender, f"{begin} words, as its streams have", size)
        messages.append(Message(own[first:].view(np.int32)[:norms], streams, sender))
    if rest.size:
        raise _damaged(f"about {tensor!r}", "no words behind those of the last rank", rest.size)
    return messages


def _length(words: Words, place: int, most: int, sender: str, of: str) -> int:
    """A number of words that is in a message, 0 to `most`."""
    if place >= words.size:
        raise _damaged(sender, f"a number of {of}", "nothing")
    length = int(words[place])
    if not 0 <= length <= most:
        raise _damaged(sender, f"0 to {most} {of}", length)
    return length


def _norm_words(norms: int) -> int:
    return -(-norms // 2)


def _damaged(what: str, expected: str, got: object) -> DamagedMessageError:
    return DamagedMessageError(
        f"QSGD: the message {what} must have {expected}, got {got}; bytes were changed on their "
        "way, or another operation has its name. Compare with coding='fixed'."
    )
