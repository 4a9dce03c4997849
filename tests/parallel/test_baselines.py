"""The baselines in the place of GlobalQSGD: values, replicas, refusals, and a training."""

from __future__ import annotations

from itertools import product
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import (
    Law,
    Tensors,
    check_errors,
    check_mean,
    check_replicas,
    compressor,
    gradients,
    law_of,
    neighbours,
    norms_of,
    plan_of,
)
from test_training import Outcome, train

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.research.torch_baselines import (
    QSGD,
    IntSGD,
    NaturalCompression,
    NearestRounding,
    PowerSGD,
    TernGrad,
)
from gq_horovod.torch import GlobalQSGD, allreduce

UNBIASED = {
    "QSGD": QSGD(min_elements=0),
    "QSGD of 4 bits, l2": QSGD(bits=4, block_size=96, norm="l2", min_elements=0),
    "QSGD in Elias codes": QSGD(norm="l2", coding="elias", min_elements=0),
    "TernGrad": TernGrad(min_elements=0),
    "natural compression": NaturalCompression(min_elements=0),
}
QUANTIZERS = {**UNBIASED, "nearest": NearestRounding(min_elements=0)}
EVERY = {
    **QUANTIZERS,
    "PowerSGD": PowerSGD(rank=2, min_elements=0),
    "IntSGD": IntSGD(min_elements=0),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def local_law(inputs: Tensors, compression: Any) -> Law:
    """The law of the mean where each rank rounds by its own norms, by enumeration."""
    plan = plan_of(compression, len(inputs))
    x = torch.stack([tensor.reshape(-1).double() for tensor in inputs])
    norms = torch.stack([norms_of(row[None], plan) for row in x])
    scale = torch.where(norms > 0, norms, 1.0)
    if plan.levels == "exponential":
        scale = 2 ** scale.log2().ceil()
    low, width = neighbours(x / scale, plan)
    share = (x / scale - low) / width
    probabilities, values = [], []
    for up in product((0.0, 1.0), repeat=len(x)):
        choice = torch.tensor(up, dtype=torch.float64)[:, None]
        probabilities.append(torch.where(choice == 1, share, 1 - share).prod(dim=0))
        values.append(((low + choice * width) * scale).mean(dim=0))
    probability, value = torch.stack(probabilities), torch.stack(values)
    mean = x.mean(dim=0)
    error = value - mean
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    dtype = inputs[0].dtype
    return Law(
        mean=mean,
        variance=(probability * error**2).sum(dim=0),
        fourth=(probability * error**4).sum(dim=0),
        low=torch.where(probability > 0, value, infinity).amin(dim=0),
        high=torch.where(probability > 0, value, -infinity).amax(dim=0),
        # Roundings of float32, then one to the dtype of the result.
        slack=2.0**-21 * norms.amax(dim=0) + torch.finfo(dtype).eps * value.abs().amax(dim=0),
        level=torch.zeros_like(mean),
    )


def check_unbiased(compression: Any, law: Law, inputs: Tensors, name: str) -> None:
    """Assert that repeated means have no bias, and the variance of their law."""
    results = [
        allreduce(inputs[hvd.rank()], name, compression=compression).reshape(-1) for _ in range(8)
    ]
    check_replicas(*results)
    assert results[0].dtype == inputs[0].dtype
    errors = torch.stack([result.double() for result in results]) - law.mean
    assert bool((errors + law.mean >= law.low - law.slack).all())
    assert bool((errors + law.mean <= law.high + law.slack).all())
    check_errors(errors, law)


def small_gradients() -> Tensors:
    """Three tenths of a level of eight bits, and a large element in every block."""
    inputs = []
    for x in gradients(4096, tag=201):
        level = 2.0 / plan_of(QUANTIZERS["nearest"], hvd.size()).level_count
        small = 0.3 * level * (1 + 0.1 * x.clamp(-1, 1))
        small[::256] = 2.0
        inputs.append(small)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", UNBIASED)
def test_means_are_unbiased_with_the_variance_of_their_law(
    key: str, dtype: torch.dtype, name: str
) -> None:
    inputs = gradients(4097, tag=200, dtype=dtype)
    own = inputs[hvd.rank()].clone()
    check_unbiased(UNBIASED[key], local_law(inputs, UNBIASED[key]), inputs, name)
    assert torch.equal(own, inputs[hvd.rank()]), "the input was modified"


@pytest.mark.parametrize("key", UNBIASED)
def test_small_gradients_are_not_lost(key: str, name: str) -> None:
    inputs = small_gradients()
    check_unbiased(UNBIASED[key], local_law(inputs, UNBIASED[key]), inputs, name)


def test_rounding_to_nearest_loses_them(name: str) -> None:
    """What is under half a level on every rank is zero in every step: the same check fails."""
    compression, inputs = QUANTIZERS["nearest"], small_gradients()
    with pytest.raises(AssertionError, match=r"^biased (up|away from zero) by"):
        check_unbiased(compression, law_of(inputs, compression), inputs, name)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    assert int((result != 0).sum()) == 4096 // 256
    ours = compressor("standard", 8)  # with the same levels
    check_mean(allreduce(inputs[hvd.rank()], f"{name}.ours", compression=ours), inputs, ours)


# ------------------------------------------------------------------------------------- every method


def bound_of(inputs: Tensors, compression: Any) -> torch.Tensor:
    """How far a quantized mean can be from the true one, element by element."""
    plan = plan_of(compression, len(inputs))
    x = torch.stack([tensor.reshape(-1).double() for tensor in inputs])
    norms = torch.stack([norms_of(row[None], plan) for row in x]).amax(dim=0)
    if plan.levels == "exponential":
        return x.abs().amax(dim=0) * 1.001
    return norms / plan.level_count * 1.001


@pytest.mark.parametrize("key", QUANTIZERS)
def test_any_number_of_elements(key: str, name: str) -> None:
    for count in (1, 31, 33, 1000, 4097):
        inputs = gradients(count, tag=202)
        result = allreduce(inputs[hvd.rank()], f"{name}.{count}", compression=QUANTIZERS[key])
        error = result.double() - torch.stack(list(inputs)).double().mean(dim=0)
        assert bool((error.abs() <= bound_of(inputs, QUANTIZERS[key])).all())
        check_replicas(result)


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("shape", [(5000,), (70, 60)], ids=str)
def test_sum_is_the_mean_times_the_number_of_ranks(
    key: str, shape: tuple[int, ...], name: str
) -> None:
    own = gradients(shape, tag=203)[hvd.rank()]
    kind, options = type(EVERY[key]), EVERY[key].config.describe()
    mean, total = (
        allreduce(own, name, op=op, compression=kind(**options)) for op in (hvd.Average, hvd.Sum)
    )
    torch.testing.assert_close(total, mean * hvd.size())
    check_replicas(mean, total)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("key", EVERY)
def test_a_bad_element_on_one_rank_is_nan_on_every_rank(key: str, value: float, name: str) -> None:
    inputs = gradients((64, 48), tag=204)
    inputs[-1][40, 30] = value
    result = allreduce(inputs[hvd.rank()], name, compression=EVERY[key])
    assert bool(result[40, 30].isnan())
    check_replicas(result.isnan().to(torch.uint8), result.nan_to_num())
    again = allreduce(gradients((64, 48), tag=205)[hvd.rank()], name, compression=EVERY[key])
    assert bool(again.isfinite().all())
    check_replicas(again)


@pytest.mark.parametrize("key", EVERY)
def test_zeros_stay_zeros(key: str, name: str) -> None:
    x = torch.zeros(64, 48)
    for _ in range(2):
        assert torch.equal(allreduce(x, name, compression=EVERY[key]), x)


@pytest.mark.parametrize("key", EVERY)
def test_small_tensors_and_integers_are_left_to_horovod(key: str, name: str) -> None:
    kind = type(EVERY[key])
    x = torch.full((99,), float(hvd.size()))
    assert torch.equal(allreduce(x, name, compression=kind), x)
    integers = torch.arange(5000)
    result = allreduce(integers, f"{name}.integers", op=hvd.Sum, compression=kind)
    assert torch.equal(result, integers * hvd.size())


@pytest.mark.parametrize("key", EVERY)
def test_strides_and_dtypes_stay(key: str, name: str) -> None:
    for dtype in DTYPES:
        x = gradients((64, 6, 5, 4), tag=206, dtype=dtype)[hvd.rank()]
        x = x.to(memory_format=torch.channels_last)
        result = allreduce(x, f"{name}.{dtype}", compression=EVERY[key])
        assert (result.dtype, result.stride()) == (dtype, x.stride())
        check_replicas(result)


@pytest.mark.parametrize("key", EVERY)
def test_a_process_set_reduces_among_its_ranks(key: str, ends: hvd.ProcessSet, name: str) -> None:
    inputs = gradients((64, 48), tag=207)
    compression = type(EVERY[key])(**EVERY[key].config.describe())
    if ends.included():
        result = allreduce(inputs[hvd.rank()], name, compression=compression, process_set=ends)
        check_replicas(result, process_set=ends)
    check_replicas(allreduce(inputs[hvd.rank()], f"{name}.all", compression=compression))


# ------------------------------------------------------------------------------------- Elias codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bits": 4, "norm": "l2", "block_size": None}], ids=str)
def test_elias_codes_decode_to_what_fixed_ones_do(
    dtype: torch.dtype, options: dict[str, Any], name: str
) -> None:
    """Bit for bit; messages of the ranks differ in length, and are empty nearly where all is 0."""
    for count in (1, 33, 4097, 200_001):
        own = gradients(count, tag=210, dtype=dtype)[hvd.rank()]
        if hvd.rank() == 0:
            own = own * 0
        if hvd.rank() == hvd.size() - 1 and count == 4097:
            own[4000] = torch.nan
        fixed, elias = (
            allreduce(own, f"{name}.{count}", compression=QSGD(min_elements=0, **options, **coding))
            for coding in ({}, {"coding": "elias"})
        )
        torch.testing.assert_close(elias, fixed, rtol=0, atol=0, equal_nan=True)
        check_replicas(elias.nan_to_num())


# ----------------------------------------------------------------------------------------- PowerSGD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sgd_is_exact_for_a_mean_of_its_rank(dtype: torch.dtype, name: str) -> None:
    """Integers of rank 2, and noise that is zero on average."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randint(-3, 4, shape, generator=generator) for shape in ((60, 2), (2, 80))]
    low = (factors[0] @ factors[1]).to(dtype)
    noise = torch.randint(-9, 10, (60, 80), generator=generator).to(dtype)
    own = low
    if hvd.size() > 1 and hvd.rank() < 2:
        own = low + noise * (1 - 2 * hvd.rank())
    compression = PowerSGD(rank=2, min_elements=0)
    result = allreduce(own, name, compression=compression)
    # float32, and a start that is ill-conditioned now and then; then the dtype of the result.
    torch.testing.assert_close(result, low, rtol=0, atol=1e-3 + torch.finfo(dtype).eps * 18)
    check_replicas(result)


def test_power_sgd_makes_up_for_what_it_left_out(name: str) -> None:
    inputs = gradients((64, 48), tag=208)
    mean = torch.stack(list(inputs)).mean(dim=0)

    def missing(error_feedback: bool) -> float:
        compression = PowerSGD(rank=2, min_elements=0, error_feedback=error_feedback)
        total = torch.zeros(64, 48)
        for _ in range(60):
            total += allreduce(inputs[hvd.rank()], name, compression=compression)
        return float((total / 60 - mean).norm() / mean.norm())

    assert missing(True) < 0.5 * missing(False)


def test_power_sgd_leaves_vectors_to_horovod(name: str) -> None:
    x = torch.full((5000,), float(hvd.rank()))
    result = allreduce(x, name, compression=PowerSGD)
    torch.testing.assert_close(result, torch.full((5000,), (hvd.size() - 1) / 2))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.usefixtures("several_ranks")
def test_ranks_with_different_methods_or_options(name: str) -> None:
    last = hvd.rank() == hvd.size() - 1
    pairs = [
        (QSGD(bits=4), QSGD(bits=8), "bits is 8 on rank"),
        (PowerSGD(rank=1), PowerSGD(), "rank is 4 on rank"),
        (QSGD(), QSGD(coding="elias"), "coding is 'elias' on rank"),
        (IntSGD(), IntSGD(scale="gradient"), "scale is 'gradient' on rank"),
        (QSGD(), GlobalQSGD(), "compression is 'GlobalQSGD' on rank"),
    ]
    for one, other, text in pairs:
        with pytest.raises(ConfigMismatchError, match=text):
            allreduce(torch.ones(5000), name, compression=one if last else other)
    assert torch.equal(allreduce(torch.ones(5000), name, compression=QSGD()), torch.ones(5000))


@pytest.mark.usefixtures("several_ranks")
def test_ranks_with_different_tensors(name: str) -> None:
    """The token tells, and names the method."""
    compression = NaturalCompression(min_elements=0)
    allreduce(torch.ones(9), name, compression=compression)
    # As many elements, so that the operations match, but another dtype.
    dtype = torch.float64 if hvd.rank() == 0 else torch.float32
    with pytest.raises(ConfigMismatchError, match="NaturalCompression: the ranks disagree about"):
        allreduce(torch.ones(5000, dtype=dtype), name, compression=compression)


@pytest.mark.parametrize("key", EVERY)
def test_mistakes_name_the_method(key: str, name: str) -> None:
    kind = type(EVERY[key])
    method = kind.__name__
    with pytest.raises(ValueError, match=f"^{method}: op must be hvd.Average or hvd.Sum"):
        hvd.allreduce(torch.ones(5000), name=name, op=hvd.Max, compression=kind)
    with pytest.raises(ValueError, match=f"^hvd.allreduce with compression={method}: name must"):
        hvd.allreduce(torch.ones(5000), compression=kind)
    with pytest.raises(RuntimeError, match=f"^{method}: compress"):
        kind.compress(torch.ones(5000))
    with pytest.raises(TypeError, match=f"^{method}: process_set must be a"):
        kind(process_set=3)
    x = torch.ones(70, 80, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{method}: tensor '.*' must not require gradients"):
        hvd.allreduce(x, name=name, compression=kind)


# ---------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def uncompressed() -> Outcome:
    return train(hvd.Compression.none)


@pytest.mark.parametrize(
    "compression",
    [
        QSGD(min_elements=1000),
        QSGD(bits=4, min_elements=1000),
        QSGD(bits=4, coding="elias", min_elements=1000),
        NaturalCompression(min_elements=1000),
        PowerSGD(rank=4, min_elements=0),
    ],
    ids=repr,
)
def test_digits_are_learned_as_without_compression(compression: Any, uncompressed: Outcome) -> None:
    theirs = train(compression)
    assert theirs.first_loss == uncompressed.first_loss
    fall = uncompressed.first_loss - uncompressed.last_loss
    # As for GlobalQSGD; but the bias of PowerSGD needs some steps to be made up for.
    allowed = 0.3 if isinstance(compression, PowerSGD) else 0.1
    assert theirs.last_loss < uncompressed.last_loss + allowed * fall


@pytest.mark.parametrize(
    "compression",
    [
        TernGrad(min_elements=1000),
        IntSGD(min_elements=1000),
        IntSGD(scale="gradient", min_elements=1000),
    ],
    ids=repr,
)
def test_digits_are_learned_at_all(compression: Any, uncompressed: Outcome) -> None:
    theirs = train(compression)
    assert theirs.last_loss < 0.5 * uncompressed.first_loss


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize(
    "options", [{"op": hvd.Sum}, {"gradient_predivide_factor": 2.0}, {"groups": 1}], ids=str
)
def test_an_optimizer_gets_what_allreduce_gives(key: str, options: dict[str, Any]) -> None:
    """In place where it lies; and the same bytes, because names and steps are the same."""
    kind, config = type(EVERY[key]), EVERY[key].config.describe()
    constants = gradients((64, 48), tag=209)
    weight = torch.nn.Parameter(torch.zeros(64, 48))
    name = f"{key}.{options}.weight"
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        named_parameters=[(name, weight)],
        compression=kind(**config),
        **options,
    )
    (weight * constants[hvd.rank()]).sum().backward()
    optimizer.synchronize()
    op = options.get("op", hvd.Average)
    expected = allreduce(constants[hvd.rank()], name, op=op, compression=kind(**config))
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=0)
    with optimizer.skip_synchronize():
        optimizer.step()
    check_replicas(weight)
