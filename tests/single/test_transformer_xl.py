"""The Transformer-XL example: its model against naive formulas, its reader against bad files."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from example_scripts import script
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import corpus  # noqa: E402
from common.rejects import Rejects, TooManyRejectedError  # noqa: E402
from corpus import END, Corpus, Streams, Vocabulary  # noqa: E402
from transformer import (  # noqa: E402
    WIKITEXT103,
    AdaptiveTokens,
    Shape,
    TransformerXL,
    relative_shift,
    sinusoids,
)

from gq_horovod.advisor.model import WORKLOADS  # noqa: E402

SMALL = Shape(
    vocabulary=30,
    cutoffs=(6, 14),
    layers=2,
    width=16,
    heads=2,
    head_width=6,
    inner=20,
    memory=10,
    shrink=2,
)


@pytest.fixture
def model() -> TransformerXL:
    torch.manual_seed(0)
    model = TransformerXL(SMALL).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocabulary, shape, generator=generator)


class TestModel:
    def test_the_paper_counts_191950298_parameters(self):
        with torch.device("meta"):
            model = TransformerXL(WIKITEXT103)
        assert sum(parameter.numel() for parameter in model.parameters()) == 191_950_298
        (known,) = (own for own in WORKLOADS if own.name == "Transformer-XL")
        assert (known.parameters, known.tensors) == (191_950_298, len(list(model.parameters())))

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (4, 4), (3, 7), (5, 6)])
    def test_relative_shift_is_the_double_loop(self, queries, keys):
        scores = torch.randn(2, 3, queries, keys)
        shifted = relative_shift(scores)
        assert shifted.shape == scores.shape
        memory = keys - queries
        for i in range(queries):
            for j in range(memory + i + 1):
                distance = memory + i - j
                column = keys - 1 - distance
                assert torch.equal(shifted[..., i, j], scores[..., i, column])

    def test_attention_is_the_formula(self, model):
        """Section 3.3 of the paper, query by query, key by key."""
        attention = model.attentions[0]
        u, v = model.content_bias, model.distance_bias
        hidden = torch.randn(2, 3, SMALL.width, dtype=torch.float64)
        memory = torch.randn(2, 4, SMALL.width, dtype=torch.float64)
        distances = sinusoids(torch.arange(6, -1, -1), SMALL.width).double()
        context = torch.cat([memory, hidden], dim=1)
        width = SMALL.head_width
        expected = torch.zeros(2, 3, SMALL.heads, width, dtype=torch.float64)
        keys, values = attention.key_value(context).chunk(2, dim=-1)
        for sample in range(2):
            for i in range(3):
                for head in range(SMALL.heads):
                    part = slice(head * width, (head + 1) * width)
                    query = attention.query(hidden)[sample, i, part]
                    scores = []
                    for j in range(4 + i + 1):
                        encoded = sinusoids(torch.tensor([4 + i - j]), SMALL.width).double()[0]
                        by_distance = (query + v[head]) @ attention.distance(encoded)[part]
                        scores.append((query + u[head]) @ keys[sample, j, part] + by_distance)
                    weights = torch.softmax(torch.stack(scores) / width**0.5, dim=0)
                    expected[sample, i, head] = weights @ values[sample, : 4 + i + 1, part]
        expected = attention.norm(hidden + attention.output(expected.flatten(2)))
        torch.testing.assert_close(attention(hidden, memory, distances, u, v), expected)

    @pytest.mark.parametrize("cuts", [(5,), (1, 5), (3, 4, 8)])
    def test_segments_with_memory_are_one_long_text(self, model, cuts):
        """While the memory holds all that came before, nothing else tells segments apart."""
        text = tokens(3, 10)
        whole, _ = model.hidden(text, model.empty_memory(3))
        memory, parts = model.empty_memory(3), []
        for segment in text.tensor_split(cuts, dim=1):
            part, memory = model.hidden(segment, memory)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)

    def test_a_text_without_its_memory_is_another_text(self, model):
        """The test above would fail without the memory."""
        text = tokens(3, 10)
        whole, _ = model.hidden(text, model.empty_memory(3))
        part, _ = model.hidden(text[:, 5:], model.empty_memory(3))
        assert (part - whole[:, 5:]).abs().max() > 0.01

    def test_no_position_sees_a_later_one(self, model):
        text = tokens(1, 8)
        changed = text.clone()
        changed[0, 5] = (text[0, 5] + 1) % SMALL.vocabulary
        before, _ = model.hidden(text, model.empty_memory(1))
        after, _ = model.hidden(changed, model.empty_memory(1))
        torch.testing.assert_close(before[:, :5], after[:, :5])
        assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=2).min() > 0.001

    def test_the_memory_is_the_newest_states_and_has_no_gradient(self, model):
        memory = model.empty_memory(2)
        for length, expected in ((7, 7), (7, 10), (2, 10)):
            text = tokens(2, length, seed=length)
            old = memory
            _, memory = model.hidden(text, memory)
            assert memory.shape == (SMALL.layers, 2, expected, SMALL.width)
            assert not memory.requires_grad
            # What the first layer sees are the embeddings.
            torch.testing.assert_close(memory[0, :, -length:], model.tokens.embed(text))
            kept = expected - length
            assert torch.equal(memory[0, :, :kept], old[0, :, old.shape[2] - kept :])

    def test_every_parameter_gets_a_gradient_from_frequent_tokens_alone(self, model):
        """Or ranks would reduce other tensors than each other."""
        text = torch.zeros(2, 4, dtype=torch.int64)
        losses, _ = model(text, text, model.empty_memory(2))
        losses.mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert not model.tokens.tables[2].grad.any()
        assert model.tokens.tables[0].grad.any()


SHAPES = [
    SMALL,
    replace(SMALL, shrink=1),
    replace(SMALL, cutoffs=()),
    replace(SMALL, cutoffs=(1, 2, 29)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.cutoffs}, shrink {s.shrink}")
class TestAdaptiveTokens:
    @pytest.fixture
    def adaptive(self, shape: Shape) -> AdaptiveTokens:
        torch.manual_seed(0)
        adaptive = AdaptiveTokens(shape).double()
        for parameter in adaptive.parameters():
            torch.nn.init.normal_(parameter)
        return adaptive

    def test_probabilities_add_up_to_one(self, adaptive, shape):
        hidden = torch.randn(5, shape.width, dtype=torch.float64)
        logs = adaptive.log_probabilities(hidden)
        assert logs.shape == (5, shape.vocabulary)
        torch.testing.assert_close(logs.exp().sum(dim=1), torch.ones(5, dtype=torch.float64))

    def test_losses_are_those_probabilities(self, adaptive, shape):
        hidden = torch.randn(shape.vocabulary, shape.width, dtype=torch.float64)
        targets = torch.randperm(shape.vocabulary)
        logs = adaptive.log_probabilities(hidden)
        expected = -logs[torch.arange(shape.vocabulary), targets]
        torch.testing.assert_close(adaptive.negative_log_likelihood(hidden, targets), expected)

    def test_a_token_is_embedded_by_its_row(self, adaptive, shape):
        found = adaptive.embed(torch.arange(shape.vocabulary).view(2, -1))
        rows = []
        for cluster, (first, end) in enumerate(shape.clusters):
            for row in range(end - first):
                vector = adaptive.tables[cluster][row]
                if str(cluster) in adaptive.projections:
                    vector = adaptive.projections[str(cluster)] @ vector
                rows.append(vector * shape.width**0.5)
        torch.testing.assert_close(found.flatten(0, 1), torch.stack(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoffs": (6, 6)}, r"Shape: cutoffs \(6, 6\) with a vocabulary of 30: .* smaller"),
        ({"cutoffs": (30,)}, r"cutoffs \(30,\)"),
        ({"cutoffs": (0, 5)}, r"cutoffs \(0, 5\)"),
        ({"shrink": 5}, r"Shape: shrink 5 leaves nothing of a width of 16 after 2 cutoffs"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


# -------------------------------------------------------------------------------------------- text


def write(folder: Path, train: bytes, valid: bytes = b" a b \n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wiki.train.tokens").write_bytes(train)
    (folder / "wiki.valid.tokens").write_bytes(valid)
    return folder


def words(corpus: Corpus, vocabulary: list[str]) -> list[str]:
    return [vocabulary[number] for number in corpus.train]


class TestReader:
    def test_a_small_text(self, tmp_path):
        folder = write(tmp_path / "data", b" \n = A = \n \n b b b c \n", b" c b A \n")
        found = corpus.wikitext(folder, tmp_path / "cache", Rejects(0))
        # By frequency: four <eos>, three b, two =; then in the order of the text.
        vocabulary = [END, "b", "=", "A", "c"]
        assert found.vocabulary == 5
        assert found.train.dtype == np.int32
        text = [END, "=", "A", "=", END, END, "b", "b", "b", "c", END]
        assert words(found, vocabulary) == text
        assert [vocabulary[number] for number in found.validation] == ["c", "b", "A", END]

    def test_what_was_read_is_kept_until_the_text_changes(self, tmp_path, monkeypatch):
        folder, cache = write(tmp_path / "data", b" a b \n"), tmp_path / "cache"
        corpus.wikitext(folder, cache, Rejects(0))
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "encode", lambda *_: pytest.fail("read again"))
            patch.setattr(Vocabulary, "count", lambda *_: pytest.fail("counted again"))
            assert len(corpus.wikitext(folder, cache, Rejects(0)).train) == 3
        assert not list(cache.glob("*.partial"))
        write(folder, b" a b a b \n")
        assert len(corpus.wikitext(folder, cache, Rejects(0)).train) == 5

    def test_a_given_vocabulary_is_taken(self, tmp_path):
        folder = write(tmp_path / "data", b" a b zebra \n")
        (folder / "vocabulary.txt").write_text("<eos>\n<unk>\na\nb\n")
        found = corpus.wikitext(folder, tmp_path / "cache", Rejects(0))
        assert found.train.tolist() == [2, 3, 1, 0]
        assert found.vocabulary == 4

    def test_bad_lines_are_left_out_and_named(self, tmp_path, caplog):
        folder = write(tmp_path / "data", b" a b \n bad \xff\xfe \n b a \n")
        rejects = Rejects(1)
        found = corpus.wikitext(folder, tmp_path / "cache", rejects)
        # Read twice, for the vocabulary and for the ids, and counted once.
        assert len(rejects) == 1
        assert f"{folder}/wiki.train.tokens:2: no UTF-8: invalid start byte at" in caplog.text
        assert words(found, ["a", "b", END]) == ["a", "b", END, "b", "a", END]

    def test_too_many_bad_lines(self, tmp_path):
        folder = write(tmp_path / "data", b" a b \n\xff\n\xff\n")
        message = r"wiki.train.tokens:3: no UTF-8.* 2 records cannot be read, and 1 may be left out"
        with pytest.raises(TooManyRejectedError, match=message):
            corpus.wikitext(folder, tmp_path / "cache", Rejects(1))
        assert not list((tmp_path / "cache").glob("*"))

    def test_a_line_without_an_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus, "LONGEST_LINE", 10)
        path = tmp_path / "text"
        path.write_bytes(b"0123456789\n" + b"x" * 35 + b"\nlast")
        rejects = Rejects(1)
        assert list(corpus.read_lines(path, rejects)) == [(1, "0123456789"), (3, "last")]
        assert rejects.reasons == {f"{path}:2": "longer than 10 bytes"}

    def test_a_token_that_no_vocabulary_has(self, tmp_path):
        folder = write(tmp_path / "data", b" a b \n", b" a \n new b \n")
        rejects = Rejects(1)
        found = corpus.wikitext(folder, tmp_path / "cache", rejects)
        assert rejects.reasons == {
            f"{folder}/wiki.valid.tokens:2": "'new' is not in the vocabulary, nor is <unk>"
        }
        assert len(found.validation) == 2

    def test_missing_and_empty_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"wiki.train.tokens: expected .*--data names"):
            corpus.wikitext(tmp_path, tmp_path / "cache", Rejects(0))
        folder = write(tmp_path / "data", b" a \n", b"")
        with pytest.raises(ValueError, match=r"wiki.valid.tokens: expected text"):
            corpus.wikitext(folder, tmp_path / "cache", Rejects(0))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"<eos>\na\na\n", r"v:3: 'a' is in line 2 already"),
            (b"<eos>\na b\n", r"v:2: expected one token, got 'a b'"),
            (b"<eos>\n\nb\n", r"v:2: expected one token, got ''"),
            (b"a\nb\n", r"v: expected a line <eos>"),
            (b"<eos>\n\xff\n", r"v:2: no UTF-8: .*; a vocabulary needs every line"),
        ],
    )
    def test_a_bad_vocabulary_is_an_error(self, text, message, tmp_path):
        path = tmp_path / "v"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            Vocabulary.read(path)

    @given(st.binary(max_size=300))
    def test_any_bytes_are_read_or_named(self, content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text"
            path.write_bytes(content)
            rejects = Rejects(1000)
            lines = list(corpus.read_lines(path, rejects))
            # Every line is read or left out, and what is read is what Python decodes.
            expected = content.split(b"\n")
            if expected[-1] == b"":
                expected.pop()
            assert len(lines) + len(rejects) == len(expected)
            for number, text in lines:
                assert text == expected[number - 1].decode().rstrip("\r")

    tokens_ = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=5)

    @given(st.lists(st.lists(tokens_, max_size=8), min_size=1, max_size=8))
    def test_text_comes_back_from_its_ids(self, paragraphs):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text"
            text = "".join(f" {' '.join(paragraph)} \n" for paragraph in paragraphs)
            path.write_text(text, encoding="utf-8")
            Vocabulary.count(path, Rejects(0)).write(Path(folder) / "vocabulary")
            vocabulary = Vocabulary.read(Path(folder) / "vocabulary")
            ids = np.concatenate(list(corpus.encode(path, vocabulary, Rejects(0))))
            back = [vocabulary.tokens[number] for number in ids]
            assert back == [token for line in text.splitlines() for token in [*line.split(), END]]
            counts = np.bincount(ids)
            assert (counts[:-1] >= counts[1:]).all()

    def test_pythons_sources(self):
        found = corpus.source_bytes()
        assert found.vocabulary == 256
        assert len(found.train) > 10 * len(found.validation) > 10**5
        counts = np.bincount(found.train, minlength=256)
        assert (counts[:-1] >= counts[1:]).all()


class TestStreams:
    @given(
        st.integers(2, 200), st.integers(1, 8), st.integers(1, 9), st.integers(1, 4), st.booleans()
    )
    def test_ranks_share_what_one_rank_reads(self, count, streams, length, ranks, short_last):
        ids = np.arange(count, dtype=np.int32)
        if count // streams < 2:
            with pytest.raises(ValueError, match="expected at least two for each"):
                Streams(ids, streams, length)
            return
        cut = Streams(ids, streams, length)
        number = cut.segments if short_last else cut.whole_segments
        read = [cut.segment(k, 0, 1) for k in range(number)]
        for k, (inputs, targets) in enumerate(read):
            assert np.array_equal(targets, inputs + 1)
            assert inputs.shape[1] == length or (short_last and k == number - 1)
            for rank in range(ranks):
                share = cut.segment(k, rank, ranks)
                assert np.array_equal(share[0], inputs[rank::ranks])
                assert np.array_equal(share[1], targets[rank::ranks])
        if short_last:
            # Every stream in order, all but its last id.
            each = count // streams
            whole = np.concatenate([inputs for inputs, _ in read], axis=1)
            expected = ids[: each * streams].reshape(streams, each)[:, :-1]
            assert np.array_equal(whole, expected)


# ------------------------------------------------------------------------------------ the workload


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """examples/transformer_xl/train.py; `import train` would find another example's."""
    pytest.importorskip("horovod.torch", exc_type=ImportError)
    return script("transformer_xl")


class TestWorkload:
    def batches(self, train, monkeypatch, rank: int, ranks: int) -> list:
        """The first three batches of a rank; all ranks together read 12 streams."""
        ranked = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
        monkeypatch.setattr(train, "hvd", ranked)
        options = train.loop.parse(train.LanguageModel, ["--batch-size", str(12 // ranks)])
        batches = train.LanguageModel(options).batches(0, 5)
        return [next(batches) for _ in range(3)]

    def test_ranks_share_one_global_batch(self, train, monkeypatch):
        whole = self.batches(train, monkeypatch, 0, 1)
        assert whole[0][0].shape == (12, 64)
        for ranks in (2, 3):
            for rank in range(ranks):
                for mine, all_of_it in zip(
                    self.batches(train, monkeypatch, rank, ranks), whole, strict=True
                ):
                    assert torch.equal(mine[0], all_of_it[0][rank::ranks])
                    assert torch.equal(mine[1], all_of_it[1][rank::ranks])

    def test_an_epoch_begins_without_a_memory(self, train, monkeypatch):
        monkeypatch.setattr(train, "hvd", SimpleNamespace(rank=lambda: 0, size=lambda: 1))
        workload = train.LanguageModel(train.loop.parse(train.LanguageModel, []))
        torch.manual_seed(0)
        model = workload.model()
        losses = []
        for epoch in (0, 1):
            batches = workload.batches(epoch, 0)
            losses.append([workload.loss(model, next(batches)).item() for _ in range(2)])
        assert losses[0] == losses[1]
        kept = workload.state_dict()["memory"]
        assert kept.shape == (3, 8, 64, 96)
        # Bytes are about equally likely at the start, but for what tells the clusters apart.
        assert 1 < losses[0][0] < math.log(256) + 0.1

    def test_the_settings_of_the_paper_s_runs(self, train, monkeypatch):
        """Of 64 ranks: 256 streams, LAMB, and a cosine that ends with the last of 40,000 steps."""
        monkeypatch.setattr(train, "hvd", SimpleNamespace(rank=lambda: 0, size=lambda: 64))
        arguments = ["--preset", "paper", "--data", "synthetic"]
        workload = train.LanguageModel(train.loop.parse(train.LanguageModel, arguments))
        assert workload.describe()["streams"] == 256
        assert workload._shape is train.WIKITEXT103
        assert workload.options.length == workload._shape.memory == 192
        optimizer = workload.optimizer(torch.nn.Linear(2, 2))
        assert isinstance(optimizer, train.Lamb)
        workload.options.cosine_steps = 4000  # a tenth, for time's sake
        schedule = workload.schedule(optimizer, 10**6)
        rates = []
        for _ in range(4000):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()  # without gradients
            schedule.step()
        assert max(rates) == rates[1000] == 0.01
        assert rates[499] == pytest.approx(0.005)
        assert rates[2500] == pytest.approx(0.005)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
        paper = train.LanguageModel.PRESETS["paper"]
        assert (paper["cosine_steps"], paper["max_steps"], paper["warm_up"]) == (40000, 40000, 1000)
        # As many steps as the 103,227,021 tokens of WikiText-103 have in these epochs.
        assert paper["epochs"] * (103_227_021 // (256 * 192)) >= 40_000

    def test_the_preset_needs_its_data(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "hvd", SimpleNamespace(rank=lambda: 0, size=lambda: 1))
        monkeypatch.setattr(train.loop, "first_rank_first", lambda function: function())
        arguments = ["--preset", "wikitext103", "--cache", str(tmp_path / "cache")]
        with pytest.raises(ValueError, match="--preset wikitext103: expected --data"):
            train.LanguageModel(train.loop.parse(train.LanguageModel, arguments))
        arguments += ["--data", str(write(tmp_path, b" a b \n"))]
        with pytest.raises(ValueError, match=r"expected 267735 different tokens.*got 3; take"):
            train.LanguageModel(train.loop.parse(train.LanguageModel, arguments))


def test_synthetic_text_follows_zipf_s_law_and_itself() -> None:
    text = corpus.synthetic(1000, 200_000, 500, seed=3)
    assert (len(text.train), len(text.validation), text.vocabulary) == (200_000, 500, 1000)
    assert text.train.min() == 0
    assert text.train.max() < 1000
    again = corpus.synthetic(1000, 200_000, 500, seed=3)
    np.testing.assert_array_equal(again.train, text.train)
    assert (corpus.synthetic(1000, 200_000, 500, seed=4).train != text.train).any()
    before, after = text.train[:-1].astype(int), text.train[1:]
    follows = float(np.mean(after == (31 * before + 7) % 1000))
    assert 0.45 < follows < 0.55
    seen = np.bincount(text.train, minlength=1000)
    assert seen[0] > 5 * seen[20]
