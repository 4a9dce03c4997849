"""Files that benchmarks/workloads.py reads, and the shapes of models."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.parametrize("model", shapes.PARAMETERS)
def test_shapes_of_real_models_have_their_parameters(model: str) -> None:
    own = dict(shapes.shapes(model))
    assert len(own) == len(shapes.shapes(model))  # each has a name of its own
    assert sum(map(math.prod, own.values())) == shapes.PARAMETERS[model]


def test_deeplight_has_the_shapes_of_the_example() -> None:
    import torch
    from model import DeepLight

    with torch.device("meta"):
        made = DeepLight(shapes._DEEPLIGHT)
    found = {name: tuple(own.shape) for name, own in made.named_parameters()}
    assert found == dict(shapes.shapes("DeepLight"))
