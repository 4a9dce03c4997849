"""Train DeepFwFM with Horovod: one rank of it.

    mpirun -np 4 python train.py --compression standard

What is special about this workload is here; the loop around it, with all options that workloads
share, is in examples/common/loop.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import horovod.torch as hvd
import torch
from common import loop
from model import DeepFwFM
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


def evaluate(model: nn.Module, fields: Tensor, clicked: Tensor) -> tuple[float, float]:
    """Return (AUC, mean loss) on held-out samples; this rank computes its share of the logits.

    fields (N, F) int32 and clicked (N,) float32 are this rank's share; N may differ between ranks.
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


class DeepLight(loop.Workload):
    """DeepFwFM, the click model of DeepLight, on flights or on Criteo's clicks."""

    NAME = "deeplight"
    METRIC = "auc"
    HIGHER_IS_BETTER = True
    PRESETS: ClassVar = {
        "flights": {"batch_size": 512, "lr": 2e-3, "epochs": 1, "eval_every": 16},
    }

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._train, test = loop.first_rank_first(lambda: data.load(options.cache))
        share = slice(hvd.rank(), None, hvd.size())
        self._test = tuple(
            torch.from_numpy(part[share].copy())  # Horovod wants it contiguous
            for part in (test.fields, test.late)
        )
        self._test_samples = len(test.late)
        self.steps_per_epoch = len(self._train.late) // (options.batch_size * hvd.size())

    def model(self) -> nn.Module:
        return DeepFwFM(data.TABLE_ROWS, data.NUM_FIELDS)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.options.lr)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int | None) -> Any:
        assert steps is not None
        return torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
        )

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = loop.shuffled(len(self._train.late), self.options.seed, epoch).numpy()
        rank, size = hvd.rank(), hvd.size()
        assert self.steps_per_epoch is not None
        for number in range(skip, self.steps_per_epoch):
            first = number * self.options.batch_size * size
            rows = order[first + rank : first + self.options.batch_size * size : size]
            yield (
                torch.from_numpy(self._train.fields[rows]),
                torch.from_numpy(self._train.late[rows]),
            )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        auc, loss = evaluate(model, *self._test)
        return {"test_loss": loss, "auc": auc}

    def describe(self) -> dict[str, Any]:
        return {"train_flights": len(self._train.late), "test_flights": self._test_samples}


if __name__ == "__main__":
    loop.main(DeepLight)
