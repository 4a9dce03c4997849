"""Options and their errors, the plan for a world size, agreement between ranks, and the token."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import Array

from gq_horovod.path import agreement, token
from gq_horovod.path.config import PAPER_EXPONENTIAL, PAPER_STANDARD, Config, ConfigMismatchError
from mpi_ops import lanes
from mpi_ops.agreement import decode, encode, require_same
from mpi_ops.scheme import Scheme

# ------------------------------------------------------------------------------------------- errors

# Options, the type of the error, and its text after the name of the function: argument, what was
# expected, what came, the remedy.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"norm": "l1"}, ValueError, "norm must be 'max' or 'l2', got 'l1'; choose one of them."),
    (
        {"seed": 1.5},
        TypeError,
        "seed must be an integer, got 1.5 of type float; pass an int.",
    ),
    (
        {"seed": None},
        TypeError,
        "seed must be an integer, got None of type NoneType; pass an int.",
    ),
    ({"seed": True}, TypeError, "seed must be an integer, got True of type bool; pass an int."),
    ({"bits": "8"}, TypeError, "bits must be an integer, got '8' of type str; pass an int."),
    ({"bits": 8.0}, TypeError, "bits must be an integer, got 8.0 of type float; pass an int."),
    *[
        (
            {"bits": bits},
            ValueError,
            f"bits must be between 2 and 16 for two-hop levels, got {bits}; "
            "leave it out for the default.",
        )
        for bits in (-8, 0, 1, 17, 32)
    ],
    *[
        (
            {"levels": "exponential", "bits": bits},
            ValueError,
            f"bits must be 4 or 8 for exponential levels, got {bits}; "
            "leave it out for the default of 8.",
        )
        for bits in (0, 2, 5, 7, 16)
    ],
    *[
        (
            {"block_size": block_size},
            ValueError,
            f"block_size must be a positive multiple of 32, 'auto' or None, got {block_size}; "
            "256 suits most models, None means one norm per tensor.",
        )
        for block_size in (0, -32, 1, 31, 33, 100)
    ],
    (
        {"block_size": 256.0},
        TypeError,
        "block_size must be an integer, got 256.0 of type float; pass an int.",
    ),
    (
        {"block_size": "automatic"},
        TypeError,
        "block_size must be an integer, got 'automatic' of type str; pass an int.",
    ),
]
PLUGIN_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"levels": "linear"},
        ValueError,
        "levels must be 'standard', 'exponential', 'two-hop' or 'auto', got 'linear'; "
        "choose one of them.",
    ),
    (
        {"levels": "auto", "bits": 8},
        ValueError,
        "bits must be None with levels='auto', got 8; leave it out, or set levels.",
    ),
    (
        {"transport": "nccl"},
        ValueError,
        "transport must be 'horovod' or 'mpi', got 'nccl'; choose one of them.",
    ),
    (
        {"min_elements": -1},
        ValueError,
        "min_elements must be 0 or more, got -1; 0 compresses every tensor.",
    ),
    (
        {"min_elements": 1e4},
        TypeError,
        "min_elements must be an integer, got 10000.0 of type float; pass an int.",
    ),
    *[
        (
            {"timeout": timeout},
            ValueError,
            f"timeout must be more than 0 s, got {timeout}; None waits for ever.",
        )
        for timeout in (0, -1.5, float("nan"))
    ],
    (
        {"timeout": "10s"},
        TypeError,
        "timeout must be a number of seconds or None, got '10s' of type str; pass a number.",
    ),
    (
        {"check_replicas": 0},
        ValueError,
        "check_replicas must be 1 or more steps, got 0; None never checks.",
    ),
    (
        {"check_replicas": True},
        TypeError,
        "check_replicas must be an integer, got True of type bool; pass an int.",
    ),
    (
        {"error_feedback": 1},
        TypeError,
        "error_feedback must be True or False, got 1 of type int; pass a bool.",
    ),
    (
        {"error_feedback": True, "levels": "auto"},
        ValueError,
        "levels must be 'standard' or 'two-hop' with error_feedback=True, got 'auto'; "
        "choose one of them.",
    ),
    (
        {"error_feedback": True, "rules": {"a": {"levels": "exponential"}}},
        ValueError,
        "in rules['a'] levels must be 'standard' or 'two-hop' with error_feedback=True, got "
        "'exponential'; choose one of them.",
    ),
    (
        {"error_feedback": True, "hierarchical": True},
        ValueError,
        "hierarchical must be 'auto' or False with error_feedback=True, which is about each "
        "rank's own codes, got True; leave it out.",
    ),
]


def refused(cases: list[Any]) -> pytest.MarkDecorator:
    """Parametrize by cases, named after their options."""
    return pytest.mark.parametrize(
        ("options", "kind", "text"), cases, ids=[str(case[0]) for case in cases]
    )


@refused(REFUSED + PLUGIN_REFUSED)
def test_options_that_cannot_work(options: dict[str, Any], kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        Config(**options)
    assert str(error.value) == f"GlobalQSGD: {text}"


@refused(
    [
        *REFUSED,
        (
            {"levels": "auto"},
            ValueError,
            "levels must be 'standard', 'exponential' or 'two-hop', got 'auto'; "
            "choose one of them.",
        ),
    ]
)
def test_options_of_mpi_ops_alone(options: dict[str, Any], kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        Scheme(**options)
    assert str(error.value) == f"mpi_ops.allreduce: {text}"


RULES: Any = {"*.bias": None, "embedding*": {"levels": "two-hop"}, "*": {"bits": 4}}


def test_the_first_rule_that_a_name_matches_counts() -> None:
    config = Config(bits=6, block_size=64, seed=3, rules=RULES)
    assert config.of("embedding.bias") is None
    embedding = config.of("embedding.weight")
    assert embedding == Config(levels="two-hop", seed=3)  # bits and blocks are those of its levels
    assert config.of("head.weight") == Config(bits=4, block_size=64, seed=3)
    assert Config(rules={"head": None}).of("heads") == Config(rules={"head": None})
    assert Config().of("anything") == Config()
    for own in (Config(levels="auto", rules={"a": None}) for _ in range(2)):  # equal ones
        assert own.of("b") is own
        assert not own.fixed("b")


def test_rules_are_plain_data() -> None:
    config = Config(rules=RULES)
    assert hash(config) == hash(Config(rules=RULES))
    for own in (config, Config(), Config(levels="exponential", block_size=None)):
        through_json = json.loads(json.dumps(own.describe()))
        assert through_json == own.describe()  # which a loaded state is compared with
        assert Config(**through_json) == own
    assert config != Config(rules=dict(reversed(RULES.items())))  # their order counts


@pytest.mark.parametrize(
    ("rules", "kind", "argument"),
    [
        ({"a": {"seed": 1}}, ValueError, r"rules\['a'\] must be"),
        ({"a": {"bits": 99}}, ValueError, r"in rules\['a'\] bits must be"),
        ({"a": {"bits": "8"}}, TypeError, r"in rules\['a'\] bits must be"),
        ({"a": {"levels": "auto"}}, ValueError, r"rules\['a'\]\['levels'\] must be"),
        ({1: None}, TypeError, "rules must be a dictionary"),
        ({"a": 5}, TypeError, "rules must be a dictionary"),
        (["a"], TypeError, "rules must be a dictionary"),
        (None, TypeError, "rules must be a dictionary"),
    ],
    ids=str,
)
def test_what_is_no_rule(rules: Any, kind: type, argument: str) -> None:
    with pytest.raises(kind, match=argument):
        Config(rules=rules)


def test_a_rule_beside_trials_names_its_levels() -> None:
    with pytest.raises(ValueError, match=r"in rules\['a'\] bits must be None"):
        Config(levels="auto", rules={"a": {"bits": 4}})
    own = Config(levels="auto", rules={"a": {"levels": "standard", "bits": 4}}).of("a")
    assert own == Config(levels="standard", bits=4)


def test_a_rule_has_to_suit_the_number_of_ranks() -> None:
    config = Config(rules={"a": {"levels": "standard", "bits": 4}})
    config.require_plans(4)
    with pytest.raises(ValueError, match="bits must be at least"):
        config.require_plans(64)


def test_options_are_frozen_and_comparable() -> None:
    config = Config(bits=8, block_size=512)
    assert config == Config(bits=8, block_size=512)
    assert hash(config) == hash(Config(bits=8, block_size=512))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4  # type: ignore[misc]


def test_description_has_every_option() -> None:
    config = Config(levels="exponential", bits=4, block_size=None, norm="l2", seed=-7)
    described = config.describe()
    assert Config(**described) == config
    assert set(described) == {field.name for field in dataclasses.fields(Config)}
    quantizers = {"levels", "bits", "block_size", "norm", "seed"}
    plugins = {"min_elements", "transport", "hierarchical", "timeout", "check_replicas", "rules"}
    plugins |= {"error_feedback"}
    buckets = {"bucket_bytes", "first_bucket_bytes"}
    assert set(described) == quantizers | plugins | buckets


# --------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_plans_of_standard_levels(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    for world_size in {1, 2, 3, 18, 64, 100, largest}:
        if world_size > largest:
            continue
        plan = Config(levels="standard", bits=bits).plan(world_size)
        assert (plan.levels, plan.bits, plan.world_size) == ("standard", bits, world_size)
        assert plan.level_count == largest // world_size >= 1
        assert plan.block_size == 256
    for world_size in {largest + 1, 2 * largest}:
        needed = lanes.minimum_bits(world_size)
        with pytest.raises(ValueError, match="bits must be at least") as error:
            Config(levels="standard", bits=bits).plan(world_size)
        assert str(error.value) == (
            f"GlobalQSGD: bits must be at least {needed} for standard levels on {world_size} "
            f"ranks (the sum of all codes has to fit its lane), got {bits}; "
            + (
                f"use bits={needed} or more, or leave bits out."
                if needed <= 16
                else "use levels='two-hop', whose codes are not added in their lanes."
            )
        )
        if needed <= 16:
            assert Config(levels="standard", bits=needed).plan(world_size).level_count >= 1


def test_default_plans() -> None:
    for world_size in (1, 4, 64, 1000, 100_000):
        plan = Config().plan(world_size)
        assert (plan.levels, plan.bits, plan.level_count, plan.square) == ("two-hop", 8, 127, True)
        assert (plan.block_size, plan.norm) == (256, "max")


def test_default_widths_of_standard_levels() -> None:
    for world_size, bits in [(1, 8), (2, 8), (18, 8), (19, 10), (73, 10), (74, 16), (32767, 16)]:
        plan = Config(levels="standard").plan(world_size)
        assert (plan.bits, plan.block_size, plan.norm) == (bits, 256, "max")
        assert plan.level_count * world_size <= 2 ** (bits - 1) - 1
    with pytest.raises(ValueError, match="use levels='two-hop'"):
        Config(levels="standard").plan(32768)


def test_two_hop_levels_of_many_ranks_still_add_up_in_32_bits() -> None:
    assert Config(levels="two-hop", bits=16).plan(2**16).level_count == 2**15 - 1
    text = "one whose levels of 65539 ranks add up in 32 bits, got 16; pass bits=15"
    with pytest.raises(ValueError, match=text):
        Config(levels="two-hop", bits=16).plan(65539)
    assert Config(levels="two-hop", bits=15).plan(65539).bits == 15
    widest = Config(levels="two-hop").plan(133_144)  # squares of up to 127
    assert (widest.bits, widest.square, widest.units) == (8, True, 127**2)
    assert not Config(levels="two-hop", bits=9).plan(4).square
    with pytest.raises(ValueError, match="got 8; pass bits=7"):
        Config(levels="two-hop", bits=8).plan(133_145)
    assert Config(levels="two-hop").plan(133_145).bits == 7
    assert Config(levels="two-hop").plan(10**6).bits == 6
    assert Config(levels="two-hop", bits=6).plan(10**6).units == 41**2


@pytest.mark.parametrize(
    ("bits", "width", "levels"),
    [
        *((2, 2, 1), (3, 3, 4), (4, 4, 7), (5, 5, 19), (6, 6, 41), (7, 8, 127), (8, 8, 127)),
        *((9, 10, 511), (10, 10, 511), (11, 16, 2**15 - 1), (16, 16, 2**15 - 1)),
    ],
)
def test_two_hop_levels_are_all_that_a_word_can_hold(bits: int, width: int, levels: int) -> None:
    for world_size in (1, 4, 1000):
        plan = Config(levels="two-hop", bits=bits).plan(world_size)
        assert (plan.bits, plan.level_count, plan.square) == (width, levels, width <= 8)


@pytest.mark.parametrize("world_size", [1, 7, 64, 10**6])
def test_plans_of_exponential_levels(world_size: int) -> None:
    plan = Config(levels="exponential").plan(world_size)
    assert (plan.bits, plan.level_count, plan.block_size) == (8, 0, None)
    plan = Config(levels="exponential", bits=4).plan(world_size)
    assert (plan.bits, plan.level_count, plan.block_size) == (4, 0, 256)


def test_block_sizes() -> None:
    assert Config(block_size=1024).plan(2).block_for(10) == 1024
    assert Config(levels="exponential", block_size=64).plan(2).block_for(10**6) == 64
    whole = Config(block_size=None).plan(2)
    for count in (1, 32, 33, 10**6):
        assert whole.block_for(count) == -(-count // 32) * 32
    assert whole.block_for(0) == 32


def test_settings_of_the_paper() -> None:
    for preset, levels in ((PAPER_STANDARD, "standard"), (PAPER_EXPONENTIAL, "exponential")):
        plan = preset.plan(4)
        assert (plan.levels, plan.bits, plan.block_size, plan.norm) == (levels, 8, None, "max")
        # Of all tensors of a bucket of DistributedDataParallel's sizes, biases included.
        assert plan.one_norm
        assert (preset.first_bucket_bytes, preset.bucket_bytes) == (1 << 20, 25 << 20)
        assert preset.min_elements == 0
    assert PAPER_STANDARD.plan(4).level_count == 31  # 127 / 4, rounded down


def test_one_norm_for_a_bucket() -> None:
    config = Config(levels="standard", block_size="bucket")
    assert config.plan(4).one_norm
    assert config.plan(4).block_size is None
    assert not Config(block_size=None).plan(4).one_norm
    # Results depend on the buckets, so a resumed run has to have the same.
    for name in ("bucket_bytes", "first_bucket_bytes"):
        assert name in config.describe_results()
        assert name not in Config(block_size=None).describe_results()


def test_a_state_of_another_default_limit_of_buckets() -> None:
    """With standard levels the default means the same buckets as its number did."""
    own, other = (
        Config(levels="standard", block_size="bucket", bucket_bytes=limit)
        for limit in (None, 8 << 20)
    )
    assert own.describe_results() == other.describe_results()
    exponential = Config(levels="exponential", block_size="bucket")
    assert exponential.describe_results()["bucket_bytes"] is None


@pytest.mark.parametrize(
    ("options", "ranks", "mebibytes"),
    [
        ({}, 16, 8),
        ({}, 64, 32),
        ({"levels": "exponential"}, 1024, 512),
        ({"levels": "standard"}, 1024, 8),  # Horovod fuses Allreduces
        ({"bucket_bytes": 25 << 20}, 64, 25),
        ({"bucket_bytes": 0}, 64, 0),
    ],
    ids=str,
)
def test_buckets_grow_where_ranks_have_messages_for_each_other(
    options: dict[str, Any], ranks: int, mebibytes: int
) -> None:
    config = Config(**options)
    assert config.bucket_limit(config.plan(ranks)) == mebibytes << 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(
            ({"levels": levels}, "levels must be 'standard' or 'exponential' with block_size='buck")
            for levels in ("two-hop", "auto")
        ),
        ({"norm": "l2"}, "norm must be 'max' with block_size='bucket', got 'l2'"),
    ],
)
def test_what_one_norm_for_a_bucket_does_not_go_with(
    options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"GlobalQSGD: {expected}"):
        Config(**{"levels": "standard", "block_size": "bucket", **options})
    with pytest.raises(TypeError, match=r"mpi_ops\.allreduce: block_size must be an integer"):
        Scheme(block_size="bucket")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- agreement

# A fixed alphabet: for all of Unicode Hypothesis would first compute tables for seconds.
text = st.text('ab0 "\\\0é☃\U0001f40d', max_size=8)
options = st.dictionaries(
    text,
    st.none() | st.booleans() | st.integers() | text,
    max_size=5,
)


@given(st.lists(options, max_size=5))
def test_descriptions_of_all_ranks_round_trip(descriptions: list[dict[str, Any]]) -> None:
    encoded = [encode(description) for description in descriptions]
    assert all(own.dtype == np.uint8 and own.flags.writeable for own in encoded)
    gathered = np.concatenate([np.zeros(0, dtype=np.uint8), *encoded])
    assert decode(gathered) == descriptions


@given(options, st.integers(1, 5))
def test_equal_descriptions_agree(description: dict[str, Any], ranks: int) -> None:
    require_same([dict(description) for _ in range(ranks)])


def test_the_error_names_every_field_and_rank() -> None:
    descriptions = [Config().describe() for _ in range(4)]
    descriptions[2]["bits"] = 10
    descriptions[1]["norm"] = descriptions[3]["norm"] = "l2"
    with pytest.raises(ConfigMismatchError) as error:
        require_same(descriptions)
    assert (
        "the ranks are configured differently: "
        "bits is None on ranks 0, 1, 3, 10 on rank 2; "
        "norm is 'max' on ranks 0, 2, 'l2' on ranks 1, 3. Pass the same "
    ) in str(error.value)


@given(st.integers(2, 6), st.data())
def test_one_rank_that_differs_is_named(ranks: int, data: st.DataObject) -> None:
    odd = data.draw(st.integers(0, ranks - 1))
    field = data.draw(st.sampled_from(sorted(Config().describe())))
    descriptions = [Config().describe() for _ in range(ranks)]
    descriptions[odd][field] = "another"
    with pytest.raises(ConfigMismatchError) as error:
        require_same(descriptions)
    assert f"{field} is " in str(error.value)
    assert f"'another' on rank {odd}" in str(error.value)


def test_a_field_that_only_one_rank_has() -> None:
    with pytest.raises(ConfigMismatchError, match="new is None on rank 0, 1 on rank 1"):
        require_same([{}, {"new": 1}])


class Late:
    """An operation that completes after some polls."""

    def __init__(self, polls: int) -> None:
        self.polls = polls

    def ready(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def wait(self) -> Array:
        assert self.polls < 0, "waited before it was ready"
        return np.arange(3)


def test_waiting_for_the_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_array_equal(agreement.wait(Late(3)), np.arange(3))
    monkeypatch.setattr(agreement, "TIMEOUT_SECONDS", 0.05)
    with pytest.raises(ConfigMismatchError, match="not every rank has reported its configuration"):
        agreement.wait(Late(10000))  # of a millisecond and more each


# -------------------------------------------------------------------------------------------- token

Token = tuple[float, ...]


def average(tokens: Array, before: float = 1.0, after: float = 1.0) -> list[float]:
    """What a ring of ranks makes of float64 tokens (rank, number): scale, add up, scale."""
    total = np.add.accumulate(tokens * before, axis=0)[-1]
    return (total * (after / len(tokens))).tolist()


def tokens_of(own: Token, world_size: int) -> Array:
    return np.tile(np.array(own), (world_size, 1))


def test_a_token_is_one_and_a_fingerprint() -> None:
    own = token.make("layer.weight", (50, 20), "float32")
    assert own == token.make("layer.weight", (50, 20), "float32")
    assert np.array(own).nbytes == token.BYTES == 32  # what PyTorch and TensorFlow make of it
    assert own[0] == 1.0
    assert all(number == int(number) and 1 <= number <= 251 for number in own)
    others = {
        token.make("layer.bias", (50, 20), "float32"),
        token.make("layer.weight", (20, 50), "float32"),  # as many elements
        token.make("layer.weight", (1000,), "float32"),
        token.make("layer.weight", (5, 0, 20), "float32"),
        token.make("layer.weight", (50, 20), "float16"),
        token.make("layer.weight1", (0, 20), "float32"),
        token.make("layer.weight", (50, 2), "0float32"),
    }
    assert len(others | {own}) == 8


def test_tokens_that_agree_pass_at_any_world_size_and_op() -> None:
    for world_size in range(1, 513):
        own = token.make(f"w{world_size}", (7,), "float32")
        tokens = tokens_of(own, world_size)
        token.check(average(tokens), own, "w", world_size)
        token.check(average(tokens, after=world_size), own, "w", world_size)  # op=Sum
        token.check(average(tokens, after=1e-3), own, "w", world_size)


def scaled_tokens_agree(world_sizes: range) -> None:
    for world_size in world_sizes:
        for number in (1, 2, 3, 85, 127, 250, 251):
            own = (1.0, float(number), 1.0, 251.0)
            for divisor in (3.0, 10.0, float(world_size)):
                reduced = average(tokens_of(own, world_size), 1 / divisor, divisor)
                token.check(reduced, own, "w", world_size)


def test_gradient_predivide_factor_is_no_mismatch() -> None:
    """It divides before the sum what it multiplies after it, so that nothing is exact any more."""
    scaled_tokens_agree(range(1, 513))


def test_ranks_that_joined_send_zeros() -> None:
    own = token.make("w", (7,), "float32")
    for world_size in range(2, 65):
        for joined in {1, world_size // 2, world_size - 1}:
            tokens = tokens_of(own, world_size)
            tokens[:joined] = 0
            token.check(average(tokens), own, "w", world_size)
            token.check(average(tokens, after=world_size), own, "w", world_size)


def test_any_single_rank_that_differs_is_seen_by_every_rank() -> None:
    """Even by one in one of the three numbers."""
    own = (1.0, 251.0, 100.0, 2.0)
    for world_size in range(2, 513):
        for place in (1, 2, 3):
            for change in (-1, 1):
                tokens = tokens_of(own, world_size)
                tokens[world_size // 2, place] += change
                reduced = average(tokens)
                for rank in (0, world_size // 2):
                    with pytest.raises(ConfigMismatchError):
                        token.check(reduced, tuple(tokens[rank]), "w", world_size)


@given(st.integers(2, 512), st.integers(1, 10**9), st.data())
def test_tensors_that_differ_are_seen(world_size: int, count: int, data: st.DataObject) -> None:
    own = token.make("w", (count,), "float32")
    other = data.draw(
        st.sampled_from(
            [token.make("v", (count,), "float32"), token.make("w", (count,), "float16")]
        ).filter(lambda other: other != own)
    )
    tokens = tokens_of(own, world_size)
    tokens[0] = other
    with pytest.raises(ConfigMismatchError):
        token.check(average(tokens), own, "w", world_size)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_token_that_is_no_number_is_an_error(scale: float) -> None:
    own = token.make("layer.weight", (7,), "float32")
    with pytest.raises(ConfigMismatchError) as error:
        token.check([scale, *own[1:]], own, "layer.weight", 2)
    assert str(error.value) == (
        "GlobalQSGD: the ranks disagree about tensor 'layer.weight': the reduced fingerprint is "
        f"{[scale, *own[1:]]}, this rank's is {list(own)}. Every rank has to reduce a tensor of "
        "the same name, shape and dtype, and an optimizer of the same parameters."
    )


# --------------------------------------------------------------------- the class, before hvd.init()


@pytest.fixture(scope="module")
def plugin() -> Any:
    """gq_horovod.torch, which imports torch and Horovod."""
    import gq_horovod.torch

    return gq_horovod.torch


def test_the_class_stands_for_its_default_instance(plugin: Any) -> None:
    GlobalQSGD = plugin.GlobalQSGD
    of_class = GlobalQSGD.compress.__self__
    assert isinstance(of_class, GlobalQSGD)
    assert of_class.config == Config()
    assert GlobalQSGD.decompress.__self__ is of_class
    own = GlobalQSGD(bits=10, seed=3)
    assert own.compress.__self__ is own
    assert own.decompress.__self__ is own
    assert own.config == Config(bits=10, seed=3)
    assert GlobalQSGD().compress.__self__ is not of_class


def test_a_subclass_stands_for_an_instance_of_itself(plugin: Any) -> None:
    Sub = type("Sub", (plugin.GlobalQSGD,), {})
    assert type(plugin.GlobalQSGD.compress.__self__) is plugin.GlobalQSGD
    assert type(Sub.compress.__self__) is Sub
    assert type(Sub.paper_standard) is Sub
    assert type(plugin.GlobalQSGD.paper_standard) is plugin.GlobalQSGD


def test_presets_are_shared_instances(plugin: Any) -> None:
    GlobalQSGD = plugin.GlobalQSGD
    for name, config in (
        ("paper_standard", PAPER_STANDARD),
        ("paper_exponential", PAPER_EXPONENTIAL),
    ):
        preset = getattr(GlobalQSGD, name)
        assert isinstance(preset, GlobalQSGD)
        assert preset.config == config
        assert getattr(GlobalQSGD, name) is preset
        assert getattr(GlobalQSGD(), name) is preset
        assert preset.compress.__self__ is preset
    assert GlobalQSGD.paper_standard is not GlobalQSGD.paper_exponential


def test_repr_can_be_pasted(plugin: Any) -> None:
    GlobalQSGD = plugin.GlobalQSGD
    own = GlobalQSGD(levels="exponential", bits=4, block_size=None, min_elements=0)
    assert repr(own).startswith("GlobalQSGD(levels='exponential', bits=4, block_size=None")
    assert eval(repr(own), {"GlobalQSGD": GlobalQSGD}).config == own.config


def test_the_constructor_refuses_what_config_refuses(plugin: Any) -> None:
    GlobalQSGD = plugin.GlobalQSGD
    for options, kind, text in REFUSED + PLUGIN_REFUSED:
        with pytest.raises(kind) as error:
            GlobalQSGD(**options)
        assert str(error.value) == f"GlobalQSGD: {text}"
    with pytest.raises(TypeError, match=r"process_set must be a .*ProcessSet or None, got 3"):
        GlobalQSGD(process_set=3)
    with pytest.raises(TypeError):
        GlobalQSGD("exponential")


def test_a_transport_that_the_framework_does_not_have(plugin: Any) -> None:
    Sub = type("Sub", (plugin.GlobalQSGD,), {"TRANSPORTS": ("horovod",)})
    with pytest.raises(ValueError, match=r"GlobalQSGD: transport") as error:
        Sub(transport="mpi")
    assert str(error.value) == (
        "GlobalQSGD: transport must be 'horovod' with horovod.torch, got 'mpi'; leave it out."
    )


def test_the_signature_shows_the_options(plugin: Any) -> None:
    shown = set(inspect.signature(plugin.GlobalQSGD).parameters)
    assert shown == {*(field.name for field in dataclasses.fields(Config)), "process_set", "stats"}


def test_compress_has_to_be_called_by_horovod(plugin: Any) -> None:
    with pytest.raises(RuntimeError, match=r"called by Horovod.* use gq_horovod.torch.allreduce"):
        plugin.GlobalQSGD.compress(plugin.torch.ones(5000))


def test_decompress_returns_what_was_left_to_horovod(plugin: Any) -> None:
    tensor = plugin.torch.ones(5)
    assert plugin.GlobalQSGD.decompress(tensor, None) is tensor
    handed, left = plugin.GlobalQSGD()._left_to_horovod(tensor.bfloat16(), "w")
    assert handed.dtype == plugin.torch.float32
    assert plugin.GlobalQSGD.decompress(handed, left).dtype == plugin.torch.bfloat16
