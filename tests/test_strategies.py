"""What the laws draw is complete: every field of the configuration takes every kind of value somewhere."""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
from hypothesis import HealthCheck, Phase, given, settings
from jax.typing import DTypeLike

from core.config import TransformerConfig
from tests.strategies import CHOICES, COVERING_ROWS, TOGETHER, choices, configs
from tests.test_reference import oracle_configs

FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
# what no strategy draws, and which tests go through its values
ELSEWHERE = {
    "attention_implementation": "the covering rows, test_blockwise.py",
    "max_length": "the learned table's end: test_positions.py, test_reference.py",
    "source_features": "test_classifier.py",
    "source_vocab_size": "sizes of the two sides differ in every draw",
    "target_vocab_size": "sizes of the two sides differ in every draw",
    "rotary_factor": "test_rotary.py draws it; here 4, which no scaling takes for 1",
    "history_length": "test_agreement.py and test_reference.py set it where positions allow it",
}


@functools.cache
def drawn(strategy):
    """Many draws."""
    found = []

    @given(strategy())
    @settings(max_examples=150, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True)
    def draw(config):
        found.append(config)

    draw()
    return found


def test_every_field_of_the_configuration_is_drawn_or_said_to_be_drawn_elsewhere():
    with jax.enable_x64(True):
        draws = drawn(configs) + drawn(oracle_configs)
    found = {name: {getattr(config, name) for config in draws} for name in FIELDS}
    fixed = {name for name, values in found.items() if len(values) == 1}
    assert fixed - {"source_vocab_size"} == ELSEWHERE.keys() & FIELDS - {"source_vocab_size"}
    for name in FIELDS - ELSEWHERE.keys():
        # float16: the covering rows, test_attention_oracle.py and test_layers.py
        assert found[name] >= set(CHOICES[name]) - {"float16"}, name


def test_most_configurations_have_blocks_on_both_sides():
    layers = [(config.num_encoder_layers, config.num_decoder_layers) for config in drawn(configs)]
    assert sum(map(all, layers)) > len(layers) / 2
    assert [set(side) for side in zip(*layers, strict=True)] == [{0, 1, 2}] * 2


def test_choices_are_what_an_annotation_names():
    assert choices(int) == choices(tuple[int, int]) == []
    assert choices(Literal["a", None]) == ["a", None]
    assert choices(bool | tuple[int, int] | None) == [False, True, None]
    assert choices(Literal["a", "b"] | DTypeLike) == ["a", "b"]


BESIDE = {  # where fields mean something
    "max_length": {"positions": {"learned"}},
    "rotary_scaling": {"positions": {"rotary"}},
    "rotary_factor": {"positions": {"rotary"}},
    "rotary_layout": {"positions": {"rotary"}},
    "rotary_dim": {"positions": {"rotary"}},
    "rotary_theta": {"positions": {"rotary"}},
    "rotary_original_length": {"rotary_scaling": {"yarn", "llama3"}},
    "relative_distance": {"positions": {"shaw", "t5"}},
    "relative_buckets": {"positions": {"t5"}},
    "remat_keeps": {"remat": {True}},
}
ONE_VALUE = {"max_length", "relative_buckets", "target_vocab_size"}  # in the rows


def test_the_covering_rows_take_every_value_of_every_option_where_it_means_something():
    for field in dataclasses.fields(TransformerConfig):
        beside = BESIDE.get(field.name, {})
        rows = [row for row in COVERING_ROWS if all(row.get(name) in values for name, values in beside.items())]
        found = {row.get(field.name, field.default) for row in rows}
        assert found >= set(CHOICES[field.name]) - ({None} if field.name.endswith("vocab_size") else set()), field.name
        assert len(found) > (field.name not in ONE_VALUE), f"{field.name} takes no other value: give it to NUMBERS"
    assert all(row["num_encoder_layers"] and row["num_decoder_layers"] for row in COVERING_ROWS)


def test_any_two_values_of_small_options_meet_in_a_covering_row():
    single = COVERING_ROWS[0].keys() - {name for option in TOGETHER for value in option for name in value}
    values = {name: {row[name] for row in COVERING_ROWS} for name in single}
    for a, b in itertools.combinations(sorted(single), 2):
        if len(values[a]) * len(values[b]) <= 6:
            assert len({(row[a], row[b]) for row in COVERING_ROWS}) == len(values[a]) * len(values[b]), (a, b)
