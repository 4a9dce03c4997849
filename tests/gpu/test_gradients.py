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


def test_a_mean_of_its_own_is_not_written_too_early() -> None:
    """Its memory has been another tensor's, with which the GPU is not done."""
    from gq_horovod.torch import tensors

    values = torch.ones(ELEMENTS, device="cuda")
    other = torch.full_like(values, 2.0)
    doubled = torch.empty_like(values)
    pointer = other.data_ptr()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    torch.mul(other, 2, out=doubled)
    del other  # PyTorch hands its memory out again
    output = tensors.new_output(values, values.dtype)
    assert output.data_ptr() == pointer
    with torch.cuda.stream(torch.cuda.Stream()):
        output.zero_()
    torch.cuda.synchronize()
    assert torch.equal(doubled, torch.full_like(values, 4.0))
