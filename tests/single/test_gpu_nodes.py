"""The paper's table for nodes with a GPU each: by hand, in the right direction, inputs named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_horovod import cli
from gq_horovod.advisor import gpu_nodes, model
from gq_horovod.advisor.gpu_nodes import NCCL, PATHS, STAGED, Inputs
from gq_horovod.advisor.model import Method, Workload

DEEPLIGHT = model.WORKLOADS[0]
P = DEEPLIGHT.parameters
# Nothing costs time but the bytes on the link, of a gigabyte a second, whole.
IDEAL = Inputs(
    gpu_memory=1e30,
    kernel_share=1.0,
    pcie=1e30,
    host_sum=1e30,
    nvlink=1e30,
    nvlink_share=1.0,
    host_exchange=1e30,
    allreduce_efficiency=1.0,
    gather_efficiency=1.0,
    latency=0.0,
    message_overhead=0.0,
    cycle_time=0.0,
    operation_overhead=0.0,
    hook=0.0,
    plain_hook=0.0,
)
BY_NAME = {method.name: method for method in gpu_nodes.METHODS}
EIGHT = {
    method.name: method
    for method in gpu_nodes.methods(gpu_nodes.cluster_of(IDEAL, 64, 8e9, NCCL, 8))
}


def seconds(
    method: Method | str,
    inputs: Inputs,
    path: str = NCCL,
    ranks: int = 64,
    rate: float = 8e9,
    gpus: int = 1,
) -> float:
    """A step of DeepLight with a second of compute behind which nothing hides."""
    own = {1: BY_NAME, 8: EIGHT}[gpus][method] if isinstance(method, str) else method
    cluster = gpu_nodes.cluster_of(inputs, ranks, rate, path, gpus)
    return gpu_nodes.step_time(own, DEEPLIGHT, inputs, cluster, 1.0, 0.0)


@pytest.mark.parametrize(
    ("method", "element_bytes"),
    [
        ("none", 4),
        ("fp16", 2),
        ("standard", 4 / 3 + 4 / 256),  # three lanes of 10 bits to a word, a norm for 256
        ("standard 8 bit", 1 + 4 / 256),
        ("exponential", 1),  # one norm in all
        ("exponential 4 bit", 1 / 2 + 4 / 256),
        ("two-hop", 1 + 2 * 4 / 256),  # norms of the second rounding, too
        ("two-hop 4 bit", 1 / 2 + 2 * 4 / 256),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_bytes_alone(method: str, element_bytes: float, path: str) -> None:
    """Everything crosses the link 2(n-1)/n times."""
    expected = 1 + 2 * 63 / 64 * element_bytes * P / 1e9
    assert seconds(method, IDEAL, path) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    ("method", "element_bytes", "factor"),
    [
        # Eight hosts' codes of a share each, by norms of all elements.
        ("standard, hierarchical", 1 + 4 / 256, 7 / 8),
        ("exponential, hierarchical", 1, 7 / 8),
        ("two-hop 4 bit, hierarchical", 1 / 2 + 2 * 4 / 256, 7 / 8),
        # An Allreduce is no worse, but for its bits; every GPU sends codes to each of 56 others.
        ("standard, flat", 4 / 3 + 4 / 256, 7 / 8),
        ("none", 4, 7 / 8),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_bytes_alone_of_eight_nodes(
    method: str, element_bytes: float, factor: float, path: str
) -> None:
    expected = 1 + 2 * factor * element_bytes * P / 1e9
    assert seconds(method, IDEAL, path, gpus=8) == pytest.approx(expected, rel=2e-2)


def test_flat_codes_of_eight_nodes_by_hand() -> None:
    """Alltoall: each of a node's eight GPUs sends 56/64 of its codes elsewhere. Then a ring."""
    expected = 1 + (8 * 56 / 64 + 63 / 64) * P / 1e9
    assert seconds("exponential, flat", IDEAL, gpus=8) == pytest.approx(expected, rel=2e-2)


def test_exchanges_inside_a_node_by_hand() -> None:
    """Seven eighths of the floats out, and again of the results, at a GB/s."""
    slow = {"nvlink": 2e9, "nvlink_share": 0.5, "host_exchange": 1e9}
    more = 2 * 7 / 8 * 4 * P / 1e9
    for path in PATHS:
        name = "standard, hierarchical"
        fast = seconds(name, IDEAL, path, gpus=8)
        assert seconds(name, replace(IDEAL, **slow), path, gpus=8) == pytest.approx(fast + more)
    # Through host memory: 7/8 out and in; then an eighth out and 7/8 in.
    copied = seconds("standard, hierarchical", replace(IDEAL, pcie=1e9), STAGED, gpus=8)
    fast = seconds("standard, hierarchical", IDEAL, STAGED, gpus=8)
    codes = 2 * P / 8 / 1e9  # of a share; they hide behind the link
    assert fast + 2.75 * 4 * P / 1e9 < copied < fast + 2.75 * 4 * P / 1e9 + codes


def test_standard_levels_are_those_of_so_many_nodes() -> None:
    cluster = gpu_nodes.cluster_of(IDEAL, 64, 8e9, NCCL, 8)
    plans = {
        name: own.config.plan(own.parties(cluster).ranks)
        for name, own in EIGHT.items()
        if own.config is not None and own.why_not(cluster) is None
    }
    within = plans["standard, hierarchical"]
    assert (within.bits, within.level_count) == (8, 15)
    flat = plans["standard, flat"]
    assert (flat.bits, flat.level_count) == (10, 7)
    assert "standard 8 bit, hierarchical" not in EIGHT  # the same


def test_the_uncompressed_step_by_hand() -> None:
    """Through host memory: 4P bytes out and back at 2 GB/s, and three times 4P added at 3 GB/s.

    The copies of a message of 128 MiB are hidden behind the link's work on others, as those of
    codes are.
    """
    wire = 2 * 63 / 64 * 4 * P / 1e9
    inputs = replace(IDEAL, pcie=2e9, host_sum=3e9, plain_hook=0.01)
    hooks = 0.01 * 50
    assert seconds("none", inputs) == pytest.approx(1 + wire + hooks)
    network, copies, messages = wire + 63 / 64 * 4 * P / 1e9, 2 * 4 * P / 2e9, 19
    staged = 1 + network + copies / messages + hooks
    assert seconds("none", inputs, STAGED) == pytest.approx(staged)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("workload", model.WORKLOADS, ids=lambda own: own.name)
@pytest.mark.parametrize(
    ("method", "element_bytes"),
    [("fp16", 2), ("standard", 4 / 3 + 4 / 256), ("standard 8 bit", 1 + 4 / 256)],
)
def test_fewer_bytes_on_the_same_way_gain_at_most_their_ratio(
    path: str, workload: Workload, method: str, element_bytes: float
) -> None:
    """What is summed by Horovod's Allreduce differs from none in bytes and kernels alone."""
    for rate in (1e9, 1e10, 1e11, 4e11):
        cluster = gpu_nodes.cluster_of(Inputs(), 64, rate, path)
        none, codes = (
            gpu_nodes.step_time(BY_NAME[own], workload, Inputs(), cluster, workload.compute, 0.5)
            for own in ("none", method)
        )
        assert none / codes < 4 / element_bytes


def test_slow_copies_take_turns_with_nothing() -> None:
    """Codes pass 0.1 GB/s twice; what the link does meanwhile is hidden but for a chunk."""
    inputs = replace(IDEAL, pcie=1e8)
    copies = 2 * (1 + 4 / 256) * P / 1e8
    assert seconds("standard 8 bit", inputs, STAGED) == pytest.approx(1 + copies, rel=2e-2)
    # Shares go to the GPU to be reduced: out, in, out, in, of which one is an n-th.
    assert seconds("exponential", inputs, STAGED) == pytest.approx(
        1 + (3 + 1 / 64) * P / 1e8, rel=2e-2
    )


def test_kernels_of_the_gpu_by_hand() -> None:
    """Standard codes: read for the norm, read and written by two kernels; at a GB/s each."""
    inputs = replace(IDEAL, gpu_memory=2e9, kernel_share=0.5)
    moved = (4 + 2 * (4 + 1)) * P / 1e9  # longer than the codes are on the link
    sums = 3 * 63 / 64 * P / 1e9 + 2 * 63 / 64 * P / 1e9  # which hide behind the kernels
    found = seconds("standard 8 bit", inputs)
    assert 1 + moved < found < 1 + moved + 0.1 * sums


def test_hooks_are_python_of_each_gradient() -> None:
    slow = replace(IDEAL, hook=1.0)
    assert seconds("standard", slow) == pytest.approx(seconds("standard", IDEAL) + 50)
    assert seconds("none", slow) == seconds("none", IDEAL)


# Methods, and GPUs of a node.
SETTINGS = [
    (method, gpus)
    for gpus, some in ((1, BY_NAME), (8, EIGHT))
    for method in some.values()
    if method.why_not(gpu_nodes.cluster_of(IDEAL, 64, 8e9, NCCL, gpus)) is None
]
settings = st.sampled_from(SETTINGS)
rates = st.floats(1e8, 4e11)


@given(settings, st.sampled_from(PATHS), rates, rates, st.floats(0, 1))
def test_a_faster_network_is_never_slower(
    setting: tuple[Method, int], path: str, one: float, other: float, overlap: float
) -> None:
    method, gpus = setting

    def step(rate: float) -> float:
        cluster = gpu_nodes.cluster_of(Inputs(), 64, rate, path, gpus)
        return gpu_nodes.step_time(method, DEEPLIGHT, Inputs(), cluster, 0.015, overlap)

    slow, fast = sorted((one, other))
    assert step(fast) <= step(slow) * (1 + 1e-9)


@pytest.mark.parametrize("name", [own.name for own in fields(Inputs)])
@given(setting=settings, path=st.sampled_from(PATHS))
def test_every_input_counts_in_one_direction(
    name: str, setting: tuple[Method, int], path: str
) -> None:
    """Twice as fast is never slower, twice as long never faster; and somewhere it matters."""
    inputs, (method, gpus) = Inputs(), setting
    value = getattr(inputs, name)
    time = own_unit(name) == "s"
    worse = replace(inputs, **{name: value * 2 if time else value / 2})
    better = seconds(method, inputs, path, gpus=gpus)
    assert better <= seconds(method, worse, path, gpus=gpus) * (1 + 1e-9)


@pytest.mark.parametrize("name", [own.name for own in fields(Inputs)])
def test_every_input_counts(name: str) -> None:
    inputs = Inputs()
    other = replace(inputs, **{name: getattr(inputs, name) / 2})
    assert any(
        seconds(method, inputs, path, gpus=gpus) != seconds(method, other, path, gpus=gpus)
        for method, gpus in SETTINGS
        for path in PATHS
    )


def own_unit(name: str) -> str:
    (unit,) = (own.metadata["unit"] for own in fields(Inputs) if own.name == name)
    return str(unit)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_inputs_that_cannot_be(value: float) -> None:
    for own in fields(Inputs):
        with pytest.raises(ValueError, match=f"{own.name} must be a finite number"):
            replace(Inputs(), **{own.name: value})
    with pytest.raises(ValueError, match="pcie must be more than 0"):
        Inputs(pcie=0.0)


def test_methods_that_are_one_with_so_many_ranks() -> None:
    """With few ranks standard levels have 8 bits anyway."""
    many, few = (gpu_nodes.methods(gpu_nodes.cluster_of(IDEAL, n, 8e9, NCCL)) for n in (64, 4))
    assert [own.name for own in many] == [own.name for own in gpu_nodes.METHODS]
    assert "standard 8 bit" not in [own.name for own in few]


# ---------------------------------------------------------------------------------------- command


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["simulate", "--paper", *options]) == 0
    return capsys.readouterr().out


def plain(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *options, "--json"))
    return found


def test_the_table_names_where_each_input_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    lines = text.splitlines()
    names = [own.name for own in fields(Inputs)]
    names += ["overlap", *(f"compute, {own.name}" for own in model.WORKLOADS)]
    for name in names:
        (line,) = (line for line in lines if f"│ {name} " in line)
        assert line.split("│")[4].strip() in ("measured", "assumed")
    assert "standard 4 bit, 64 ranks: the codes cannot hold the sum" in text
    for path in PATHS:
        assert f"64 nodes with a GPU each, codes by {path}" in text
    assert "3.17x" in text


def test_every_source_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    for row in plain(capsys)["inputs"]:
        assert row["origin"] in ("measured", "assumed")
        assert len(row["source"]) > 20
        if row["origin"] == "measured":  # says where
            assert any(where in row["source"] for where in ("docs/", "README", "authors' logs"))


def test_an_input_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    before = plain(capsys)
    options = ("--input", "latency=1e-3", "--input", "hook=1e-5", "--compute", "DeepLight=1s")
    options += ("--overlap", "0.25")
    after = plain(capsys, *options)
    found = {row["name"]: (row["value"], row["origin"]) for row in after["inputs"]}
    assert found["latency"] == (1e-3, "given")
    assert found["hook"] == (1e-5, "given")
    assert found["compute, DeepLight"] == (1.0, "given")
    assert found["overlap"] == (0.25, "given")
    assert found["pcie"][1] == "assumed"
    assert after["rows"][0]["none_seconds"] > before["rows"][0]["none_seconds"]


def test_rows_are_those_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert len(plain(capsys)["rows"]) == 3 * 3 * 2
    plot = tmp_path / "paper.png"
    options = ("--workers", "4,64", "--bandwidth", "1Gbit,25Gbit", "--plot", str(plot))
    rows = plain(capsys, *options)["rows"]
    assert {(row["ranks"], row["bandwidth"], row["path"]) for row in rows} == {
        (ranks, rate, path) for ranks in (4, 64) for rate in (1e9, 25e9) for path in PATHS
    }
    assert "standard 4 bit" in rows[0]["speedups"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["speedups"]["none"] == 1


def test_nodes_with_several_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "nodes.png"
    options = ["--gpus-per-node", "1,8", "--bandwidth", "100Gbit", "--plot", str(plot)]
    assert cli.main(["simulate", *options]) == 0
    text = capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    for path in PATHS:
        assert f"4096 nodes with a GPU each, codes by {path}" in text
        for within in model.WITHIN:
            assert f"512 nodes with 8 GPUs each, {within}, codes by {path}" in text
    assert cli.main(["simulate", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    kinds = {(row["ranks"], row["gpus_per_node"]) for row in rows}
    assert kinds == {(ranks, gpus) for ranks in (64, 256, 1024, 4096) for gpus in (1, 8)}
    assert len(rows) == 3 * len(kinds) * len(PATHS)
    for row in rows:
        several = row["gpus_per_node"] > 1
        assert all(name.endswith(model.WITHIN) == several for name in row["bits"])


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["--paper", "--input", "speed=1"], "--input speed: expected one of allreduce_efficiency"),
        (["--paper", "--input", "pcie=0"], "pcie must be more than 0"),
        (["--input", "pcie=1e9"], "--input: expected --paper or --gpus-per-node beside it"),
        (
            ["--paper", "--calibration", "c.json"],
            "--calibration c.json: expected none with --paper",
        ),
        (
            ["--gpus-per-node", "1,8", "--workers", "64,100"],
            "--gpus-per-node 8: expected a divisor of --workers 100",
        ),
    ],
)
def test_options_that_do_not_go_together(
    command: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *command]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("text", ["pcie", "=1", "pcie=fast", "pcie=1GB", "pcie=-1", "pcie=nan"])
def test_numbers_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--paper", "--input", text])
    assert "expected NAME=NUMBER" in capsys.readouterr().err
