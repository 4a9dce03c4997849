"""Threads that share a kernel call: the same bytes for any number, callers, forks, defaults."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from reference import DTYPES
from test_memory import CASES, SUPPORTED, result

import mpi_ops
from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host, interface
from mpi_ops.kernels.threads import (
    DEFAULT_MOST,
    LOCAL_SIZES,
    THREADS_VARIABLE,
    chosen_threads,
    quota,
)

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (1, 2, 3, 7)
# Some pieces, and an end anywhere; the second has a last piece of a single element.
SIZES = (300_007, 4 * 49_152 + 1)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = mpi_ops.get_threads()
    yield
    mpi_ops.set_threads(before)


def pieces() -> int:
    """How many pieces of shared calls all threads but the callers have done in this process."""
    counter = host._library().gq_pieces_of_helpers
    counter.restype = ctypes.c_int64
    count: int = counter()
    return count


# ------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_any_number_gives_the_same_bytes(name: str, dtype: str) -> None:
    """Of every kernel; nothing outside its result is written, and no input is."""
    for count in SIZES:
        inputs = CASES[name].inputs(count, dtype)
        found = set()
        for number in NUMBERS:
            mpi_ops.set_threads(number)
            found.add(result(name, count, dtype, inputs).tobytes())
        assert len(found) == 1


@pytest.mark.parametrize(
    "name", ["quantize standard 10", "quantize square 5", "quantize square 8", "l2norm"]
)
def test_every_instruction_set_shares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = CASES[name].inputs(SIZES[0], "float32")
    found = set()
    for instruction_set in SUPPORTED:
        monkeypatch.setattr(host, "_instruction_set", instruction_set)
        for number in NUMBERS:
            mpi_ops.set_threads(number)
            found.add(result(name, SIZES[0], "float32", inputs).tobytes())
    assert len(found) == 1


BLOCKS = [256, 100_032, 1 << 21]  # smaller than a piece, larger, and one for the tensor


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("levels", ["standard", "square", "exponential"])
def test_pieces_begin_anywhere_in_a_block(levels: str, block: int) -> None:
    count = SIZES[0]
    x = np.random.default_rng(1).standard_normal(count, dtype=np.float32)
    key = dither(1, "w", 0, 0, Stage.QUANTIZE)
    shared = {"block_size": block, "bits": 7 if levels == "standard" else 8}
    found = set()
    for number in NUMBERS:
        mpi_ops.set_threads(number)
        source, target = host.Buffer.of(x), np.empty_like(x)
        norms = host.absmax(source, block)
        assert host.l2norm(source, block).size == norms.size
        if levels == "exponential":
            codes = host.quantize_exponential(source, norms, dither=key, **shared)
            host.dequantize_exponential(codes, norms, host.Buffer.of(target), **shared)
        else:
            shared["square"] = levels == "square"
            codes = host.quantize_standard(source, norms, dither=key, levels=63, **shared)
            divisor = lanes.units(63, shared["square"])
            host.dequantize_standard(
                codes, norms, host.Buffer.of(target), divisor=divisor, **shared
            )
        found.add((norms.tobytes(), codes.tobytes(), target.tobytes()))
    assert len(found) == 1


def test_pieces_cut_through_a_table_anywhere() -> None:
    """Segments of all sizes, empty ones and absent ones among them, with room behind each."""
    random = np.random.default_rng(2)
    sizes = [0, 1, 31, 200_003, 0, 32, 70_000, 5, *random.integers(0, 3000, 200), 90_000, 0]
    tensors = [random.standard_normal(size, dtype=np.float32) for size in sizes]
    segments = np.zeros(len(sizes), dtype=interface.SEGMENT)
    norms = payload = 0
    for own, x, size in zip(segments, tensors, sizes, strict=True):
        own["elements"], own["norms"], own["payload"] = size, norms, payload
        own["x"] = 0 if size in (31, 70_000) else x.ctypes.data
        norms += lanes.blocks(size, 64)
        payload += lanes.standard_words(size, 8) + 32
        own["stop"] = payload
        own["random"] = (1, 2, 3, size)
    found = set()
    for number in NUMBERS:
        mpi_ops.set_threads(number)
        measured = np.full(norms, -1, dtype=np.int32)
        words = np.full(payload, -1, dtype=np.int32)
        host.KERNELS.measure_table("absmax", "float32", segments, 64, measured)
        host.KERNELS.quantize_table(
            *("float32", segments, measured, words),
            block_size=64,
            bits=8,
            levels=127,
            square=False,
        )
        assert (measured >= 0).all()
        found.add((measured.tobytes(), words.tobytes()))
    assert len(found) == 1


FLUSH = """
#include <xmmintrin.h>
extern "C" void flush(int on) {
  _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
}
"""


def flush_denormals(directory: Path) -> Callable[[int], object]:
    """A function that switches it for the calling thread."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("flushing is switched on x86-64, with a compiler")
    (directory / "flush.cpp").write_text(FLUSH)
    words = [compiler, "-shared", "-fPIC", "flush.cpp", "-o", "flush.so"]
    subprocess.run(words, cwd=directory, check=True, timeout=60)
    function: Callable[[int], object] = ctypes.CDLL(str(directory / "flush.so")).flush
    return function


def test_arithmetic_is_that_of_the_caller(tmp_path: Path) -> None:
    """All pieces of a call flush denormals where its caller does, as TensorFlow's threads do."""
    flush = flush_denormals(tmp_path)
    count = 1 << 21
    norms = np.full(1, 1 << 20, dtype=np.int32)  # a denormal
    codes = np.full(count, 0x7F, dtype=np.uint8)

    def decoded() -> np.ndarray:
        out = np.full(count, 7, dtype=np.float32)
        host.dequantize_exponential(codes, norms, host.Buffer.of(out), block_size=count, bits=8)
        return out.view(np.int32)

    mpi_ops.set_threads(3)
    for _ in range(10):
        assert (decoded() == 1 << 20).all()
        flush(1)
        flushed = decoded()
        flush(0)
        assert (flushed == 0).all()


# ----------------------------------------------------------------------------------------- threads


def call(number: int, seed: int) -> bytes:
    """All stages of a tensor that is large enough to be shared."""
    mpi_ops.set_threads(number)
    x = np.random.default_rng(seed).standard_normal(200_000, dtype=np.float32)
    source, out = host.Buffer.of(x), np.empty_like(x)
    norms = host.absmax(source, 256)
    key = dither(seed, "w", 0, 0, Stage.QUANTIZE)
    options = {"block_size": 256, "bits": 8}
    codes = host.quantize_standard(source, norms, levels=127, dither=key, **options)
    host.dequantize_standard(codes, norms, host.Buffer.of(out), divisor=127, **options)
    return out.tobytes()


def test_helpers_work_on_large_calls_alone() -> None:
    x = np.ones(32_000, dtype=np.float32)
    mpi_ops.set_threads(3)
    before = pieces()
    for _ in range(20):
        host.absmax(host.Buffer.of(x), 256)
    assert pieces() == before
    x = np.ones(1 << 22, dtype=np.float32)
    for _ in range(200):
        host.absmax(host.Buffer.of(x), 256)
        if pieces() > before:
            break
    assert pieces() > before


def test_many_callers_at_a_time() -> None:
    """One of them has the pool; the others work alone, and all get their own bytes."""
    expected = [call(1, seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as callers:
        futures = [callers.submit(call, 1 + turn % 4, turn % 4) for turn in range(64)]
        found = [future.result(timeout=120) for future in futures]
    assert found == [expected[turn % 4] for turn in range(64)]


def test_a_fork_begins_with_a_pool_of_its_own() -> None:
    """Also while another thread has the parent's."""
    expected = call(3, 1)
    with ThreadPoolExecutor(1) as other:
        busy = other.submit(lambda: [call(3, 2) for _ in range(50)])
        for _ in range(10):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.write(writing, b"same" if call(3, 1) == expected else b"other")
                finally:
                    os._exit(0)
            os.close(writing)
            with os.fdopen(reading, "rb") as answer:
                assert answer.read() == b"same"
            assert os.waitpid(child, 0)[1] == 0
        busy.result(timeout=120)
    assert call(3, 1) == expected


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in (THREADS_VARIABLE, *LOCAL_SIZES)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_ends_while_threads_wait_and_work() -> None:
    code = """
import threading, numpy as np, mpi_ops
from mpi_ops.kernels import host
mpi_ops.set_threads(4)
x = host.Buffer.of(np.ones(1 << 22, dtype=np.float32))
def forever():
    while True:
        host.absmax(x, 256)
threading.Thread(target=forever, daemon=True).start()
for _ in range(20):
    host.absmax(x, 256)
print("end")
"""
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "end"), done.stderr


# ----------------------------------------------------------------------------------------- numbers


def test_the_variable_sets_the_number() -> None:
    code = "import mpi_ops; print(mpi_ops.get_threads())"
    assert python(code, **{THREADS_VARIABLE: "5"}).stdout.strip() == "5"
    assert python(code, OMPI_COMM_WORLD_LOCAL_SIZE="100000").stdout.strip() == "1"


@pytest.mark.parametrize("value", ["0", "65", "-1", "two", "1.5"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=THREADS_VARIABLE) as error:
        chosen_threads({THREADS_VARIABLE: value})
    assert repr(value) in str(error.value)
    assert (
        THREADS_VARIABLE
        in python("import mpi_ops; mpi_ops.get_threads()", **{THREADS_VARIABLE: value}).stderr
    )


@pytest.mark.parametrize(
    ("count", "kind"), [(0, ValueError), (65, ValueError), ("2", TypeError), (True, TypeError)]
)
def test_other_counts_are_refused(count: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="set_threads: count must be"):
        mpi_ops.set_threads(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOCAL_SIZES)
def test_ranks_on_a_host_divide_its_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpi_ops.kernels.threads.quota", lambda: 1 << 20)
    for cores, ranks, expected in [
        (16, 1, DEFAULT_MOST),
        (16, 4, 4),
        (16, 5, 3),
        (4, 4, 1),
        (2, 8, 1),
    ]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert chosen_threads({name: str(ranks)}) == expected
        assert chosen_threads({name: "", THREADS_VARIABLE: " "}) == min(cores, DEFAULT_MOST)


def test_srun_tells_the_ranks_of_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpi_ops.kernels.threads.quota", lambda: 1 << 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for told, expected in [("1", 8), ("8(x2)", 2), ("2(x3),16", 1), ("", 8)]:
        assert chosen_threads({"SLURM_STEP_TASKS_PER_NODE": told}) == expected


def test_a_quota_limits_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("mpi_ops.kernels.threads.quota", lambda: 3)
    assert chosen_threads({}) == 3


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/pods/one\n", {"cgroup/pods/one/cpu.max": "max 100000"}, 1 << 20),
        ("0::/pods/one\n", {"cgroup/pods/one/cpu.max": "250000 100000"}, 3),
        ("0::/pods/one\n", {"cgroup/pods/cpu.max": "200000 100000"}, 2),
        ("0::/outside\n", {"cgroup/cpu.max": "50000 100000"}, 1),
        (
            "5:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cgroup/cpu/x/cpu.cfs_quota_us": "400000", "cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "3:cpu,cpuacct:/x\n",
            {"cgroup/cpu/x/cpu.cfs_quota_us": "-1", "cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            1 << 20,
        ),
        ("", {}, 1 << 20),
    ],
)
def test_quotas_of_both_versions(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    for name, text in {"../../proc/self/cgroup": groups, **files}.items():
        path = (tmp_path / "sys/fs" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert quota(tmp_path) == expected


# --------------------------------------------------------------------------------- ThreadSanitizer

RACES = """
#include <cstdlib>
#include <thread>
#include <vector>
#include "threads.h"
extern "C" void gq_set_threads(int);
int main() {
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([c] {
      for (int turn = 0; turn < 300; ++turn) {
        gq_set_threads(1 + (turn + c) % 5);
        std::vector<int64_t> done(static_cast<size_t>(turn % 40));
        auto* all = &done;
        gq::share([](const void* to, int64_t i) {
          auto* own = *static_cast<std::vector<int64_t>* const*>(to);
          (*own)[static_cast<size_t>(FAULT)] += i + 1;
        }, &all, static_cast<int64_t>(done.size()));
        for (size_t i = 0; i < done.size(); ++i)
          if (done[i] != static_cast<int64_t>(i) + 1) std::abort();
      }
    });
  for (auto& caller : callers) caller.join();
}
"""


@pytest.mark.parametrize(("place", "sound"), [("i", True), ("i / 2", False)])
def test_no_races(place: str, sound: bool, tmp_path: Path) -> None:
    """ThreadSanitizer finds none in the pool, and finds one that is put into the work."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "races.cpp", tmp_path / "races"
    kernels = ROOT / "mpi_ops" / "kernels"
    source.write_text(RACES.replace("FAULT", place))
    words = [compiler, "-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", f"-I{kernels}"]
    words += [str(source), str(kernels / "threads.cpp"), "-o", str(program)]
    built = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    if built.returncode:
        pytest.skip(f"{compiler} has no ThreadSanitizer runtime: {built.stderr[-300:]}")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=240, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's layout of memory")
    assert (done.returncode == 0) == sound, done.stderr
