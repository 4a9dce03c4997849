"""Gradients that are reduced together: who is in a bucket, and that nobody can tell."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, all_bytes, gradient

from gq_horovod.path import pipeline
from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.torch import GlobalQSGD, allreduce
from gq_horovod.torch.collectives import Collectives

Parameters = dict[str, torch.nn.Parameter]

LEVELS = pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
SHAPES = {
    "convolution": (16, 16, 3, 3),
    "bias": (65,),
    "matrix": (35, 37),
    "vector": (1003,),
    "table": (50, 300),
}
needs_ranks = pytest.mark.usefixtures("several")


def make(levels: str = "standard", **options: Any) -> GlobalQSGD:
    return GlobalQSGD(
        levels=levels,  # type: ignore[arg-type]
        transport=TRANSPORT,  # type: ignore[arg-type]
        **{"min_elements": 100, **options},
    )


def parameters(shapes: dict[str, Sequence[int]] | None = None) -> Parameters:
    return {
        name: torch.nn.Parameter(gradient(0, shape, tag=99))
        for name, shape in (shapes or SHAPES).items()
    }


def optimizer_of(own: Parameters, compression: Any, prefix: str = "", **options: Any) -> Any:
    return hvd.DistributedOptimizer(
        torch.optim.SGD(own.values(), lr=0.125),
        named_parameters=[(prefix + name, parameter) for name, parameter in own.items()],
        compression=compression,
        **options,
    )


def backward(own: Parameters, step: int, names: Sequence[str] | None = None) -> None:
    for name in own if names is None else names:
        constant = gradient(hvd.rank(), own[name].shape, tag=10 * step + list(own).index(name))
        (own[name] * constant.to(own[name].dtype)).sum().backward()


def train(
    own: Parameters,
    optimizer: Any,
    steps: int = 3,
    names: Callable[[int], Sequence[str] | None] = lambda step: None,
) -> bytes:
    for step in range(steps):
        backward(own, step, names(step))
        optimizer.step()
        optimizer.zero_grad()
    rows = all_bytes([parameter.detach() for parameter in own.values()])
    assert len(rows.unique(dim=0)) == 1, "replicas differ"
    return rows[0].numpy().tobytes()


@pytest.fixture
def several() -> None:
    """Skips where there is one rank: Horovod registers no hooks then."""
    if hvd.size() == 1:
        pytest.skip("needs another rank")


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the reductions that begin."""
    started: list[str] = []
    submit = pipeline.Pipeline.submit

    def noted(own: pipeline.Pipeline, task: pipeline.Task) -> pipeline.InFlight:
        started.append(task.name)
        return submit(own, task)

    monkeypatch.setattr(pipeline.Pipeline, "submit", noted)
    return started


# -------------------------------------------------------------------------------------- the results


def units(levels: str, mean: torch.Tensor, norm: float) -> torch.Tensor:
    """A mean as multiples of the smallest number that ranks can agree on."""
    if levels == "standard":  # sums of n codes, each of which is a multiple of norm / s
        return mean.double() * hvd.size() * (127 // hvd.size()) / norm
    return torch.log2(mean[mean != 0].abs().double() / norm)  # one rounding of the mean


@needs_ranks
@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_one_norm_for_a_bucket(levels: str, name: str) -> None:
    """Every mean lies on levels of the largest element of all its bucket's tensors and ranks."""
    scales = {"large": 8.0, "small": 2.0**-9, "middle": 1.0, "other bucket": 2.0**-6}
    shapes: dict[str, Sequence[int]] = dict.fromkeys(scales, (1000,))

    def gradients() -> dict[str, list[torch.Tensor]]:
        return {
            key: [scale * gradient(rank, (1000,), tag=place) for rank in range(hvd.size())]
            for place, (key, scale) in enumerate(scales.items())
        }

    inputs = gradients()
    own = parameters(shapes)
    compression = make(
        levels, bits=8, block_size="bucket", first_bucket_bytes=1, bucket_bytes=12_000
    )
    optimizer = optimizer_of(own, compression, name)
    for key, parameter in own.items():
        (parameter * inputs[key][hvd.rank()]).sum().backward()
    optimizer.synchronize()
    largest = {key: max(float(one.abs().max()) for one in ranks) for key, ranks in inputs.items()}
    # The last parameter's gradient comes first, and is a bucket by itself.
    together = max(largest["large"], largest["small"], largest["middle"])
    for key, parameter in own.items():
        norm = largest[key] if key == "other bucket" else together
        assert parameter.grad is not None
        found = units(levels, parameter.grad, norm)
        assert torch.allclose(found, found.round(), atol=1e-3)
        if levels == "standard" and norm == largest[key]:
            # By a norm of its own a tensor would have other levels than by that of its bucket.
            assert int(found.abs().max()) > hvd.size()
    small = units(levels, own["small"].grad, largest["small"])  # type: ignore[arg-type]
    if levels == "standard":
        # The small one is below half a level: nearly all of its means are zeros, and not all.
        assert float((small == 0).double().mean()) > 0.8
    rows = all_bytes([parameter.grad for parameter in own.values()])  # type: ignore[misc]
    assert len(rows.unique(dim=0)) == 1


@needs_ranks
def test_the_mean_by_a_bucket_s_norm_is_unbiased(name: str) -> None:
    """Over many steps; a tensor far below its bucket's norm is where a bias would show."""
    if hvd.size() != 2:
        pytest.skip("two ranks are enough for what takes hundreds of steps")
    own = parameters({"large": (64,), "small": (64,)})
    compression = make("standard", bits=8, block_size="bucket", min_elements=0)
    optimizer = optimizer_of(own, compression, name)
    truth, steps = 0.01 / (127 // hvd.size()), 400
    total = torch.zeros(64, dtype=torch.float64)
    for _ in range(steps):
        (own["large"] * 1.0).sum().backward()  # the norm of both is 1
        (own["small"] * truth).sum().backward()
        optimizer.synchronize()
        assert own["small"].grad is not None
        total += own["small"].grad.double()
        for parameter in own.values():
            parameter.grad = None
    # Each rank's code is 0 or 1 with probability 0.01, at most independent of the others'.
    level = 1 / (127 // hvd.size())
    deviation = level * (0.01 * 0.99 / (hvd.size() * 64 * steps)) ** 0.5
    assert abs(float(total.mean()) / steps - truth) < 5 * deviation


@needs_ranks
def test_what_is_not_finite_is_so_in_the_whole_bucket(name: str) -> None:
    own = parameters({"first": (500,), "second": (500,)})
    optimizer = optimizer_of(own, make("standard", block_size="bucket"), name)
    constant = gradient(hvd.rank(), (500,), tag=1)
    if hvd.rank() == hvd.size() - 1:
        constant[7] = torch.inf
    (own["first"] * constant).sum().backward()
    (own["second"] * gradient(hvd.rank(), (500,), tag=2)).sum().backward()
    optimizer.synchronize()
    for parameter in own.values():
        assert parameter.grad is not None
        assert parameter.grad.isnan().all()


@needs_ranks
def test_a_bucket_of_one_norm_stays_whole(name: str, operations: list[str]) -> None:
    """Another one goes without what was absent; here results would depend on what has been."""
    own = parameters({"first": (2000,), "second": (2000,)})
    optimizer = optimizer_of(own, make("standard", block_size="bucket", min_elements=0), name)
    train(own, optimizer, 3, lambda step: ["first"] if step == 1 else None)
    assert len(operations) == 3


@needs_ranks
@pytest.mark.parametrize(
    ("levels", "dtype"),
    [
        *((levels, torch.float32) for levels in ("standard", "exponential", "two-hop")),
        # Codes are made of float32, whatever the gradient is.
        ("standard", torch.float64),
        ("two-hop", torch.bfloat16),
    ],
    ids=str,
)
def test_results_do_not_depend_on_buckets(
    levels: str, dtype: torch.dtype, name: str, operations: list[str]
) -> None:
    results, counts = [], []
    for bucket_bytes, first in ((0, 0), (1 << 23, 1 << 20), (20_000, 5_000)):
        own = {key: torch.nn.Parameter(one.detach().to(dtype)) for key, one in parameters().items()}
        compression = make(levels, bucket_bytes=bucket_bytes, first_bucket_bytes=first)
        operations.clear()
        results.append(train(own, optimizer_of(own, compression, name)))
        counts.append(len(operations))
    assert results[0] == results[1] == results[2]
    assert counts[0] == 3 * 4  # steps, and tensors that are not too small
    assert counts[1] == 3
    assert 3 < counts[2] < 12


@needs_ranks
@LEVELS
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_hvd_groups_are_buckets(levels: str, op: int, name: str, operations: list[str]) -> None:
    results = []
    for groups in (None, 2):
        own = parameters()
        compression = make(levels, bucket_bytes=0)
        if groups is not None:
            compression = make(levels)
        operations.clear()
        options = {} if groups is None else {"groups": groups}
        results.append(train(own, optimizer_of(own, compression, name, op=op, **options)))
    assert results[0] == results[1]
    assert len(operations) == 3 * 2


@LEVELS
def test_grouped_allreduce_is_a_bucket(levels: str, name: str, operations: list[str]) -> None:
    shapes = [(300,), (7,), (40, 50), (0,), (1000,)]
    xs = [gradient(hvd.rank(), shape, tag=5) for shape in shapes]
    before = [x.clone() for x in xs]
    compression = make(levels)
    for op in (hvd.Average, hvd.Sum):
        operations.clear()
        together = hvd.grouped_allreduce(xs, name=name, op=op, compression=compression)
        assert len(operations) == 1
        for x, old in zip(xs, before, strict=True):
            assert torch.equal(x, old)
        single = make(levels)
        if op == hvd.Sum:  # with as many reductions before
            for place, x in enumerate(xs):
                allreduce(x, f"{name}.{place}", compression=single)
        for place, (x, own) in enumerate(zip(xs, together, strict=True)):
            if x.numel() >= 100:
                alone = allreduce(x, f"{name}.{place}", op=op, compression=single)
                assert torch.equal(alone, own)


def test_grouped_allreduce_of_several_dtypes_and_again(name: str, operations: list[str]) -> None:
    shapes = [(300,), (400,), (500,), (600,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.int64]
    xs = [
        gradient(hvd.rank(), shape, tag=6).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    compression = make()
    for _ in range(2):
        # Horovod's own group cannot have several dtypes; tokens have one, and so can these.
        first = hvd.grouped_allreduce(xs[:3], name=name, compression=compression)
        assert [own.dtype for own in first] == dtypes[:3]
    assert len(operations) == 4


# ---------------------------------------------------------------------------- who comes, and when


@needs_ranks
@LEVELS
def test_hooks_in_another_order_on_every_rank(levels: str, name: str) -> None:
    names = list(SHAPES)

    def order(step: int) -> list[str]:
        shift = (hvd.rank() + step) % len(names)
        return names[shift:] + names[:shift]

    own = parameters()
    mixed = train(own, optimizer_of(own, make(levels), name), names=order)
    own = parameters()
    assert mixed == train(own, optimizer_of(own, make(levels), name))


@needs_ranks
@LEVELS
def test_parameters_that_only_some_ranks_use(levels: str, name: str, operations: list[str]) -> None:
    """Horovod hands over zeros for the others, in synchronize()."""
    names = list(SHAPES)

    def used(step: int) -> list[str]:
        left = names[(hvd.rank() + step) % len(names)]
        return [own for own in names if own != left]

    own = parameters()
    train(own, optimizer_of(own, make(levels), name), names=used)
    assert len(operations) == 3


@needs_ranks
@LEVELS
def test_tensors_that_never_come_leave_their_bucket(
    levels: str, name: str, operations: list[str]
) -> None:
    """A class of the user sends some elsewhere: from the second step on nothing waits for them."""
    compression = make(levels)
    elsewhere = {"matrix", "vector"}

    class Wrapper:
        def __init__(self) -> None:
            self.wanted = elsewhere

        def compress(self, tensor: torch.Tensor) -> Any:
            if any(tensor is own[left].grad for left in self.wanted):
                return tensor, None
            return compression.compress(tensor)

        def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
            return tensor if ctx is None else compression.decompress(tensor, ctx)

    own, wrapper = parameters(), Wrapper()
    optimizer = optimizer_of(own, wrapper, name)
    train(own, optimizer)
    assert len(set(operations[1:])) == 1
    assert operations[0] != operations[1] == operations[2]
    wrapper.wanted = {"matrix"}  # one comes back
    operations.clear()
    train(own, optimizer)
    assert len(operations) == 6
    assert len(set(operations)) == 2
    assert f"gq.{name}vector" in operations


@needs_ranks
def test_frozen_and_unfrozen_layers(name: str, operations: list[str]) -> None:
    own = parameters()
    own["matrix"].requires_grad_(False)
    optimizer = optimizer_of(own, make(), name)
    train(own, optimizer, names=lambda step: [key for key in own if key != "matrix"])
    own["matrix"].requires_grad_(True)  # Horovod has no hook for it, and does not reduce it
    own["vector"].requires_grad_(False)  # its gradients are zeros
    left = ("matrix", "vector")
    train(own, optimizer, names=lambda step: [key for key in own if key not in left])
    assert len(set(operations)) == 1


@needs_ranks
@LEVELS
def test_two_optimizers_of_one_compression(levels: str, name: str, operations: list[str]) -> None:
    """Their steps cross: one's bucket waits for a tensor while the other synchronizes."""
    compression = make(levels)
    one, other = parameters(), parameters()
    optimizers = (
        optimizer_of(one, compression, name),
        optimizer_of(other, compression, f"{name}.o."),
    )
    for step in range(2):
        backward(one, step, ["table", "matrix"])
        backward(other, step)
        optimizers[1].step()
        backward(one, step, ["convolution", "vector", "bias"])
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    rows = all_bytes([own.detach() for both in (one, other) for own in both.values()])
    assert len(rows.unique(dim=0)) == 1
    for left, right in zip(one.values(), other.values(), strict=True):
        assert left.shape == right.shape
    assert len(operations) == 4


@needs_ranks
@LEVELS
def test_two_optimizers_that_are_given_the_names_of_both(
    levels: str, name: str, operations: list[str]
) -> None:
    """Of a whole model, as Horovod allows. Ranks begin in another order."""
    one, other = parameters(), parameters()
    named = [(f"{name}.{key}", own) for key, own in one.items()]
    named += [(f"{name}.o.{key}", own) for key, own in other.items()]
    compression = make(levels)
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(own.values(), lr=0.125), named, compression)
        for own in (one, other)
    ]
    for step in range(2):
        for own in (one, other) if hvd.rank() % 2 else (other, one):
            backward(own, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    rows = all_bytes([own.detach() for both in (one, other) for own in both.values()])
    assert len(rows.unique(dim=0)) == 1
    assert len(operations) == 4


@needs_ranks
def test_a_gradient_of_another_dtype_goes_by_itself(name: str, operations: list[str]) -> None:
    own = parameters()
    optimizer = optimizer_of(own, make(), name)
    for step in range(2):
        backward(own, step)
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    operations.clear()
    with torch.no_grad():
        own["vector"].data = own["vector"].data.double()
        own["vector"].grad = None
    backward(own, 3)
    optimizer.synchronize()
    assert own["vector"].grad is not None
    assert own["vector"].grad.dtype == torch.float64
    assert sorted(name.count("+") for name in operations) == [0, 1]


@needs_ranks
@LEVELS
@pytest.mark.parametrize("first", ["table", "convolution"])
def test_a_step_that_was_abandoned_half_way(levels: str, first: str, name: str) -> None:
    """Every rank forgets what has come of it, whatever comes first in the next step.

    Gradients stay where they are, so that what is stale looks like what is new.
    """
    results = []
    for abandon in (False, True):
        own = parameters()
        optimizer = optimizer_of(own, make(levels, min_elements=0), name)
        for parameter in own.values():
            parameter.grad = torch.zeros_like(parameter)
        if abandon:
            backward(own, 7, ["table", "vector", "matrix"])  # and then the loss was NaN, say
            # Horovod's own way to forget its handles.
            optimizer.load_state_dict(optimizer.state_dict())
            hvd.barrier()  # Horovod itself refuses a name that is still being reduced
            time.sleep(0.1)
            for parameter in own.values():
                parameter.grad.zero_()
        # As often as in the steps of the other, which the random numbers depend on.
        order = [first, *(key for key in own if key != first)]
        backward(own, 1, order)
        optimizer.synchronize()
        results.append([parameter.grad.clone() for parameter in own.values()])
    for plain, other in zip(*results, strict=True):
        # Both are rounded, by other random numbers; what is stale or missing differs by 1 or more.
        assert (plain - other).norm() < 0.8 * plain.norm()
    rows = all_bytes(results[1])
    assert len(rows.unique(dim=0)) == 1


@needs_ranks
def test_two_threads_bring_the_first_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two GPUs do: there is one set of buckets."""
    cut = GlobalQSGD._cut

    def slowly(*arguments: Any) -> Any:
        found = list(cut(*arguments))
        time.sleep(0.3)
        return found

    monkeypatch.setattr(GlobalQSGD, "_cut", slowly)
    own = parameters()
    optimizer = optimizer_of(own, make(), name)
    for key, parameter in own.items():
        parameter.grad = gradient(hvd.rank(), parameter.shape, tag=list(own).index(key))
    keys = list(own)

    def bring(some: list[str]) -> None:
        for key in some:
            optimizer._handles[own[key]] = optimizer._allreduce_grad_async(own[key])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bring, (keys[:2], keys[2:])))
    optimizer.synchronize()
    rows = all_bytes([parameter.grad for parameter in own.values()])
    assert len(rows.unique(dim=0)) == 1


@needs_ranks
@LEVELS
def test_gradients_are_not_kept_alive(levels: str, name: str) -> None:
    """Whoever sets gradients to None after a step wants their memory back."""
    own = parameters()
    optimizer = optimizer_of(own, make(levels), name)
    backward(own, 0)
    optimizer.step()
    known = [weakref.ref(one.grad) for one in own.values()]
    for one in own.values():
        one.grad = None
    assert [one() for one in known] == [None] * len(own)


@LEVELS
def test_tensors_of_a_call_are_not_kept_alive(levels: str, name: str) -> None:
    xs = [gradient(hvd.rank(), (size,), tag=size) for size in (500, 3, 700)]
    xs.append(xs[0])  # twice, and one that is left to Horovod
    known = [weakref.ref(x) for x in xs]
    compression = make(levels)
    one, _, _, other = hvd.grouped_allreduce(xs, name=name, compression=compression)
    assert not torch.equal(one, other), "as one of another name"
    del xs
    assert [found() for found in known] == [None] * 4
    assert not compression._calls


# ---------------------------------------------------------------------------------- what is refused


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the norms that are sent."""
    sent: list[str] = []
    allreduce_max = Collectives.allreduce_max

    def noted(own: Collectives, array: Any, name: str) -> Any:
        if name.endswith(".norm"):
            sent.append(name)
        return allreduce_max(own, array, name)

    monkeypatch.setattr(Collectives, "allreduce_max", noted)
    return sent


@needs_ranks
@LEVELS
def test_ranks_that_disagree_about_the_parameters(levels: str, name: str, norms: list[str]) -> None:
    """An error on every rank, before anything is sent that some of them do not know.

    (It would wait there, and a rank that called hvd.join() later would complete it.)
    """
    own = parameters()
    if hvd.rank() == hvd.size() - 1:
        own = dict(reversed(own.items()))
    optimizer = optimizer_of(own, make(levels), name)
    backward(own, 0)
    with pytest.raises(ConfigMismatchError, match=r"the ranks disagree about (the )?tensor"):
        optimizer.synchronize()
    hvd.barrier()
    assert norms == []


@needs_ranks
@LEVELS
def test_a_rank_on_which_a_layer_is_frozen(levels: str, name: str, norms: list[str]) -> None:
    """Its buckets are others; the first of them may be the same."""
    own = parameters()
    if hvd.rank() == 0:
        own["bias"].requires_grad_(False)
        own["convolution"].requires_grad_(False)
    optimizer = optimizer_of(own, make(levels, first_bucket_bytes=65_000), name)
    used = [key for key in own if key not in ("bias", "convolution")]
    backward(own, 0, used)
    optimizer._requires_update = {own[key] for key in used}  # nobody waits for Horovod's own
    with pytest.raises(ConfigMismatchError, match=r"the ranks disagree about (the )?tensor"):
        optimizer.synchronize()
    hvd.barrier()
    assert norms == []


@needs_ranks
@LEVELS
@pytest.mark.parametrize("buckets", ["together", "each by itself"])
def test_ranks_that_disagree_about_a_shape(
    buckets: str, levels: str, name: str, norms: list[str]
) -> None:
    """Also in a bucket of one, and where this rank has time to go on before it looks."""
    last = hvd.rank() == hvd.size() - 1
    own = parameters({"matrix": (300, 30), "vector": (6001 if last else 6000,)})
    options = {} if buckets == "together" else {"bucket_bytes": 0}
    optimizer = optimizer_of(own, make(levels, **options), name)
    backward(own, 0)
    for _ in range(20):
        pipeline.poll_all()
        time.sleep(0.01)
    with pytest.raises(ConfigMismatchError, match=r"the ranks disagree about (the )?tensor"):
        optimizer.synchronize()
    hvd.barrier()
    assert norms == []


def test_options_are_compared(name: str) -> None:
    if hvd.size() == 1:
        pytest.skip("needs others")
    compression = make(bucket_bytes=1000 + hvd.rank())
    with pytest.raises(ConfigMismatchError, match="bucket_bytes"):
        allreduce(torch.ones(1000), name, compression=compression)


@pytest.mark.parametrize("option", ["bucket_bytes", "first_bucket_bytes"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"GlobalQSGD: {option} must be 0 or more, got -1"):
        make(**{option: -1})
    with pytest.raises(TypeError, match=f"GlobalQSGD: {option} must be an integer"):
        make(**{option: 1.5})


@needs_ranks
@pytest.mark.skipif(
    "patience" in os.environ.get("LD_PRELOAD", ""), reason="whoever waits here sleeps"
)
@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_a_rank_that_waits_leaves_its_core(levels: str, name: str) -> None:
    """Horovod itself takes all of a core while it waits, for a token too."""
    late = hvd.rank() == hvd.size() - 1
    own = parameters()
    optimizer = optimizer_of(own, make(levels), name)
    for step in range(2):  # the first one agrees
        if late:
            time.sleep(1.0)
        backward(own, step)
        busy, began = time.thread_time(), time.monotonic()
        optimizer.step()
        busy, taken = time.thread_time() - busy, time.monotonic() - began
    if not late:
        assert taken > 0.5
        assert busy < 0.5 * taken
