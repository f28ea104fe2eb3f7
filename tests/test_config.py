"""Laws of the configuration: it is valid or it is not there."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from core.config import TransformerConfig, check_window
from tests.strategies import configs

nan, inf = float("nan"), float("inf")

BAD = [
    *[({name: value}, f"{name} must be at least 1 and finite, got {value}")
      for name in ("d_model", "num_heads", "d_ff", "max_length", "source_vocab_size", "target_vocab_size",
                   "source_features", "num_kv_heads", "value_dim", "relative_distance", "rotary_original_length")
      for value in (0, -2)],
    *[({name: -1}, f"{name} must be at least 0 and finite, got -1")
      for name in ("num_encoder_layers", "num_decoder_layers", "history_length")],
    *[({name: value}, f"{name} must be at least 0 and below 1, got {value}")
      for name in ("dropout_rate", "attention_dropout_rate", "embedding_dropout_rate", "stochastic_depth_rate")
      for value in (1.0, 1, 1.5, -0.1, nan, inf)],
    *[({name: value}, f"{name} must be above 0 and finite, got {value}")
      for name in ("norm_epsilon", "rotary_theta", "attention_scale", "attention_soft_cap")
      for value in (0.0, -1.0, nan, inf)],
    *[({"rotary_factor": value}, f"rotary_factor must be at least 1 and finite, got {value}")
      for value in (0.5, 0, -1.0, nan, inf)],
    *[({name: value}, f"{name} must be int, got {value!r}")
      for name in ("d_model", "num_heads", "d_ff", "max_length", "num_encoder_layers", "num_decoder_layers",
                   "relative_distance", "relative_buckets", "rotary_original_length", "history_length")
      for value in (8.0, "8", None, True)],
    *[({name: value}, f"{name} must be int or None, got {value!r}")
      for name in ("source_vocab_size", "target_vocab_size", "source_features", "num_kv_heads", "value_dim",
                   "rotary_dim")
      for value in (8.0, "8", False)],
    *[({name: value}, f"{name} must be float or int, got {value!r}")
      for name in ("dropout_rate", "attention_dropout_rate", "norm_epsilon", "rotary_theta", "rotary_factor",
                   "stochastic_depth_rate")
      for value in ("0.1", None, False)],
    *[({name: value}, f"{name} must be float or None or int, got {value!r}")
      for name in ("attention_scale", "attention_soft_cap", "embedding_dropout_rate") for value in ("0.1", True)],
    *[({"attention_window": value}, f"attention_window must be tuple or None, got {re.escape(repr(value))}")
      for value in (3, "3", 1.5, True)],
    *[({"attention_window": value}, rf"a window must be \(left, right\), .*got {re.escape(repr(value))}; a causal")
      for value in ((1,), (1, 2, 3), (1, -1), (1.0, 2), (True, 2))],
    *[({name: value}, f"{name} must be bool, got {value!r}")
      for name in ("attention_bias", "feed_forward_bias", "attention_sinks", "qk_norm", "parallel_residual",
                   "scale_embeddings", "remat", "scan_layers")
      for value in (1, 0, None, "yes")],
    *[({name: value}, f"{name} must be one of .*, got {value!r}")
      for name in ("activation", "norm", "norm_order", "positions", "tie_embeddings", "dtype", "param_dtype",
                   "rotary_layout", "rotary_scaling", "remat_keeps")
      for value in ("other", None, 1, True)],
    *[({"attention_implementation": value}, f"attention_implementation must be one of .*, got {value!r}")
      for value in ("other", 1, True)],
    ({"d_model": 10, "num_heads": 4}, "d_model must be a multiple of num_heads, got d_model=10, num_heads=4"),
    ({"num_heads": 8, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got num_heads=8"),
    ({"num_heads": 8, "num_kv_heads": 16}, "num_heads must be a multiple of num_kv_heads.*num_kv_heads=16"),
    ({"d_model": 20, "num_heads": 4, "positions": "rotary"}, "turn an even number.*or else d_model / num_heads, got 5"),
    ({"rotary_dim": 3, "positions": "rotary"}, "turn an even number of features, rotary_dim or else .*, got 3"),
    *[({"rotary_dim": value, "positions": "rotary"}, rf"rotary_dim must lie in \[2, head width 64\], got {value}")
      for value in (0, -2, 66)],
    *[({"rotary_theta": value, "rotary_scaling": "yarn", "positions": "rotary"},
       f"the rotary_theta of YaRN must be above 1 and finite, got {value}") for value in (1.0, 0.5, 1)],
    *[({"relative_buckets": value, "positions": "t5"}, f"relative_buckets must be even and at least 4, got {value}")
      for value in (2, 0, -4, 7)],
    *[({"relative_buckets": 8, "relative_distance": value, "positions": "t5"},
       f"relative_distance must be above half of relative_buckets, got relative_distance={value}, relative_buckets=8")
      for value in (4, 1)],
    ({"parallel_residual": True}, "parallel_residual has no place for norm_order='post'; use 'pre' or 'sandwich'"),
    *[({"history_length": 4, "positions": value},
       f"history_length needs positions that go by distance, .*got positions='{value}'; use 'transformer_xl'")
      for value in ("sinusoidal", "learned")],
    ({"source_vocab_size": 8, "target_vocab_size": 9, "tie_embeddings": "all"}, "one joint.*=8.*=9; use 'target' or"),
    ({"dtype": "float64"}, "float64 needs .*jax_enable_x64"),
    ({"param_dtype": "float64"}, "float64 needs .*jax_enable_x64"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda case: None if isinstance(case, str) else str(case))
def test_an_invalid_field_is_named_with_what_came(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)


def test_every_field_has_an_invalid_value_in_these_laws():
    named = {name for fields, _ in BAD for name in fields}
    assert named == {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize(("fields", "message"), BAD[::7], ids=lambda case: None if isinstance(case, str) else str(case))
def test_replace_and_json_validate_like_the_constructor(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        TransformerConfig().replace(**fields)
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_json(json.dumps(fields))


def test_the_defaults_are_the_base_model_of_2017():
    config = TransformerConfig()
    assert (config.d_model, config.num_heads, config.d_ff, config.dropout_rate) == (512, 8, 2048, 0.1)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (6, 6)
    assert (config.activation, config.norm, config.norm_order) == ("relu", "layer_norm", "post")
    assert (config.positions, config.scale_embeddings, config.parallel_residual) == ("sinusoidal", True, False)
    assert (config.attention_bias, config.feed_forward_bias, config.norm_epsilon) == (False, True, 1e-6)
    assert (config.embedding_scale, config.max_length) == (512**0.5, 1024)


def test_what_was_invented_later_is_off_unless_asked_for():
    config = TransformerConfig()
    assert config.attention_scale is config.attention_soft_cap is config.attention_window is config.rotary_dim is None
    assert config.source_features is None
    assert not any((config.attention_sinks, config.qk_norm, config.history_length, config.stochastic_depth_rate))
    assert not any((config.remat, config.scan_layers))
    assert (config.rotary_layout, config.rotary_scaling, config.rotary_factor) == ("half", "none", 1.0)
    assert (config.relative_distance, config.relative_buckets) == (128, 32)  # T5's
    assert (config.rotary_theta, config.rotary_original_length) == (10_000.0, 2048)


@pytest.mark.parametrize(
    "fields",
    [
        {"source_features": 1},
        {"positions": "t5", "relative_buckets": 4, "relative_distance": 3},
        {"positions": "shaw", "relative_buckets": 1, "relative_distance": 1},
        {"positions": "rotary", "rotary_dim": 2, "rotary_factor": 1},
        {"positions": "rotary", "rotary_dim": 64},
        {"positions": "rotary", "rotary_scaling": "yarn", "rotary_theta": 1.001},
        {"positions": "rotary", "rotary_scaling": "ntk", "rotary_theta": 1.0},
        {"positions": "sinusoidal", "rotary_scaling": "yarn", "rotary_theta": 1.0},
        {"positions": "sinusoidal", "rotary_dim": 3},
        {"attention_window": (0, 0)},
        {"parallel_residual": True, "norm_order": "pre"},
        {"parallel_residual": True, "norm_order": "sandwich"},
        {"history_length": 1, "positions": "none"},
        {"embedding_dropout_rate": 0, "stochastic_depth_rate": 0},
        {"attention_scale": 1, "attention_soft_cap": 5e-324},
    ],
    ids=str,
)
def test_the_last_valid_value_is_valid(fields):
    config = TransformerConfig(**fields)
    assert TransformerConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "given", [jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros(1, "bfloat16").dtype, "bfloat16"], ids=repr
)
def test_a_dtype_may_come_as_jax_writes_it_and_is_kept_by_name(given):
    config = TransformerConfig(dtype=given, param_dtype=given)
    named = TransformerConfig(dtype="bfloat16", param_dtype="bfloat16")
    assert type(config.dtype) is type(config.param_dtype) is str
    assert (config, hash(config), config.to_json()) == (named, hash(named), named.to_json())
    assert TransformerConfig().replace(dtype=given).dtype == "bfloat16"


@pytest.mark.parametrize("given", [jnp.int32, jnp.float8_e4m3fn, np.dtype(complex), bool, "bf16"], ids=repr)
def test_a_dtype_that_no_model_computes_in_is_refused(given):
    with pytest.raises(ValueError, match=r"^dtype must be one of \('float32', 'bfloat16', .*, got "):
        TransformerConfig(dtype=given)


def test_fields_are_given_by_name():
    with pytest.raises(TypeError, match="positional argument"):
        TransformerConfig(8, 9)


@pytest.mark.parametrize("window", [[1, 2], np.array([1, 2]), "12"])
def test_a_window_is_a_tuple(window, untyped):
    with pytest.raises(ValueError, match=r"a window must be \(left, right\)"):
        check_window(window)


@pytest.mark.parametrize("sizes", [(7, None), (None, 7), (7, 7)])
def test_one_joint_vocabulary_may_be_named_on_one_side(sizes):
    config = TransformerConfig(source_vocab_size=sizes[0], target_vocab_size=sizes[1], tie_embeddings="all")
    assert (config.source_vocab_size, config.target_vocab_size) == sizes


def test_stochastic_depth_grows_evenly_to_its_rate_at_the_last_layer():
    config = TransformerConfig(stochastic_depth_rate=0.5)
    assert [config.depth_rate(layer, 4) for layer in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_derived_numbers_follow_their_fields():
    config = TransformerConfig(d_model=8, num_heads=2, dropout_rate=0.3)
    assert (config.rotary_width, config.stack_dropout_rate, config.embedding_scale) == (4, 0.3, 8**0.5)
    assert (config.value_width, config.replace(value_dim=3).value_width) == (4, 3)
    config = config.replace(rotary_dim=2, embedding_dropout_rate=0.0, scale_embeddings=False)
    assert (config.rotary_width, config.stack_dropout_rate, config.embedding_scale) == (2, 0.0, 1.0)


def test_a_configuration_shows_what_differs_from_the_defaults():
    assert repr(TransformerConfig()) == "TransformerConfig()"
    assert repr(TransformerConfig(num_heads=8, positions="t5", attention_window=(2, 0))) == (
        "TransformerConfig(attention_window=(2, 0), positions='t5')"
    )


@given(configs())
def test_the_text_of_a_configuration_makes_it_again(config):
    assert eval(repr(config), {"TransformerConfig": TransformerConfig}) == config


def test_a_window_is_a_tuple_again_after_json():
    config = TransformerConfig.from_json('{"attention_window": [3, 0]}')
    assert config.attention_window == (3, 0)
    assert hash(config) == hash(TransformerConfig(attention_window=(3, 0)))


@given(configs())
def test_json_gives_back_the_same_configuration(config):
    back = TransformerConfig.from_json(config.to_json())
    assert back == config
    assert hash(back) == hash(config)
    assert '{\n  "source_vocab_size"' in config.to_json()  # to be read
    assert set(json.loads(config.to_json())) == {field.name for field in dataclasses.fields(config)}


@given(configs())
def test_replace_changes_what_it_names_alone(config):
    changed = config.replace(max_length=config.max_length + 1)
    assert changed != config
    assert changed.replace(max_length=config.max_length) == config
    assert config.replace() == config


@given(configs())
def test_heads_divide_the_width_and_share_keys(config):
    assert config.head_dim * config.num_heads == config.d_model
    assert config.kv_heads == (config.num_kv_heads or config.num_heads)
    assert config.num_heads % config.kv_heads == 0


@pytest.mark.parametrize("dtype", ["dtype", "param_dtype"])
def test_float64_is_there_with_x64(dtype, x64):
    assert getattr(TransformerConfig(**{dtype: "float64"}), dtype) == "float64"


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().d_model = 8


def test_unknown_fields_are_listed_beside_the_known(untyped):
    message = r"unknown configuration fields \['heads', 'width'\]; known are \['activation', .*'value_dim'\]"
    with pytest.raises(ValueError, match=message):
        TransformerConfig().replace(width=8, heads=2, d_model=8)
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_json('{"width": 8, "heads": 2, "d_model": 8}')


@pytest.mark.parametrize("text", ["[]", "3", "null", '"d_model"'])
def test_a_configuration_is_one_json_object(text):
    with pytest.raises(ValueError, match="a configuration is one JSON object, got"):
        TransformerConfig.from_json(text)


def test_broken_json_is_a_value_error():
    with pytest.raises(ValueError, match="Expecting"):
        TransformerConfig.from_json('{"d_model": 8')


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_vocabulary_that_is_not_there_is_named(side):
    other = "target" if side == "source" else "source"
    config = TransformerConfig(**{f"{other}_vocab_size": 7})
    assert config.vocab_size(other) == 7
    with pytest.raises(ValueError, match=f"this model needs {side}_vocab_size, got None; give it in the configuration"):
        config.vocab_size(side)


@pytest.mark.parametrize("width", [1, 7])
def test_the_width_of_source_vectors_is_named_where_it_is_not_there(width):
    assert TransformerConfig(source_features=width).source_width == width
    with pytest.raises(ValueError, match="this model needs source_features, got None; give it in the configuration"):
        _ = TransformerConfig(source_vocab_size=width, target_vocab_size=width).source_width


def test_numpy_numbers_are_refused_by_name(untyped):
    with pytest.raises(ValueError, match=r"d_model must be int, got np\.int64"):
        TransformerConfig(d_model=np.int64(8))
