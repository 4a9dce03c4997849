"""Train Transformer-XL with Horovod: one rank of it.

    mpirun -np 2 python examples/transformer_xl/train.py --compression exponential
    mpirun ... python examples/transformer_xl/train.py --preset wikitext103 --data wikitext-103

Options, metrics and checkpoints are those of examples/common/loop.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

import corpus
from common import loop
from common.lamb import Lamb
from common.rejects import Rejects
from common.schedules import warm_cosine
from transformer import WIKITEXT103, Shape, TransformerXL

# 387,234 parameters: ten steps of 1024 bytes take some seconds on two cores.
SMALL = Shape(
    vocabulary=256,
    cutoffs=(32, 96),
    layers=3,
    width=96,
    heads=4,
    head_width=24,
    inner=384,
    memory=64,
    dropout=0.0,
)


LARGE = ("wikitext103", "paper")  # presets of the paper's model


class LanguageModel(loop.Workload):
    """Transformer-XL on WikiText-103, on other text in its format, or on Python's own sources."""

    NAME = "transformer-xl"
    METRIC = "perplexity"  # of held-out tokens, which are bytes with the preset "source"
    HIGHER_IS_BETTER = False
    PRESETS = {  # noqa: RUF012
        # A small model on the bytes of Python's standard library: no data is needed.
        "source": {
            "batch_size": 8,  # streams of a rank
            "length": 64,
            "lr": 2e-3,
            "warm_up": 20,
            "epochs": 1,
            "eval_every": 50,
            "evaluation_streams": 8,
            "evaluation_tokens": 16384,
        },
        # A small model on text in WikiText's format.
        "text": {
            "batch_size": 8,
            "length": 64,
            "lr": 2e-3,
            "warm_up": 20,
            "epochs": 1,
            "eval_every": 50,
            "evaluation_streams": 8,
        },
        # The paper's model: 64 ranks read 256 streams. Segments and clipping as in NVIDIA's "base"
        # configuration, optimizer and learning rate as in Dai et al.'s script for this data.
        "wikitext103": {
            "batch_size": 4,
            "length": 192,
            "lr": 2.5e-4,
            "warm_up": 1000,
            "epochs": 20,
            "eval_every": 2000,
            "evaluation_streams": 64,
        },
        # The same with the settings of the authors' runs (sands-lab/global-qsgd, commit 13d702f).
        "paper": {
            "batch_size": 4,
            "length": 192,
            "lr": 0.01,
            "warm_up": 1000,
            "epochs": 20,
            "eval_every": 2000,
            "evaluation_streams": 64,
            "optimizer": "lamb",
            "cosine_steps": 40_000,
            "max_steps": 40_000,
        },
    }
    clip_norm = 0.25

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, help="folder of wiki.train.tokens and others; or 'synthetic'"
        )
        parser.add_argument(
            "--tokens", type=int, default=10_000_000, help="of synthetic data (10,000,000)"
        )
        parser.add_argument("--length", type=int, help="tokens of a segment")
        parser.add_argument("--optimizer", choices=["adam", "lamb"], default="adam")
        parser.add_argument("--warm-up", type=int, help="steps in which the learning rate rises")
        parser.add_argument(
            "--cosine-steps", type=int, help="after which the learning rate is 0; else all steps"
        )
        parser.add_argument("--evaluation-streams", type=int, help="streams of the held-out text")
        parser.add_argument("--evaluation-tokens", type=int, help="of the held-out text; all")
        parser.add_argument(
            "--max-rejected", type=int, default=100, help="lines that may be left out (100)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._rejects = Rejects(options.max_rejected)
        text = self._corpus()
        self._shape = self._shape_for(text.vocabulary)
        # Which streams there are depends on how many all ranks read together, not on who reads.
        streams = options.batch_size * hvd.size()
        self._train = corpus.Streams(text.train, streams, options.length)
        held_out = text.validation[: options.evaluation_tokens]
        self._held_out = corpus.Streams(held_out, options.evaluation_streams, options.length)
        self.steps_per_epoch = self._train.whole_segments
        # What each layer saw of the segments before: (layers, streams of this rank, M, width).
        self._memory: Tensor | None = None

    def _corpus(self) -> corpus.Corpus:
        options = self.options
        if options.preset == "source":
            return corpus.source_bytes()
        if str(options.data) == loop.SYNTHETIC:
            vocabulary = WIKITEXT103.vocabulary if options.preset in LARGE else 1000
            held_out = options.evaluation_streams * (options.length + 1)
            return corpus.synthetic(vocabulary, options.tokens, held_out, options.seed)
        if options.data is None:
            raise ValueError(
                f"--preset {options.preset}: expected --data with the folder of wiki.train.tokens "
                "and wiki.valid.tokens, or 'synthetic', got none; or take --preset source, which "
                "needs no data."
            )
        return loop.first_rank_first(
            lambda: corpus.wikitext(options.data, options.cache, self._rejects)
        )

    def _shape_for(self, vocabulary: int) -> Shape:
        if self.options.preset == "text":
            cutoffs = {vocabulary // 8, vocabulary // 2} - {0}
            return replace(SMALL, vocabulary=vocabulary, cutoffs=tuple(sorted(cutoffs)))
        shape = WIKITEXT103 if self.options.preset in LARGE else SMALL
        if vocabulary != shape.vocabulary:
            raise ValueError(
                f"--data {self.options.data}: expected {shape.vocabulary} different tokens, as "
                f"WikiText-103 has, got {vocabulary}; take --preset text for other text."
            )
        return shape

    def model(self) -> TransformerXL:
        return TransformerXL(self._shape)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        kind = {"adam": torch.optim.Adam, "lamb": Lamb}[self.options.optimizer]
        return kind(model.parameters(), lr=self.options.lr)

    def schedule(
        self, optimizer: torch.optim.Optimizer, steps: int | None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        assert steps is not None
        return warm_cosine(optimizer, self.options.warm_up, self.options.cosine_steps or steps)

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        if skip == 0:
            self._memory = None  # the streams begin anew
        for number in range(skip, self._train.whole_segments):
            inputs, targets = self._train.segment(number, hvd.rank(), hvd.size())
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        memory = self._memory
        if memory is None:
            memory = model.empty_memory(len(inputs))
        losses, self._memory = model(inputs, targets, memory.to(inputs.device))
        return losses.mean()

    def evaluate(self, model: Any) -> dict[str, float]:
        total, count = 0.0, 0
        device = next(model.parameters()).device
        memory: Tensor | None = None
        for number in range(self._held_out.segments):
            segment = self._held_out.segment(number, hvd.rank(), hvd.size())
            inputs, targets = (torch.from_numpy(part).to(device) for part in segment)
            if not len(inputs):
                break  # more ranks than streams
            if memory is None:
                memory = model.empty_memory(len(inputs))
            losses, memory = model(inputs, targets, memory)
            total += losses.double().sum().item()
            count += losses.numel()
        loss = loop.mean_over_ranks(total, count, "held.out")
        return {"perplexity": math.exp(loss), "validation_loss": loss}

    def describe(self) -> dict[str, Any]:
        return {
            "streams": self._train.streams,
            "vocabulary": self._shape.vocabulary,
            "synthetic": str(self.options.data) == loop.SYNTHETIC,
        }

    def counters(self) -> dict[str, int]:
        # The first rank reads the text; others may find its ids in the cache.
        return {"rejected_lines": len(self._rejects) if hvd.rank() == 0 else 0}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._memory is None else {"memory": self._memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory = state.get("memory")


if __name__ == "__main__":
    loop.main(LanguageModel)
