"""Train DeepFwFM with Horovod: one rank of it.

    mpirun -np 4 python train.py --compression standard
    mpirun ... python train.py --preset criteo --data train.txt.gz --compression exponential

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
import torch
from common import loop
from model import DeepFwFM
from sklearn.metrics import roc_auc_score
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
    loss = binary_cross_entropy_with_logits(logits, clicked).item()
    return float(roc_auc_score(clicked, logits)), loss


class Flights:
    """The data of the preset "flights": all in memory."""

    FIELDS = data.NUM_FIELDS

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


class Criteo:
    """The data of the preset "criteo": read from the file in every epoch."""

    FIELDS = criteo.NUM_FIELDS
    WINDOW = 16  # batches of a rank that are shuffled together

    def __init__(self, options: argparse.Namespace) -> None:
        if options.data is None:
            raise ValueError(
                "--preset criteo: expected --data with a file in Criteo's format, got none; or "
                "take --preset flights, which needs no data."
            )
        self._options = options
        self.steps = None  # nobody has counted the lines
        self._readers: list[criteo.Reader] = []
        self._reader = self._open(options.data)
        if options.test_data:
            self._keep = lambda line: True
            fields, clicked = self._open(options.test_data).samples(self._keep, options.eval_rows)
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
                f"{options.test_data or options.data}: expected held-out lines with both labels, "
                f"which the AUC needs, got {rows:.0f} of which {clicks:.0f} are clicks; raise "
                "--eval-rows, or name other --test-data."
            )
        self.sizes = {"test_samples": int(rows)}

    def _open(self, path: Path) -> criteo.Reader:
        options = self._options
        reader = criteo.Reader(path, options.rows, hvd.rank(), hvd.size(), options.max_rejected)
        self._readers.append(reader)
        return reader

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        batches = self._reader.batches(
            self._keep, self._options.batch_size, self.WINDOW, skip, (self._options.seed, epoch)
        )
        for fields, clicked in batches:
            yield torch.from_numpy(fields), torch.from_numpy(clicked)

    def counters(self) -> dict[str, int]:
        return {"rejected_lines": sum(len(reader.rejects) for reader in self._readers)}


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
        # The paper's 607,959,381 parameters; docs/workloads.md says how they came about.
        "criteo": {
            "batch_size": 2048,
            "lr": 1e-3,
            "epochs": 1,
            "eval_every": 1000,
            "rows": 55_241_858,
            "dim": 10,
            "units": 300,
            "layers": 3,
        },
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, help="of the embedding table")
        parser.add_argument("--dim", type=int, help="length of an embedding")
        parser.add_argument("--units", type=int, help="of a hidden layer")
        parser.add_argument("--layers", type=int, help="hidden layers")
        parser.add_argument("--data", type=Path, help="Criteo's file, tab-separated; .gz too")
        parser.add_argument("--test-data", type=Path, help="held-out lines (else every tenth)")
        parser.add_argument("--eval-rows", type=int, default=2**20, help="held-out lines to use")
        parser.add_argument(
            "--max-rejected", type=float, default=0.001, help="share of malformed lines (0.001)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._data = Flights(options) if options.preset == "flights" else Criteo(options)
        self.steps_per_epoch = self._data.steps

    def model(self) -> nn.Module:
        options = self.options
        hidden = (options.units,) * options.layers
        return DeepFwFM(options.rows, self._data.FIELDS, options.dim, hidden)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.options.lr)

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

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        auc, loss = evaluate(model, *self._data.held_out)
        return {"test_loss": loss, "auc": auc}

    def describe(self) -> dict[str, Any]:
        return self._data.sizes

    def counters(self) -> dict[str, int]:
        return self._data.counters()


if __name__ == "__main__":
    loop.main(DeepLight)
