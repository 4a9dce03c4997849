"""Elias gamma codes that travel: against codes written out by hand, and against hostile bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_pipeline
from hypothesis import example, given
from hypothesis import strategies as st
from reference import Array, pack_lanes
from test_baselines import BaselineJob, gradients

from gq_horovod.research import baselines, elias
from gq_horovod.research.baselines import GATHER, GATHER_ELIAS, QSGDConfig
from gq_horovod.research.code_length import qsgd_code_length, standard_codes
from gq_horovod.research.elias import DamagedMessageError
from gq_horovod.research.simulation import combine
from mpi_ops import lanes
from mpi_ops.kernels import host

widths = st.sampled_from(list(lanes.STANDARD_BITS))
counts = st.sampled_from([0, 1, 31, 32, 33, 64, 97, 300]) | st.integers(0, 400)


def written_out(codes: Array) -> str:
    """The stream of codes, as text: gamma codes by their definition, and signs."""
    text = ""
    for code in codes.tolist():
        number = bin(abs(code) + 1)[2:]
        text += "0" * (len(number) - 1) + number
        text += {0: "", 1: "0", -1: "1"}[(code > 0) - (code < 0)]
    return text


def stream_of(text: str) -> Array:
    """Bits as the words of a stream, filled up with zeros."""
    padded = text + "0" * (-len(text) % 64)
    return np.frombuffer(
        bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8)), np.int64
    )


def draw_codes(random: np.random.Generator, count: int, bits: int) -> Array:
    """Codes of a width, small ones and the largest."""
    top = 2 ** (bits - 1) - 1
    small = np.rint(random.standard_normal(count) * 2.0 ** random.integers(-3, bits))
    return np.clip(small, -top, top).astype(np.int64)


def encode(codes: Array, bits: int) -> Array:
    out = np.empty(host.elias_words(len(codes), bits), np.int64)
    size = host.encode_elias(pack_lanes(codes, bits), len(codes), bits=bits, out=out)
    return out[:size].copy()


def decode(stream: Array, count: int, bits: int) -> Array | None:
    """The payload, or None; in memory that has the size that it needs and no more."""
    out = np.empty(lanes.standard_words(count, bits), np.int32)
    return out if host.decode_elias(stream, count, bits=bits, out=out) else None


@pytest.fixture(params=host.INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = host.INSTRUCTION_SETS
    if names.index(request.param) > names.index(host.best_instruction_set()):
        pytest.skip("this CPU does not have it")
    monkeypatch.setattr(host, "_instruction_set", request.param)


def test_streams_are_those_of_the_definition() -> None:
    @given(st.integers(0, 2**32), counts, widths)
    @example(0, 300, 2)
    def check(seed: int, count: int, bits: int) -> None:
        codes = draw_codes(np.random.default_rng(seed), count, bits)
        stream = encode(codes, bits)
        np.testing.assert_array_equal(stream, stream_of(written_out(codes)))
        np.testing.assert_array_equal(decode(stream, count, bits), pack_lanes(codes, bits))

    check()


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_the_longest_codes_fit(bits: int) -> None:
    """The largest code takes 2 * bits bits; so does the one below it that no quantizer makes."""
    top = 2 ** (bits - 1)
    for code in (top - 1, 1 - top):
        codes = np.full(333, code)
        assert encode(codes, bits).size == host.elias_words(333, bits) == -(-333 * bits // 32)
        np.testing.assert_array_equal(
            decode(encode(codes, bits), 333, bits), pack_lanes(codes, bits)
        )
    below = np.full(32, -top)
    assert encode(below, bits).size == host.elias_words(32, bits)
    assert decode(encode(below, bits), 32, bits) is None


def test_whatever_is_not_such_a_stream_is_refused() -> None:
    @given(st.data(), st.integers(0, 2**32), counts.filter(bool), widths)
    def check(data: st.DataObject, seed: int, count: int, bits: int) -> None:
        random = np.random.default_rng(seed)
        codes = draw_codes(random, count, bits)
        stream = encode(codes, bits)
        assert decode(stream[:-1], count, bits) is None, "truncated"
        assert decode(np.append(stream, 0), count, bits) is None, "longer"
        assert decode(stream, count + 64, bits) is None, "of more codes"
        # Any words: refused, or the stream of the codes that they decode to.
        hostile = stream.copy()
        kind = data.draw(st.sampled_from(["bits", "words", "zeros"]))
        if kind == "bits":
            place = data.draw(st.integers(0, hostile.size - 1))
            hostile[place] ^= np.int64(1) << np.int64(data.draw(st.integers(0, 62)))
        else:
            high = 1 if kind == "zeros" else 2**63 - 1
            hostile = random.integers(0, high, hostile.size, dtype=np.int64)
        payload = decode(hostile, count, bits)
        if payload is not None:
            again = np.empty(host.elias_words(count, bits), np.int64)
            size = host.encode_elias(payload, count, bits=bits, out=again)
            np.testing.assert_array_equal(again[:size], hostile)

    check()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 17}, "bits must be between 2 and 16, got 17"),
        ({"count": -1}, "count must be 0 or more, got -1"),
        ({"payload": np.zeros(31, np.int32)}, "payload must be 32 words or more, got 31"),
        ({"payload": np.zeros(32, np.int64)}, "payload must be of int32, got int64"),
        ({"payload": np.zeros(64, np.int32)[::2]}, "payload must be C-contiguous"),
    ],
)
def test_arguments_that_cannot_work(change: dict[str, Any], text: str) -> None:
    sound = {"payload": np.zeros(32, np.int32), "count": 30, "bits": 8, **change}
    payload, count, bits = sound["payload"], sound["count"], sound["bits"]
    words = np.zeros(99, np.int64)
    with pytest.raises(ValueError, match=f"^encode_elias: {text}"):
        host.encode_elias(payload, count, bits=bits, out=words)
    with pytest.raises(ValueError, match=f"^decode_elias: {text}"):
        host.decode_elias(words, count, bits=bits, out=payload)


def test_room_and_streams_that_cannot_work() -> None:
    payload = np.zeros(32, np.int32)
    for out, text in (
        (np.zeros(7, np.int64), "out must be 8 words or more, got 7"),
        (np.zeros(8, np.int32), "out must be of int64, got int32"),
        (np.zeros(16, np.int64)[::2], "out must be C-contiguous"),
    ):
        with pytest.raises(ValueError, match=f"^encode_elias: {text}"):
            host.encode_elias(payload, 32, bits=8, out=out)
    for stream, text in ((np.zeros(8, np.int32), "of int64"), (np.zeros(16, np.int64)[::2], "C-c")):
        with pytest.raises(ValueError, match=f"^decode_elias: stream must be {text}"):
            host.decode_elias(stream, 32, bits=8, out=payload)


# ----------------------------------------------------------------------------------------- messages

CONFIGS = [
    {"bits": 8},
    {"bits": 8, "norm": "l2"},
    {"bits": 4, "block_size": 96},
    {"bits": 4, "norm": "l2", "block_size": None},
    {"bits": 2, "block_size": 32},
    {"bits": 16},
]


def job_of(world_size: int, **options: Any) -> BaselineJob:
    config = QSGDConfig(**options)
    job = BaselineJob(world_size, "QSGD")
    job.plan = config.plan(world_size)
    job.method = GATHER_ELIAS if config.coding == "elias" else GATHER
    return job


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_are_those_of_fixed_width(
    options: dict[str, Any], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with one piece of a chunk and with several; with norms of zero, NaN and Inf."""
    monkeypatch.setattr(baselines, "_PIECE_ELEMENTS", 1500)
    for count, dtype in ((1, "float32"), (33, "float16"), (4097, "bfloat16"), (5000, "float64")):
        xs = gradients(world_size, count, dtype)
        for x in xs:
            x[: count // 3] *= 0
        if count == 5000:
            xs[0][4000], xs[-1][4900] = np.inf, np.nan
        fixed, own = (
            job_of(world_size, coding=coding, **options).mean(xs) for coding in ("fixed", "elias")
        )
        assert own.tobytes() == fixed.tobytes()


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_messages_are_as_long_as_code_length_says(options: dict[str, Any], sparse: bool) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(2**17).astype(np.float32)
    if sparse:
        x *= random.random(x.size) < 0.1
    config = QSGDConfig(coding="elias", **options)
    job = job_of(1, coding="elias", **options)
    sent = []
    submit = job.network.submit

    def record(rank: int, kind: str, array: Array, name: str) -> Any:
        sent.append((kind, 8 * array.nbytes))
        return submit(rank, kind, array, name)

    job.network.submit = record  # type: ignore[method-assign]
    job.mean([x])
    ((kind, bits),) = sent
    assert kind == "allgather"
    length = qsgd_code_length(x, config).elias_gamma * x.size
    assert abs(bits - length) < 0.01 * length
    # A check that could not fail would pass with the length of another code too.
    assert abs(bits - qsgd_code_length(x, config).fixed * x.size) > 0.01 * length
    assert np.abs(standard_codes(x, config.plan(1))).max() > 0


def messages(bits: int = 8) -> tuple[list[Array], list[int]]:
    """Messages of three ranks with two pieces each, and the counts of the pieces."""
    random = np.random.default_rng(1)
    sizes = [96, 50]
    made = []
    for _ in range(3):
        pieces = [(pack_lanes(draw_codes(random, n, bits), bits), n) for n in sizes]
        made.append(elias.pack(np.arange(5, dtype=np.int32), pieces, bits))
    return made, sizes


def read(gathered: Array, sizes: list[int], bits: int = 8) -> None:
    for message in elias.split(gathered, 3, 5, len(sizes), "w"):
        assert message.norms.tolist() == [0, 1, 2, 3, 4]
        for piece, count in enumerate(sizes):
            message.decode(piece, count, bits, np.empty(lanes.standard_words(count, bits), "i4"))


DAMAGE = {
    "truncated": lambda one, two, three: [one, two, three[:-1]],
    "without the last": lambda one, two, three: [one, two],
    "nothing": lambda one, two, three: [one[:0]],
    "more behind": lambda one, two, three: [one, two, three, one[:1]],
    "a length that is negative": lambda one, two, three: [one, _with(two, 0, -1), three],
    "a length of zero": lambda one, two, three: [one, _with(two, 0, 0), three],
    "a length beyond all": lambda one, two, three: [one, _with(two, 0, 2**62), three],
    "one word": lambda one, two, three: [_with(one[:1], 0, 1), two, three],
    "a stream beyond its message": lambda one, two, three: [one, _with(two, 1, 2**40), three],
    "a stream of negative length": lambda one, two, three: [one, two, _with(three, 2, -3)],
    "streams that are shorter": lambda one, two, three: [one, two, _with(three, 2, three[2] - 1)],
    "streams cut elsewhere": lambda one, two, three: [
        one,
        two,
        _with(_with(three, 1, three[1] - 1), 2, three[2] + 1),
    ],
    "other codes": lambda one, two, three: [one, two, _with(three, -2, 0)],
}


def _with(message: Array, place: int, value: int) -> Array:
    changed = message.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_messages_are_an_error(damage: str) -> None:
    made, sizes = messages()
    read(np.concatenate(made), sizes)
    with pytest.raises(DamagedMessageError, match=r"^QSGD: the message (of rank \d )?about 'w' mu"):
        read(np.concatenate(DAMAGE[damage](*made)), sizes)


def test_any_words_are_an_error_or_messages() -> None:
    """Nothing else is raised, whatever words have been gathered."""
    made, sizes = messages()
    whole = np.concatenate(made)
    random = np.random.default_rng(2)
    refused = 0
    for _ in range(2000):
        hostile = whole.copy()
        for place in random.integers(0, whole.size, random.integers(1, 4)):
            hostile[place] = random.choice([0, 1, 2, -1, 2**62, random.integers(-(2**63), 2**63)])
        try:
            for message in elias.split(hostile, 3, 5, len(sizes), "w"):
                for piece, count in enumerate(sizes):
                    out = np.empty(lanes.standard_words(count, 8), "i4")
                    message.decode(piece, count, 8, out)
        except DamagedMessageError:
            refused += 1
    assert refused > 1500


def test_every_rank_raises_for_a_message_that_was_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncate(kind: str, arrays: list[Array]) -> list[Array]:
        return combine(kind, [arrays[0], arrays[1][:-1], arrays[2]])

    monkeypatch.setattr(test_pipeline, "combine", truncate)
    job = job_of(3, coding="elias")
    started = [job.submit(rank, x) for rank, x in enumerate(gradients(3, 1000))]
    job.poll_until(lambda: all(own.done for own in started))
    for own, reduction in zip(job.pipelines, started, strict=True):
        with pytest.raises(DamagedMessageError, match=r"^QSGD: the message of rank"):
            own.finish(reduction)
        assert not own.busy
