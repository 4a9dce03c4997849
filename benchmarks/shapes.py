"""Names and shapes of the parameters of well-known models: what a step reduces, and no more.

Counted from the definitions in the papers and in torchvision, Hugging Face Transformers and DLRM;
`PARAMETERS` has their numbers of parameters, which a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator

Shapes = list[tuple[str, tuple[int, ...]]]
Named = Iterator[tuple[str, tuple[int, ...]]]

PARAMETERS = {
    "ResNet-50": 25_557_032,
    "Wide-ResNet-101-2": 126_886_696,
    "BERT-large": 335_141_888,
    "GPT-2 small": 124_439_808,
    "DLRM": 65_584_721,
    "DeepLight": 607_959_381,
}

# Rows of the tables of Criteo's Kaggle data (DLRM's own counts), of which so many are kept.
_CRITEO = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27),
    *(14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_MOST_ROWS = 700_000

# Rows of the tables of DeepLight in the authors' code (sands-lab/global-qsgd, commit 13d702f).
_DEEPLIGHT = (
    *(1,) * 13,
    *(15040574, 35017, 17195, 7374, 20127, 4, 7111, 1397, 63, 10260959, 939647, 285463, 11, 2210),
    *(10874, 117, 5, 971, 15, 15604226, 4668632, 13476290, 357276, 12277, 100, 35),
)


def _convolution(name: str, out: int, into: int, kernel: int, norm: str) -> Named:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{norm}.weight", (out,)
    yield f"{norm}.bias", (out,)


def _linear(name: str, out: int, into: int) -> Named:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _layer_norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(blocks: tuple[int, ...], factor: int) -> Named:
    """Bottlenecks whose inner width is `factor` times that of ResNet-50's (He et al., 2015)."""
    yield from _convolution("conv1", 64, 3, 7, "bn1")
    into = 64
    for stage, count in enumerate(blocks):
        inner, out = 64 * factor * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            yield from _convolution(f"{name}.conv1", inner, into, 1, f"{name}.bn1")
            yield from _convolution(f"{name}.conv2", inner, inner, 3, f"{name}.bn2")
            yield from _convolution(f"{name}.conv3", out, inner, 1, f"{name}.bn3")
            if block == 0:
                short = f"{name}.downsample"
                yield from _convolution(f"{short}.0", out, into, 1, f"{short}.1")
            into = out
    yield from _linear("fc", 1000, into)


def _bert() -> Named:
    """BERT-large, uncased (Devlin et al., 2018), without a head."""
    width = 1024
    for name, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        yield f"embeddings.{name}_embeddings.weight", (rows, width)
    yield from _layer_norm("embeddings.LayerNorm", width)
    for layer in range(24):
        name = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield from _linear(f"{name}.attention.{part}", width, width)
        yield from _layer_norm(f"{name}.attention.output.LayerNorm", width)
        yield from _linear(f"{name}.intermediate.dense", 4 * width, width)
        yield from _linear(f"{name}.output.dense", width, 4 * width)
        yield from _layer_norm(f"{name}.output.LayerNorm", width)
    yield from _linear("pooler.dense", width, width)


def _gpt2() -> Named:
    """GPT-2 small (Radford et al., 2019); the head shares the embeddings."""
    width = 768
    yield "wte.weight", (50257, width)
    yield "wpe.weight", (1024, width)
    for layer in range(12):
        name = f"h.{layer}"
        yield from _layer_norm(f"{name}.ln_1", width)
        yield from _linear(f"{name}.attn.c_attn", 3 * width, width)
        yield from _linear(f"{name}.attn.c_proj", width, width)
        yield from _layer_norm(f"{name}.ln_2", width)
        yield from _linear(f"{name}.mlp.c_fc", 4 * width, width)
        yield from _linear(f"{name}.mlp.c_proj", width, 4 * width)
    yield from _layer_norm("ln_f", width)


def _dlrm() -> Named:
    """DLRM (Naumov et al., 2019) as its script for Criteo's Kaggle data has it, tables cut."""
    for table, rows in enumerate(_CRITEO):
        yield f"emb_l.{table}.weight", (min(rows, _MOST_ROWS), 16)
    for name, widths in (("bot_l", (13, 512, 256, 64, 16)), ("top_l", (367, 512, 256, 1))):
        for layer in range(len(widths) - 1):
            yield from _linear(f"{name}.{2 * layer}", widths[layer + 1], widths[layer])


def _deeplight() -> Named:
    """DeepLight at the size of arXiv 2305.18627, as examples/deeplight/model.py has it."""
    fields, dim, width = len(_DEEPLIGHT), 10, 400
    yield "first", (fields, dim)
    yield "field_bias", (fields,)
    yield "pair_weight", (fields, fields)
    yield "bias", (1,)
    for table, rows in enumerate(_DEEPLIGHT):
        yield f"tables.{table}.weight", (rows, dim)
    for layer, into in enumerate((fields * dim, width, width)):
        yield from _linear(f"deep.{3 * layer}", width, into)
    yield "deep.9.weight", (1, width)


def shapes(model: str) -> Shapes:
    """The parameters of a model of PARAMETERS, or of "COUNTxELEMENTS", in the model's order."""
    if model == "ResNet-50":
        return list(_resnet((3, 4, 6, 3), 1))
    if model == "Wide-ResNet-101-2":
        return list(_resnet((3, 4, 23, 3), 2))
    if model == "BERT-large":
        return list(_bert())
    if model == "GPT-2 small":
        return list(_gpt2())
    if model == "DLRM":
        return list(_dlrm())
    if model == "DeepLight":
        return list(_deeplight())
    count, elements = map(int, model.split("x"))
    return [(f"layer{place}", (elements,)) for place in range(count)]
