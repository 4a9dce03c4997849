"""Train DeepFwFM with Horovod: one rank of it.

    mpirun -np 4 python train.py --compression standard
    mpirun ... python train.py --preset criteo --data train.txt.gz --compression exponential
    mpirun ... python train.py --preset criteo --data synthetic --compression two-hop

What is special about this workload is here; the loop around it, with all options that workloads
share, is in examples/common/loop.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import criteo
import data
import horovod.torch as hvd
import model
import numpy as np
import prepare_criteo
import pruning
import torch
from common import loop
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

Batch = tuple[Tensor, Tensor]  # fields (B, F) integers, clicked (B,) float32


def evaluate(model: nn.Module, fields: Tensor, clicked: Tensor) -> tuple[float, float]:
    """Return (AUC, mean loss) on held-out samples; this rank computes its share of the logits.

    fields (N, F) int32 or int64 and clicked (N,) float32 are this rank's share; N may differ
    between ranks.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)).cpu() for part in fields.split(4096)])
    model.train()
    logits = hvd.allgather(logits, name="test.logits")
    clicked = hvd.allgather(clicked, name="test.clicked")
    if not logits.isfinite().all():  # on all ranks, of which one alone goes on
        raise ValueError(
            "evaluation: expected finite predictions, got NaN or infinity; training has diverged, "
            "so pass a smaller --lr."
        )
    auc = torch.zeros(1, dtype=torch.float64)
    if hvd.rank() == 0:
        from sklearn.metrics import roc_auc_score  # 55 MB of memory, a second of a core

        auc[0] = roc_auc_score(clicked, logits)
    auc = hvd.broadcast(auc, root_rank=0, name="test.auc")
    return auc.item(), binary_cross_entropy_with_logits(logits, clicked).item()


class Flights:
    """The data of the preset "flights": all in memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.rows != data.TABLE_ROWS:
            raise ValueError(
                f"--rows: expected {data.TABLE_ROWS} with the preset flights, got {options.rows}; "
                "leave it out."
            )
        self._options = options
        self._train, test = loop.first_rank_first(lambda: data.load(options.cache))
        share = slice(hvd.rank(), None, hvd.size())
        # Horovod wants it contiguous.
        self.held_out = tuple(torch.from_numpy(p[share].copy()) for p in (test.fields, test.late))
        self.sizes = {"train_flights": len(self._train.late), "test_flights": len(test.late)}
        self.steps = len(self._train.late) // (options.batch_size * hvd.size())

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        order = loop.shuffled(len(self._train.late), self._options.seed, epoch).numpy()
        global_batch = self._options.batch_size * hvd.size()
        for first in range(skip * global_batch, self.steps * global_batch, global_batch):
            rows = order[first + hvd.rank() : first + global_batch : hvd.size()]
            fields, late = self._train.fields[rows], self._train.late[rows]
            yield torch.from_numpy(fields), torch.from_numpy(late)

    def counters(self) -> dict[str, int]:
        return {}

    def model(self) -> nn.Module:
        options = self._options
        hidden = (options.units,) * options.layers
        return model.DeepFwFM(options.rows, data.NUM_FIELDS, options.dim, hidden)


class Clicks:
    """What the data of Criteo's presets have in common: the model with the paper's tables."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.rows = criteo.shrunk(options.shrink) if options.shrink > 1 else criteo.ROWS

    def model(self) -> nn.Module:
        options = self._options
        return model.DeepLight(self.rows, options.dim, (options.units,) * options.layers)


class Criteo(Clicks):
    """A file in Criteo's format, which is read in every epoch."""

    WINDOW = 16  # batches of a rank that are shuffled together

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.steps = None  # nobody has counted the lines
        self._readers: list[criteo.Reader] = []
        data, test_data = options.data, options.test_data
        if data.is_dir():
            data, prepared_test_data = prepare_criteo.files_of(data)
            test_data = test_data or prepared_test_data
        self._reader = self._open(data)
        if test_data:
            self._keep = lambda line: True
            fields, clicked = self._open(test_data).samples(self._keep, options.eval_rows)
        else:
            self._keep = lambda line: line % criteo.HELD_OUT_EVERY != 0
            fields, clicked = self._reader.samples(
                lambda line: line % criteo.HELD_OUT_EVERY == 0, options.eval_rows
            )
        self.held_out = torch.from_numpy(fields), torch.from_numpy(clicked)
        counts = torch.tensor([clicked.sum(), len(clicked)], dtype=torch.float64)
        clicks, rows = hvd.allreduce(counts, op=hvd.Sum, name="held.out").tolist()
        if not 0 < clicks < rows:
            raise ValueError(
                f"{test_data or data}: expected held-out lines with both labels, "
                f"which the AUC needs, got {rows:.0f} of which {clicks:.0f} are clicks; raise "
                "--eval-rows, or name other --test-data."
            )
        self.sizes = {"test_samples": int(rows)}

    def _open(self, path: Path) -> criteo.Reader:
        options = self._options
        reader = criteo.Reader(path, self.rows, hvd.rank(), hvd.size(), options.max_rejected)
        self._readers.append(reader)
        return reader

    def first(self, count: int) -> criteo.Samples:
        """This rank's share of the first lines for training."""
        return self._reader.samples(self._keep, count)

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        batches = self._reader.batches(
            self._keep, self._options.batch_size, self.WINDOW, skip, (self._options.seed, epoch)
        )
        for fields, clicked in batches:
            yield torch.from_numpy(fields), torch.from_numpy(clicked)

    def counters(self) -> dict[str, int]:
        return {"rejected_lines": sum(len(reader.rejects) for reader in self._readers)}


class Repeated(Clicks):
    """Samples in memory, which an epoch repeats, as the paper's does."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        least = options.batch_size * hvd.size()
        if options.samples < least:
            raise ValueError(
                f"--samples: expected a batch of {options.batch_size} for each of {hvd.size()} "
                f"ranks, {least} samples or more, got {options.samples}."
            )
        self._passes = options.samples // least  # batches of one
        self.steps = options.repeat * self._passes
        self._fields, self._clicked = self.samples()

    def samples(self) -> criteo.Samples:
        """This rank's samples for training."""
        raise NotImplementedError

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        size = self._options.batch_size
        for step in range(skip, self.steps):
            number, place = divmod(step, self._passes)
            seed = (self._options.seed, epoch, number, hvd.rank())
            order = np.random.default_rng(seed).permutation(len(self._clicked))
            # Where lines were left out, some samples come twice, so that all ranks have a batch.
            rows = np.resize(order, self._passes * size)[place * size :][:size]
            yield torch.from_numpy(self._fields[rows]), torch.from_numpy(self._clicked[rows])


class Sample(Repeated):
    """The first so many lines of a file."""

    def samples(self) -> criteo.Samples:
        options = self._options
        self._file = Criteo(options)
        samples = self._file.first(options.samples)
        own = torch.tensor([len(samples[1]), self.counters()["rejected_lines"]])
        found, rejected = hvd.allreduce(own, op=hvd.Sum, name="samples").tolist()
        if found + rejected < options.samples:
            raise ValueError(
                f"{options.data}: expected {options.samples} lines for training, got "
                f"{found + rejected}; lower --samples, or take 0 for the file as it is."
            )
        self.held_out = self._file.held_out
        self.sizes = {**self._file.sizes, "train_samples": found}
        return samples

    def counters(self) -> dict[str, int]:
        return self._file.counters()


class Synthetic(Repeated):
    """Samples of the same form that need no file, the same ones for any number of ranks."""

    MADE_AT_ONCE = 4096  # of which each rank keeps its share

    def samples(self) -> criteo.Samples:
        options = self._options
        held_out = min(options.eval_rows, 2**14)
        fields, clicked = self._made(held_out, 1)
        self.held_out = torch.from_numpy(fields), torch.from_numpy(clicked)
        self.sizes = {
            "train_samples": options.samples,
            "test_samples": held_out,
            "synthetic": True,
        }
        return self._made(options.samples, 0)

    def _made(self, count: int, part: int) -> criteo.Samples:
        """This rank's share of so many samples: each n-th with n ranks."""
        shares = []
        for first in range(0, count, self.MADE_AT_ONCE):
            seed = (self._options.seed, part, first)
            made = criteo.synthetic(min(self.MADE_AT_ONCE, count - first), self.rows, seed)
            own = slice((hvd.rank() - first) % hvd.size(), None, hvd.size())
            shares.append([array[own] for array in made])
        fields, clicked = (np.concatenate(arrays) for arrays in zip(*shares, strict=True))
        return fields, clicked

    def counters(self) -> dict[str, int]:
        return {}


def clicks(options: argparse.Namespace) -> Clicks:
    """The data that the options ask for."""
    if options.data is None:
        raise ValueError(
            f"--preset {options.preset}: expected --data with a file in Criteo's format or "
            "'synthetic', got none; or take --preset flights, which needs no data."
        )
    if str(options.data) == loop.SYNTHETIC:
        return Synthetic(options)
    return Sample(options) if options.samples else Criteo(options)


# Settings of the authors' runs (sands-lab/global-qsgd, commit 13d702f). The share that pruning
# leaves zero is DeepLight's own.
CRITEO = {
    "batch_size": 512,
    "lr": 1e-3,
    "l2": 6e-7,
    "epochs": 1,
    "eval_every": 1000,
    "samples": 32_768,
    "repeat": 100,
    "shrink": 1,
    "dim": 10,
    "units": 400,
    "layers": 3,
    "prune_from": 3,
    "sparsity": 0.9,
}


# SGD is for machines whose memory does not hold Adam's moments, twice the model.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


class DeepLight(loop.Workload):
    """DeepFwFM, the click model of DeepLight, on flights or on Criteo's clicks."""

    NAME = "deeplight"
    METRIC = "auc"
    HIGHER_IS_BETTER = True
    PRESETS: ClassVar = {
        # 3.6 M parameters; the learning rate falls linearly to 0.
        "flights": {
            "batch_size": 512,
            "lr": 2e-3,
            "epochs": 1,
            "eval_every": 16,
            "rows": data.TABLE_ROWS,
            "dim": 12,
            "units": 256,
            "layers": 2,
        },
        # The paper's: 607,959,381 parameters, 32,768 samples that an epoch repeats 100 times.
        "criteo": CRITEO,
        # The same with tables of a five-hundredth of the rows: 1.7 M parameters.
        "criteo-small": {**CRITEO, "shrink": 500, "batch_size": 64, "eval_every": 100},
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, help="of the flights' embedding table")
        parser.add_argument(
            "--shrink", type=int, help="Criteo: divides the rows of the paper's tables"
        )
        parser.add_argument("--dim", type=int, help="length of an embedding")
        parser.add_argument("--units", type=int, help="of a hidden layer")
        parser.add_argument("--layers", type=int, help="hidden layers")
        parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam")
        parser.add_argument("--l2", type=float, default=0.0, help="weight decay")
        parser.add_argument("--prune-from", type=int, help="epoch, from 1 on, that begins to prune")
        parser.add_argument("--prune-every", type=int, default=10, help="steps (default 10)")
        parser.add_argument("--sparsity", type=float, help="share of zeros that pruning comes to")
        parser.add_argument(
            "--data",
            type=Path,
            help="Criteo's file, .gz too; the folder that prepare_criteo.py made; or 'synthetic'",
        )
        parser.add_argument(
            "--samples", type=int, help="Criteo: lines for training; 0 reads the whole file"
        )
        parser.add_argument("--repeat", type=int, help="how often an epoch goes through --samples")
        parser.add_argument("--test-data", type=Path, help="held-out lines (else every tenth)")
        parser.add_argument("--eval-rows", type=int, default=2**20, help="held-out lines to use")
        parser.add_argument(
            "--max-rejected", type=float, default=0.001, help="share of malformed lines (0.001)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        if options.prune_from is not None and not 0 < (options.sparsity or 0.0) < 1:
            raise ValueError(
                "--prune-from: expected --sparsity above 0 and below 1 beside it, got "
                f"{options.sparsity}; give 0.9, or leave both out."
            )
        if options.prune_every < 1:
            raise ValueError(f"--prune-every: expected 1 or more, got {options.prune_every}.")
        self._data: Any = Flights(options) if options.preset == "flights" else clicks(options)
        self.steps_per_epoch = self._data.steps
        self._steps_of_pruning = 0

    def model(self) -> nn.Module:
        made: nn.Module = self._data.model()
        return made

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        options = self.options
        kind = OPTIMIZERS[options.optimizer]
        return kind(model.parameters(), lr=options.lr, weight_decay=options.l2)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int | None) -> Any:
        if steps is None:
            return None
        return torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
        )

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        return self._data.batches(epoch, skip)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def after_step(self, model: nn.Module, epoch: int) -> None:
        options = self.options
        if options.prune_from is None or epoch + 1 < options.prune_from:
            return
        self._steps_of_pruning += 1
        if self._steps_of_pruning % options.prune_every == 0:
            share = pruning.share_at(self._steps_of_pruning, options.sparsity)
            pruning.prune(pruning.parts(model), share)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        auc, loss = evaluate(model, *self._data.held_out)
        found = {"test_loss": loss, "auc": auc}
        if self._steps_of_pruning:
            found["zeros"] = pruning.zeros(pruning.parts(model))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"steps_of_pruning": self._steps_of_pruning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps_of_pruning = state["steps_of_pruning"]

    def describe(self) -> dict[str, Any]:
        return self._data.sizes

    def counters(self) -> dict[str, int]:
        return self._data.counters()


if __name__ == "__main__":
    loop.main(DeepLight)
