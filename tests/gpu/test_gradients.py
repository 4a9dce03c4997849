"""Gradients of PyTorch on a GPU, in one rank; needs a GPU, CuPy and Horovod."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("cupy", reason="CuPy is not installed")
hvd = pytest.importorskip("horovod.torch", reason="Horovod with PyTorch is not installed")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no GPU", allow_module_level=True)

ELEMENTS = 1 << 20
LONG = 10**9  # cycles, half a second


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_a_hook_leaves_the_gpu_its_work(levels: Any) -> None:
    """PyTorch has given it far more than it has done when the hook comes, and goes."""
    from gq_horovod.torch import GlobalQSGD

    values = torch.randn(ELEMENTS, device="cuda")
    parameter = torch.nn.Parameter(torch.zeros_like(values))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [("parameter", parameter)],
        compression=GlobalQSGD(levels=levels),
    )
    for _ in range(2):  # the first time kernels are compiled
        parameter.grad = torch.full_like(values, torch.nan)
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        parameter.grad.copy_(values)
        optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
        busy = not torch.cuda.current_stream().query()
        optimizer.synchronize()
    assert busy
    error = (parameter.grad - values).norm() / values.norm()
    assert 0 < error < (0.4 if levels == "exponential" else 0.02)


def test_a_mean_of_its_own_waits_for_nothing() -> None:
    """Its memory has been no other tensor's with which the GPU is not done, and so it is at once.

    Nor is it another one's before PyTorch's stream is done with it.
    """
    from gq_horovod.torch import gpus, tensors

    values = torch.ones(ELEMENTS, device="cuda")
    other = torch.full_like(values, 2.0)
    doubled = torch.empty_like(values)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    torch.mul(other, 2, out=doubled)
    del other  # PyTorch hands its memory out again
    output = tensors.new_output(values, values.dtype)
    busy = not torch.cuda.current_stream().query()
    with torch.cuda.stream(gpus.kernel_stream(output.device)):
        output.fill_(3.0)
    gpus.follow_kernels(output.device)
    tripled = output * 3
    del output
    again = tensors.new_output(values, values.dtype)
    with torch.cuda.stream(gpus.kernel_stream(again.device)):
        again.zero_()
    torch.cuda.synchronize()
    assert busy
    assert torch.equal(doubled, torch.full_like(values, 4.0))
    assert torch.equal(tripled, torch.full_like(values, 9.0))


@pytest.mark.parametrize("stays", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_the_same_bytes_as_in_host_memory(
    levels: Any, dtype: torch.dtype, stays: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether codes pass through host memory or, where Horovod has NCCL, stay on the GPU."""
    from gq_horovod.torch import GlobalQSGD, allreduce, gpus

    monkeypatch.setenv(gpus.VARIABLE, stays)
    own = torch.randn(ELEMENTS + 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for place in ("cpu", "cuda"):
        compression = GlobalQSGD(levels=levels, block_size=256)
        for _ in range(3):  # memory of the first is used again
            result = allreduce(own.to(place), "tensor", compression=compression)
            results.append(result.cpu())
    for step in range(3):
        assert torch.equal(results[step], results[step + 3])


@pytest.mark.parametrize("stays", ["0", "1"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 5},
        {"bits": 3, "error_feedback": True},
        {"levels": "standard", "norm": "l2"},
        {"levels": "exponential", "block_size": "bucket"},
    ],
    ids=["default", "dense lanes", "error feedback", "L2 norms", "a norm for a bucket"],
)
def test_a_stream_of_its_own_gives_the_same_bytes(
    options: dict[str, Any], stays: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes on one stream, steps on another; gradients that have to be copied."""
    from gq_horovod.torch import GlobalQSGD, gpus

    monkeypatch.setenv(gpus.VARIABLE, stays)
    shape = (64, 33, 17)

    def train(place: str) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.zeros(shape, device=place))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0),
            [("parameter", parameter)],
            compression=GlobalQSGD(**{"block_size": 256, **options}),
        )
        side = torch.cuda.Stream() if place == "cuda" else None
        results = []
        for step in range(3):
            own = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(step))
            own = own.permute(2, 1, 0)
            with torch.cuda.stream(side):  # none on a CPU
                if side is not None:
                    side.wait_stream(torch.cuda.default_stream())
                    torch.cuda._sleep(LONG // 20)
                parameter.grad = own.to(place)
                optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
            optimizer.synchronize()
            results.append(parameter.grad.cpu())
            parameter.grad = None
        return results

    for one, other in zip(train("cpu"), train("cuda"), strict=True):
        assert torch.equal(one, other)


def test_memory_that_pytorch_does_not_use_is_given_back() -> None:
    """Where our kernels need some, and PyTorch keeps all that is left of the GPU."""
    from gq_horovod.torch import gpus
    from mpi_ops.kernels import device

    assert gpus.kernels_problem(torch.cuda.current_device()) is None
    left = 64 << 20
    free, _ = torch.cuda.mem_get_info()
    kept = torch.empty(free - left, dtype=torch.uint8, device="cuda")
    del kept
    assert torch.cuda.mem_get_info()[0] < 8 * left
    assert device.KERNELS.empty(8 * left, "uint8").nbytes == 8 * left


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_steps_take_no_more_memory_than_the_first_ones(
    levels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole backward passes, whose activations differ in size from step to step."""
    import cupy

    from gq_horovod.torch import GlobalQSGD

    monkeypatch.setenv("HOROVOD_ELASTIC", "1")  # an optimizer of one rank has hooks only then
    layers = [torch.nn.Linear(512, 512, device="cuda") for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    compression = GlobalQSGD(levels=levels, bucket_bytes=2 << 20)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=compression,
    )
    taken = []
    for step in range(40):
        optimizer.zero_grad()
        model(torch.randn(64 + step % 3, 512, device="cuda")).square().mean().backward()
        optimizer.step()
        torch.cuda.synchronize()
        pool = cupy.get_default_memory_pool()
        taken.append((torch.cuda.memory_reserved(), pool.total_bytes()))
    assert all(last <= before for before, last in zip(taken[19], taken[-1], strict=True))


def test_no_graph_is_captured_meanwhile() -> None:
    from gq_horovod.torch import GlobalQSGD

    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS, device="cuda"))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [("parameter", parameter)],
        compression=GlobalQSGD(),
    )
    parameter.grad = torch.ones(ELEMENTS, device="cuda")
    refused = pytest.raises(RuntimeError, match="make_graphed_callables")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer._allreduce_grad_async(parameter)
