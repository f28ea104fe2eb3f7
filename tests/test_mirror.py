"""The two frontends have the same files, classes, methods, arguments, names and shapes."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings

import equinox_impl
import nnx_impl
from tests.conftest import ROOT
from tests.strategies import configs

FILES = sorted(path.stem for path in (ROOT / "nnx_impl").glob("*.py"))
# what only one of the frameworks has, and what stands for it in the other
KEYWORDS = {"rngs": "key", "deterministic": "inference", "optimizer": "opt_state"}
ONE_SIDED = {
    "axes",
    "dropout",
    "tx",
}  # NNX parameters name their axes, its streams rest in evaluation, its optimizer has tx
NNX_ONLY_NAMES = {"Part", "Rngs", "call_key", "sharded", "stream_key", "Dropout.set_view", "train_step.update"}
# in Equinox every layer takes a key, so that layers can be put in a row whatever they are
KEYLESS = ("Linear", "LayerNorm", "RMSNorm", "Embedding", "Unembedding", "PositionEmbedding", "FeedForward")


def test_both_have_the_same_files():
    assert sorted(path.stem for path in (ROOT / "equinox_impl").glob("*.py")) == FILES


@pytest.mark.parametrize("file", FILES)
def test_both_define_the_same_classes_methods_and_functions(file):
    first, second = (definitions(package, file) for package in ("nnx_impl", "equinox_impl"))
    assert first - NNX_ONLY_NAMES == second


@pytest.mark.parametrize("file", FILES)
def test_both_import_the_same_of_core(file):
    first, second = (core_imports(ROOT / package / f"{file}.py") for package in ("nnx_impl", "equinox_impl"))
    assert first ^ second <= {
        "core.layers.site_keys",  # an NNX stream forks where an Equinox key is split by the same rule
        "core.weights.dotted",
    }


def test_both_take_the_same_arguments():
    for name in nnx_impl.__all__:
        first, second = getattr(nnx_impl, name), getattr(equinox_impl, name)
        if first is second:
            continue
        pairs = [(first, second)]
        if inspect.isclass(first):
            pairs = [
                (getattr(first, method), getattr(second, method))
                for method, function in vars(first).items()
                if inspect.isfunction(function) and f"{name}.{method}" not in NNX_ONLY_NAMES
            ]
        for a, b in pairs:
            optional_key = ["key"] if name in KEYLESS and a.__name__ == "__call__" else []
            expected = [(KEYWORDS.get(argument, argument), how) for argument, how in arguments(a).items()]
            expected += [(argument, (inspect.Parameter.KEYWORD_ONLY, None)) for argument in optional_key]
            found = list(arguments(b).items())
            assert [x for x in expected if x[0] not in ONE_SIDED] == [x for x in found if x[0] not in ONE_SIDED], name


@given(config=configs())
@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
def test_both_have_the_same_names_shapes_and_leaf_order(config):
    for name in ("Transformer", "EncoderOnlyTransformer", "DecoderOnlyTransformer", "Classifier"):
        first, second = (shapes(package, name, config) for package in (nnx_impl, equinox_impl))
        assert first == second
        assert [key for key, *_ in first] == sorted((key for key, *_ in first), key=natural)


def test_array_fields_of_equinox_modules_are_in_alphabetical_order():
    for name in equinox_impl.__all__:
        cls = getattr(equinox_impl, name)
        if inspect.isclass(cls) and issubclass(cls, eqx.Module):
            fields = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
            assert fields == sorted(fields), f"{name}: leaves would flatten in another order than in NNX"


def test_the_parameter_count_is_the_papers():
    config = nnx_impl.TransformerConfig(source_vocab_size=37_000, target_vocab_size=37_000, tie_embeddings="all")
    weights = jax.eval_shape(lambda: nnx_impl.to_weights(nnx_impl.init_transformer(config, seed=0)))
    assert sum(array.size for array in weights.values()) == 37_000 * 512 + 6 * (
        3 * (4 * 512 * 512) + 2 * (2 * 512 * 2048 + 2048 + 512) + 5 * (2 * 512)
    )  # 63 million: the base model of the paper's table 3, which says 65


@given(configs())
@settings(max_examples=8)
def test_the_parameter_count_is_that_of_a_sum_on_paper(config):
    """Of the encoder-decoder under every option."""
    weights = jax.eval_shape(lambda: nnx_impl.to_weights(nnx_impl.init_transformer(config, seed=0)))
    D, N, K, F = config.d_model, config.num_heads, config.kv_heads, config.d_ff
    H, Hv, rows = config.head_dim, config.value_width, 2 * config.relative_distance + 1
    norm = lambda width: width * (1 if config.norm == "rms_norm" else 2)
    linear = lambda i, o, bias: i * o + (o if bias else 0)
    attention = sum(linear(D, o, config.attention_bias) for o in (N * H, K * H, K * Hv))
    attention += linear(N * Hv, D, config.attention_bias)
    attention += 2 * norm(H) * config.qk_norm + N * config.attention_sinks
    distances = {"shaw": rows * (H + Hv), "transformer_xl": 2 * N * H + D * D}.get(config.positions, 0)
    ups = 2 if config.activation in ("glu", "geglu", "swiglu", "reglu") else 1
    feed_forward = ups * linear(D, F, config.feed_forward_bias) + linear(F, D, config.feed_forward_bias)
    norms = norm(D) * (2 if config.norm_order == "sandwich" else 1)
    encoder = config.num_encoder_layers * (attention + distances + feed_forward + 2 * norms)
    decoder = config.num_decoder_layers * (2 * attention + distances + feed_forward + 3 * norms)
    stack = {"t5": config.relative_buckets * N, "learned": config.max_length * D}.get(config.positions, 0)
    stack += 0 if config.norm_order == "post" else norm(D)
    tables = {"none": (1, 2), "target": (1, 1), "all": (0, 1)}[config.tie_embeddings]
    vocabularies = tables[0] * config.vocab_size("source") + tables[1] * config.vocab_size("target")
    assert sum(array.size for array in weights.values()) == encoder + decoder + 2 * stack + vocabularies * D


def definitions(package: str, file: str) -> set[str]:
    module = importlib.import_module(f"{package}.{file}".removesuffix(".__init__"))
    names = set()
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        names.add(name)
        if inspect.isclass(value):
            methods = {m for m, f in vars(value).items() if inspect.isfunction(f) and not m.startswith("_")}
            names |= {f"{name}.{method}" for method in methods}
    return names


def core_imports(path: Path) -> set[str]:
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("core")
        for alias in node.names
    } - {"core.config.Activation", "core.config.NormOrder", "core.config.Positions"}


def arguments(function) -> dict[str, tuple[object, object]]:
    return {
        name: (p.kind, getattr(p.default, "__name__", p.default))
        for name, p in inspect.signature(function).parameters.items()
    }


def shapes(package, name: str, config) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    model_class, order = getattr(package, name), []

    def weights():
        made = model_class(config, **({"rngs": nnx.Rngs(0)} if package is nnx_impl else {"key": jax.random.key(0)}))
        found = package.to_weights(made)
        order.extend(found)
        return found

    found = jax.eval_shape(weights)
    return [(key, found[key].shape, found[key].dtype) for key in order]


def natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
