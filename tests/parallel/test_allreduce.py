"""gq_horovod.torch.allreduce: values, replicas, and what a gradient may look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import (
    CONFIGURATIONS,
    all_bytes,
    check_averages,
    check_errors,
    check_mean,
    check_replicas,
    compressor,
    gradient,
    gradients,
    law_of,
    plan_of,
)

from gq_horovod.path import pipeline
from gq_horovod.torch import GlobalQSGD, allreduce

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EVERY = pytest.mark.parametrize(("levels", "bits"), CONFIGURATIONS)
EACH = pytest.mark.parametrize(
    ("levels", "bits"), [("standard", 8), ("exponential", 8), ("two-hop", 8)]
)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_unbiased_with_the_variance_of_its_closed_form(
    levels: str, bits: int | None, dtype: torch.dtype, name: str
) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(4097, tag=1, dtype=dtype)
    own = inputs[hvd.rank()].clone()
    result = allreduce(own, name, compression=compression)
    assert torch.equal(own, inputs[hvd.rank()]), "the input was modified"
    check_mean(result, inputs, compression)
    check_replicas(result)


@EVERY
def test_any_number_of_elements(levels: str, bits: int | None, name: str) -> None:
    compression = compressor(levels, bits)
    results = []
    for count in (1, 31, 32, 33, 1000, 4097):
        inputs = gradients(count, tag=2)
        result = allreduce(inputs[hvd.rank()], f"{name}.{count}", compression=compression)
        check_mean(result, inputs, compression)
        results.append(result)
    check_replicas(*results)


@EACH
def test_a_large_tensor(levels: str, bits: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 20_000)  # so that it is one
    compression = compressor(levels, bits)
    inputs = gradients(100_003, tag=17)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize(
    "options", [{"norm": "l2"}, {"block_size": None}, {"block_size": 32}, {"bits": 8, "seed": -1}]
)
def test_the_other_options(levels: str, options: dict[str, Any], name: str) -> None:
    compression = compressor(levels, **options)
    inputs = gradients(1000, tag=3)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)


@pytest.mark.parametrize("bits", [3, 5, 6, 10, 12, 16])
def test_lanes_of_any_width(bits: int, name: str) -> None:
    compression = compressor("standard", bits)
    if hvd.size() > 2 ** (bits - 1) - 1:
        pytest.skip(f"{bits} bits cannot hold the sum of {hvd.size()} ranks")
    inputs = gradients(1000, tag=4)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sum_is_the_mean_times_the_number_of_ranks(
    levels: str, bits: int, dtype: torch.dtype, name: str
) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(1000, tag=5, dtype=dtype)
    result = allreduce(inputs[hvd.rank()], name, op=hvd.Sum, compression=compression)
    check_mean(result, inputs, compression, factor=hvd.size())
    check_replicas(result)


def test_the_presets_of_the_paper_and_the_class_itself(name: str) -> None:
    inputs = gradients(5000, tag=6)
    for index, choice in enumerate(
        (GlobalQSGD, GlobalQSGD.paper_standard, GlobalQSGD.paper_exponential)
    ):
        result = allreduce(inputs[hvd.rank()], f"{name}.{index}", compression=choice)
        check_mean(result, inputs, choice() if isinstance(choice, type) else choice)
        check_replicas(result)


@EACH
def test_horovod_functions_take_it_as_compression(levels: str, bits: int, name: str) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(1000, tag=7)
    own = inputs[hvd.rank()]
    scaled = hvd.allreduce(
        own, name=name, compression=compression, prescale_factor=0.5, postscale_factor=4.0
    )
    check_mean(scaled, inputs, compression, factor=2.0)
    others = gradients(500, tag=8)
    pair = hvd.grouped_allreduce(
        [own, others[hvd.rank()]], name=f"{name}.group", compression=compression
    )
    check_mean(pair[0], inputs, compression)
    check_mean(pair[1], others, compression)
    check_replicas(scaled, *pair)


# ------------------------------------------------------------------------------- shapes and strides


SHAPES = {
    "scalar": lambda x: x[0],
    "transposed": lambda x: x.view(40, 30).t(),
    "every second": lambda x: x[::2],
    "channels last": lambda x: x.view(5, 8, 6, 5).to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:40].view(40, 1).expand(40, 30),
}


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides(levels: str, bits: int, shape: str, name: str) -> None:
    compression = compressor(levels, bits)
    inputs = [SHAPES[shape](x) for x in gradients(1200, tag=9)]
    own = inputs[hvd.rank()]
    before = own.clone()
    result = allreduce(own, name, compression=compression)
    assert torch.equal(own, before), "the input was modified"
    check_mean(result, inputs, compression)
    check_replicas(result)
    assert result.stride() == torch.empty_like(own).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_tensor_stays_empty(dtype: torch.dtype, name: str) -> None:
    result = allreduce(torch.empty(0, 3, dtype=dtype), name, compression=compressor())
    assert result.shape == (0, 3)
    assert result.dtype == dtype


# ----------------------------------------------------------------------------------- special values


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_all_ranks_hold_the_maximum_it_is_exact(
    levels: str, bits: int | None, dtype: torch.dtype, name: str
) -> None:
    """No sum of codes overflows: every code of the tensor is the largest one of its sign."""
    x = 3.0 * torch.ones(1000, dtype=dtype)
    x[1::2] = -3.0
    result = allreduce(x, name, compression=compressor(levels, bits))
    assert torch.equal(result, x)


@EVERY
def test_zeros_stay_zeros_and_disturb_nobody(levels: str, bits: int | None, name: str) -> None:
    compression = compressor(levels, bits)
    assert torch.equal(
        allreduce(torch.zeros(1000), name, compression=compression), torch.zeros(1000)
    )
    inputs = gradients(1024, tag=10)
    for x in inputs:
        x[256:512] = 0
    if hvd.size() > 1:
        inputs[-1].zero_()
    result = allreduce(inputs[hvd.rank()], f"{name}.part", compression=compression)
    assert torch.equal(result[256:512], torch.zeros(256))
    check_mean(result, inputs, compression)
    check_replicas(result)


@EVERY
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(torch.nan, torch.float16), (torch.inf, torch.float32), (-torch.inf, torch.float64)],
    ids=str,
)
def test_one_bad_element_on_one_rank_makes_its_block_nan_on_every_rank(
    levels: str, bits: int | None, value: float, dtype: torch.dtype, name: str
) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(1000, tag=11, dtype=dtype)
    block = plan_of(compression, hvd.size()).block_for(1000)
    bad = slice(0, 1000) if block >= 1000 else slice(256, 512)
    inputs[-1][300] = value
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    assert bool(result[bad].isnan().all())
    check_replicas(result)
    for fine in (slice(0, bad.start), slice(bad.stop, 1000)):
        if fine.start < fine.stop:
            check_mean(result[fine], [x[fine] for x in inputs], compression)


@EVERY
def test_the_largest_and_the_smallest_numbers(levels: str, bits: int | None, name: str) -> None:
    """Norms at both ends of float32: neither the scale nor its reciprocal leaves the range."""
    compression = compressor(levels, bits)
    for end in (torch.finfo(torch.float32).max, 2.0**-140):
        x = torch.full((512,), end)
        x[::3] = 0
        assert torch.equal(allreduce(x, name, compression=compression), x)


# -------------------------------------------------------------------------- what is left to Horovod


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integers_are_summed_exactly(dtype: torch.dtype, name: str) -> None:
    x = torch.arange(10, dtype=dtype) + hvd.rank()
    result = allreduce(x, name, op=hvd.Sum, compression=compressor())
    ranks = hvd.size()
    assert result.dtype == dtype
    assert torch.equal(result, torch.arange(10, dtype=dtype) * ranks + ranks * (ranks - 1) // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tensors_are_exact(dtype: torch.dtype, name: str) -> None:
    """Multiples of the number of ranks, so that their mean is an integer."""
    result = allreduce(
        (hvd.size() * (torch.arange(99) % 9 + hvd.rank())).to(dtype), name, compression=GlobalQSGD
    )
    expected = hvd.size() * (torch.arange(99) % 9) + hvd.size() * (hvd.size() - 1) // 2
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0)


def test_small_tensors_of_any_strides(name: str) -> None:
    x = torch.arange(24.0).view(4, 6).t()
    torch.testing.assert_close(allreduce(x, name, compression=GlobalQSGD), x)


def test_small_tensors_stay_differentiable(name: str) -> None:
    x = torch.ones(9, requires_grad=True)
    weights = torch.arange(9.0)
    (hvd.allreduce(x, name=name, compression=GlobalQSGD) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)


# ------------------------------------------------------------------------------------- process sets


@EVERY
def test_a_process_set_reduces_among_its_ranks(
    levels: str, bits: int | None, ends: hvd.ProcessSet, name: str
) -> None:
    compression = GlobalQSGD(levels=levels, bits=bits, min_elements=0)
    inputs = [gradients(1000, tag=12)[rank] for rank in ends.ranks]
    if ends.included():
        result = allreduce(inputs[ends.rank()], name, compression=compression, process_set=ends)
        check_mean(result, inputs, compression)
        check_replicas(result, process_set=ends)
    everyone = gradients(1000, tag=13)
    result = allreduce(everyone[hvd.rank()], f"{name}.all", compression=compression)
    check_mean(result, everyone, compression)


# --------------------------------------------------------------------------------------- randomness


@EVERY
def test_repetitions_average_to_the_true_mean(levels: str, bits: int | None, name: str) -> None:
    """Every call rounds afresh: the squared error of the average falls with their number."""
    compression = compressor(levels, bits)
    repetitions = 12
    inputs = gradients(500, tag=14)
    law = law_of(inputs, compression)
    results = [
        allreduce(inputs[hvd.rank()], name, compression=compression) for _ in range(repetitions)
    ]
    errors = torch.stack([result.double() for result in results]) - law.mean
    check_errors(errors, law)
    check_averages(errors, law)


@EVERY
def test_ranks_do_not_share_their_errors(levels: str, bits: int | None, name: str) -> None:
    """With the same values on every rank, a shared dither would leave n times the variance."""
    compression = compressor(levels, bits)
    inputs = [gradients(4097, tag=15)[0]] * hvd.size()
    result = allreduce(inputs[0], name, compression=compression)
    check_mean(result, inputs, compression)


@EACH
def test_a_seed_reproduces_the_bytes_and_another_one_does_not(
    levels: str, bits: int, name: str
) -> None:
    own = gradients(1000, tag=16)[hvd.rank()]

    def run(seed: int) -> list[torch.Tensor]:
        fresh = GlobalQSGD(levels=levels, bits=bits, min_elements=0, seed=seed)
        return [allreduce(own, name, compression=fresh) for _ in range(2)]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert len(all_bytes(first).unique(dim=0)) == 1


# -------------------------------------------------------------- what plain Horovod does, done alike


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_a_factor_of_zero(levels: str, name: str) -> None:
    """No token comes back of it."""
    own = gradient(hvd.rank(), 3000)
    for factors in ({"prescale_factor": 0.0}, {"postscale_factor": 0.0}):
        result = hvd.allreduce(own, name=name, compression=compressor(levels), **factors)
        assert torch.equal(result, torch.zeros_like(own))


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_initializing_again_on_one_rank_alone(levels: str, name: str) -> None:
    """Horovod does nothing there, and no rank may take it for a start of another session."""
    compression = compressor(levels)
    inputs = gradients(3000, tag=91)
    for turn in range(3):
        if hvd.rank() == turn % hvd.size():
            hvd.init(process_sets="dynamic")
        result = allreduce(inputs[hvd.rank()], name, compression=compression)
        check_mean(result, inputs, compression)


STRANGE: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.ones(100, 100).to_sparse(),
    "on the device meta": lambda: torch.ones(5000, device="meta"),
    "complex": lambda: torch.ones(5000, dtype=torch.complex64),
    "boolean": lambda: torch.ones(5000, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_horovod_refuses_it_refuses_in_its_own_words(kind: str, name: str) -> None:
    tensor = STRANGE[kind]()
    texts = []
    for options in ({}, {"compression": compressor()}):
        with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as error:
            hvd.allreduce(tensor, name=name, **options)
        texts.append((type(error.value), str(error.value)))
    assert texts[0] == texts[1]
