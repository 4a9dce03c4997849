"""The CUDA kernels on a GPU: the bytes of the host kernels, and their throughput.

Needs CuPy, NVRTC and a GPU; `-s` shows the throughput.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_cases import (  # noqa: F401 the cases are collected here
    KEY,
    grid,
    on_device,
    same,
    test_absmax,
    test_add_exponential,
    test_codec_gives_the_same_payloads,
    test_dequantize_standard,
    test_exponential,
    test_l2norm,
    test_l2norm_adds_in_the_order_of_the_host,
    test_mean_standard,
    test_norms_keep_to_bounds,
    test_quantize_standard,
    test_reduce_exponential,
    test_shares_of_a_bucket,
    test_the_operation_adds_wherever_the_codes_lie,
)
from reference import buffer
from table_cases import (  # noqa: F401 and those of tables
    test_a_table_is_packed_as_floats_and_unpacked,
    test_a_table_of_more_segments_than_a_warp_finds_in_two_votes,
    test_a_table_without_elements,
    test_exponential_codes_of_a_table,
    test_norms_of_a_table,
    test_nothing_between_norms_is_written_where_blocks_are_small,
    test_reduced_codes_of_a_table,
    test_rows_of_floats_are_added_in_their_order,
    test_standard_codes_of_a_table,
)

from mpi_ops import lanes
from mpi_ops.kernels import host
from tools.gpu_check import seconds_on_device

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
try:
    DEVICES = cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"there is no GPU: {error}", allow_module_level=True)

ELEMENTS = 1 << 26
BLOCK = 256


@pytest.fixture(scope="module")
def device() -> Any:
    from mpi_ops.kernels import device

    return device


def test_large_tensors(device: Any) -> None:
    """Grids of their full size, blocks of many segments."""
    count = (1 << 24) + 77
    x = np.random.default_rng(0).normal(size=count).astype(np.float32)
    copied = on_device(device, x)[1]
    whole = lanes.whole_tensor_block(count)
    for block in (BLOCK, whole):
        norms = host.absmax(buffer(x), block)
        device_norms = device.absmax(copied, block)
        same(device_norms, norms)
        args = {"block_size": block, "bits": 8, "dither": KEY}
        words = host.quantize_standard(buffer(x), norms, levels=127, **args)
        same(device.quantize_standard(copied, device_norms, levels=127, **args), words)
        codes = host.quantize_exponential(buffer(x), norms, **args)
        same(device.quantize_exponential(copied, device_norms, **args), codes)
    expected = host.l2norm(buffer(x), whole)
    first, second = (device.l2norm(copied, whole).get() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert abs(int(first[0]) - int(expected[0])) <= 1


def test_throughput(device: Any) -> None:
    """Prints bytes read and written by each kernel in a second, beside a copy; asserts nothing."""
    x = cupy.random.default_rng(0).standard_normal(ELEMENTS, dtype=np.float32)
    y = cupy.empty_like(x)
    source, target = device.Buffer.of(x), device.Buffer.of(y)
    norms = device.absmax(source, BLOCK)
    args = {"block_size": BLOCK, "bits": 8}
    words = device.quantize_standard(source, norms, levels=127, dither=KEY, **args)
    codes = device.quantize_exponential(source, norms, dither=KEY, **args)
    inputs = [codes, codes.copy(), codes.copy(), codes.copy()]
    address = [own.data.ptr for own in inputs]
    exponential = {"bits": 8, "dither": KEY}
    cases = {
        "copy": (2 * x.nbytes, lambda: cupy.copyto(y, x)),
        "absmax": (x.nbytes, lambda: device.absmax(source, BLOCK, out=norms)),
        "absmax, one block": (x.nbytes, lambda: device.absmax(source, ELEMENTS)),
        "l2 norm": (x.nbytes, lambda: device.l2norm(source, BLOCK)),
        "l2 norm, one block": (x.nbytes, lambda: device.l2norm(source, ELEMENTS)),
        "quantize standard": (
            x.nbytes + words.nbytes,
            lambda: device.quantize_standard(
                source, norms, levels=127, dither=KEY, out=words, **args
            ),
        ),
        "dequantize standard": (
            x.nbytes + words.nbytes,
            lambda: device.dequantize_standard(words, norms, target, divisor=127, **args),
        ),
        "quantize exponential": (
            x.nbytes + codes.nbytes,
            lambda: device.quantize_exponential(source, norms, dither=KEY, out=codes, **args),
        ),
        "dequantize exponential": (
            x.nbytes + codes.nbytes,
            lambda: device.dequantize_exponential(codes, norms, target, **args),
        ),
        "reduce exponential, 4 inputs": (
            5 * codes.nbytes,
            lambda: device.reduce_exponential(inputs, factor=0.25, out=inputs[0], **exponential),
        ),
        "add exponential": (
            3 * codes.nbytes,
            lambda: device.add_exponential(*address[:2], codes.size, **exponential),
        ),
    }
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"\n{name}, {ELEMENTS} float32 elements, bytes read and written")
    for case, (size, run) in cases.items():
        print(f"{case:30} {size / seconds_on_device(run) / 1e9:8.0f} GB/s")
