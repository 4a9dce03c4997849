"""Lengths of Elias' codes and entropies, against codes that are written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from reference import unpack_lanes

from gq_horovod.research import code_length
from gq_horovod.research.baselines import QSGDConfig
from gq_horovod.research.code_length import (
    elias_gamma_bits,
    elias_omega_bits,
    entropy,
    qsgd_code_length,
)
from mpi_ops import codec
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer

# The first codes of Elias' paper; groups and the final zero of omega are set apart.
GAMMA = {1: "1", 2: "010", 3: "011", 4: "00100", 7: "00111", 8: "0001000", 17: "000010001"}
OMEGA = {
    1: "0",
    2: "10 0",
    3: "11 0",
    4: "10 100 0",
    7: "10 111 0",
    8: "11 1000 0",
    15: "11 1111 0",
    16: "10 100 10000 0",
    100: "10 110 1100100 0",
}


@pytest.mark.parametrize(
    ("bits_of", "table"), [(elias_gamma_bits, GAMMA), (elias_omega_bits, OMEGA)]
)
def test_lengths_are_those_of_the_codes(bits_of, table) -> None:
    lengths = [len(code.replace(" ", "")) for code in table.values()]
    np.testing.assert_array_equal(bits_of(np.array(list(table))), lengths)


def omega(number: int) -> str:
    """Elias' omega code, by its definition."""
    code = "0"
    while number > 1:
        group = bin(number)[2:]
        code, number = group + code, len(group) - 1
    return code


def test_lengths_of_many_numbers() -> None:
    numbers = np.array([*range(1, 3000), 2**15, 2**31 - 1, 2**31, 2**52 - 1, 2**52])
    np.testing.assert_array_equal(
        elias_omega_bits(numbers), [len(omega(int(number))) for number in numbers]
    )
    np.testing.assert_array_equal(
        elias_gamma_bits(numbers), [2 * int(number).bit_length() - 1 for number in numbers]
    )


def test_entropy_of_few_codes() -> None:
    assert entropy(np.array([5, 5, 5])) == 0
    assert entropy(np.array([-1, 1])) == 1
    assert entropy(np.array([0, 0, 1, -1])) == 1.5
    assert entropy(np.arange(8)) == 3


def test_a_gradient_of_four_elements() -> None:
    """Levels of 3 bits are thirds: codes 3, -1, 0 and 2 of a block with the norm 3."""
    x = np.array([3, -1, 0, 2], dtype=np.float32)
    length = qsgd_code_length(x, QSGDConfig(bits=3, block_size=None))
    # |c| + 1 = 4, 2, 1, 3: omega 6 + 3 + 1 + 3, gamma 5 + 3 + 1 + 3, and three signs. Gaps of 1, 1
    # and 2: gamma 1 + 1 + 3, of 3, 1 and 2 3 + 1 + 3, and signs.
    gaps = (5 + 7 + 3) / 4
    assert length == (3 + 8, 2 + 8, (13 + 3) / 4 + 8, (12 + 3) / 4 + 8, gaps + 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10, 16])
def test_codes_are_those_that_travel(bits: int) -> None:
    x = np.random.default_rng(0).normal(size=1000)
    plan = QSGDConfig(bits=bits, block_size=64).plan(4)
    codes = code_length.standard_codes(x, plan, seed=5)
    random = dither(5, "codes", 0, 0, Stage.QUANTIZE)
    buffer = Buffer.of(x)
    payload = codec.quantize(buffer, codec.norms(buffer, plan), plan, random)
    np.testing.assert_array_equal(codes, unpack_lanes(payload, bits, 1000))
    assert np.abs(codes).max() == plan.level_count


def test_an_entropy_coder_saves_what_is_expected() -> None:
    """Normal numbers with a standard deviation of s levels: log2(s sqrt(2 pi e)) bits, about."""
    x = np.random.default_rng(0).normal(size=200_000)
    x[0] = 4.0
    x = x.clip(-4, 4)
    length = qsgd_code_length(x, QSGDConfig(block_size=None))
    expected = np.log2(127 / 4 * np.sqrt(2 * np.pi * np.e))
    assert abs(length.entropy - expected) < 0.02
    assert length.entropy < length.fixed < length.elias_omega
    # Where most codes are zero, Elias' codes are shorter than fixed ones.
    sparse = qsgd_code_length(x, QSGDConfig(norm="l2", block_size=None))
    assert sparse.entropy < sparse.elias_omega < 2 < sparse.fixed
    assert sparse.elias_gamma < 2
    assert qsgd_code_length(np.eye(1, 1000), QSGDConfig(block_size=None)).elias_gaps < 0.05
    assert qsgd_code_length(np.zeros(1000), QSGDConfig(block_size=None)).elias_gaps == 0.032


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, np.nan]), np.array([np.inf])])
def test_gradients_that_have_no_codes(bad) -> None:
    with pytest.raises(ValueError, match="qsgd_code_length: gradient must have finite elements"):
        qsgd_code_length(bad)
