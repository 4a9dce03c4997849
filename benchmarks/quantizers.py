"""Quantizers at equal bytes: the relative squared error of the mean of n ranks' gradients.

    python benchmarks/quantizers.py            # 4 and 64 ranks, about two minutes on one core

What exists runs through the project's own codec, n ranks in one process. Candidates are simulated
in NumPy, in the same lanes and with the same levels; two of them, standard and two-hop levels with
stratified dithers, have to give what the codec gives, or the run stops. Prints a table for each
number of ranks, writes quantizers.json and quantizers.png.

Error: ‖result - mean‖² / ‖mean‖². Bits: codes, norms and whatever else a candidate sends, for each
element, as what one Allreduce of that size would move.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gq_horovod.path.config import Config
from gq_horovod.research import theory
from gq_horovod.research.simulation import SimulatedRanks
from mpi_ops import lanes, wire

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
BLOCK = 256
NORM_BITS = 32
# An outlier that is sent by itself: a float and its place in a block.
OUTLIER_BITS = 32 + 8
TRIALS = 3
WIDTHS = (4, 8, 10, 16)
TWO_HOP_WIDTHS = (3, 4, 5, 6, 8)


@dataclass
class Result:
    """One quantizer on one kind of gradients."""

    name: str
    ranks: int
    gradients: str
    lane_bits: int
    bits: float  # for each element on the wire, everything included
    error: float
    formula: float | None  # expected error (research.theory); for exponential levels its bound
    simulated: bool


# --------------------------------------------------------------------------------------- gradients


def layers(count: int, rng: np.random.Generator) -> Array:
    """A scale for each element: layers of 32 to 4096 elements whose scales span three decades."""
    scales = np.empty(0)
    while len(scales) < count:
        size = int(2 ** rng.uniform(5, 12))
        scales = np.concatenate([scales, np.full(size, 10 ** rng.uniform(-3, 0))])
    return scales[:count]


def torch_gradients(ranks: int, steps: int = 100, batch: int = 32) -> NDArray[np.float32]:
    """Each rank's gradient of a small network of 13 k parameters after some steps of training.

    A perceptron that learns to tell ten noisy clusters of synthetic points apart. All tensors of a
    rank one after the other, as one.
    """
    import torch
    from torch.nn.functional import cross_entropy

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.LayerNorm(96)),
        *(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)),
    )
    centers = torch.randn(10, 64, generator=generator)

    def gradient() -> torch.Tensor:
        label = torch.randint(10, (batch,), generator=generator)
        points = centers[label] + 3 * torch.randn(batch, 64, generator=generator)
        model.zero_grad()
        cross_entropy(model(points), label).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        gradient()
        optimizer.step()
    found: NDArray[np.float32] = torch.stack([gradient() for _ in range(ranks)]).numpy()
    return found


def gradients(ranks: int, count: int) -> dict[str, NDArray[np.float32]]:
    """The gradients that are compared, float32 (rank, element)."""
    rng = np.random.default_rng(ranks)
    shape = (ranks, count)
    normal = rng.standard_normal(shape)
    common = rng.standard_normal(count)
    found = {
        "Gaussian": normal,
        "Student t3": rng.standard_t(3, shape),
        "mixed layers": normal * layers(count, rng),
        # Ranks that agree: large batches. Noise of one rank half and a tenth of the common part.
        "common + 0.5 noise": common + 0.5 * normal,
        "common + 0.1 noise": common + 0.1 * normal,
    }
    single = {name: x.astype(np.float32) for name, x in found.items()}
    return {**single, "torch MLP": torch_gradients(ranks)}


# -------------------------------------------------------------------------------------- what exists


def codec_mean(x: NDArray[np.float32], config: Config, step: int) -> Array:
    """The mean that the project's stages deliver."""
    mean: Array = SimulatedRanks(config, len(x)).average(f"q{step}", list(x))
    return mean.astype(np.float64)


EXISTING = [
    *(
        Config(levels="standard", bits=bits, block_size=size)
        for bits in WIDTHS
        for size in (256, 128, 512)
    ),
    *(Config(levels="standard", bits=bits, block_size=None) for bits in WIDTHS),
    *(Config(levels="standard", bits=bits, block_size=256, norm="l2") for bits in WIDTHS),
    Config(levels="exponential", bits=8, block_size=None),
    Config(levels="exponential", bits=8, block_size=256),
    Config(levels="exponential", bits=4, block_size=256),
    Config(levels="exponential", bits=4, block_size=None),
    *(Config(levels="two-hop", bits=bits, block_size=256) for bits in TWO_HOP_WIDTHS),
]


def existing_name(config: Config) -> str:
    size = "one norm" if config.block_size is None else f"B={config.block_size}"
    return f"{config.levels}, {size}" + (", l2" if config.norm == "l2" else "")


# --------------------------------------------------------------------------------------- candidates

# Uniform numbers in [0, 1) of shape (rank, element), the dither of every rank.
Dither = Callable[[tuple[int, ...], np.random.Generator], Array]


def independent(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return rng.random(shape)


def stratified(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """u_i = (π(i) + v_i)/n: a permutation that all ranks know, and a jitter of each rank's own.

    Suresh, Sun, Ro and Yu, "Correlated quantization for distributed mean estimation and
    optimization", ICML 2022.
    """
    n, count = shape
    order = np.argsort(rng.random((n, count)), axis=0)
    return (order + rng.random(shape)) / n


def lattice(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """u_i = (i/n + w) mod 1 with one shared w for an element: no permutation, no private bits."""
    n, count = shape
    return (np.arange(n)[:, None] / n + rng.random(count)) % 1.0


def blocked(x: Array) -> Array:
    """Elements as (rank, block, element of the block), the last block padded with zeros."""
    n, count = x.shape
    blocks = lanes.blocks(count, BLOCK)
    padded = np.zeros((n, blocks * BLOCK))
    padded[:, :count] = x
    return padded.reshape(n, blocks, BLOCK)


def standard(x: Array, bits: int, draw: Dither, rng: np.random.Generator) -> Array:
    """Mean of standard codes with blocks of 256; x of shape (rank, block, element)."""
    n = len(x)
    levels = lanes.levels(bits, n)
    norm = np.abs(x).max(axis=(0, 2))[:, None]
    norm = np.where(norm > 0, norm, 1.0)
    u = draw((n, x[0].size), rng).reshape(x.shape)
    total = np.floor(x * (levels / norm) + u).sum(axis=0)
    return total * norm / (levels * n)


def sum_of_norms(x: Array, bits: int, draw: Dither, rng: np.random.Generator) -> Array:
    """Levels of a block from the sum of the ranks' norms in place of n times the largest (p = 1).

    |q_i| < s·N_i/N + 1, so s·ΣN_i/N + n <= 2^(b-1)-1 keeps every partial sum in its lane. Where n
    leaves no room for that, the usual levels.
    """
    n, top = len(x), 2 ** (bits - 1) - 1
    norms = np.abs(x).max(axis=2)[:, :, None]
    norm = np.where(norms.max(axis=0) > 0, norms.max(axis=0), 1.0)
    usual = lanes.levels(bits, n)
    levels = np.maximum((top - n) / np.maximum((norms / norm).sum(axis=0), 1.0), usual)
    u = draw((n, x[0].size), rng).reshape(x.shape)
    codes = np.floor(x * (levels / norm) + u)
    assert np.abs(codes).sum(axis=0).max() <= top, "a sum may leave its lane"
    return codes.sum(axis=0) * norm / (levels * n)


def hadamard(x: Array) -> Array:
    """Orthonormal Walsh-Hadamard transform of the last axis, a power of two long."""
    size = x.shape[-1]
    y = x.copy()
    half = 1
    while half < size:
        pairs = y.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]
        y = np.stack([first, second], axis=-2).reshape(x.shape)
        half *= 2
    return y / math.sqrt(size)


def rotated(
    x: Array,
    bits: int,
    draw: Dither,
    rng: np.random.Generator,
    size: int = BLOCK,
    inner: Callable[..., Array] = standard,
) -> Array:
    """Shared random signs and a Hadamard transform of `size` elements before, the inverse after."""
    n, blocks, _ = x.shape
    groups = -(-blocks * BLOCK // size)
    padded = np.zeros((n, groups * size))
    padded[:, : blocks * BLOCK] = x.reshape(n, -1)
    signs = rng.choice([-1.0, 1.0], groups * size)
    y = hadamard((padded * signs).reshape(n, groups, size))
    mean = inner(y.reshape(n, -1, BLOCK), bits, draw, rng)
    back = hadamard(mean.reshape(groups, size)).reshape(-1) * signs
    return back[: blocks * BLOCK].reshape(blocks, BLOCK)


# Spacing of levels: one of these, or an integer m for floating ones, 2^m steps in each octave.
EVEN, SQUARE, TRIANGULAR = "even", "square", "triangular"


def levels_of(bits: int, spacing: str | int) -> Array:
    """The magnitudes that codes of `bits` bits stand for, from 0 to 1."""
    top = lanes.two_hop_levels(bits)
    number = np.arange(top + 1.0)
    if spacing == EVEN:
        return number / top
    if spacing == SQUARE:
        return (number / top) ** 2
    if spacing == TRIANGULAR:
        return number * (number + 1) / (top * (top + 1))
    assert isinstance(spacing, int)
    steps = 2**spacing
    octaves = top // steps - 1  # as many as there are codes; below them, the lowest spacing
    parts = [np.arange(steps + 1) / steps * 2.0**-octaves]
    parts += [(1 + np.arange(1, steps + 1) / steps) * 2.0**-o for o in range(octaves, 0, -1)]
    return np.concatenate(parts)


def rounded(x: Array, norm: Array, bits: int, spacing: str | int, u: Array) -> Array:
    """x, rounded without bias to the levels of a code of `bits` bits, at most `norm` large."""
    levels = levels_of(bits, spacing)
    y = np.minimum(np.abs(x) / norm, 1.0)
    below = np.minimum(np.searchsorted(levels, y, side="right") - 1, levels.size - 2)
    share = (y - levels[below]) / (levels[below + 1] - levels[below])
    # Magnitudes are rounded; negative ones the other way round, so that errors are signed alike.
    u = np.where(x < 0, 1 - u, u)
    return np.copysign(levels[below + np.floor(share + u).astype(int)], x) * norm


def two_hop(
    x: Array, bits: int, draw: Dither, rng: np.random.Generator, spacing: str | int = EVEN
) -> Array:
    """Alltoall of codes, their mean rounded once by the rank that owns it, Allgather.

    No sum has to fit a code, so the levels do not depend on n. The mean gets norms of its own.
    """
    norm = np.abs(x).max(axis=(0, 2))[:, None]
    u = draw((len(x), x[0].size), rng).reshape(x.shape)
    mean = rounded(x, np.where(norm > 0, norm, 1.0), bits, spacing, u).mean(axis=0)
    norm = np.abs(mean).max(axis=1)[:, None]
    u = rng.random(mean.shape)
    return rounded(mean, np.where(norm > 0, norm, 1.0), bits, spacing, u)


def clipped(
    x: Array, bits: int, draw: Dither, rng: np.random.Generator, keep: float
) -> tuple[Array, float]:
    """The largest `keep` of all elements go by themselves, exactly; the norm is that of the rest.

    They travel by Allgather, since their places differ: n-1 times their bytes to every rank, where
    an Allreduce sends 2(n-1)/n. Returns the mean and the extra bits for each element.
    """
    n = len(x)
    order = np.sort(np.abs(x), axis=2)
    at = max(BLOCK - max(round(keep * BLOCK), 1), 1)
    limit = order[:, :, at][:, :, None]  # each rank's own, so that it sends a fixed number
    outlier = np.abs(x) >= np.where(limit > 0, limit, np.inf)
    mean = standard(np.where(outlier, 0.0, x), bits, draw, rng)
    extra = outlier.mean() * OUTLIER_BITS * n / 2
    return mean + np.where(outlier, x, 0.0).sum(axis=0) / n, float(extra)


@dataclass
class Candidate:
    """A quantizer that does not exist yet."""

    # The mean of x (rank, block, element), and the bits for each element besides codes and norms.
    mean: Callable[[Array, int, np.random.Generator], tuple[Array, float]]
    widths: tuple[int, ...]  # bits of a code
    summed: bool = True  # in lanes, which have to hold the sum

    def runs(self, bits: int, ranks: int) -> bool:
        return bits in self.widths and (not self.summed or lanes.levels(bits, ranks) > 0)


def lane_sum(
    method: Callable[..., Array], draw: Dither, extra: float = 0.0, **options: int
) -> Candidate:
    """A candidate whose codes are summed in lanes."""
    return Candidate(lambda x, bits, rng: (method(x, bits, draw, rng, **options), extra), WIDTHS)


def hops(
    draw: Dither,
    widths: tuple[int, ...] = (4, 8),
    method: Callable[..., Array] = two_hop,
    **options: Any,
) -> Candidate:
    """A candidate of two hops, of the bytes of two-hop levels."""
    return Candidate(
        lambda x, bits, rng: (method(x, bits, draw, rng, **options), 0.0), widths, summed=False
    )


def exact(keep: float) -> Candidate:
    return Candidate(lambda x, bits, rng: clipped(x, bits, independent, rng, keep), WIDTHS)


# Candidates that exist, and what they are called there.
CHECK = "stratified"  # the dithers of the codec
CHECKS = {
    CHECK: f"standard, B={BLOCK}",
    "two-hop, square levels, stratified": f"two-hop, B={BLOCK}",
}
CANDIDATES = {
    "independent": lane_sum(standard, independent),
    CHECK: lane_sum(standard, stratified),
    "lattice": lane_sum(standard, lattice),
    "rotated 256": lane_sum(rotated, independent),
    "rotated 4096": lane_sum(rotated, independent, size=4096),
    "rotated 256, stratified": lane_sum(rotated, stratified),
    "sum of norms": lane_sum(sum_of_norms, independent, extra=NORM_BITS / BLOCK),
    "sum of norms, stratified": lane_sum(sum_of_norms, stratified, extra=NORM_BITS / BLOCK),
    "1/256 exact": exact(1 / 256),
    "4/256 exact": exact(4 / 256),
    "two-hop, even levels": hops(independent),
    "two-hop, even levels, stratified": hops(stratified, TWO_HOP_WIDTHS),
    "two-hop, even levels, rotated 256": hops(independent, method=rotated, inner=two_hop),
    "two-hop, square levels, stratified": hops(stratified, TWO_HOP_WIDTHS, spacing=SQUARE),
    "two-hop, triangular levels, stratified": hops(stratified, TWO_HOP_WIDTHS, spacing=TRIANGULAR),
    **{
        f"two-hop, {2**m} an octave": hops(independent, (4, 8) if m < 2 else (8,), spacing=m)
        for m in range(6)
    },
}


# ---------------------------------------------------------------------------------------- measuring


def bias(candidate: Candidate, bits: int, draws: int = 200) -> float:
    """‖mean of the errors‖² over what it is expected to be without bias: 1 then, up to 0.1 or so.

    On Student t3 gradients of 4 ranks and 2048 elements, the ranks' scales different.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (4, 8, BLOCK)) * np.array([1.0, 0.5, 0.25, 0.125])[:, None, None]
    errors = np.stack([candidate.mean(x, bits, rng)[0] - x.mean(axis=0) for _ in range(draws)])
    return float(np.sum(errors.mean(axis=0) ** 2) * draws / np.sum(errors.var(axis=0)))


def check_bias() -> None:
    """Stop unless every candidate is unbiased, and a biased one is found out."""
    faulty = lane_sum(standard, lambda shape, rng: independent(shape, rng) / 2 + 0.25)
    for name, candidate in {**CANDIDATES, "half the dither": faulty}.items():
        bits = 8 if 8 in candidate.widths else 4
        ratio = bias(candidate, bits)
        if (ratio > 1.3) != (candidate is faulty):
            raise SystemExit(f"{name}: squared mean error is {ratio:.2f} times that of no bias.")


def relative(error: Array, mean: Array) -> float:
    return float(np.sum(error**2) / np.sum(mean**2))


def measure(x: NDArray[np.float32], kind: str) -> list[Result]:
    """All quantizers on one set of gradients."""
    n, count = x.shape
    mean = x.astype(np.float64).mean(axis=0)
    results = []
    for config in EXISTING:
        assert config.bits is not None
        if config.levels == "standard" and lanes.levels(config.bits, n) == 0:
            continue
        plan = config.plan(n)
        errors = [relative(codec_mean(x, config, step) - mean, mean) for step in range(TRIALS)]
        formula = float(theory.mean_bound(x, plan).sum() / np.sum(mean**2))
        bits = wire.wire(count, plan).bits_per_element(count)
        name = existing_name(config)
        results.append(
            Result(name, n, kind, config.bits, bits, float(np.mean(errors)), formula, False)
        )
    own = blocked(x.astype(np.float64))
    for bits in sorted({*WIDTHS, *TWO_HOP_WIDTHS}):
        for name, candidate in CANDIDATES.items():
            if not candidate.runs(bits, n):
                continue
            levels: Literal["standard", "two-hop"] = "standard" if candidate.summed else "two-hop"
            plan = Config(levels=levels, bits=bits, block_size=BLOCK).plan(n)
            base = wire.wire(count, plan).bits_per_element(count)
            errors, extra = [], 0.0
            for step in range(TRIALS):
                got, extra = candidate.mean(own, bits, np.random.default_rng(step))
                errors.append(relative(got.reshape(-1)[:count] - mean, mean))
            results.append(
                Result(
                    *(name, n, kind, bits, base + extra),
                    *(float(np.mean(errors)), None, True),
                )
            )
    return results


def check(results: list[Result]) -> None:
    """Stop unless the simulation gives what the codec gives, where trials can tell: Gaussians."""
    for result in results:
        if result.name in CHECKS and result.gradients == "Gaussian":
            twin = next(
                r
                for r in results
                if r.name == CHECKS[result.name]
                and (r.ranks, r.gradients, r.lane_bits)
                == (result.ranks, result.gradients, result.lane_bits)
            )
            off = abs(result.error / twin.error - 1)
            if off > 0.05:
                raise SystemExit(
                    f"{result.name}: {off:.0%} off the codec: {result.error} and {twin.error} "
                    f"with {result.lane_bits} bits on {result.ranks} ranks."
                )


# ---------------------------------------------------------------------------------------- reporting


def report(results: list[Result], output: Path) -> None:
    """Tables, JSON and a picture."""
    kinds = list(dict.fromkeys(result.gradients for result in results))
    for n in dict.fromkeys(result.ranks for result in results):
        table = Table(title=f"Relative squared error of the mean, {n} ranks; (s): simulated")
        table.add_column("quantizer", no_wrap=True)
        for heading in ("lane", "bits"):
            table.add_column(heading, justify="right", no_wrap=True)
        for kind in kinds:
            table.add_column(kind, justify="right")
        rows: dict[tuple[int, bool, str], dict[str, Result]] = {}
        for result in results:
            if result.ranks == n:
                key = (result.lane_bits, result.simulated, result.name)
                rows.setdefault(key, {})[result.gradients] = result
        lane = 0
        for (bits, simulated, name), row in sorted(rows.items(), key=lambda item: item[0][:2]):
            if bits != lane:
                table.add_section()
                lane = bits
            shown = next(iter(row.values()))
            errors = [f"{row[kind].error:.2g}" for kind in kinds]
            table.add_row(name + " (s)" * simulated, str(bits), f"{shown.bits:.2f}", *errors)
        Console(width=140).print(table)

    output.mkdir(parents=True, exist_ok=True)
    document = {"trials": TRIALS, "results": [asdict(result) for result in results]}
    (output / "quantizers.json").write_text(json.dumps(document, indent=2) + "\n")
    ranks = list(dict.fromkeys(result.ranks for result in results))
    figure, axes = plt.subplots(
        len(ranks), len(kinds), figsize=(3.2 * len(kinds), 3.4 * len(ranks)), layout="constrained"
    )
    for row, n in zip(np.atleast_2d(axes), ranks, strict=True):
        for panel, kind in zip(row, kinds, strict=True):
            own = [r for r in results if r.ranks == n and r.gradients == kind]
            for name in dict.fromkeys(r.name for r in own):
                points = sorted((r.bits, r.error) for r in own if r.name == name)
                style = "--" if name in CANDIDATES else "-"
                panel.semilogy(*zip(*points, strict=True), style, marker=".", label=name)
            panel.set_title(f"{kind}, {n} ranks", fontsize=9)
    figure.supxlabel("bits on the wire for each element; dashed: simulated")
    figure.supylabel("relative squared error of the mean")
    handles, labels = np.atleast_2d(axes)[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(output / "quantizers.png", dpi=110)
    print(f"Wrote {output / 'quantizers.json'} and {output / 'quantizers.png'}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", default="4,64")
    parser.add_argument("--elements", type=int, default=1 << 14)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    check_bias()
    results = []
    for n in map(int, options.ranks.split(",")):
        found = gradients(n, options.elements)
        for kind in track(found, f"{n} ranks", console=Console(stderr=True)):
            results += measure(found[kind], kind)
    check(results)
    report(results, options.output)


if __name__ == "__main__":
    main()
