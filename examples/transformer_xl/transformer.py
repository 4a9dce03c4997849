"""Transformer-XL: a language model whose segments see the hidden states of earlier ones.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", ACL 2019
(arXiv 1901.02860), sections 3.2 (segment recurrence) and 3.3 (relative positions). Input embedding
and softmax are adaptive: Grave et al., "Efficient softmax approximation for GPUs", ICML 2017
(arXiv 1609.04309), and Baevski and Auli, "Adaptive Input Representations", ICLR 2019
(arXiv 1809.10853), with one table for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02  # of all weights, as in the authors' runs


@dataclass(frozen=True)
class Shape:
    """Sizes of a Transformer-XL."""

    vocabulary: int  # token ids are 0 to vocabulary - 1, the most frequent first
    cutoffs: tuple[int, ...]  # first ids of the clusters after the first, ascending
    layers: int
    width: int  # of a hidden state
    heads: int
    head_width: int
    inner: int  # width inside the feed-forward part
    memory: int  # hidden states of each layer that the next segment sees, at most
    shrink: int = 1  # each cluster's embeddings are that much narrower than those of the one before
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        edges = (0, *self.cutoffs, self.vocabulary)
        if any(low >= high for low, high in pairwise(edges)):
            raise ValueError(
                f"Shape: cutoffs {self.cutoffs} with a vocabulary of {self.vocabulary}: expected "
                "ids that ascend between 0 and the vocabulary's size; choose smaller cutoffs"
            )
        if self.width // self.shrink ** len(self.cutoffs) < 1:
            raise ValueError(
                f"Shape: shrink {self.shrink} leaves nothing of a width of {self.width} after "
                f"{len(self.cutoffs)} cutoffs; choose a smaller one"
            )

    @property
    def clusters(self) -> list[tuple[int, int]]:
        """First id, and the id after the last one, of each cluster."""
        return list(pairwise((0, *self.cutoffs, self.vocabulary)))

    def cluster_width(self, cluster: int) -> int:
        """Width of a cluster's embeddings."""
        return self.width // self.shrink**cluster


class AdaptiveTokens(nn.Module):
    """The embedding of tokens, and the softmax over them, with the same table for both.

    Tokens are in clusters by how frequent they are. The softmax is first over the tokens of the
    first cluster and one entry for each other cluster, then, where it is another cluster, over its
    tokens: a rare token costs a second, and a frequent one a small softmax.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        clusters = shape.clusters
        widths = [shape.cluster_width(cluster) for cluster in range(len(clusters))]
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(end - first, width))
            for (first, end), width in zip(clusters, widths, strict=True)
        )
        # From a cluster's width to the model's, and back: one matrix for both ways.
        self.projections = nn.ParameterDict(
            {
                str(cluster): nn.Parameter(torch.empty(shape.width, width))
                for cluster, width in enumerate(widths)
                if width != shape.width
            }
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(end - first)) for first, end in clusters
        )
        # One row and bias for each cluster but the first, beside the first one's tokens.
        self.cluster_table = nn.Parameter(torch.empty(len(clusters) - 1, shape.width))
        self.cluster_bias = nn.Parameter(torch.zeros(len(clusters) - 1))
        for weight in (*self.tables, *self.projections.values(), self.cluster_table):
            nn.init.normal_(weight, std=INIT_STD)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., width) of the ids `tokens` (...), int64.

        A cluster without a token in `tokens` takes part with none, so that every table gets a
        gradient on every rank.
        """
        flat = tokens.flatten()
        vectors = self.tables[0].new_zeros(len(flat), self.shape.width)
        for cluster, (first, end) in enumerate(self.shape.clusters):
            (rows,) = torch.where((flat >= first) & (flat < end))
            found = functional.embedding(flat[rows] - first, self.tables[cluster])
            if str(cluster) in self.projections:
                found = functional.linear(found, self.projections[str(cluster)])
            vectors = vectors.index_copy(0, rows, found)
        # sqrt(width), as in "Attention Is All You Need", section 3.4: tables start small.
        return vectors.view(*tokens.shape, -1) * self.shape.width**0.5

    def _logits(self, hidden: Tensor, cluster: int) -> Tensor:
        """Logits of a cluster's tokens; in the first one those of the other clusters follow."""
        if str(cluster) in self.projections:
            hidden = hidden @ self.projections[str(cluster)]
        logits = functional.linear(hidden, self.tables[cluster], self.biases[cluster])
        if cluster == 0 and len(self.tables) > 1:
            others = functional.linear(hidden, self.cluster_table, self.cluster_bias)
            logits = torch.cat([logits, others], dim=-1)
        return logits

    def negative_log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p (N,) of the ids `targets` (N,), int64, after `hidden` (N, width)."""
        head = functional.log_softmax(self._logits(hidden, 0), dim=-1)
        first_size = self.shape.clusters[0][1]
        in_head = targets.clamp(max=first_size - 1)
        for cluster, (first, _) in enumerate(self.shape.clusters[1:], start=1):
            in_head = torch.where(targets >= first, first_size + cluster - 1, in_head)
        log_likelihood = head.gather(1, in_head[:, None]).squeeze(1)
        for cluster, (first, end) in enumerate(self.shape.clusters[1:], start=1):
            (rows,) = torch.where((targets >= first) & (targets < end))
            tail = functional.log_softmax(self._logits(hidden[rows], cluster), dim=-1)
            inside = tail.gather(1, targets[rows, None] - first).squeeze(1)
            log_likelihood = log_likelihood.index_add(0, rows, inside)
        return -log_likelihood

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return log p (N, vocabulary) of every token after `hidden` (N, width)."""
        head = functional.log_softmax(self._logits(hidden, 0), dim=-1)
        first_size = self.shape.clusters[0][1]
        parts = [head[:, :first_size]]
        for cluster in range(1, len(self.tables)):
            tail = functional.log_softmax(self._logits(hidden, cluster), dim=-1)
            parts.append(head[:, first_size + cluster - 1, None] + tail)
        return torch.cat(parts, dim=1)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by distance into scores by key, without a gather.

    scores (..., T, K) has in row i and column c the score of query i with what lies K - 1 - c
    positions before it. Returns (..., T, K) with the score of query i and key j at (i, j): row i
    moved to the left by T - 1 - i. What lies after the query, j > i + K - T, is not meaningful.
    (Appendix B of the paper.)
    """
    *batch, queries, keys = scores.shape
    padded = functional.pad(scores, (1, 0))
    # Read in rows of T, the zero before each row moves it by one more place than the row before.
    return padded.view(*batch, keys + 1, queries)[..., 1:, :].reshape(*batch, queries, keys)


def sinusoids(distances: Tensor, width: int) -> Tensor:
    """Encode distances (K,) as (K, width) sines and cosines."""
    exponents = torch.arange(0, width, 2, device=distances.device) / width
    angles = distances[:, None] / 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class RelativeAttention(nn.Module):
    """Attention of T hidden states over a memory of M older ones and themselves.

    The score of a query i and a key j (equation in section 3.3) is
    (q_i + u)·k_j + (q_i + v)·W r_(i-j), over sqrt(head width): by content and by distance.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head_width = shape.heads, shape.head_width
        inner = shape.heads * shape.head_width
        self.query = nn.Linear(shape.width, inner, bias=False)
        self.key_value = nn.Linear(shape.width, 2 * inner, bias=False)
        self.distance = nn.Linear(shape.width, inner, bias=False)
        self.output = nn.Linear(inner, shape.width, bias=False)
        self.norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.attention_dropout = nn.Dropout(shape.attention_dropout)

    def forward(
        self, hidden: Tensor, memory: Tensor, distances: Tensor, u: Tensor, v: Tensor
    ) -> Tensor:
        """Return the new hidden states (B, T, width).

        Args:
            hidden: (B, T, width).
            memory: (B, M, width), of the positions just before; no gradient goes into it.
            distances: (M + T, width), encodings of the distances M + T - 1 down to 0.
            u, v: (heads, head width), biases that all layers share.
        """
        context = torch.cat([memory, hidden], dim=1)
        length = hidden.shape[1]
        query = self._split(self.query(hidden))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        distance = self._split(self.distance(distances)[None])
        by_content = (query + u[:, None]) @ key.transpose(2, 3)
        by_distance = relative_shift((query + v[:, None]) @ distance.transpose(2, 3))
        scores = (by_content + by_distance) * self.head_width**-0.5
        # A query at i sees the keys up to M + i.
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ahead.triu(1 + memory.shape[1]), float("-inf"))
        weights = self.attention_dropout(scores.softmax(dim=-1))
        attended = (weights @ value).transpose(1, 2).flatten(2)
        assert attended.shape[1] == length
        return self.norm(hidden + self.dropout(self.output(attended)))

    def _split(self, vectors: Tensor) -> Tensor:
        """(B, L, heads · head width) -> (B, heads, L, head width)."""
        return vectors.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps for each position by itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.inner = nn.Linear(shape.width, shape.inner)
        self.output = nn.Linear(shape.inner, shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.dropout(self.inner(hidden).relu())
        return self.norm(hidden + self.dropout(self.output(inner)))


class TransformerXL(nn.Module):
    """The whole model. Its memory is an argument and a result: the caller decides what it is of."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = AdaptiveTokens(shape)
        # The biases u and v of the paper, the same in every layer.
        self.content_bias = nn.Parameter(torch.empty(shape.heads, shape.head_width))
        self.distance_bias = nn.Parameter(torch.empty(shape.heads, shape.head_width))
        self.attentions = nn.ModuleList(RelativeAttention(shape) for _ in range(shape.layers))
        self.feed_forwards = nn.ModuleList(FeedForward(shape) for _ in range(shape.layers))
        self.dropout = nn.Dropout(shape.dropout)
        nn.init.normal_(self.content_bias, std=INIT_STD)
        nn.init.normal_(self.distance_bias, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def empty_memory(self, batch: int) -> Tensor:
        """The memory before a text's first segment: (layers, batch, 0, width)."""
        return self.content_bias.new_zeros(self.shape.layers, batch, 0, self.shape.width)

    def hidden(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's states (B, T, width), and the memory for the next segment.

        Args:
            tokens: (B, T), int64: the segment that follows on what `memory` is of.
            memory: (layers, B, M, width), what each layer saw before.
        """
        distance = torch.arange(memory.shape[2] + tokens.shape[1] - 1, -1, -1, device=tokens.device)
        distances = sinusoids(distance, self.shape.width).to(memory.dtype)
        distances = self.dropout(distances)
        hidden = self.dropout(self.tokens.embed(tokens))
        seen = []
        layers = zip(self.attentions, self.feed_forwards, memory, strict=True)
        for attention, feed_forward, remembered in layers:
            seen.append(torch.cat([remembered, hidden.detach()], dim=1))
            hidden = attention(hidden, remembered, distances, self.content_bias, self.distance_bias)
            hidden = feed_forward(hidden)
        kept = torch.stack(seen)
        kept = kept[:, :, max(0, kept.shape[2] - self.shape.memory) :].contiguous()
        return self.dropout(hidden), kept

    def forward(self, tokens: Tensor, targets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p (B, T) of the ids `targets` (B, T) after `tokens`, and the next memory."""
        hidden, memory = self.hidden(tokens, memory)
        losses = self.tokens.negative_log_likelihood(hidden.flatten(0, 1), targets.flatten())
        return losses.view(targets.shape), memory


# The configuration that NVIDIA's DeepLearningExamples call "base", with the clusters of Dai et al.:
# 191,950,298 parameters, which is the count of the Global-QSGD paper (arXiv 2305.18627).
WIKITEXT103 = Shape(
    vocabulary=267_735,
    cutoffs=(19_997, 39_997, 199_997),
    layers=16,
    width=512,
    heads=8,
    head_width=64,
    inner=2048,
    memory=192,
    dropout=0.1,
)
