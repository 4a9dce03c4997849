"""What the kernels read and write: sizes, alignment, guards, inputs, instruction sets."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from reference import DTYPES, ROW, SQUARE_LEVELS, Array, buffer, float_bits, guarded

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer

BLOCK = 64
KEY = dither(1, "w", 2, 3, Stage.QUANTIZE)
SIZES = [0, 1, 31, 32, 33, 255, 256, 257, 1000, 4095, 4096, 4097]
LARGE = (1 << 20) + 7
SUPPORTED = host.INSTRUCTION_SETS[: host.INSTRUCTION_SETS.index(host.best_instruction_set()) + 1]


class Case(NamedTuple):
    """One kernel with its arguments for `count` elements of a dtype."""

    run: Callable[..., None]  # (inputs, out)
    inputs: Callable[[int, str], list[Array]]
    out: Callable[[int, str], tuple[int, object]]  # elements and dtype


def tensor(count: int, dtype: str) -> Array:
    x = np.random.default_rng(count).normal(size=count)
    x[::7] = 0
    return x.astype(DTYPES[dtype])


def norms(count: int) -> Array:
    rng = np.random.default_rng(count)
    return float_bits(10 ** rng.uniform(-1, 1, lanes.blocks(count, BLOCK)))


def random_bytes(size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def top(bits: int, square: bool) -> int:
    return SQUARE_LEVELS[bits] if square else 2 ** (bits - 1) - 1


def norm_case(measure: Callable[..., Array]) -> Case:
    return Case(
        lambda inputs, out: measure(buffer(inputs[0]), BLOCK, out=out),
        lambda count, dtype: [tensor(count, dtype)],
        lambda count, dtype: (lanes.blocks(count, BLOCK), np.int32),
    )


def quantize_standard_case(bits: int, square: bool = False) -> Case:
    args = {"block_size": BLOCK, "bits": bits, "levels": top(bits, square), "dither": KEY}
    args["square"] = square
    return Case(
        lambda inputs, out: host.quantize_standard(buffer(inputs[0]), inputs[1], **args, out=out),
        lambda count, dtype: [tensor(count, dtype), norms(count)],
        lambda count, dtype: (lanes.standard_words(count, bits), np.int32),
    )


def dequantize_standard_case(bits: int, square: bool = False) -> Case:
    args = {"block_size": BLOCK, "bits": bits, "divisor": top(bits, square), "square": square}
    return Case(
        lambda inputs, out: host.dequantize_standard(*inputs, buffer(out), **args),
        lambda count, dtype: [
            random_bytes(4 * lanes.standard_words(count, bits)).view(np.int32),
            norms(count),
        ],
        lambda count, dtype: (count, DTYPES[dtype]),
    )


def quantize_exponential_case(bits: int) -> Case:
    args = {"block_size": BLOCK, "bits": bits, "headroom": 1, "dither": KEY}
    return Case(
        lambda inputs, out: host.quantize_exponential(
            buffer(inputs[0]), inputs[1], **args, out=out
        ),
        lambda count, dtype: [tensor(count, dtype), norms(count)],
        lambda count, dtype: (lanes.exponential_bytes(count, bits), np.uint8),
    )


def dequantize_exponential_case(bits: int) -> Case:
    args = {"block_size": BLOCK, "bits": bits, "headroom": 1}
    return Case(
        lambda inputs, out: host.dequantize_exponential(*inputs, buffer(out), **args),
        lambda count, dtype: [random_bytes(lanes.exponential_bytes(count, bits)), norms(count)],
        lambda count, dtype: (count, DTYPES[dtype]),
    )


def reduce_case(bits: int, number: int) -> Case:
    # Of bytes: any number of them, not only whole rows.
    return Case(
        lambda inputs, out: host.reduce_exponential(
            inputs, bits=bits, factor=1 / number, dither=KEY, out=out
        ),
        lambda count, dtype: [random_bytes(count, seed) for seed in range(number)],
        lambda count, dtype: (count, np.uint8),
    )


def add_case(bits: int) -> Case:
    def run(inputs: list[Array], out: Array) -> None:
        out[:] = inputs[1]
        host.add_exponential(
            inputs[0].ctypes.data, out.ctypes.data, out.size, bits=bits, dither=KEY
        )

    return Case(
        run,
        lambda count, dtype: [random_bytes(count, seed) for seed in range(2)],
        lambda count, dtype: (count, np.uint8),
    )


def mean_case(bits: int, number: int, square: bool = False) -> Case:
    def run(inputs: list[Array], out: Array) -> None:
        *payloads, own = inputs
        args = {"block_size": BLOCK, "bits": bits, "levels": top(bits, square)}
        args["square"] = square
        out[:] = host.mean_standard(payloads, own, count=out.size, **args)

    return Case(
        run,
        lambda count, dtype: [
            *(
                random_bytes(4 * lanes.standard_words(count, bits), seed).view(np.int32)
                for seed in range(number)
            ),
            norms(count),
        ],
        lambda count, dtype: (count, np.float32),
    )


CASES = {
    "absmax": norm_case(host.absmax),
    "l2norm": norm_case(host.l2norm),
    **{f"quantize standard {bits}": quantize_standard_case(bits) for bits in (2, 4, 7, 8, 10, 16)},
    **{f"dequantize standard {bits}": dequantize_standard_case(bits) for bits in (2, 7, 8, 16)},
    **{f"mean standard {bits}": mean_case(bits, 3) for bits in (2, 4, 7, 8, 16)},
    **{f"quantize square {bits}": quantize_standard_case(bits, True) for bits in SQUARE_LEVELS},
    **{f"dequantize square {bits}": dequantize_standard_case(bits, True) for bits in SQUARE_LEVELS},
    **{f"mean square {bits}": mean_case(bits, 3, True) for bits in SQUARE_LEVELS},
    **{f"quantize exponential {bits}": quantize_exponential_case(bits) for bits in (4, 8)},
    **{f"dequantize exponential {bits}": dequantize_exponential_case(bits) for bits in (4, 8)},
    **{
        f"reduce exponential {bits} of {number}": reduce_case(bits, number)
        for bits in (4, 8)
        for number in (1, 2, 3)
    },
    **{f"add exponential {bits}": add_case(bits) for bits in (4, 8)},
}


def result(name: str, count: int, dtype: str, inputs: list[Array] | None = None) -> Array:
    """Of one kernel, with guards around the output and a check that the inputs are as they were."""
    case = CASES[name]
    inputs = case.inputs(count, dtype) if inputs is None else inputs
    before = [own.tobytes() for own in inputs]
    out, *guards = guarded(*case.out(count, dtype))
    case.run(inputs, out)
    assert all(np.all(guard == 0xA5) for guard in guards)
    assert [own.tobytes() for own in inputs] == before
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_inputs_and_alignment(name: str, dtype: str) -> None:
    """All sizes: nothing outside the output is written, no input is, and any offset will do."""
    for count in [*SIZES, LARGE] if dtype == "float32" else SIZES:
        expected = result(name, count, dtype).tobytes()
        inputs = CASES[name].inputs(count, dtype)
        shifted = []
        for own in inputs:
            wider = np.empty(len(own) + 1, dtype=own.dtype)
            wider[1:] = own
            shifted.append(wider[1:])
        assert result(name, count, dtype, shifted).tobytes() == expected
        case = CASES[name]
        size, kind = case.out(count, dtype)
        out = np.empty(size + 1, dtype=kind)[1:]
        case.run(inputs, out)
        assert out.tobytes() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_instruction_sets_give_the_same_bytes(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in [*SIZES, 20011]:
        results = set()
        for instruction_set in SUPPORTED:
            monkeypatch.setattr(host, "_instruction_set", instruction_set)
            results.add(result(name, count, dtype).tobytes())
        assert len(results) == 1


def test_the_instruction_set_is_chosen() -> None:
    assert SUPPORTED[0] == "baseline"
    kernels = [host._kernel("absmax", name) for name in SUPPORTED]
    addresses = {ctypes.cast(kernel, ctypes.c_void_p).value for kernel in kernels}
    assert len(addresses) == len(SUPPORTED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dequantize standard 8", "dequantize exponential 8"])
def test_large_aligned_results_are_written_past_the_caches(name: str, dtype: str) -> None:
    """From 16 MiB on, at multiples of 64 bytes, another way of writing is used: the same bytes."""
    item = DTYPES[dtype].itemsize
    count = (16 << 20) // item + 5
    case = CASES[name]
    inputs = case.inputs(count, dtype)
    results = []
    for offset in (0, 1):
        memory = np.full((count + 200) * item, 0xA5, dtype=np.uint8)
        start = -memory.ctypes.data % 64 + 64 + offset * item
        out = memory[start : start + count * item].view(DTYPES[dtype])
        assert (out.ctypes.data % 64 == 0) == (offset == 0)
        case.run(inputs, out)
        assert np.all(memory[:start] == 0xA5)
        assert np.all(memory[start + count * item :] == 0xA5)
        results.append(out.tobytes())
    assert results[0] == results[1]


# -------------------------------------------------------------------------------- refused arguments


X = np.ones(64, dtype=np.float32)
ONE = float_bits(1.0)
STANDARD = {"block_size": 64, "bits": 8, "levels": 127, "dither": KEY}
EXPONENTIAL = {"block_size": 64, "bits": 8, "dither": KEY}
CODES = np.zeros(64, dtype=np.uint8)
WORDS = np.zeros(32, dtype=np.int32)
REFUSED = {
    "absmax: block_size must be a positive multiple of 32, got 33": lambda: host.absmax(
        buffer(X), 33
    ),
    "l2norm: block_size must be a positive multiple of 32, got 0": lambda: host.l2norm(
        buffer(X), 0
    ),
    "absmax: out must be a contiguous int32 array of 2 elements, got int32 of shape (3,)": (
        lambda: host.absmax(buffer(X), 32, out=np.zeros(3, np.int32))
    ),
    "absmax: x must be a buffer of one of the dtypes float32, float64, float16, bfloat16, got": (
        lambda: host.absmax(Buffer(X.ctypes.data, "int8", 64, X), 32)
    ),
    "quantize_standard: norms must be a contiguous int32 array of 1 elements, got float32": (
        lambda: host.quantize_standard(buffer(X), ONE.view(np.float32), **STANDARD)
    ),
    "quantize_standard: bits must be between 2 and 16, got 17": lambda: host.quantize_standard(
        buffer(X), ONE, **{**STANDARD, "bits": 17}
    ),
    "quantize_standard: levels must be between 1 and 127 with 8 bits, got 128": (
        lambda: host.quantize_standard(buffer(X), ONE, **{**STANDARD, "levels": 128})
    ),
    "quantize_standard: bits must be at most 8 with square levels, got 9": (
        lambda: host.quantize_standard(buffer(X), ONE, **{**STANDARD, "bits": 9, "square": True})
    ),
    "quantize_standard: dither must be a contiguous uint32 array of 4 elements": (
        lambda: host.quantize_standard(buffer(X), ONE, **{**STANDARD, "dither": KEY[:3]})
    ),
    "dequantize_standard: payload must be a contiguous int32 array of 32 elements": (
        lambda: host.dequantize_standard(
            WORDS[:31], ONE, buffer(X), block_size=64, bits=8, divisor=1
        )
    ),
    "dequantize_standard: divisor must be between 1 and 2**31 - 1, got 0": (
        lambda: host.dequantize_standard(WORDS, ONE, buffer(X), block_size=64, bits=8, divisor=0)
    ),
    "quantize_exponential: bits must be 4 or 8, got 5": lambda: host.quantize_exponential(
        buffer(X), ONE, **{**EXPONENTIAL, "bits": 5}
    ),
    "quantize_exponential: headroom must be between 0 and 126, got 127": (
        lambda: host.quantize_exponential(buffer(X), ONE, **EXPONENTIAL, headroom=127)
    ),
    "dequantize_exponential: codes must be a contiguous uint8 array of 64 elements": (
        lambda: host.dequantize_exponential(CODES[::2], ONE, buffer(X), block_size=64, bits=8)
    ),
    "reduce_exponential: inputs must be at least one array, got 0": (
        lambda: host.reduce_exponential([], bits=8, dither=KEY)
    ),
    "reduce_exponential: inputs[1] must be a contiguous uint8 array of 64 elements": (
        lambda: host.reduce_exponential([CODES, CODES[:32]], bits=8, dither=KEY)
    ),
    "Buffer.of: array must be C-contiguous, got strides (8,)": lambda: Buffer.of(X[::2]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the text is compared below
        REFUSED[message]()
    assert message in str(error.value)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="array must have one of the dtypes"):
        Buffer.of(np.zeros(4, dtype=np.int32))


def test_rows_are_as_wide_as_the_models_believe() -> None:
    assert lanes.ROW == ROW
