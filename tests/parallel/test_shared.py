"""One compression for everything in a process: threads, copies, models with equal names, wrappers.

The class itself stands for one instance, so two libraries in one program share it unknowingly.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_mean, check_replicas, compressor, gradient, gradients
from horovod.torch.compression import Compression as HorovodCompression

from gq_horovod.research.torch_baselines import QSGD, IntSGD, PowerSGD
from gq_horovod.torch import GlobalQSGD, allreduce

LEVELS = pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])


def model(prefix: str, seed: int = 0) -> tuple[torch.nn.Module, list[tuple[str, Any]]]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(3)])
    return net, [(f"{prefix}.{key}", value) for key, value in net.named_parameters()]


def wrap(net: torch.nn.Module, named: Any, compression: Any, **options: Any) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    return hvd.DistributedOptimizer(optimizer, named, compression=compression, **options)


def step(net: torch.nn.Module, optimizer: Any, seed: int = 0) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(1000 * seed + hvd.rank())
    net(torch.randn(8, 40, generator=generator)).square().mean().backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------ threads


def in_threads(work: Callable[[int], None], count: int = 2) -> None:
    """Run work(0), work(1), ... at the same time, and raise what they raise."""
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@LEVELS
@pytest.mark.parametrize("one", ["instance", "class", "an instance for each"])
def test_threads_that_reduce(levels: str, one: str, name: str) -> None:
    """Also their first use, which compares options, is at the same time."""
    if one == "class" and (levels != "two-hop" or TRANSPORT != "horovod"):
        pytest.skip("the class has the default options")
    options = {"levels": levels, "transport": TRANSPORT}
    shared = GlobalQSGD if one == "class" else GlobalQSGD(**options)
    results: dict[int, list[torch.Tensor]] = {}

    def work(place: int) -> None:
        own = GlobalQSGD(**options) if one == "an instance for each" else shared
        tensor = gradient(hvd.rank(), 20000, tag=400 + place)
        results[place] = [allreduce(tensor, f"{name}.{place}", compression=own) for _ in range(20)]

    in_threads(work, 3)
    alone = GlobalQSGD(**options)
    for place, found in sorted(results.items()):  # in the same order on every rank
        inputs = gradients(20000, tag=400 + place)
        check_mean(found[0], inputs, alone)
        check_replicas(*found)
        # The dither is that of the name and the step: threads change no byte.
        if one != "class":
            expected = allreduce(inputs[hvd.rank()], f"{name}.{place}", compression=alone)
            assert torch.equal(found[0], expected)


@LEVELS
def test_threads_that_train(levels: str, name: str) -> None:
    compression = compressor(levels)
    # Before the threads, which have one random generator together.
    models = [model(f"{name}.{place}", seed=place) for place in range(2)]

    def work(place: int) -> None:
        net, named = models[place]
        optimizer = wrap(net, named, compression)
        for turn in range(10):
            step(net, optimizer, turn)

    in_threads(work)
    check_replicas(*(parameter for net, _ in models for parameter in net.parameters()))


@pytest.mark.usefixtures("several_ranks")
def test_an_error_of_one_thread_is_not_the_other_ones(name: str) -> None:
    compression = compressor("two-hop")
    allreduce(torch.ones(100), name, compression=compression)

    def work(place: int) -> None:
        if place == 0:
            with pytest.raises(ValueError, match="op must be"):
                hvd.allreduce(torch.ones(9), name=f"{name}.op", op=hvd.Max, compression=compression)
        else:
            for _ in range(20):
                allreduce(gradient(hvd.rank(), 5000), f"{name}.good", compression=compression)

    in_threads(work)


# ------------------------------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda own: pickle.loads(pickle.dumps(own)),  # noqa: S301
    "cloudpickle": lambda own: cloudpickle.loads(cloudpickle.dumps(own)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


class Renamed(GlobalQSGD):
    """A user's class, with something of its own."""

    def __init__(self, note: str, **options: Any) -> None:
        super().__init__(**options)
        self.note = note


ORIGINALS: dict[str, Callable[[], Any]] = {
    "standard": lambda: GlobalQSGD(levels="standard", bits=10, min_elements=5, stats=7),
    "two-hop": lambda: GlobalQSGD(levels="two-hop", bits=4, transport=TRANSPORT),
    "auto": lambda: GlobalQSGD(levels="auto"),
    "preset": lambda: GlobalQSGD.paper_exponential,
    "for a process set": lambda: GlobalQSGD(process_set=hvd.global_process_set),
    "qsgd": lambda: QSGD(bits=4),
    "qsgd in Elias codes": lambda: QSGD(coding="elias"),
    "intsgd": lambda: IntSGD(min_elements=0),
    "powersgd": lambda: PowerSGD(rank=2, min_elements=0),
    "a subclass": lambda: Renamed("kept", levels="two-hop"),
    "class": lambda: GlobalQSGD,
}


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_begins_anew_with_the_same_options(way: str, original: str, name: str) -> None:
    """As Spark's and Ray's estimators send it; also after its first use."""
    compression = ORIGINALS[original]()
    own = gradient(hvd.rank(), (100, 60), tag=41)
    first = allreduce(own, name, compression=compression)
    copied = COPIES[way](compression)
    assert repr(copied) == repr(compression)
    if original == "class":
        assert copied is GlobalQSGD
        return
    assert copied is not compression
    assert copied.state_dict()["process_sets"] == {}
    if isinstance(copied, GlobalQSGD):
        assert copied.stats == {}
        assert copied.stats_interval == compression.stats_interval
    again = allreduce(own, name, compression=copied)
    if original != "preset":  # which other tests may have used before
        assert torch.equal(first, again)
    check_replicas(again)
    if isinstance(compression, Renamed):
        assert copied.note == "kept"
    allreduce(own, name, compression=compression)


def test_an_optimizer_is_copied_with_its_compression(name: str) -> None:
    net, named = model(name)
    optimizer = wrap(net, named, GlobalQSGD(min_elements=0))
    step(net, optimizer)
    assert repr(copy.deepcopy(optimizer._compression)) == repr(optimizer._compression)


# -------------------------------------------------------------------------- models with equal names


@pytest.mark.parametrize("method", ["standard", "two-hop", "powersgd", "intsgd"])
def test_two_models_with_the_same_names(method: str) -> None:
    """What a method remembers of one's gradients is never added to the other's."""

    def compression() -> Any:
        if method == "powersgd":
            return PowerSGD(rank=1, min_elements=0)
        if method == "intsgd":
            return IntSGD(min_elements=0)
        return GlobalQSGD(levels=method, min_elements=0, transport=TRANSPORT)

    def train(shared: bool) -> list[torch.Tensor]:
        one = compression()
        pairs = []
        for seed in range(2):
            net, named = model("same", seed)
            pairs.append((net, wrap(net, named, one if shared else compression())))
        for turn in range(4):
            for place, (net, optimizer) in enumerate(pairs):
                step(net, optimizer, 10 * turn + place)
        return [p.detach().clone() for net, _ in pairs for p in net.parameters()]

    together, apart = train(shared=True), train(shared=False)
    check_replicas(*together)
    first = len(together) // 2
    # Horovod's own sums of more than two ranks are rounded as its fusion has it. What another
    # model leaves behind is larger by far.
    exact = method != "powersgd" or hvd.size() <= 2
    same = torch.equal if exact else partial(torch.allclose, atol=1e-6)
    assert all(map(same, together[:first], apart[:first]))
    if method == "powersgd":  # others have dithers of their own
        assert all(map(same, together[first:], apart[first:]))


@pytest.mark.usefixtures("several_ranks")
def test_what_is_remembered_of_two_models(name: str) -> None:
    compression = PowerSGD(rank=1, min_elements=0)
    kept = []
    for place in range(2):
        net, named = model(name, place)
        optimizer = wrap(net, named, compression)
        step(net, optimizer)
        kept += [net, named, optimizer]
    (group,) = compression._groups.values()
    keys = {key for key, memory in group.memories.items() if memory}
    assert keys == {f"{name}.{i}.weight" for i in range(3)} | {
        f"{name}.{i}.weight#2" for i in range(3)
    }
    del net, named, optimizer, kept
    gc.collect()
    # Of models that are gone, nothing is kept but the number of their steps.
    assert not any(group.memories.values())
    assert group.steps[f"{name}.0.weight#2"] == 1


@pytest.mark.usefixtures("several_ranks")
def test_statistics_of_two_models(name: str) -> None:
    compression = GlobalQSGD(min_elements=0, stats=1, transport=TRANSPORT)
    nets = []
    for place in range(2):
        net, named = model(name, place)
        nets.append(net)
        optimizer = wrap(net, named, compression)
        step(net, optimizer)
        nets.append(optimizer)
    assert f"{name}.0.weight" in compression.stats
    assert f"{name}.0.weight#2" in compression.stats


def test_a_tensor_that_changes_its_shape(name: str) -> None:
    """PowerSGD's error of a matrix is not added to one of another shape."""
    compression = PowerSGD(rank=1, min_elements=0)
    for shape in ((40, 50), (40, 50), (30, 70), (40, 50)):
        allreduce(gradient(hvd.rank(), shape), name, compression=compression)


# ------------------------------------------------------------------------------ several instances


@LEVELS
@pytest.mark.parametrize("shared", [True, False])
def test_optimizers_that_step_in_another_order_on_every_rank(
    levels: str, shared: bool, name: str
) -> None:
    """Plain Horovod has started everything by then, and so has to have this package."""
    options = {"levels": levels, "min_elements": 0, "transport": TRANSPORT}
    instances = [GlobalQSGD(**options) for _ in range(2)]
    parameters = [torch.nn.Parameter(torch.zeros(50_000)) for _ in instances]
    optimizers = []
    for place, parameter in enumerate(parameters):
        sgd = torch.optim.SGD([parameter], lr=1.0)
        compression = instances[0 if shared else place]
        optimizers.append(
            hvd.DistributedOptimizer(sgd, [(f"{name}.{place}", parameter)], compression)
        )
    order = [0, 1] if hvd.rank() % 2 else [1, 0]
    for turn in range(5):
        own = [gradients(50_000, tag=60 + 2 * turn + place) for place in range(2)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for place in order:
            (parameters[place] * own[place][hvd.rank()]).sum().backward()
        for place in order:
            optimizers[place].synchronize()
        for place, parameter in enumerate(parameters):
            assert parameter.grad is not None
            if turn in (0, 4) and hvd.size() > 1:
                check_mean(parameter.grad, own[place], instances[0])
            check_replicas(parameter.grad)
            with optimizers[place].skip_synchronize():
                optimizers[place].step()


@LEVELS
def test_an_operation_of_the_program_before_the_step_or_behind_it(levels: str, name: str) -> None:
    """Those that wait for it have to go on with codes, which the others wait for first."""
    if hvd.size() == 1:
        pytest.skip("needs another rank")
    parameter = torch.nn.Parameter(torch.zeros(50_000))
    compression = GlobalQSGD(levels=levels, min_elements=0, transport=TRANSPORT)
    sgd = torch.optim.SGD([parameter], lr=1.0)
    optimizer = hvd.DistributedOptimizer(sgd, [(name, parameter)], compression)
    for turn in range(3):
        own = gradients(50_000, tag=80 + turn)[hvd.rank()]
        (parameter * own).sum().backward()
        for what in ("loss", "step") if hvd.rank() % 2 else ("step", "loss"):
            if what == "step":
                optimizer.step()
            else:
                hvd.allreduce(torch.ones(1), name=f"{name}.loss")
        optimizer.zero_grad()
    check_replicas(parameter.detach())


# ----------------------------------------------------------------------------------------- wrappers


class BySize:
    """A user's rule: matrices are compressed, the rest is sent as float16."""

    inner: Any = GlobalQSGD

    @classmethod
    def _of(cls, tensor: torch.Tensor) -> Any:
        return cls.inner if tensor.dim() > 1 else HorovodCompression.fp16

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> Any:
        own = cls._of(tensor)
        handed, context = own.compress(tensor)
        return handed, (own, context)

    @classmethod
    def decompress(cls, tensor: torch.Tensor, context: Any) -> Any:
        own, inner = context
        return own.decompress(tensor, inner)


class Deeper(BySize):
    """Two calls deep, and in a loop of its own."""

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> Any:
        (found,) = [BySize.compress(own) for own in [tensor]]
        return found


class Scaled(BySize):
    """What is passed on is not the gradient itself."""

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> Any:
        return BySize.compress(tensor * 4)

    @classmethod
    def decompress(cls, tensor: torch.Tensor, context: Any) -> Any:
        return BySize.decompress(tensor, context) / 4


class Forwarding:
    """An object that forwards whatever it is asked for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(self._inner, name)(*arguments, **options)

        return call


class Sub(GlobalQSGD):
    """A subclass."""


class Calling(GlobalQSGD):
    """A subclass that calls its parent's methods."""

    def compress(self, tensor: torch.Tensor) -> Any:
        return super().compress(tensor)

    def decompress(self, tensor: torch.Tensor, context: Any) -> Any:
        return super().decompress(tensor, context)


WRAPPERS: dict[str, Any] = {
    "one call deep": BySize,
    "two calls deep": Deeper,
    "scaled": Scaled,
    "an object": Forwarding(GlobalQSGD(min_elements=0)),
    "a subclass": Sub,
    "an instance of a subclass": Sub(levels="two-hop"),
    "a subclass that calls its parent": Calling(min_elements=0),
}


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"backward_passes_per_step": 2}], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_class_of_the_user_around_it(wrapper: str, options: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(80, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 80)]
    net = torch.nn.Sequential(*layers)
    named = [(f"{name}.{key}", value) for key, value in net.named_parameters()]
    exact = copy.deepcopy(net)
    exact_named = [(f"{name}.exact.{key}", value) for key, value in exact.named_parameters()]
    ours = wrap(net, named, WRAPPERS[wrapper], **options)
    plain = wrap(exact, exact_named, HorovodCompression.none, **options)
    for turn in range(2):
        for own, optimizer in ((net, ours), (exact, plain)):
            optimizer.zero_grad()
            for part in range(options.get("backward_passes_per_step", 1)):
                seed = 10 * turn + part
                generator = torch.Generator().manual_seed(1000 * seed + hvd.rank())
                own(torch.randn(8, 80, generator=generator)).square().mean().backward()
            optimizer.step()
    check_replicas(*net.parameters())
    for found, wanted in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_functions_of_horovod_through_a_class_of_the_user(wrapper: str, name: str) -> None:
    inputs = [gradients((60, 70), tag=51), gradients((90,), tag=52), gradients((50, 90), tag=53)]
    own = [every[hvd.rank()] for every in inputs]
    compression = WRAPPERS[wrapper]
    results = hvd.grouped_allreduce(own, name=name, compression=compression)
    results.append(hvd.allreduce(own[0], name=f"{name}.one", compression=compression))
    for result, every in zip(results, [*inputs, inputs[0]], strict=True):
        mean = torch.stack(every).mean(dim=0)
        assert result.shape == mean.shape
        torch.testing.assert_close(result, mean, rtol=0, atol=0.1 * float(mean.abs().max()))
    check_replicas(*results)
