"""What the laws draw is complete: every field of the configuration takes every kind of value somewhere."""

import dataclasses
from typing import get_args, get_type_hints

import jax
from hypothesis import HealthCheck, Phase, given, settings

from core.config import TransformerConfig
from tests.strategies import configs
from tests.test_reference import oracle_configs

FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
# what no strategy draws, and which tests go through its values
ELSEWHERE = {
    "attention_implementation": "test_blockwise.py and test_agreement.py name it",
    "max_length": "the learned table's end: test_positions.py, test_reference.py",
    "source_features": "test_classifier.py",
    "source_vocab_size": "sizes of the two sides differ in every draw",
    "target_vocab_size": "sizes of the two sides differ in every draw",
    "rotary_factor": "test_rotary.py draws it; here 4, which no scaling takes for 1",
    "history_length": "test_agreement.py and test_reference.py set it where positions allow it",
}


def drawn(strategy):
    """The values of each field in many draws."""
    found = {name: set() for name in FIELDS}

    @given(strategy)
    @settings(max_examples=150, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True)
    def draw(config):
        for name in FIELDS:
            found[name].add(getattr(config, name))

    draw()
    return found


def test_every_field_of_the_configuration_is_drawn_or_said_to_be_drawn_elsewhere():
    with jax.enable_x64(True):
        wide = drawn(oracle_configs())
    found = {name: values | wide[name] for name, values in drawn(configs()).items()}
    fixed = {name for name, values in found.items() if len(values) == 1}
    assert fixed - {"source_vocab_size"} == ELSEWHERE.keys() & FIELDS - {"source_vocab_size"}
    hints = get_type_hints(TransformerConfig)
    for name, values in found.items():
        choices = set(get_args(hints[name])) if all(isinstance(c, str) for c in get_args(hints[name])) else set()
        assert values >= choices - {"float16"}, name  # float16: test_attention_oracle.py and test_layers.py
        if hints[name] is bool and name not in ELSEWHERE:
            assert values == {False, True}, name
