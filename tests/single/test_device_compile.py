"""NVRTC compiles the CUDA kernels for every architecture, without a GPU and without a driver."""

from __future__ import annotations

import re
from typing import Any

import pytest

nvrtc = pytest.importorskip(
    "cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed", exc_type=ImportError
)
try:
    KNOWN = nvrtc.getSupportedArchs()
except Exception as error:
    pytest.skip(f"NVRTC is missing: {error}", allow_module_level=True)

# V100, T4, A100, A10, L4, H100, B200, RTX 50.
ARCHITECTURES = [arch for arch in (70, 75, 80, 86, 89, 90, 100, 120) if arch in KNOWN]
DTYPES = ["float32", "float64", "float16", "bfloat16", None]  # None: the kernels of codes
OLDEST = ARCHITECTURES[0]
# All of them for the oldest and for one that is common; float32 and codes for the others.
MATRIX = [
    (architecture, dtype)
    for architecture in ARCHITECTURES
    for dtype in DTYPES
    if architecture in (OLDEST, 90) or dtype in ("float32", None)
]
KERNELS = {
    "tensors": {
        *("gq_absmax", "gq_l2norm", "gq_l2norm_of_partial"),
        *("gq_dequantize_standard", "gq_dequantize_standard_dense"),
        *(f"gq_quantize_standard_{lanes}_dense" for lanes in (5, 6, 10)),
        *(f"gq_quantize_standard{variant}" for variant in ("", "_2", "_4", "_8")),
        *(f"gq_quantize_standard{variant}_square" for variant in ("", "_4", "_8")),
        *("gq_quantize_exponential", "gq_dequantize_exponential", "gq_pack", "gq_unpack"),
    },
    "codes": {
        *("gq_reduce_exponential", "gq_add_exponential", "gq_add"),
        *(f"gq_mean_standard{variant}" for variant in ("", "_2", "_4", "_8")),
        *(f"gq_mean_standard_{lanes}_dense" for lanes in (5, 6, 10)),
    },
}


@pytest.fixture(scope="module")
def device() -> Any:
    from mpi_ops.kernels import device

    return device


def test_nvrtc_knows_what_clouds_have() -> None:
    dropped = {70} if nvrtc.getVersion() >= (13, 0) else set[int]()
    assert {70, 75, 80, 86, 89, 90} - dropped <= set(ARCHITECTURES)


@pytest.mark.parametrize(("architecture", "dtype"), MATRIX)
def test_kernels_keep_to_registers(architecture: int, dtype: str | None, device: Any) -> None:
    code, log = device.compile_kernels(dtype, f"sm_{architecture}", "--ptxas-options=-v")
    assert code.startswith(b"\x7fELF")
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    assert set(kernels) == KERNELS["codes" if dtype is None else "tensors"]
    memory = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert log.count(memory) == len(kernels)
    assert "lmem" not in log
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    # So that an SM holds at least half of its threads, which hides the latency of memory.
    assert len(registers) == len(kernels)
    assert max(registers) <= 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_that_of_the_host(dtype: str | None, device: Any) -> None:
    """No fused multiply-add, no flushing of denormals, no approximate division or root."""
    code, _ = device.compile_kernels(dtype, f"compute_{OLDEST}")
    assert not re.findall(
        r"\w+\.(?:\w+\.)*(?:ftz|approx|full)\S*|fma\.\S*|mad\.f\S*", code.decode()
    )


def test_what_the_check_of_the_arithmetic_would_find(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"--ftz=true": ".ftz", "--fmad=true": "fma.", "--prec-div=false": ".full"}
    for option, word in found.items():
        name = option.partition("=")[0]
        options = [own for own in device.OPTIONS if not own.startswith(name)]
        monkeypatch.setattr(device, "OPTIONS", [*options, option])
        assert word in device.compile_kernels("float32", f"compute_{OLDEST}")[0].decode()
        monkeypatch.undo()


def test_a_failure_shows_the_compilers_words(device: Any) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC could not compile for sm_80(.|\n)*GQ_ELEMENT"):
        device.compile_kernels("float32", "sm_80", "-DGQ_ELEMENT=nothing")


def test_the_source_needs_no_other_file(device: Any) -> None:
    """But those that elements.h includes for the host alone."""
    hosts = r'#include (<cst\w+>|"vectors.h")'
    assert "#include" not in re.sub(hosts, "", device.source())
