"""Hostile input: any values, shapes and configurations, any payload, and kernels under sanitizers.

GQ_FUZZ_EXAMPLES=20000 tries more configurations than the default run, GQ_FUZZ_SECONDS=600 more
inputs of the sanitized kernels, with each driver. What was tried is printed at the end of the
session.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, INF_BITS, buffer

from gq_horovod.path.config import Config
from mpi_ops import codec
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.scheme import Plan

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).with_name("fuzz") / "kernels.cpp"
KERNELS = ROOT / "mpi_ops" / "kernels" / "host.cpp"
THREADS = KERNELS.with_name("threads.cpp")
EXAMPLES = int(os.environ.get("GQ_FUZZ_EXAMPLES", "300"))
SECONDS = int(os.environ.get("GQ_FUZZ_SECONDS", "4"))  # of each driver
BUILD_SECONDS = 240

fuzzing = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
Record = Callable[[str, object], None]

FLT_MAX = float(np.finfo(np.float32).max)
HOSTILE = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.2e-38, 1.0, -1.0, 65504.0, 1e30, FLT_MAX, -FLT_MAX]
NOT_FINITE = [np.inf, -np.inf, np.nan]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    levels = draw(st.sampled_from(["standard", "exponential", "two-hop"]))
    ranks = draw(st.integers(1, 9))
    lowest = 2 if levels == "two-hop" else (2 * ranks).bit_length() + 1
    bits = draw(
        st.sampled_from([4, 8]) if levels == "exponential" else st.integers(min(lowest, 16), 16)
    )
    block = draw(st.sampled_from([32, 64, 96, 256, 1024, None]))
    norm = draw(st.sampled_from(["max", "l2"]))
    return Config(levels=levels, bits=bits, block_size=block, norm=norm).plan(ranks)


def tensors(draw: st.DrawFn, plan: Plan, dtype: str) -> list[np.ndarray]:
    """One tensor for each rank, with values that are hostile and seldom not finite."""
    count = draw(st.sampled_from([0, 1, 31, 32, 33, 255, 257]) | st.integers(0, 700))
    pool = HOSTILE + draw(st.sampled_from([[], [], NOT_FINITE]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-40, 1e-20, 1.0, 1e20]))
    made = []
    for _ in range(plan.world_size):
        x = random.standard_normal(count) * scale
        where = random.random(count) < draw(st.sampled_from([0.0, 0.05, 1.0]))
        x[where] = random.choice(pool, size=int(where.sum()))
        with np.errstate(over="ignore"):
            made.append(x.astype(np.float32).astype(DTYPES[dtype]))
    return made


def reduced(xs: list[np.ndarray], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The mean by all stages, and the global norms."""
    buffers = [buffer(x) for x in xs]
    count = xs[0].size
    norms = np.max([codec.norms(each, plan) for each in buffers], axis=0).astype(np.int32)
    keys = [dither(0, "w", 0, rank, Stage.QUANTIZE) for rank in range(plan.world_size)]
    if plan.levels == "standard":
        payload = sum(
            codec.quantize(each, norms, plan, key) for each, key in zip(buffers, keys, strict=True)
        )
    else:
        size = codec.shard_size(count, plan) * plan.world_size
        codes = [
            codec.quantize(each, norms, plan, key, out=np.empty(size, codec.payload_dtype(plan)))
            for each, key in zip(buffers, keys, strict=True)
        ]
        shares = []
        for rank in range(plan.world_size):
            pieces = [np.split(own, plan.world_size)[rank] for own in codes]
            key = dither(0, "w", 0, rank, Stage.REDUCE)
            own = codec.norms_of_share(norms, count, rank, plan)
            shares.append(codec.reduce(pieces, plan, key, norms=own))
        payload = np.concatenate(shares)
    out = np.full(count, 7, dtype=xs[0].dtype)
    codec.dequantize(payload, norms, plan, buffer(out))
    return out, norms


@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_values_through_all_stages(dtype: str, record_property: Record) -> None:
    """Finite where all ranks are, within the norm; NaN where any is not; zeros stay."""
    tried = 0

    @fuzzing
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        plan = data.draw(plans())
        xs = tensors(data.draw, plan, dtype)
        kept = [x.copy() for x in xs]
        out, norms = reduced(xs, plan)
        for x, before in zip(xs, kept, strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), before.view(np.uint8))
        block = plan.block_for(xs[0].size)
        own = np.repeat(norms, block)[: xs[0].size]
        finite = own < INF_BITS
        got = out.astype(np.float64)
        assert np.isnan(got[~finite]).all()
        limit = own.view(np.float32).astype(np.float64)
        # A result in a narrow type may round up beyond its largest number where the norm does.
        largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
        inside = finite & (limit <= largest)
        assert np.isfinite(got[inside]).all()
        # Two hops: the mean's own norm may be rounded up once more.
        eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps) + 2.0**-20
        tiny = max(float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal), 2.0**-149)
        assert (np.abs(got[inside]) <= limit[inside] * (1 + eps) + tiny).all()
        assert (got[own == 0] == 0).all()

    check()
    record_property("job", f"hostile values, {dtype}: {tried} configurations, no failure")


def test_any_payload_decodes_to_finite_numbers(record_property: Record) -> None:
    """Of standard and two-hop levels; tests of packing do the same for exponential ones."""
    tried = 0

    @fuzzing
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        plan = data.draw(plans().filter(lambda plan: plan.levels != "exponential"))
        count = data.draw(st.integers(1, 700))
        random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        block = plan.block_for(count)
        norms = random.integers(0, 0x7E000000, -(-count // block), dtype=np.int32)
        size = codec.payload_size(count, plan)
        if plan.levels == "two-hop":
            size = codec.reduced_size(count, plan) * plan.world_size
        payload = np.frombuffer(random.bytes(4 * size), dtype=np.int32).copy()
        out = np.empty(count, dtype=np.float32)
        codec.dequantize(payload, norms, plan, buffer(out))
        if plan.levels == "standard":
            assert np.isfinite(out).all()

    check()
    record_property("job", f"any payload: {tried} payloads, no failure")


NO_LIBFUZZER = (
    "libFuzzer needs clang++ and the runtime of its sanitizers: install both "
    "(Debian: apt-get install clang libclang-rt-VERSION-dev, the version that of clang)"
)


def run_all(commands: list[list[str]]) -> None:
    """All at the same time."""
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        statuses = [process.wait(BUILD_SECONDS) for process in running]
        assert not any(statuses)
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module", params=["stand-alone", "libFuzzer"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the kernels with sanitizers; skipped where a compiler has none."""
    directory = tmp_path_factory.mktemp("fuzz")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if request.param == "libFuzzer":
        compiler = shutil.which("clang++")
        coverage, driver = ["-fsanitize=fuzzer-no-link"], ["-fsanitize=fuzzer", "-DGQ_LIBFUZZER"]
        smallest = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
        remedy = NO_LIBFUZZER
    else:
        compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
        coverage, driver = [], []
        smallest = "int main() {}"
        remedy = f"{compiler} has no AddressSanitizer and UBSan runtime"
    if compiler is None:
        pytest.skip(NO_LIBFUZZER if request.param == "libFuzzer" else "no C++ compiler")
    probe = directory / "probe.cpp"
    probe.write_text(smallest + "\n")
    words = [compiler, *sanitize, *driver, str(probe), "-o", str(directory / "probe")]
    if subprocess.run(words, capture_output=True, timeout=BUILD_SECONDS).returncode:
        pytest.skip(remedy)

    # Kernels without optimization: UBSan's checks take clang++ a minute otherwise.
    common = [compiler, "-std=c++17", "-g1", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
    common += sanitize
    objects, commands = [], []
    for isa in host.INSTRUCTION_SETS:
        objects.append(str(directory / f"{isa}.o"))
        march = [] if isa == "baseline" else [f"-march={isa.replace('_', '-')}"]
        source = ["-O0", *march, *coverage, f"-DGQ_ISA={isa}", "-c", str(KERNELS)]
        commands.append([*common, *source, "-o", objects[-1]])
        if isa == host.best_instruction_set():
            break
    objects.append(str(directory / "threads.o"))
    commands.append([*common, "-O1", "-pthread", "-c", str(THREADS), "-o", objects[-1]])
    objects.append(str(directory / "harness.o"))
    commands.append([*common, "-O1", *coverage, *driver[1:], "-c", str(HARNESS), "-o", objects[-1]])
    run_all(commands)
    program = directory / "kernels"
    run_all([[*common, *driver[:1], "-rdynamic", "-pthread", *objects, "-ldl", "-o", str(program)]])
    return program


# Inputs of all lengths from the start: libFuzzer would begin with the shortest ones, and take
# minutes to those that reach the last parameters.
QUICK = ["-seed=1", "-len_control=0", "-max_len=512"]


def run(
    program: Path, *arguments: object, fault: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GQ_FUZZ_LIBRARY": str(host._LIBRARY)}
    if fault is not None:  # its report is not for people
        quick = {"ASAN_OPTIONS": "symbolize=0", "UBSAN_OPTIONS": "symbolize=0"}
        env |= {**quick, "GQ_FUZZ_FAULT": fault}
    words = [str(program), *map(str, arguments)]
    limit = SECONDS + 120
    return subprocess.run(
        words, capture_output=True, text=True, errors="replace", timeout=limit, env=env
    )


def test_kernels_under_sanitizers(
    harness: Path, tmp_path: Path, request: pytest.FixtureRequest, record_property: Record
) -> None:
    """Every kernel of every instruction set of this CPU, and of the library, the same bytes."""
    failed = tmp_path / "input"
    driver = request.node.callspec.params["harness"]
    done = run(harness, f"-max_total_time={SECONDS}", *QUICK, f"-exact_artifact_path={failed}")
    again = f"GQ_FUZZ_LIBRARY={host._LIBRARY} {harness} {failed}"
    assert done.returncode == 0, f"{done.stderr}\nto run this input again: {again}"
    found = re.search(r"^Done (\d+) runs in", done.stderr, re.MULTILINE)
    assert found, done.stderr
    assert int(found[1]) > 0
    record_property(
        "job", f"kernels, ASan and UBSan, {driver}: {int(found[1]):,} inputs, no failure"
    )


# What the harness can make a kernel do wrong, and a pattern of what it says then.
FAULTS = {
    "writes beyond the end": "heap-buffer-overflow",
    "reads beyond the end": "heap-buffer-overflow",
    "signed overflow": "signed integer overflow",
    "norm with a sign": "fuzz: a norm has a sign",
    "norm that is lost": "fuzz: (the L2 norm is below|one norm is finite)",
    "writes to x": "fuzz: a kernel has written to its input",
    "wrong sign": "fuzz: (standard|two hops): off by",
    "not finite": "fuzz: (exponential|codes of no rank): a finite norm gave a number that is not",
    "zero norm, no zero": "fuzz: (exponential|codes of no rank): a norm of zero did not give zero",
    "sum that depends on the order": "fuzz: add_exponential: the order of the inputs matters",
    "mean beyond the largest": "fuzz: reduce_exponential: a level beyond those of the inputs",
    "code that is lost": "fuzz: elias: other codes came back",
    "reads beyond a stream": "heap-buffer-overflow",
    "stream that is cut": "fuzz: elias: a stream was refused",
    "codes of another instruction set": "gives other bytes than baseline",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(harness: Path, fault: str, tmp_path: Path) -> None:
    """By both drivers, which leave an input that fails again, and that passes without the fault."""
    failed = tmp_path / "input"
    where = f"-exact_artifact_path={failed}"
    done = run(harness, "-max_total_time=60", *QUICK, where, fault=fault)
    assert done.returncode != 0
    assert re.search(FAULTS[fault], done.stderr), done.stderr
    again = run(harness, failed, fault=fault)
    assert again.returncode != 0
    assert re.search(FAULTS[fault], again.stderr), again.stderr
    sound = run(harness, failed)
    assert sound.returncode == 0, sound.stderr
