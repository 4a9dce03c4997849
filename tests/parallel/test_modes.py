"""Every public entry under the modes of PyTorch that change what its functions do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_replicas, gradient, gradients

from gq_horovod.research.torch_baselines import QSGD, IntSGD, PowerSGD
from gq_horovod.torch import GlobalQSGD, allreduce

Mode = Callable[[], AbstractContextManager[Any]]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Mode] = {
    "no mode": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}

METHODS: dict[str, Callable[[], Any]] = {
    **{
        levels: lambda levels=levels: GlobalQSGD(levels=levels, min_elements=0, transport=TRANSPORT)
        for levels in ("standard", "exponential", "two-hop", "auto")
    },
    "checked": lambda: GlobalQSGD(min_elements=0, check_replicas=1, stats=1),
    "qsgd": lambda: QSGD(min_elements=0),
    "qsgd in Elias codes": lambda: QSGD(coding="elias", min_elements=0),
    "powersgd": lambda: PowerSGD(rank=2, min_elements=0),
    "intsgd": lambda: IntSGD(min_elements=0),
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
# Compiling takes seconds.
SOME_METHODS = pytest.mark.parametrize("method", ["standard", "two-hop", "powersgd"])


def strange(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor in several layouts and dtypes; the same numbers as near as may be."""
    return [
        tensor,
        tensor.to(torch.float64).to(torch.bfloat16),
        tensor.to(memory_format=torch.channels_last),
        tensor.transpose(0, 1),
        torch.stack([tensor, tensor], dim=-1)[..., 0],
    ]


@EVERY_MODE
@EVERY_METHOD
def test_functions(method: str, mode: str, name: str) -> None:
    """The same bytes as without a mode."""
    own = gradient(hvd.rank(), (6, 8, 10, 12), tag=71)
    results = []
    for place in ("no mode", mode):
        compression = METHODS[method]()
        tensors = strange(own)
        with MODES[place]():
            found = [
                allreduce(tensor, f"{name}.{index}", compression=compression)
                for index, tensor in enumerate(tensors)
            ]
            found += hvd.grouped_allreduce(
                [own, own * 2], name=f"{name}.group", compression=compression
            )
        for result, tensor in zip(found, tensors, strict=False):
            assert (result.dtype, result.device) == (tensor.dtype, tensor.device)
            assert result.shape == tensor.shape
        results.append(found)
    # PowerSGD's factors and IntSGD's first step are float sums of Horovod's, which fusion orders
    # from three ranks on.
    exact = method not in ("powersgd", "intsgd") or hvd.size() == 2
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other) if exact else torch.allclose(plain, other, atol=1e-5)
    check_replicas(*(result.contiguous() for result in results[1]))


@EVERY_MODE
@EVERY_METHOD
def test_training(method: str, mode: str, name: str) -> None:
    if mode in ("no_grad", "inference_mode"):
        pytest.skip("nothing to train there")
    weights = []
    for place in ("no mode", mode):
        parameter = torch.nn.Parameter(torch.ones(60, 50))
        compression = METHODS[method]()
        sgd = torch.optim.SGD([parameter], lr=0.1)
        optimizer = hvd.DistributedOptimizer(sgd, [(name, parameter)], compression=compression)
        for step in range(3):
            own = gradient(hvd.rank(), (60, 50), tag=72 + step)
            optimizer.zero_grad()
            with MODES[place]():
                (parameter.float() * own).sum().backward()
                optimizer.step()
        weights.append(parameter.detach().clone())
    assert torch.equal(*weights)
    check_replicas(*weights)


# -------------------------------------------------------------------------------- compiled regions


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """As torch.compile makes it, but for the machine code; whatever it warns of is an error."""
    found: Callable[..., Any] = torch.compile(function, backend="aot_eager", **options)

    def call(*arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lru_cache.*")
            return found(*arguments)

    return call


@SOME_METHODS
def test_functions_in_a_compiled_region(method: str, name: str) -> None:
    own = gradient(hvd.rank(), (50, 60), tag=73)

    def work(compression: Any, tensor: torch.Tensor) -> list[torch.Tensor]:
        before = tensor * 2
        one = hvd.allreduce(before, name=f"{name}.one", compression=compression)
        two = allreduce(before + 1, f"{name}.two", compression=compression)
        group = hvd.grouped_allreduce(
            [before, tensor], name=f"{name}.group", compression=compression
        )
        return [one * 2, two - 1, *(member + 1 for member in group)]

    plain = work(METHODS[method](), own)
    found = compiled(work)(METHODS[method](), own)
    assert all(map(torch.equal, plain, found))
    check_replicas(*found)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        *(("standard", what) for what in ("model", "whole step")),
        ("two-hop", "whole step"),
        ("powersgd", "step of the optimizer"),
    ],
)
def test_training_in_a_compiled_region(method: str, what: str, name: str) -> None:
    weights = []
    for mode in ("plain", "compiled"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 40))
        named = [(f"{name}.{key}", value) for key, value in net.named_parameters()]
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = hvd.DistributedOptimizer(sgd, named, compression=METHODS[method]())
        forward: Any = net
        update: Any = optimizer.step

        def step(
            data: torch.Tensor, forward: Any = net, optimizer: Any = optimizer, update: Any = None
        ) -> None:
            optimizer.zero_grad()
            forward(data).square().mean().backward()
            (update or optimizer.step)()

        run: Any = step
        if mode == "compiled":
            torch._dynamo.reset()
            forward = compiled(net) if what == "model" else net
            update = compiled(update) if what == "step of the optimizer" else update
            run = compiled(step) if what == "whole step" else step
        for turn in range(3):
            generator = torch.Generator().manual_seed(10 * turn + hvd.rank())
            data = torch.randn(8, 40, generator=generator)
            if what == "whole step":
                run(data)
            else:
                run(data, forward, optimizer, update)
        weights.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*weights, strict=True):
        # Compiled code may round the loss otherwise, and a code with it.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    check_replicas(*weights[1])


def test_a_graph_is_not_broken_where_nothing_is_compressed() -> None:
    """Importing the package changes nothing about what compiles."""
    own = gradients((30,), tag=74)[hvd.rank()]
    assert torch.equal(torch.compile(torch.sin, backend="eager", fullgraph=True)(own), own.sin())
