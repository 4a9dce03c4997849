"""The reader of Criteo's files: what it accepts, rejects and counts, and which rank reads what."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("pandas")

import criteo  # noqa: E402
from common.rejects import TooManyRejectedError  # noqa: E402
from model import DeepLight, parameter_count  # noqa: E402

from gq_horovod.advisor.model import WORKLOADS  # noqa: E402

ROWS = (1,) * 13 + tuple(range(1000, 1026))


def line(number: int) -> bytes:
    """A good line, of which no other number has the like."""
    numbers = [b"%d" % (number + i) if (number + i) % 5 else b"" for i in range(criteo.NUMBERS)]
    categories = [b"%08x" % (977 * number + i) for i in range(criteo.CATEGORIES)]
    return b"\t".join([b"01"[number % 2 :][:1], *numbers, *categories])


def write(path: Path, lines: list[bytes]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.writelines(each + b"\n" for each in lines)
    return path


def reader(path: Path, rank: int = 0, size: int = 1, share: float = 0.0) -> criteo.Reader:
    return criteo.Reader(path, ROWS, rank, size, share)


def everything(number: int) -> bool:
    return True


def rows_of(lines: list[bytes]) -> list[bytes]:
    """The samples of lines, in a form that can be counted."""
    found = []
    for each in lines:
        parsed = criteo.values(each)
        assert parsed is not None
        found.append(parsed[1])
    return [bytes(row) for row in criteo.hashed(found, ROWS)]


# ------------------------------------------------------------------------------------------- lines

numbers = st.integers(-(10**17), 10**18 - 1).map(lambda n: b"%d" % n) | st.just(b"")
categories = st.text("0123456789abcdefABCDEF", max_size=8).map(str.encode)
good_lines = st.tuples(
    st.sampled_from([b"0", b"1"]),
    *[numbers] * criteo.NUMBERS,
    *[categories] * criteo.CATEGORIES,
).map(b"\t".join)


@given(good_lines)
def test_good_lines_are_read(text: bytes) -> None:
    assert criteo.complaint(text) is None
    parsed = criteo.values(text)
    assert parsed is not None
    label, found = parsed
    fields = text.split(b"\t")
    assert label == int(fields[0])
    assert len(found) == criteo.NUM_FIELDS
    for text, value in zip(fields[1 + criteo.NUMBERS :], found[criteo.NUMBERS :], strict=True):
        assert value == (int(text, 16) if text else 2**36)


@given(good_lines, st.data())
def test_a_line_is_read_or_complained_about(text: bytes, data: st.DataObject) -> None:
    """One byte more, less or other: what the pattern does not take has a reason, and only that."""
    place = data.draw(st.integers(0, len(text)))
    removed = data.draw(st.integers(0, 1))
    inserted = data.draw(st.binary(max_size=1) | st.sampled_from([b"\t", b"-", b" ", b"_", b"1"]))
    changed = text[:place] + inserted + text[place + removed :]
    assert (criteo.values(changed) is None) == (criteo.complaint(changed) is not None)


@given(st.binary(max_size=300))
@example(b"")
@example(b"0" + b"\t" * criteo.NUM_FIELDS + b"\n")
def test_any_bytes_are_read_or_complained_about(text: bytes) -> None:
    assert (criteo.values(text) is None) == (criteo.complaint(text) is not None)


def replaced(place: int, field: bytes) -> bytes:
    fields = line(1).split(b"\t")
    fields[place] = field
    return b"\t".join(fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "expected 40 fields separated by tabs, got 1"),
        (line(1) + b"\t", "expected 40 fields separated by tabs, got 41"),
        (line(1).replace(b"\t", b" "), "expected 40 fields separated by tabs, got 1"),
        (replaced(0, b"2"), "expected a label 0 or 1, got '2'"),
        (replaced(0, b""), "expected a label 0 or 1, got ''"),
        (replaced(1, b"1.5"), "field I1: expected a whole number or nothing, got '1.5'"),
        (replaced(13, b"-"), "field I13: expected a whole number or nothing, got '-'"),
        (replaced(2, b"9" * 19), "field I2: expected a whole number or nothing, got '9999"),
        (replaced(2, "\u0663".encode()), "field I2: expected a whole number or nothing, got"),
        (replaced(14, b"12g4"), "field C1: expected up to 8 hexadecimal digits, got '12g4'"),
        (replaced(39, b"123456789"), "field C26: expected up to 8 hexadecimal digits"),
        (replaced(39, b"\xff\x00"), "field C26: expected up to 8 hexadecimal digits"),
    ],
)
def test_what_is_wrong_is_said(text: bytes, reason: str) -> None:
    said = criteo.complaint(text)
    assert said is not None
    assert said.startswith(reason)
    assert criteo.values(text) is None


# Of the fields C1, C2 and C26 of line(3).
EXPECTED_ROWS = (14076600, 23417, 23)


def test_rows_are_those_of_every_process() -> None:
    (found,) = (parsed[1] for parsed in [criteo.values(line(3))] if parsed)
    rows = criteo.hashed([found], criteo.ROWS)[0]
    assert list(rows[:3]) == [3, 4, 0]  # numbers as they are; the third is missing
    assert (rows >= 0).all()
    assert (rows[13:] < criteo.ROWS[13:]).all()
    assert tuple(rows[[13, 14, 38]]) == EXPECTED_ROWS
    # The field is hashed too: one value is not one row in all fields of equal size.
    same = criteo.hashed([[5] * criteo.NUM_FIELDS], (1,) * 13 + (2**20,) * 26)[0]
    assert len(set(same[13:])) == criteo.CATEGORIES


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_the_lines_of_a_part(tmp_path: Path, suffix: str, size: int) -> None:
    lines = [line(number) for number in range(107)]
    path = write(tmp_path / f"train.{suffix}", lines)

    def keep(number: int) -> bool:
        return number % 10 != 0

    batch, window = 4, 3
    kept = [each for number, each in enumerate(lines) if keep(number)]
    whole = len(kept) // (batch * size) * batch * size
    seen: list[bytes] = []
    for rank in range(size):
        batches = list(reader(path, rank, size).batches(keep, batch, window))
        assert [len(labels) for _, labels in batches] == [batch] * (whole // (batch * size))
        seen += [bytes(row) for fields, _ in batches for row in fields]
    assert sorted(seen) == sorted(rows_of(kept[:whole]))
    held_out: list[bytes] = []
    for rank in range(size):
        fields, labels = reader(path, rank, size).samples(lambda number: number % 10 == 0, 7)
        assert len(fields) == len(labels)
        held_out += [bytes(row) for row in fields]
    assert sorted(held_out) == sorted(rows_of(lines[:70:10]))


def test_batches_after_a_pause_are_those_of_one_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", [line(number) for number in range(101)])

    def batches(skip: int, seed: int = 7) -> list[tuple[bytes, bytes]]:
        found = reader(path, 1, 2).batches(everything, 5, 4, skip, (seed, 0))
        return [(bytes(fields), bytes(labels)) for fields, labels in found]

    through = batches(0)
    assert len(through) == 10
    for skip in range(12):
        assert batches(skip) == through[skip:]
    assert batches(0, seed=8) != through
    # Shuffled within a window, with the labels.
    rows = rows_of([line(number) for number in range(1, 40, 2)])
    first = [bytes(row) for f, _ in reader(path, 1, 2).batches(everything, 5, 4) for row in f][:20]
    assert first != rows
    assert sorted(first) == sorted(rows)
    for fields, labels in reader(path).batches(everything, 5, 4):
        for row, label in zip(fields, labels, strict=True):
            number = rows_of([line(n) for n in range(101)]).index(bytes(row))
            assert label == number % 2


def test_malformed_lines_are_named_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [line(number) for number in range(60)]
    lines[4], lines[33] = b"nonsense", lines[33] + b"\t"
    path = write(tmp_path / "train.txt", lines)
    both = [reader(path, rank, 2) for rank in range(2)]
    sizes = []
    for each in both:
        for _ in range(2):  # two epochs count once
            sizes.append([len(labels) for _, labels in each.batches(everything, 10, 2)])
    assert [len(each.rejects) for each in both] == [1, 1]
    # As many batches on both ranks; what is missing is missing in one of the window.
    assert [sum(each) for each in sizes] == [29] * 4
    assert {len(each) for each in sizes} == {3}
    assert f"left out: {path}:5: expected 40 fields separated by tabs, got 1" in caplog.text
    assert f"left out: {path}:34: expected 40 fields separated by tabs, got 41" in caplog.text


@pytest.mark.parametrize(("share", "enough"), [(0.0, False), (0.2, False), (0.5, True)])
def test_too_many_malformed_lines(
    tmp_path: Path, share: float, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo, "FIRST_REJECTS", 3)
    lines = [line(number) if number % 3 else b"nonsense" for number in range(60)]
    path = write(tmp_path / "train.txt", lines)
    batches = reader(path, share=share).batches(everything, 10, 3)
    if enough:
        assert sum(len(labels) for _, labels in batches) == 40
        return
    with pytest.raises(TooManyRejectedError, match=rf"{path}:\d+: expected 40.*--max-rejected"):
        list(batches)


def test_a_window_without_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", [b"nonsense"] * 20)
    with pytest.raises(ValueError, match=f"{path}:1: expected a sample at least .* got 0"):
        list(reader(path).batches(everything, 10, 2))


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    """What was read before is delivered: nothing waits for the end of the file."""
    path = write(tmp_path / "train.txt.gz", [line(number) for number in range(2000)])
    path.write_bytes(path.read_bytes()[:-5000])
    batches = reader(path).batches(everything, 10, 2)
    assert len(next(batches)[1]) == 10
    with pytest.raises(ValueError, match=rf"{path}:\d+: expected complete gzip data"):
        list(batches)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "train.txt.gz"
    path.write_bytes(line(1))
    with pytest.raises(ValueError, match=f"{path}:1: expected complete gzip data"):
        list(reader(path).batches(everything, 1, 1))
    empty = write(tmp_path / "empty.txt", [])
    assert list(reader(empty).batches(everything, 1, 1)) == []
    assert reader(empty).samples(everything, 10)[0].shape == (0, criteo.NUM_FIELDS)


def test_a_line_without_end_is_one_line(tmp_path: Path) -> None:
    lines = [line(0), b"x" * (5 * criteo.LONGEST), line(2), b"y" * criteo.LONGEST, line(4)]
    each = reader(write(tmp_path / "train.txt", lines))
    fields, _ = each.samples(everything, 10)
    assert sorted(bytes(row) for row in fields) == sorted(rows_of(lines[::2]))
    assert [where.rpartition(":")[2] for where in each.rejects.reasons] == ["2", "4"]


def test_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"\r\n".join([line(0), line(1)]))
    fields, labels = reader(path).samples(everything, 10)
    np.testing.assert_array_equal(labels, [0, 1])
    assert [bytes(row) for row in fields] == rows_of([line(0), line(1)])


# ------------------------------------------------------------------------------------------- model


def test_the_paper_s_number_of_parameters() -> None:
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    preset = train.DeepLight.PRESETS["criteo"]
    assert preset["shrink"] == 1
    hidden = (preset["units"],) * preset["layers"]
    with torch.device("meta"):
        model = DeepLight(criteo.ROWS, preset["dim"], hidden)
    parts = parameter_count(criteo.ROWS, preset["dim"], hidden)
    assert sum(parameter.numel() for parameter in model.parameters()) == 607_959_381
    (known,) = (own for own in WORKLOADS if own.name == "DeepLight")
    assert (known.parameters, known.tensors) == (607_959_381, len(list(model.parameters())))
    assert sum(parts.values()) == 607_959_381
    assert parts["embeddings"] == 607_479_830


@pytest.mark.parametrize(("factor", "least"), [(500, 2), (10**8, 2), (1, 4)])
def test_smaller_tables_have_the_same_structure(factor: int, least: int) -> None:
    rows = criteo.shrunk(factor)
    assert len(rows) == criteo.NUM_FIELDS
    assert rows[: criteo.NUMBERS] == (1,) * criteo.NUMBERS
    assert min(rows[criteo.NUMBERS :]) == least
    with torch.device("meta"):
        model = DeepLight(rows, 10, (400,))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == sum(parameter_count(rows, 10, (400,)).values())


def test_the_model_computes_what_its_formula_says() -> None:
    """Against loops over fields and pairs."""
    torch.manual_seed(0)
    rows = (1, 1, 5, 7)
    model = DeepLight(rows, dim=3, hidden=(6, 4)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.requires_grad_(False)
    fields = torch.tensor([[0, 20, 4, 6], [3, 0, 0, 1], [-2, 1, 2, 2]])
    found = model(fields)
    for sample, logit in zip(fields.tolist(), found.tolist(), strict=True):
        vectors = [
            table.weight[0] * math.log1p(max(value, 0)) if own == 1 else table.weight[value]
            for own, table, value in zip(rows, model.tables, sample, strict=True)
        ]
        expected = float(model.bias) + float(model.field_bias.sum())
        expected += sum(
            float(own @ vector) for own, vector in zip(model.first, vectors, strict=True)
        )
        for i in range(4):
            for j in range(i):
                weight = float(model.pair_weight[i, j] + model.pair_weight[j, i]) / 2
                expected += weight * float(vectors[i] @ vectors[j])
        expected += float(model.deep(torch.cat(vectors)))
        assert logit == pytest.approx(expected, rel=1e-6)


def test_a_field_of_one_row_is_a_number() -> None:
    with pytest.raises(ValueError, match="expected fields of one row first"):
        DeepLight((1, 5, 1))


# --------------------------------------------------------------------------------------- synthetic


def test_synthetic_samples() -> None:
    rows = criteo.shrunk(100)
    fields, clicked = criteo.synthetic(20_000, rows, (1, 2))
    assert fields.shape == (20_000, criteo.NUM_FIELDS)
    assert (fields >= 0).all()
    assert (fields[:, 13:] < rows[13:]).all()
    assert 0.2 < clicked.mean() < 0.8
    again, _ = criteo.synthetic(20_000, rows, (1, 2))
    other, _ = criteo.synthetic(20_000, rows, (1, 3))
    np.testing.assert_array_equal(again, fields)
    assert (other != fields).any()


def test_synthetic_samples_are_the_same_for_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    monkeypatch.setattr(train.Synthetic, "MADE_AT_ONCE", 50)
    options = ["--preset=criteo-small", "--data=synthetic", "--samples=192", "--batch-size=8"]
    parsed = train.loop.parse(train.DeepLight, [*options, "--eval-rows=70"])

    def of_rank(rank: int, size: int) -> tuple[criteo.Samples, criteo.Samples]:
        monkeypatch.setattr(train.hvd, "rank", lambda: rank)
        monkeypatch.setattr(train.hvd, "size", lambda: size)
        data = train.Synthetic(parsed)
        assert (data.sizes["train_samples"], data.sizes["test_samples"]) == (192, 70)
        return data.samples(), tuple(part.numpy() for part in data.held_out)

    alone = of_rank(0, 1)
    assert (len(alone[0][1]), len(alone[1][1])) == (192, 70)
    for size in (3, 24):
        ranks = [of_rank(rank, size) for rank in range(size)]
        for part in range(2):
            for column in range(2):
                together = np.empty_like(alone[part][column])
                for rank, found in enumerate(ranks):
                    together[rank::size] = found[part][column]
                np.testing.assert_array_equal(together, alone[part][column])


def test_the_optimizer_is_the_one_asked_for() -> None:
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    model = torch.nn.Linear(2, 1)
    for asked, expected in (([], torch.optim.Adam), (["--optimizer=sgd"], torch.optim.SGD)):
        options = train.loop.parse(train.DeepLight, [*asked, "--lr=0.5", "--l2=0.25"])
        made = train.DeepLight.optimizer(SimpleNamespace(options=options), model)
        assert type(made) is expected
        assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_says_that_training_has_diverged(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one rank alone computes the AUC, which the others wait for."""
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    monkeypatch.setattr(train.hvd, "rank", lambda: rank)
    monkeypatch.setattr(train.hvd, "allgather", lambda tensor, name: tensor)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))
    fields, clicked = torch.tensor([[1.0, np.nan], [0.0, 1.0]]), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"finite predictions.*smaller --lr"):
        train.evaluate(model, fields, clicked)


def test_synthetic_categories_follow_zipf_s_law() -> None:
    """The k-th category comes with probability log((k + 1) / k) / log(n + 1): nearly 1 / k."""
    size, count = 1000, 200_000
    fields, _ = criteo.synthetic(count, (1,) * 13 + (size,) * 26, (0,))
    seen = np.bincount(fields[:, 13], minlength=size) / count
    for k in (1, 2, 10, 100):
        expected = math.log((k + 1) / k) / math.log(size + 1)
        error = math.sqrt(expected / count)
        assert abs(seen[k - 1] - expected) < 5 * error
