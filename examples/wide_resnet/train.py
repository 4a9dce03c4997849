"""Train Wide-ResNet with Horovod: one rank of it.

    mpirun -np 2 python examples/wide_resnet/train.py --compression exponential
    mpirun ... python examples/wide_resnet/train.py --preset imagenet --data imagenet

Options, metrics and checkpoints are those of examples/common/loop.py.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import image_folder
from common import loop
from common.rejects import Rejects, TooManyRejectedError
from common.schedules import warm_cosine
from resnet import WIDE_RESNET_101_2, Shape, WideResNet

Batch = tuple[Tensor, Tensor]  # images (N, channels, height, width) float32, labels (N,) int64

SMALL = Shape(blocks=(1, 1, 1), classes=10, width=16, widening=2, channels=1, large_images=False)
AHEAD = 2  # batches that are decoded while another one is trained on


class Source(Protocol):
    """Images for training and for validation, numbered from 0."""

    training: int  # number of images
    validation: int

    def training_batches(self, rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        """The batches of given images."""

    def validation_batches(self, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        """Likewise; an image that cannot be read is not in them."""


class Digits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, in memory."""

    HELD_OUT = 297

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32))[:, None]
        labels = torch.from_numpy(digits.target.astype(np.int64))
        order = np.random.default_rng(0).permutation(len(labels))
        self._images, self._labels = (images - images.mean()) / images.std(), labels
        self._held_out, self._rows = order[: self.HELD_OUT], order[self.HELD_OUT :]
        self.training, self.validation = len(self._rows), len(self._held_out)

    def training_batches(self, rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        return (self._pair(self._rows[some]) for some in rows)

    def validation_batches(self, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        return (self._pair(self._held_out[some]) for some in rows)

    def _pair(self, rows: np.ndarray) -> Batch:
        return self._images[rows], self._labels[rows]


class Synthetic:
    """Images without any sense, of which each rank has a few hundred in memory.

    A class has a pattern, and an image is that and noise, so that there is something to learn.
    """

    IMAGES = 256  # of a rank; others are these again

    def __init__(self, options: argparse.Namespace, classes: int) -> None:
        self.training, self.validation = options.images, max(options.images // 64, 1)
        size = options.image_size
        random = np.random.default_rng((options.seed, hvd.rank()))
        labels = random.integers(classes, size=self.IMAGES)
        shape = (self.IMAGES, 3, size, size)
        images = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        for image, label in zip(images, labels, strict=True):
            pattern = np.random.default_rng((options.seed, 1, int(label)))
            image += torch.from_numpy(pattern.standard_normal((3, 1, size), dtype=np.float32))
        self._images, self._labels = images, torch.from_numpy(labels)

    def training_batches(self, rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        return map(self._pair, rows)

    def validation_batches(self, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        return map(self._pair, rows)

    def _pair(self, rows: np.ndarray) -> Batch:
        chosen = torch.from_numpy(rows % self.IMAGES)
        return self._images[chosen], self._labels[chosen]


class Folder:
    """FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, decoded by threads."""

    def __init__(self, options: argparse.Namespace, rejects: Rejects) -> None:
        image_folder.pillow()
        self._train = image_folder.find_images(options.data / "train")
        self._held_out = image_folder.find_images(options.data / "val", self._train.classes)
        self.classes = len(self._train.classes)
        self._size, self._seed, self._threads = options.image_size, options.seed, options.threads
        self._rejects = rejects
        self.training, self.validation = len(self._train), len(self._held_out)

    def training_batches(self, rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        seed = (self._seed, epoch)

        def read(index: int) -> Any:
            return image_folder.training_image(self._train, index, self._size, seed, self._rejects)

        return self._decoded(read, rows)

    def validation_batches(self, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        def read(index: int) -> Any:
            return image_folder.validation_image(self._held_out, index, self._size, self._rejects)

        return self._decoded(read, rows)

    def _decoded(self, read: Any, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        """Batches of what `read` returns for each of the rows, some of them ahead."""
        with ThreadPoolExecutor(self._threads) as pool:
            waiting: deque[list[Future[Any]]] = deque()
            try:
                for some in rows:
                    waiting.append([pool.submit(read, int(index)) for index in some])
                    if len(waiting) > AHEAD:
                        yield _stacked(waiting.popleft())
                while waiting:
                    yield _stacked(waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _stacked(futures: list[Future[Any]]) -> Batch:
    found = [pair for pair in (future.result() for future in futures) if pair is not None]
    if not found:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    images, labels = zip(*found, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


class ImageClassifier(loop.Workload):
    """Wide-ResNet on folders of images, or a small one on scikit-learn's digits."""

    NAME = "wide-resnet"
    METRIC = "accuracy"  # top-1, of the validation images
    HIGHER_IS_BETTER = True
    PRESETS = {  # noqa: RUF012
        "digits": {
            "batch_size": 32,
            "lr": 0.05,
            "warm_up": 10,
            "epochs": 4,
            "eval_every": 20,
        },
        # 64 ranks of 32: the learning rate of 0.1 for 256 images, times 2048/256, after a warm-up
        # of five epochs (Goyal et al., arXiv 1706.02677).
        "imagenet": {
            "batch_size": 32,
            "lr": 0.8,
            "warm_up": 3125,
            "epochs": 90,
            "eval_every": 625,
        },
        # The settings of the authors' runs on MiniImageNet (sands-lab/global-qsgd, commit 13d702f).
        # How their learning rate falls is not known to us: here along a cosine.
        "paper": {
            "batch_size": 16,
            "lr": 0.1,
            "warm_up": 0,
            "epochs": 90,
            "eval_every": 625,
        },
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, help="folder of train/CLASS and val/CLASS; or 'synthetic'"
        )
        parser.add_argument(
            "--images", type=int, default=128_000, help="of synthetic data (128,000)"
        )
        parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
        parser.add_argument("--threads", type=int, default=4, help="that decode images (4)")
        parser.add_argument("--warm-up", type=int, help="steps in which the learning rate rises")
        parser.add_argument("--momentum", type=float, default=0.9)
        parser.add_argument("--weight-decay", type=float, default=1e-4)
        parser.add_argument(
            "--max-rejected", type=int, default=100, help="images that may be left out (100)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._rejects = Rejects(options.max_rejected)
        self._shape = SMALL
        self._source: Source
        if options.preset == "digits":
            self._source = Digits()
        elif str(options.data) == loop.SYNTHETIC:
            self._shape = WIDE_RESNET_101_2
            self._source = Synthetic(options, self._shape.classes)
        else:
            self._source = self._folder()
        self._global_batch = options.batch_size * hvd.size()
        self.steps_per_epoch = self._source.training // self._global_batch

    def _folder(self) -> Folder:
        options = self.options
        if options.data is None:
            raise ValueError(
                f"--preset {options.preset}: expected --data with a folder of train/CLASS and "
                "val/CLASS, or 'synthetic', got none; or take --preset digits, which needs no data."
            )
        folder = Folder(options, self._rejects)
        self._shape = WIDE_RESNET_101_2
        if folder.classes > self._shape.classes:
            raise ValueError(
                f"--data {options.data}: expected at most {self._shape.classes} classes, which "
                f"this model has, got {folder.classes}."
            )
        return folder

    def model(self) -> WideResNet:
        return WideResNet(self._shape)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

    def schedule(
        self, optimizer: torch.optim.Optimizer, steps: int | None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        assert steps is not None
        return warm_cosine(optimizer, self.options.warm_up, steps)

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        assert self.steps_per_epoch is not None
        order = loop.shuffled(self._source.training, self.options.seed, epoch).numpy()
        # All ranks' images of a step first, then a rank's: the same ones for any number of ranks.
        mine = (
            order[step * self._global_batch :][: self._global_batch][hvd.rank() :: hvd.size()]
            for step in range(skip, self.steps_per_epoch)
        )
        return self._source.training_batches(mine, epoch)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        self._check_rejects()
        device = next(model.parameters()).device
        right, total, count = 0, 0.0, 0
        mine = np.arange(hvd.rank(), self._source.validation, hvd.size())
        parts = (mine[first : first + 64] for first in range(0, len(mine), 64))
        with averaged_statistics(model):
            for batch in self._source.validation_batches(parts):
                images, labels = loop.to_device(batch, device)
                if not len(labels):
                    continue
                logits = model(images)
                right += int((logits.argmax(dim=1) == labels).sum())
                total += functional.cross_entropy(logits, labels, reduction="sum").item()
                count += len(labels)
        return {
            "accuracy": loop.mean_over_ranks(right, count, "accuracy"),
            "validation_loss": loop.mean_over_ranks(total, count, "validation.loss"),
        }

    def _rejected(self) -> int:
        """Files that any rank could not read. Collective."""
        names = hvd.allgather_object(list(self._rejects.reasons), name="rejected")
        return len({name for some in names for name in some})

    def _check_rejects(self) -> None:
        """Raise on every rank when all together have left out too many."""
        if (rejected := self._rejected()) > self.options.max_rejected:
            raise TooManyRejectedError(
                f"--data {self.options.data}: {rejected} images cannot be read, and "
                f"{self.options.max_rejected} may be left out; the log names them. Repair the "
                "data, or raise --max-rejected"
            )

    def describe(self) -> dict[str, Any]:
        source = self._source
        synthetic = isinstance(source, Synthetic)
        counts = {"images": source.training, "validation_images": source.validation}
        return {**counts, "synthetic": synthetic}

    def counters(self) -> dict[str, int]:
        rejected = self._rejected()
        return {"rejected_images": rejected if hvd.rank() == 0 else 0}


@contextlib.contextmanager
def averaged_statistics(model: torch.nn.Module) -> Iterator[None]:
    """The model with the mean of all ranks' running means and variances; collective.

    Each rank's batch norms have seen its own images only, and what is evaluated shall be one model.
    After it the rank's own are back, so that a run does not depend on when it was evaluated.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    own = torch.cat([buffer.flatten() for buffer in buffers])

    def fill(values: Tensor) -> None:
        parts = values.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    fill(hvd.allreduce(own, name="statistics"))
    try:
        yield
    finally:
        fill(own)


if __name__ == "__main__":
    loop.main(ImageClassifier)
