"""Zeros, NaN, Inf, the ends of the range of floats, and the conversions of narrow floats."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from reference import DTYPES, INF_BITS, NAN_BITS, ROW, Array, buffer, float_bits

from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host

FLT_MAX = float(np.finfo(np.float32).max)
KEY = dither(0, "w", 0, 0, Stage.QUANTIZE)


def standard(x: Array, norms: Array, block: int, bits: int, levels: int, out: Array) -> None:
    """Quantize and dequantize on one rank."""
    args = {"block_size": block, "bits": bits}
    words = host.quantize_standard(buffer(x), norms, levels=levels, dither=KEY, **args)
    host.dequantize_standard(words, norms, buffer(out), divisor=levels, **args)


def exponential(x: Array, norms: Array, block: int, bits: int, headroom: int, out: Array) -> None:
    """Quantize, reduce one rank's codes, and dequantize."""
    args = {"block_size": block, "bits": bits, "headroom": headroom}
    codes = host.quantize_exponential(buffer(x), norms, dither=KEY, **args)
    codes = host.reduce_exponential([codes], bits=bits, dither=KEY)
    host.dequantize_exponential(codes, norms, buffer(out), **args)


NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# (x, norms, block, out)
Method = Callable[..., None]
METHODS = {
    **{
        f"standard {bits} bit": partial(standard, bits=bits, levels=2 ** (bits - 1) - 1)
        for bits in (2, 3, 4, 8, 10, 16)
    },
    **{f"exponential {bits} bit": partial(exponential, bits=bits, headroom=0) for bits in (4, 8)},
}


# -------------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_zero_norm_gives_zeros(method: str, dtype: str) -> None:
    x = np.zeros(300, dtype=DTYPES[dtype])
    x[1::2] *= -1
    assert np.signbit(x.astype(np.float32)).any()
    norms = host.absmax(buffer(x), 64)
    np.testing.assert_array_equal(norms, 0)
    np.testing.assert_array_equal(host.l2norm(buffer(x), 64), 0)
    out = np.full(300, 7, dtype=DTYPES[dtype])
    METHODS[method](x, norms, 64, out=out)
    np.testing.assert_array_equal(out.astype(np.float32), 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_under_any_norm(method: str) -> None:
    for norm in (1e-45, 1e-38, 1e-30, 1.0, FLT_MAX):
        x = np.zeros(256, dtype=np.float32)
        x[1::2] *= -1
        out = np.full(256, 7, dtype=np.float32)
        METHODS[method](x, float_bits(norm), 256, out=out)
        np.testing.assert_array_equal(out, 0.0)


def test_codes_under_a_norm_that_says_nothing_are_zero() -> None:
    """A zero norm, Inf or NaN: whatever this rank holds, its codes add nothing."""
    for norm, x in ((0, 0.0), (INF_BITS, 2.0), (NAN_BITS, -3.0)):
        args = {"block_size": 64, "dither": KEY}
        norms = np.array([norm], dtype=np.int32)
        values = buffer(np.full(64, x, dtype=np.float32))
        words = host.quantize_standard(values, norms, bits=8, levels=127, **args)
        np.testing.assert_array_equal(words, 0)
        codes = host.quantize_exponential(values, norms, bits=8, **args)
        np.testing.assert_array_equal(codes & 127, 0)


# -------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_order_nan_above_inf_above_finite(dtype: str) -> None:
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    if dtype == "float64":
        largest = FLT_MAX
    blocks = [[1.0, -2.0], [largest, 1.0], [-largest], [np.inf, largest], [-np.inf], [1.0, np.nan]]
    blocks += [[np.nan, np.inf], [-np.nan, 0.0], [0.0]]
    for place in (0, 17, 31, 63):  # anywhere in the block
        x = np.zeros((len(blocks), 64), dtype=DTYPES[dtype])
        for row, values in zip(x, blocks, strict=True):
            for step, value in enumerate(values):
                row[(place + step) % 64] = value
        for measure in (host.absmax, host.l2norm):
            norms = measure(buffer(x), 64)
            assert norms.tolist()[3:5] == [INF_BITS, INF_BITS]
            assert np.all(norms[5:8] > INF_BITS)
            assert np.all(norms[:3] < INF_BITS)
            assert np.all(norms[:3] >= float_bits([2.0, largest, largest]))
            assert norms[8] == 0
        np.testing.assert_array_equal(
            host.absmax(buffer(x), 64)[:3], float_bits([2.0, largest, largest])
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_element_makes_its_block_nan_and_no_other(
    bad: float, method: str, dtype: str
) -> None:
    count, block = 1000, 96
    clean = np.random.default_rng(0).normal(size=count).astype(DTYPES[dtype])
    expected = np.empty_like(clean)
    METHODS[method](clean, host.absmax(buffer(clean), block), block, out=expected)
    assert np.all(np.isfinite(expected.astype(np.float32)))
    for place in (0, 95, 96, 500, count - 1):
        x = clean.copy()
        x[place] = bad
        out = np.empty_like(clean)
        METHODS[method](x, host.absmax(buffer(x), block), block, out=out)
        hit = np.arange(count) // block == place // block
        assert np.all(np.isnan(out[hit].astype(np.float32)))
        np.testing.assert_array_equal(out[~hit], expected[~hit])


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_norm_of_another_rank_is_enough(method: str) -> None:
    """Every pattern above Inf is a NaN; this rank's own values are finite."""
    x = np.ones(4 * ROW, dtype=np.float32)
    norms = np.array([INF_BITS, INF_BITS + 1, NAN_BITS, 0x7FFFFFFF], dtype=np.int32)
    out = np.zeros_like(x)
    METHODS[method](x, norms, ROW, out=out)
    assert np.all(np.isnan(out))


@pytest.mark.parametrize("method", METHODS)
def test_bad_values_under_a_finite_norm_saturate(method: str) -> None:
    """Cannot happen after a Max-allreduce; still no code leaves its lane, and no sign is lost."""
    x = np.array([5.0, -5.0, np.inf, -np.inf, FLT_MAX, -FLT_MAX] * 50, dtype=np.float32)
    out = np.empty_like(x)
    METHODS[method](x, float_bits(2.0), 320, out=out)
    np.testing.assert_array_equal(out, np.copysign(2.0, x))
    x[:] = np.nan
    METHODS[method](x, float_bits(2.0), 320, out=out)
    np.testing.assert_array_equal(np.abs(out), 2.0)


# ---------------------------------------------------------------------------------- ends of a range

EXTREMES = [
    1e-45,
    1.1e-44,
    1e-40,
    1e-38,
    1.2e-38,
    1e-30,
    2.0**-60,
    2.0**-61,
    1e30,
    2.0**127,
    FLT_MAX,
]


@pytest.mark.parametrize("norm", EXTREMES)
@pytest.mark.parametrize("method", METHODS)
def test_tiny_and_huge_norms(method: str, norm: float) -> None:
    """No Inf, no NaN, nothing above the norm, and no error above a level."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, 4096) * norm).astype(np.float32)
    x[:3] = norm, -norm, 0.0
    norms = host.absmax(buffer(x), 4096)
    np.testing.assert_array_equal(norms, float_bits(norm))
    out = np.empty_like(x)
    METHODS[method](x, norms, 4096, out=out)
    assert np.all(np.isfinite(out))
    assert np.all(np.abs(out) <= np.float32(norm))
    assert np.all(out * np.sign(x) >= 0)
    # Two levels are a power of two or 1 / levels apart; 2**-149 is the unit of denormal results.
    name, bits = method.split()[0], int(method.split()[1])
    step = 1 / (2 ** (bits - 1) - 1) if name == "standard" else 0.5
    exact = x.astype(np.float64)
    assert np.all(np.abs(out - exact) <= norm * step * (1 + 2.0**-20) + 2.0**-149)
    # Not everything is rounded to zero or to the norm alone.
    assert len(np.unique(out)) >= min(3, len(np.unique(x)))


@pytest.mark.parametrize(
    ("headroom", "norm"),
    [
        *[(headroom, norm) for headroom in (1, 20, 90) for norm in (1e-38, 1.0, 3.0, 1e10)],
        *[(headroom, norm) for headroom in (20, 90) for norm in (1e30, 2.9e38)],
    ],
)
def test_headroom_at_any_norm(headroom: int, norm: float) -> None:
    """Headroom moves the levels, exactly: what is a level times the norm stays as it is."""
    level = 2.0 ** -np.arange(0, 20)
    x = (np.concatenate([level, -level]) * np.float32(norm)).astype(np.float32)
    out = np.empty_like(x)
    exponential(x, float_bits(norm), 64, 8, headroom, out)
    np.testing.assert_allclose(out, x, rtol=2.0**-22, atol=0)


def test_float64_beyond_the_range_of_float32_counts_as_inf() -> None:
    half_ulp = 2.0**103
    x = np.zeros((5, ROW))
    x[:, 3] = [FLT_MAX, FLT_MAX + half_ulp * 0.99, FLT_MAX + half_ulp, 1e300, -1e39]
    bits = host.absmax(buffer(x), ROW)
    np.testing.assert_array_equal(bits, [*float_bits([FLT_MAX] * 2), *[INF_BITS] * 3])
    x[:, 3] = [1e-46, 1e-45, 1e-300, 5e-324, -1e-40]
    np.testing.assert_array_equal(
        host.absmax(buffer(x), ROW), float_bits(np.abs(x[:, 3]).astype(np.float32))
    )


def test_l2_norm_of_a_finite_block_is_finite_and_bounds_it() -> None:
    x = np.zeros((4, 64), dtype=np.float32)
    x[0], x[1, 5], x[2], x[3, 0] = FLT_MAX, FLT_MAX, 1e-45, 1e-45
    norms = host.l2norm(buffer(x), 64).view(np.float32)
    np.testing.assert_array_equal(norms[:2], np.float32(FLT_MAX))
    exact = 8 * float(np.float32(1e-45))
    np.testing.assert_array_equal(norms[2:], np.float32([exact, 1e-45]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_values_near_the_end_of_the_range_stay_finite_with_an_l2_norm(
    method: str, dtype: str
) -> None:
    """Their L2 norm lies beyond the dtype, and so would the levels next to them."""
    out = np.zeros(4096, dtype=NARROW.get(dtype, np.dtype(np.float32)))
    top = float(ml_dtypes.finfo(out.dtype).max)
    x = np.full_like(out, top * 0.46)
    norms = host.l2norm(buffer(x), 4096)
    np.testing.assert_array_equal(norms.view(np.float32), np.float32(top))
    METHODS[method](x, norms, 4096, out=out)
    means = out.astype(np.float64)
    assert np.all(np.isfinite(means))
    # Unbiased within 5 standard deviations; a level is at most 0.5 (exponential) or 1 norm wide.
    assert abs(means.mean() / top - 0.46) < 5 * 0.5 / 64


# ------------------------------------------------------------------------------ narrow conversions


def all_patterns(dtype: str) -> Array:
    return np.arange(1 << 16, dtype=np.uint16).view(NARROW[dtype])


@pytest.mark.parametrize("dtype", NARROW)
def test_every_pattern_is_read_as_numpy_reads_it(dtype: str) -> None:
    values = all_patterns(dtype)
    x = np.zeros((1 << 16, ROW), dtype=NARROW[dtype])
    x[np.arange(1 << 16), np.arange(1 << 16) % ROW] = values
    norms = host.absmax(buffer(x), ROW)
    expected = float_bits(np.abs(values.astype(np.float32)))
    nan = np.isnan(values.astype(np.float32))
    assert np.all(norms[nan] > INF_BITS)
    np.testing.assert_array_equal(norms[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("norm", [2.0**-24, 1.0, 65504.0, FLT_MAX])
def test_every_pattern_gives_the_codes_of_its_float32_value(norm: float, dtype: str) -> None:
    """Signs included, which a norm does not show."""
    narrow = all_patterns(dtype)
    wide = narrow.astype(np.float32)
    # A NaN cannot come here with a finite norm; its sign differs between NumPy and the kernels.
    narrow[np.isnan(wide)], wide[np.isnan(wide)] = 0, 0
    for bits in (8, 16):
        args = {"block_size": 1 << 16, "bits": bits, "dither": KEY, "levels": 2 ** (bits - 1) - 1}
        np.testing.assert_array_equal(
            host.quantize_standard(buffer(narrow), float_bits(norm), **args),
            host.quantize_standard(buffer(wide), float_bits(norm), **args),
        )
    for bits in (4, 8):
        args = {"block_size": 1 << 16, "bits": bits, "dither": KEY}
        np.testing.assert_array_equal(
            host.quantize_exponential(buffer(narrow), float_bits(norm), **args),
            host.quantize_exponential(buffer(wide), float_bits(norm), **args),
        )


@pytest.mark.parametrize("dtype", NARROW)
def test_results_are_rounded_to_nearest_even(dtype: str) -> None:
    """Every finite value of the type, every midpoint between two, and the floats beside both."""
    values = all_patterns(dtype)[: 1 << 15].astype(np.float32)  # positive, ascending
    finite = values[np.isfinite(values)].astype(np.float64)
    last = finite[-1] + (finite[-1] - finite[-2])  # where the next one would be
    middle = (finite + np.append(finite[1:], last)) / 2
    centre = np.concatenate([finite, middle]).astype(np.float32)  # the midpoints are exact, too
    norms = np.concatenate([centre, np.nextafter(centre, np.inf), np.nextafter(centre, 0)])
    norms = np.concatenate([norms, np.float32([FLT_MAX, 1e-45, 1e-30, 1e30])])
    norms = norms[np.isfinite(norms)]
    # Codes +1 and -1 of a block decode to its norm and minus its norm.
    codes = np.tile(np.array([127, 255] * (ROW // 2), dtype=np.uint8), len(norms))
    out = np.empty(len(codes), dtype=NARROW[dtype])
    host.dequantize_exponential(codes, float_bits(norms), buffer(out), block_size=ROW, bits=8)
    with np.errstate(over="ignore"):
        expected = norms.astype(NARROW[dtype])
    pattern = expected.view(np.uint16)
    rows = out.view(np.uint16).reshape(-1, ROW)
    np.testing.assert_array_equal(rows[:, 0::2], np.repeat(pattern[:, None], ROW // 2, axis=1))
    np.testing.assert_array_equal(
        rows[:, 1::2], np.repeat(pattern[:, None] | 0x8000, ROW // 2, axis=1)
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_nan_results_are_nan_in_narrow_types(dtype: str) -> None:
    codes = np.array([127, 255, 0, 128] * 8, dtype=np.uint8)
    for pattern in (INF_BITS, INF_BITS + 1, NAN_BITS, 0x7FFFFFFF):
        out = np.zeros(ROW, dtype=NARROW[dtype])
        norms = np.array([pattern], dtype=np.int32)
        host.dequantize_exponential(codes, norms, buffer(out), block_size=ROW, bits=8)
        assert np.all(np.isnan(out.astype(np.float32)))
