"""An unmodified hvd.DistributedOptimizer with compression=GlobalQSGD, option by option.

The loss is the sum of parameter * c over all parameters, so the gradient of each is c: the tests
choose what every rank brings.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from helpers import all_bytes, check_mean, check_replicas, compressor, gradient

from gq_horovod.path import pipeline
from gq_horovod.path.pipeline import Method, Reduced, Task
from gq_horovod.torch import GlobalQSGD
from mpi_ops.kernels.host import Tensors
from mpi_ops.layout import Parcel, Piece

Parameters = dict[str, torch.nn.Parameter]

MIN_ELEMENTS = 1000
LEARNING_RATE = 0.125
SHAPES = {
    "convolution": (16, 16, 3, 3),
    "matrix": (35, 37),
    "vector": (1003,),
    "bias": (65,),  # fewer than MIN_ELEMENTS
}
BOTH = pytest.mark.parametrize("levels", ["standard", "exponential"])


def make_parameters(shapes: Mapping[str, Sequence[int]] = SHAPES) -> Parameters:
    """Parameters that start equal on every rank."""
    return {name: torch.nn.Parameter(gradient(0, shape, tag=99)) for name, shape in shapes.items()}


def make_optimizer(parameters: Parameters, compression: Any, **options: Any) -> Any:
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    return hvd.DistributedOptimizer(
        optimizer, named_parameters=parameters.items(), compression=compression, **options
    )


def local_gradient(parameters: Parameters, name: str, rank: int, step: int) -> torch.Tensor:
    parameter = parameters[name]
    tag = 100 + 10 * step + list(parameters).index(name)
    return gradient(rank, parameter.shape, tag, dtype=parameter.dtype)


def backward(parameters: Parameters, step: int, names: Iterable[str] | None = None) -> None:
    """Give the parameters, or some of them, this rank's gradients, in the order of `names`."""
    for name in parameters if names is None else names:
        constant = local_gradient(parameters, name, hvd.rank(), step)
        (parameters[name] * constant).sum().backward()


def check_gradient(
    result: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    compression: GlobalQSGD,
    factor: float = 1.0,
) -> None:
    """Assert that `result` is what the optimizer should have made of the ranks' gradients."""
    if hvd.size() == 1:  # Horovod registers no hooks then
        assert torch.equal(result, inputs[0])
    elif result.numel() >= compression.config.min_elements:
        check_mean(result, inputs, compression, factor=factor)
    else:
        exact = torch.stack([x.double() for x in inputs]).mean(dim=0) * factor
        # Horovod adds in the dtype of the tensor: a rounding per rank, and one for the scaling.
        unit = torch.finfo(result.dtype).eps
        bound = (len(inputs) + 1) * unit * factor * max(float(x.abs().max()) for x in inputs)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)


def check_step(
    parameters: Parameters, step: int, compression: GlobalQSGD, factor: float = 1.0
) -> None:
    """Assert that every parameter's gradient is the mean of all ranks' gradients of `step`."""
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        inputs = [local_gradient(parameters, name, rank, step) for rank in range(hvd.size())]
        check_gradient(parameter.grad, inputs, compression, factor)


def apply(optimizer: Any) -> None:
    """The rest of a step after optimizer.synchronize()."""
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ options


OPTIONS: dict[str, Callable[[Parameters], dict[str, Any]]] = {
    "default": lambda _: {},
    "sum": lambda _: {"op": hvd.Sum},
    "predivide": lambda _: {"gradient_predivide_factor": 2.0},
    "passes": lambda _: {"backward_passes_per_step": 2},
    "number of groups": lambda _: {"groups": 2},
    "list of groups": lambda p: {"groups": [[p["bias"], p["matrix"]], [p["vector"]]]},
    "groups of passes": lambda _: {"groups": 2, "backward_passes_per_step": 2},
    "sum of groups": lambda _: {"groups": 2, "op": hvd.Sum},
}


@pytest.mark.parametrize("option", OPTIONS)
@BOTH
def test_options(levels: str, option: str) -> None:
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    options = OPTIONS[option](parameters)
    optimizer = make_optimizer(parameters, compression, **options)
    passes = options.get("backward_passes_per_step", 1)
    factor = hvd.size() if options.get("op") == hvd.Sum else 1
    for step in range(3):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for part in range(passes):
            backward(parameters, passes * step + part)
        optimizer.synchronize()
        for name, parameter in parameters.items():
            inputs = [
                sum(
                    local_gradient(parameters, name, rank, passes * step + part)
                    for part in range(passes)
                )
                for rank in range(hvd.size())
            ]
            check_gradient(parameter.grad, inputs, compression, factor)
            before[name] -= LEARNING_RATE * parameter.grad
        apply(optimizer)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), before[name])
    check_replicas(*parameters.values())


def test_the_old_name_of_groups() -> None:
    compression = compressor(min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    with pytest.warns(DeprecationWarning, match="num_groups"):
        optimizer = make_optimizer(parameters, compression, num_groups=2)
    backward(parameters, 0)
    optimizer.synchronize()
    check_step(parameters, 0, compression)


@pytest.mark.parametrize("choice", [GlobalQSGD, GlobalQSGD(levels="exponential")], ids=str)
def test_the_class_or_an_instance_with_default_options(choice: Any) -> None:
    """step() without synchronize(), as most scripts have it."""
    parameters = make_parameters({"weight": (70, 67), "bias": (70,)})
    optimizer = make_optimizer(parameters, choice)
    for step in range(2):
        optimizer.zero_grad()
        backward(parameters, step)
        optimizer.step()
        check_step(parameters, step, choice() if isinstance(choice, type) else choice)
    check_replicas(*parameters.values())


def test_parameters_without_names() -> None:
    parameters = make_parameters()
    compression = compressor(min_elements=MIN_ELEMENTS)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=LEARNING_RATE), compression=compression
    )
    backward(parameters, 0)
    optimizer.synchronize()
    check_step(parameters, 0, compression)


# -------------------------------------------------------------------------------------- models


@BOTH
def test_a_model_of_mixed_dtypes(levels: str) -> None:
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    parameters = {
        f"{kind}.{dtype}": torch.nn.Parameter(gradient(0, count, tag=99, dtype=dtype))
        for dtype in dtypes
        for kind, count in (("large", 1500), ("small", 15))
    }
    optimizer = make_optimizer(parameters, compression)
    for step in range(2):
        backward(parameters, step)
        optimizer.synchronize()
        check_step(parameters, step, compression)
        apply(optimizer)
    check_replicas(*parameters.values())


@BOTH
def test_channels_last(levels: str) -> None:
    """The gradient keeps the strides of its parameter, as the optimizer's state does."""
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    weight = torch.nn.Parameter(
        gradient(0, (16, 16, 3, 3), tag=99).to(memory_format=torch.channels_last)
    )
    optimizer = make_optimizer({"weight": weight}, compression)
    inputs = [gradient(rank, weight.shape, tag=98) for rank in range(hvd.size())]
    own = inputs[hvd.rank()].to(memory_format=torch.channels_last)
    (weight * own).sum().backward()
    optimizer.synchronize()
    assert weight.grad is not None
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    check_gradient(weight.grad, inputs, compression)
    apply(optimizer)
    check_replicas(weight)


@BOTH
@pytest.mark.parametrize("as_dense", [True, False])
def test_an_embedding_with_sparse_gradients(levels: str, as_dense: bool) -> None:
    """Reduced as dense tensors; or left to Horovod, which gathers them."""
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    embedding = torch.nn.Embedding(200, 17, sparse=True)
    parameters = {"embedding": embedding.weight}
    hvd.broadcast_parameters(parameters, root_rank=0)
    optimizer = make_optimizer(parameters, compression, sparse_as_dense=as_dense)
    rows = [torch.arange(40) * (rank + 2) % 200 for rank in range(hvd.size())]
    weights = [gradient(rank, (40, 17), tag=97) for rank in range(hvd.size())]
    for _ in range(2):
        (embedding(rows[hvd.rank()]) * weights[hvd.rank()]).sum().backward()
        optimizer.synchronize()
        inputs = [
            torch.zeros(200, 17).index_add_(0, rows[rank], weights[rank])
            for rank in range(hvd.size())
        ]
        assert embedding.weight.grad is not None
        result = embedding.weight.grad.to_dense()
        exact = torch.stack(inputs).mean(dim=0)
        if as_dense:
            check_gradient(result, inputs, compression)
        else:
            torch.testing.assert_close(result, exact)
        apply(optimizer)
    check_replicas(embedding.weight)


@BOTH
@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("groups", [None, 2])
def test_parameters_that_a_step_does_not_use(levels: str, groups: int | None) -> None:
    """A dynamic forward pass: they take part with zeros, in whatever order a set gives them.

    With groups all ranks have to leave out the same ones, or Horovod itself waits for ever.
    """
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression, groups=groups)
    names = list(parameters)
    for step in range(2):
        used = {
            rank: [n for i, n in enumerate(names) if (i + step + (0 if groups else rank)) % 3]
            for rank in range(hvd.size())
        }
        backward(parameters, step, used[hvd.rank()])
        optimizer.synchronize()
        for name, parameter in parameters.items():
            inputs = [
                local_gradient(parameters, name, rank, step) * (1.0 if name in used[rank] else 0.0)
                for rank in range(hvd.size())
            ]
            check_gradient(parameter.grad, inputs, compression)
        apply(optimizer)
    check_replicas(*parameters.values())


# --------------------------------------------------------------------------------------- scripts


@BOTH
def test_gradient_clipping(levels: str) -> None:
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    for step in range(2):
        before = [p.detach().clone() for p in parameters.values()]
        backward(parameters, step)
        optimizer.synchronize()
        check_step(parameters, step, compression)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        assert float(norm) > 0.5
        apply(optimizer)
        moved = [p.detach() - start for p, start in zip(parameters.values(), before, strict=True)]
        length = float(torch.cat([m.reshape(-1) for m in moved]).norm())
        assert length == pytest.approx(0.5 * LEARNING_RATE, rel=1e-3)
    check_replicas(*parameters.values())


@BOTH
def test_two_optimizers_share_one_compression(levels: str) -> None:
    """As a GAN has them: alternately with equal parameter names, and both at once."""
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    generator, discriminator = make_parameters(), make_parameters()
    first = make_optimizer(generator, compression)
    second = make_optimizer(discriminator, compression)
    for step in range(2):
        for parameters, optimizer in ((generator, first), (discriminator, second)):
            backward(parameters, step)
            optimizer.synchronize()
            check_step(parameters, step, compression)
            apply(optimizer)
    check_replicas(*generator.values(), *discriminator.values())

    renamed = {f"generator.{name}": p for name, p in make_parameters().items()}
    third = make_optimizer(renamed, compression)
    backward(renamed, 1)
    backward(discriminator, 2)
    second.synchronize()
    third.synchronize()
    check_step(renamed, 1, compression)
    check_step(discriminator, 2, compression)


def test_two_optimizers_with_different_compressions_at_once() -> None:
    standard = compressor("standard", min_elements=MIN_ELEMENTS)
    exponential = compressor("exponential", min_elements=MIN_ELEMENTS)
    ours = {f"a.{name}": p for name, p in make_parameters().items()}
    theirs = {f"b.{name}": p for name, p in make_parameters().items()}
    optimizers = make_optimizer(ours, standard), make_optimizer(theirs, exponential)
    backward(ours, 0)
    backward(theirs, 1)
    for optimizer in optimizers:
        optimizer.synchronize()
    check_step(ours, 0, standard)
    check_step(theirs, 1, exponential)


@BOTH
def test_process_set(levels: str, ends: hvd.ProcessSet) -> None:
    compression = GlobalQSGD(levels=levels, min_elements=MIN_ELEMENTS, process_set=ends)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression, process_set=ends)
    for step in range(2):
        backward(parameters, step)
        optimizer.synchronize()
        for name, parameter in parameters.items():
            inputs = [local_gradient(parameters, name, rank, step) for rank in ends.ranks]
            if ends.included():
                check_gradient(parameter.grad, inputs, compression)
            else:
                own = local_gradient(parameters, name, hvd.rank(), step)
                assert torch.equal(parameter.grad, own)
        apply(optimizer)
    if ends.included():
        check_replicas(*parameters.values(), process_set=ends)


@BOTH
@pytest.mark.parametrize("groups", [None, 2])
def test_hooks_may_fire_in_another_order_on_every_rank(levels: str, groups: int | None) -> None:
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters({f"layer{i}": (200 + 400 * i,) for i in range(7)})
    optimizer = make_optimizer(parameters, compression, groups=groups)
    names = list(parameters)
    for step in range(3):
        start = (2 * hvd.rank() + step) % len(names)
        order = names[start:] + names[:start]
        backward(parameters, step, order if hvd.rank() % 2 else order[::-1])
        optimizer.synchronize()
        check_step(parameters, step, compression)
        apply(optimizer)
    check_replicas(*parameters.values())


class _UserError(Exception):
    pass


@BOTH
@pytest.mark.parametrize("place", ["before step", "in backward"])
def test_training_goes_on_after_an_exception(levels: str, place: str) -> None:
    """All ranks catch it, reset Horovod's optimizer and repeat the step under the same names."""
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    backward(parameters, 0)
    optimizer.step()
    optimizer.zero_grad()
    for step in (1, 2):
        names = list(parameters)
        with contextlib.suppress(_UserError):
            for name in names if place == "before step" else names[:2]:
                backward(parameters, step + 4, [name])
                if hvd.rank() == 0:  # it will have gone further than the others
                    time.sleep(0.05)
            raise _UserError
        # A script loads its last checkpoint here. The barrier keeps a fast rank from submitting a
        # name again that a slow one has not submitted once, which Horovod itself forbids.
        hvd.barrier()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        backward(parameters, step)
        optimizer.synchronize()
        check_step(parameters, step, compression)
        apply(optimizer)
    check_replicas(*parameters.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@BOTH
def test_loss_scaling_skips_a_step_on_all_ranks_together(levels: str, value: float) -> None:
    """GradScaler looks at its own rank only, so the overflow of one has to reach every rank."""
    compression = compressor(levels, min_elements=MIN_ELEMENTS)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    backward(parameters, 0, ["bias", "matrix", "convolution"])
    own = local_gradient(parameters, "vector", hvd.rank(), 0)
    if hvd.rank() == hvd.size() - 1:
        own[77] = value
    (parameters["vector"] * own).sum().backward()
    optimizer.synchronize()
    finite = [bool(p.grad.isfinite().all()) for p in parameters.values()]
    assert finite == [name != "vector" for name in parameters]
    apply(optimizer)


# --------------------------------------------------------------------------- without the quantizer


def _values(tensors: Tensors, piece: Piece) -> Any:
    address = int(tensors.pointers[piece.tensor]) + 4 * piece.start
    return np.ctypeslib.as_array((ctypes.c_float * piece.elements).from_address(address))


def _integers(task: Task, own: Any, parcel: Parcel, *_: Any) -> Any:
    return np.concatenate([_values(task.x, piece) for piece in parcel.pieces]).astype(np.int32)


def _means(task: Task, parcel: Parcel, reduced: Reduced, out: Tensors) -> None:
    begin = 0
    for piece in parcel.pieces:
        _values(out, piece)[...] = reduced.payload[begin:][: piece.elements] / task.plan.world_size
        begin += piece.elements


@pytest.mark.parametrize("option", OPTIONS)
def test_without_quantization_it_is_horovod_bit_for_bit(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers that are multiples of the number of ranks, so that no sum or mean is rounded."""
    exact = Method(partial(pipeline.standard, quantize=_integers), _means)
    monkeypatch.setitem(pipeline.METHODS, "standard", exact)
    rows = []
    own_way = compressor(min_elements=MIN_ELEMENTS, transport="horovod")
    for compression in (own_way, hvd.Compression.none):
        parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
        }
        options = OPTIONS[option](parameters)
        optimizer = make_optimizer(parameters, compression, **options)
        for step in range(2 * options.get("backward_passes_per_step", 1)):
            for name, parameter in parameters.items():
                own = local_gradient(parameters, name, hvd.rank(), step)
                (parameter * (8 * own).round() * hvd.size()).sum().backward()
            if (step + 1) % options.get("backward_passes_per_step", 1) == 0:
                optimizer.step()
                optimizer.zero_grad()
        rows.append(all_bytes(list(parameters.values())))
    assert torch.equal(rows[0], rows[1])
    assert len(rows[0].unique(dim=0)) == 1


@pytest.mark.parametrize("bits", [8, 16])
def test_gradients_on_the_levels_are_horovod_bit_for_bit(bits: int) -> None:
    """Whole numbers up to the number of levels: the real quantizer has nothing to round."""
    compression = compressor("standard", bits, min_elements=MIN_ELEMENTS, hierarchical=False)
    levels = compression.config.plan(hvd.size()).level_count
    rows = []
    for choice in (compression, hvd.Compression.none):
        parameters = make_parameters()
        optimizer = make_optimizer(parameters, choice)
        for step in range(2):
            for name, parameter in parameters.items():
                own = local_gradient(parameters, name, hvd.rank(), step)
                # Multiples of the number of ranks again, and the largest level in every block.
                largest = levels - levels % hvd.size()
                whole = (own * 4).round().clamp(-largest, largest) * hvd.size()
                whole = whole.clamp(-largest, largest)
                whole.view(-1)[::32] = levels
                (parameter * whole).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        rows.append(all_bytes(list(parameters.values())))
    if math.log2(hvd.size()).is_integer():
        assert torch.equal(rows[0], rows[1])
    else:  # norm / (levels * ranks) is rounded
        ours, theirs = (row[0].view(torch.float32) for row in rows)
        torch.testing.assert_close(ours, theirs)
