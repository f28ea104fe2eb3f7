"""Import foreign weights, in Equinox: a model without arrays is filled, leaf by leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from bench.recipes.foreign import checkpoint
from equinox_impl import DecoderOnlyTransformer, from_weights, to_weights


def renamed(foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the dotted path of each leaf. Kernels are (in, out) here, and queries, keys and values have one each."""
    q, k, v = np.split(foreign["h.0.attn.qkv.weight"], 3)
    block = {
        "attention.q_proj.kernel": q.T,
        "attention.k_proj.kernel": k.T,
        "attention.v_proj.kernel": v.T,
        "attention.o_proj.kernel": foreign["h.0.attn.out.weight"].T,
        "attention_norm.bias": foreign["h.0.ln_1.bias"],
        "attention_norm.scale": foreign["h.0.ln_1.weight"],
        "feed_forward.up_proj.bias": foreign["h.0.mlp.up.bias"],
        "feed_forward.up_proj.kernel": foreign["h.0.mlp.up.weight"].T,
        "feed_forward.down_proj.bias": foreign["h.0.mlp.down.bias"],
        "feed_forward.down_proj.kernel": foreign["h.0.mlp.down.weight"].T,
        "feed_forward_norm.bias": foreign["h.0.ln_2.bias"],
        "feed_forward_norm.scale": foreign["h.0.ln_2.weight"],
    }
    return {f"decoder.blocks.0.{name}": array for name, array in block.items()} | {
        "decoder.norm.bias": foreign["ln_f.bias"],
        "decoder.norm.scale": foreign["ln_f.weight"],
        "embedding.embedding": foreign["wte.weight"],
    }


def filled(weights: Mapping[str, np.ndarray]):
    model = eqx.filter_eval_shape(DecoderOnlyTransformer, CONFIG, key=jax.random.key(0))
    leaf = lambda path, old: jnp.asarray(weights[dotted(path)]) if dotted(path) in weights else old
    return jax.tree_util.tree_map_with_path(leaf, model)


def dotted(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def recipe(batches: Batches, *, renamed: Callable[..., Any] = renamed, filled: Callable[[Any], Any] = filled):
    """The imported model gives the bits of the one that was exported."""
    origin = DecoderOnlyTransformer(CONFIG, key=jax.random.key(5))
    model = filled(renamed(checkpoint(to_weights(origin))))
    tokens = next(batches).inputs
    logits = model(tokens)

    assert np.array_equal(logits, origin(tokens)), "another output than before the export"
    return logits[0, 0]


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """`renamed`, but for those arrays that end so."""
    return lambda foreign: {
        key: change(array) if key.endswith(name) else array for key, array in renamed(foreign).items()
    }


@mistake()
def square_kernels_are_not_transposed(batches: Batches):
    """Of attention's projections, (D, D) each, no shape tells that they are (out, in)."""
    recipe(batches, renamed=changed("_proj.kernel", lambda kernel: kernel.T if kernel.shape == (8, 8) else kernel))


@mistake()
def a_kernel_is_not_transposed(batches: Batches):
    """(F, D) where (D, F) belongs."""
    recipe(batches, renamed=changed("up_proj.kernel", np.transpose))


@mistake()
def one_array_is_forgotten(batches: Batches):
    """The last norm is not in the dictionary."""
    short = lambda foreign: {name: x for name, x in renamed(foreign).items() if not name.startswith("decoder.norm")}
    recipe(batches, renamed=short)


@mistake()
def queries_keys_and_values_are_in_another_order(batches: Batches):
    """The fused kernel is taken to be keys, queries, values."""

    def swapped(foreign):
        q, k, v = np.split(foreign["h.0.attn.qkv.weight"], 3)
        return renamed({**foreign, "h.0.attn.qkv.weight": np.concatenate([k, q, v])})

    recipe(batches, renamed=swapped)


@mistake()
def one_array_is_forgotten_and_from_weights_asked(batches: Batches):
    """The last norm is not among the names given to `from_weights`."""

    def checked(weights):
        short = {name: x for name, x in weights.items() if not name.startswith("decoder.norm")}
        return from_weights(CONFIG, short, model_class=DecoderOnlyTransformer)

    recipe(batches, filled=checked)


if __name__ == "__main__":
    demonstrate(__file__)
