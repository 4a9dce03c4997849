"""The CUDA kernels and their driver on a CPU: the bytes of the host kernels, for every argument."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
from device_cases import (  # noqa: F401 the cases are collected here
    KEY,
    grid,
    norms_of,
    on_device,
    random_bytes,
    same,
    tensor,
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
from fake_cupy import asarray
from reference import buffer, float_bits
from table_cases import (  # noqa: F401 and those of tables
    placed,
    table,
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

import mpi_ops
from mpi_ops import codec, lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.code_cache import VARIABLE
from mpi_ops.kernels.interface import SEGMENT, Buffer
from mpi_ops.scheme import Scheme


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """device.py, whose kernels are emulated."""
    with fake_cupy.installed(tmp_path_factory.mktemp("emulation")) as module:
        yield module


def test_nothing_outside_the_output_is_written(device: Any) -> None:
    """Behind an array lies a page that nobody may touch; before it, here, known bytes."""
    count, block = 1000, 96
    x = tensor(count, "float32")
    norms = norms_of(count, block)
    margin = 64
    for bits in lanes.STANDARD_BITS:
        words = lanes.standard_words(count, bits)
        out = fake_cupy.empty(margin + words, np.int32)
        args = {"block_size": block, "bits": bits, "levels": 1, "dither": KEY}
        device.quantize_standard(on_device(device, x)[1], asarray(norms), out=out[margin:], **args)
        assert np.all(out.get().view(np.uint8)[: 4 * margin] == 0xA5)


# --------------------------------------------------------------------------------------- the driver


def test_counts_beyond_32_bits_reach_the_kernels(device: Any) -> None:
    """As far as that shows without so much memory: the types of all arguments are compared."""
    kinds = {name: device._argument_types(name) for name in device._SIGNATURES}
    assert all(np.int64 in kind for kind in kinds.values())


def test_grids_are_as_large_as_the_work(device: Any) -> None:
    x = on_device(device, np.ones(100_000, dtype=np.float32))[1]
    launches = fake_cupy.Module.launches
    launches.clear()
    device.absmax(x, 256)
    device.absmax(x, 1 << 40)
    norms = device.l2norm(x, 1 << 40)
    device.quantize_exponential(x, norms, block_size=1 << 40, bits=8, dither=KEY)
    half_warps = (-(-100_000 // 256), -(-100_000 // 2048))
    assert [launch[:3] for launch in launches] == [
        ("gq_absmax", -(-half_warps[0] * 16 // 256), 256),
        ("gq_absmax", -(-half_warps[1] * 16 // 256), 256),
        ("gq_l2norm", -(-half_warps[1] * 16 // 256), 256),
        ("gq_l2norm_of_partial", 1, 256),
        ("gq_quantize_exponential", -(-100_000 // (256 * 8)), 256),
    ]


def quantized(device: Any, segments: Any, norms: Any, out: Any) -> None:
    """The codes of a table of float32 tensors, in `out`."""
    settings = {"block_size": 256, "bits": 8, "levels": 127, "square": False}
    device.KERNELS.quantize_table("float32", segments, norms, out, **settings)


class _Far:
    """An array that begins so many elements before its memory."""

    def __init__(self, array: Any, elements: int) -> None:
        pointer = (array.data.ptr - elements * array.dtype.itemsize) % 2**64
        self.data = types.SimpleNamespace(ptr=pointer)


def test_places_beyond_32_bits(device: Any) -> None:
    """Of norms and of codes, in the tables of many large tensors."""
    far = (1 << 36) + 32
    segments, flat = table("float32", 256, lambda count: lanes.standard_words(count, 8))
    memory = on_device(device, flat)[1]
    near = placed(segments, memory.pointer)
    places = near.copy()
    for name in ("norms", "payload"):
        places[name] += far
    places["stop"][places["stop"] > 0] += far
    norms = asarray(np.zeros(int(segments["norms"][-1]) + 9, dtype=np.int32))
    codes = asarray(np.zeros(int(segments["payload"][-1]) + 128, dtype=np.int32))
    found = []
    for own, by, words in ((near, norms, codes), (places, _Far(norms, far), _Far(codes, far))):
        norms.fill(0)
        codes.fill(0)
        device.KERNELS.measure_table("absmax", "float32", own, 256, by)
        quantized(device, own, by, words)
        got, out = on_device(device, flat)
        own["x"] = placed(segments, out.pointer)["x"]
        settings = {"block_size": 256, "bits": 8, "divisor": 127, "square": False}
        device.KERNELS.dequantize_table("float32", own, by, words, **settings)
        found.append([each.get().tobytes() for each in (norms, codes, got)])
    assert found[0] == found[1]
    assert codes.get().any()


@pytest.mark.parametrize("levels", [127, 0])
def test_zeros_far_behind_codes(levels: int, device: Any) -> None:
    """By one task of a segment whose room behind its codes has more elements than an int."""
    # It has 256 elements, and begins 2**32 - 1024 behind the tensor; `x` is right for it alone.
    task = (1 << 24) - 4
    memory = on_device(device, np.full(2048, 0.7, dtype=np.float32))[1]
    out = asarray(np.full(512, 77, dtype=np.int32))
    step = 64 if levels else 256  # codes of a task
    own = np.zeros(1, dtype=device._TABLE)
    segment = own["segment"]
    segment["x"], segment["elements"] = (memory.pointer - 4 * 256 * task) % 2**64, 5
    segment["payload"] = -step * task
    segment["stop"] = segment["payload"] + step * (task + 1)
    own["task"] = -task
    name, settings = "quantize_exponential", (8, 0, np.uint32(0))
    if levels:
        name, settings = "quantize_standard", (8, levels, 0, np.uint32(0))
    norms = asarray(float_bits(1.0))
    table = asarray(own.view(np.uint8)), 1, 1
    variant = device._variant(name, 8, False) if levels else ""
    device._launch(name, "float32", 1, *table, 0, norms, *settings, out, variant=variant)
    codes = out.get().view(np.int32 if levels else np.uint8)
    assert not codes[:step].any()
    assert codes[step:].any()


def test_a_table_is_one_launch_and_is_copied_once(device: Any) -> None:
    """Whatever the step; however many segments it has."""
    segments, flat = table("float32", 256, lambda count: lanes.standard_words(count, 8))
    memory = on_device(device, flat)[1]
    for number in (2, 3, len(segments)):
        own = placed(segments[-number:], memory.pointer)
        measured = own.copy()
        measured["random"] = 0
        device._uploaded.cache_clear()  # memory at this address was in tables of other tests
        norms = fake_cupy.empty(int(segments["norms"][-1]) + 9, np.int32)
        codes = fake_cupy.empty(int(segments["payload"][-1]) + 128, np.int32)
        for step in range(3):
            own["random"][:, 2] += np.uint32(1 << 31)  # all tensors are a step further
            fake_cupy.clear_counts()
            device.KERNELS.measure_table("absmax", "float32", measured, 256, norms)
            quantized(device, own, norms, codes)
            assert len(fake_cupy.Module.launches) == 2
            assert len(fake_cupy.uploads) == (0 if step else 2)
            assert fake_cupy.waits == fake_cupy.memsets == []


def test_tables_in_flight_keep_their_contents(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a later call copies reaches a kernel that has still to run."""
    segments, flat = table("float32", 256, lambda count: lanes.standard_words(count, 8))
    tensors = [np.roll(flat, 100 * number) for number in range(4)]
    norms = norms_of(int(segments["norms"][-1]) * 256, 256)
    size = int(segments["payload"][-1]) + 128
    copies = [on_device(device, own) for own in tensors]
    there = asarray(norms)
    results = [fake_cupy.empty(size, np.int32) for _ in tensors]
    for result in results:
        result.fill(0)
    monkeypatch.setattr(fake_cupy.Stream, "deferred", True)
    fake_cupy.waits.clear()
    with device.on(0, device.own_stream(0)):
        for (_, memory), result in zip(copies, results, strict=True):
            quantized(device, placed(segments, memory.pointer), there, result)
            device._uploaded.cache_clear()  # as if many other tables had come
    assert not any(result._values.any() for result in results)  # nothing has run
    assert fake_cupy.waits == []
    device.own_stream(0).flush()
    for own, result in zip(tensors, results, strict=True):
        expected = np.zeros(size, dtype=np.int32)
        quantized(host, placed(segments, buffer(own).pointer), norms, expected)
        same(result, expected)


def test_a_table_is_copied_on_each_stream_that_reads_it(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a kernel might read it before it is there, which the stand-in notices."""
    monkeypatch.setattr(fake_cupy.Stream, "deferred", True)
    own, x = np.zeros(1, dtype=SEGMENT), on_device(device, np.ones(32, dtype=np.float32))[1]
    own["elements"], own["x"] = x.size, x.pointer
    norms, codes = asarray(float_bits(1.0)), fake_cupy.empty(32, np.int32)
    streams = [device.own_stream(0), fake_cupy.Stream(non_blocking=True)]
    for stream in streams:
        with device.on(0, stream):
            quantized(device, own, norms, codes)
    for stream in reversed(streams):
        stream.flush()
    with monkeypatch.context() as patch:
        patch.setattr(device, "_there", lambda array: there)
        late = fake_cupy.Stream(non_blocking=True)
        with device.on(0, late):
            there = device.KERNELS.upload(np.zeros(80, dtype=np.uint8))
        with (
            device.on(0, device.own_stream(0)),
            pytest.raises(AssertionError, match="still copying"),
        ):
            quantized(device, own, norms, codes)
        late.flush()


def test_a_table_is_copied_for_each_thread_that_has_a_default_stream_of_its_own(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of those have one pointer, by which CuPy's streams are equal."""
    monkeypatch.setattr(fake_cupy.Stream, "deferred", True)
    own, x = np.zeros(1, dtype=SEGMENT), on_device(device, np.ones(32, dtype=np.float32))[1]
    own["elements"], own["x"] = x.size, x.pointer
    norms, codes = asarray(float_bits(1.0)), fake_cupy.empty(32, np.int32)

    def run() -> fake_cupy.Stream:
        stream = fake_cupy.Stream.per_thread()
        with device.on(0, stream):
            quantized(device, own, norms, codes)
            fake_cupy.clear_counts()
            quantized(device, own, norms, codes)
        return stream

    streams = [run()]
    with ThreadPoolExecutor(max_workers=1) as pool:
        streams.append(pool.submit(run).result())
    assert streams[0] == streams[1]
    for stream in reversed(streams):
        stream.flush()
        assert len(fake_cupy.uploads) == 1
        fake_cupy.uploads.clear()


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_all_stages_use_the_stream_of_their_buffer(device: Any, levels: str) -> None:
    plan = Scheme(levels=levels).plan(2)
    launches = fake_cupy.Module.launches
    launches.clear()
    fake_cupy.DEFAULT_STREAM.synchronize()
    own, default = device.own_stream(0), fake_cupy.DEFAULT_STREAM
    assert own is device.own_stream(0) is not default
    x = on_device(device, np.ones(1000, dtype=np.float32))[1]
    for stream in (own, None):
        there = x._replace(stream=stream)
        norms = codec.norms(there, plan)
        assert own.running == default.running == 0  # a stage is complete when it returns
        codes = codec.quantize(there, norms, plan, KEY)
        assert own.running == default.running == 0
        if levels == "standard":
            codec.dequantize(codes, norms, plan, there)
            assert own.running == default.running == 0
        assert fake_cupy.Stream.current() is default
    number = len(launches) // 2
    assert [launch[3] for launch in launches] == [own] * number + [default] * number
    assert number == (3 if levels == "standard" else 2)


def test_empty_tensors_launch_nothing(device: Any) -> None:
    fake_cupy.Module.launches.clear()
    nothing = on_device(device, np.empty(0, dtype=np.float32))[1]
    assert device.absmax(nothing, 256).size == 0
    assert fake_cupy.Module.launches == []


def test_memory_of_the_other_kind_is_refused(device: Any) -> None:
    x = np.ones(64, dtype=np.float32)
    norms = float_bits(1.0)
    args = {"block_size": 64, "bits": 8, "dither": KEY}
    copied = on_device(device, x)[1]
    for call, message in (
        (lambda: device.absmax(buffer(x), 64), "absmax: x must be a buffer in device memory"),
        (lambda: host.absmax(copied, 64), "absmax: x must be a buffer in host memory, got one in"),
        (
            lambda: device.quantize_exponential(copied, norms, **args),
            "quantize_exponential: norms must be an array in device memory, got a numpy array",
        ),
        (
            lambda: host.quantize_exponential(buffer(x), asarray(norms), **args),
            "quantize_exponential: norms must be an array in host memory",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_arguments_are_checked_as_on_the_host(device: Any) -> None:
    copied = on_device(device, np.ones(64, dtype=np.float32))[1]
    with pytest.raises(ValueError, match="absmax: block_size must be a positive multiple of 32"):
        device.absmax(copied, 33)
    with pytest.raises(ValueError, match="out must be a contiguous int32 array of 2 elements"):
        device.absmax(copied, 32, out=fake_cupy.empty(3, np.int32))
    for kernels in (host, device):
        with pytest.raises(ValueError, match="add_exponential: bits must be 4 or 8, got 5"):
            kernels.add_exponential(0, 0, 0, bits=5, dither=KEY)


def test_buffers_know_their_memory(device: Any) -> None:
    values = np.arange(12, dtype=np.float32)
    copied = asarray(values)
    own = Buffer.of(copied)
    assert own == Buffer(copied.data.ptr, "float32", 12, copied, "device")
    assert Buffer.of(values).memory == "host"
    strided = copied.reshape(3, 4)[:, :2]
    with pytest.raises(ValueError, match=r"C-contiguous, got strides \(16, 4\) for shape \(3, 2\)"):
        Buffer.of(strided)
    # An axis of one element may have any stride.
    assert Buffer.of(copied.reshape(3, 4)[:1, :2]).size == 2
    with pytest.raises(TypeError, match="got int32; convert it"):
        Buffer.of(fake_cupy.empty(3, np.int32))


def test_a_newer_gpu_gets_the_code_of_an_older_one(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    compiled = device.compile_kernels
    monkeypatch.setattr(
        device, "compile_kernels", lambda *args: asked.append(args) or compiled(*args)
    )
    for capability in (80, 86, 120):
        device._machine_code.__wrapped__("float32", capability)
    assert [target for _, target in asked] == ["sm_80", "compute_80", "compute_90"]


def test_an_older_gpu_than_the_compiler_knows_is_named(device: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"compute capability 70 or more for NVRTC 12\.9, got 61"
    ):
        device._machine_code.__wrapped__("float32", 61)


def test_kernels_that_do_not_load_are_a_problem_with_a_remedy(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver too old for CuPy, too old for what NVRTC makes, an old GPU, no NVRTC."""
    look = device.problem.__wrapped__
    assert look(0) is None

    def fail(error: Exception) -> Any:
        def raising(*_: Any) -> None:
            raise error

        return raising

    unsupported = RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    for where, name, error in (
        (device.runtime, "getDeviceCount", device.runtime.CUDARuntimeError("InsufficientDriver")),
        (device, "_module", unsupported),
        (device, "_module", ImportError("libnvrtc.so.13")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail(error))
            found = look(0)
        assert str(error) in found
        assert "install" in found
    monkeypatch.setattr(device, "_module", device._module.__wrapped__)
    monkeypatch.setattr(device, "_machine_code", device._machine_code.__wrapped__)
    monkeypatch.setattr(device.cupy.cuda.Device, "compute_capability", "61")
    assert "got 61" in look(0)


def test_what_was_compiled_is_kept_for_other_processes(
    device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever code depends on is another file."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    compiled = []

    def compile_kernels(dtype: str | None, target: str) -> tuple[bytes, str]:
        compiled.append((dtype, target))
        return f"{dtype} {target}".encode(), ""

    monkeypatch.setattr(device, "compile_kernels", compile_kernels)
    code = device._machine_code.__wrapped__
    for _ in range(2):
        assert code("float32", 80) == b"float32 sm_80"
        assert code("float32", 86) == b"float32 compute_80"
        assert code(None, 80) == b"None sm_80"
    assert len(compiled) == 3
    for where, name, value in (
        (device, "OPTIONS", (*device.OPTIONS, "--more")),
        (device, "THREADS", 128),
        (device, "PIECE", 1024),
        (device, "source", lambda: "other"),
        (device.nvrtc, "getVersion", lambda: (13, 0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            before = len(compiled)
            code("float32", 80)
            code("float32", 80)
            assert len(compiled) == before + 1, name


class Memory:
    """What mpi4py hands to the function of an operation."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The functions of which mpi_ops.op makes operations; no MPI is started."""
    functions: list[Any] = []
    mpi = types.SimpleNamespace(
        Op=types.SimpleNamespace(Create=lambda function, commute: functions.append(function)),
        Is_finalized=lambda: True,
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    before = sys.modules.pop("mpi_ops.op", None)
    yield functions
    sys.modules.pop("mpi_ops.op")
    vars(mpi_ops).pop("op")
    if before is not None:
        sys.modules["mpi_ops.op"] = mpi_ops.op = before


def test_callback_of_the_operation(
    device: Any, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made where there is a GPU it takes both kinds of memory; elsewhere CuPy is never asked."""
    op = importlib.import_module("mpi_ops.op")
    random = dither(5, "mpi_ops.exponential_sum", 0, 0, Stage.REDUCE)
    source, target = random_bytes(300, 1), random_bytes(300, 2)
    expected = target.copy()
    host.add_exponential(source.ctypes.data, expected.ctypes.data, 300, bits=8, dither=random)

    monkeypatch.setattr(op, "_driver_is_there", lambda: True)
    op._operation(8, 5)
    copies = asarray(source), asarray(target)
    made[0](*(Memory(own.data.ptr, 300) for own in copies), None)
    same(copies[1], expected)
    own = target.copy()
    made[0](Memory(source.ctypes.data, 300), Memory(own.ctypes.data, 300), None)
    np.testing.assert_array_equal(own, expected)

    monkeypatch.setattr(op, "_driver_is_there", lambda: False)
    monkeypatch.setattr(device, "device_of", None)
    op._operation(8, 5)
    made[1](Memory(source.ctypes.data, 300), Memory(target.ctypes.data, 300), None)
    np.testing.assert_array_equal(target, expected)

    def broken() -> bool:
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(op, "_driver_is_there", lambda: True)
    monkeypatch.setattr(device, "prepare_addition", broken)
    with pytest.warns(UserWarning, match="only those of the host: no NVRTC"):
        assert op._addition() == host.add_exponential
