"""Import foreign weights, in NNX: a model without arrays is filled from a nested dictionary."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.ergonomics import demonstrate
from bench.mistakes import mistake
from bench.recipes import CONFIG, Batches
from bench.recipes.foreign import checkpoint
from nnx_impl import DecoderOnlyTransformer, from_weights, to_weights


def renamed(foreign: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Kernels are (in, out) here, and queries, keys and values have one each."""
    of = lambda name: {"bias": foreign[f"{name}.bias"], "kernel": foreign[f"{name}.weight"].T}
    norm = lambda name: {"bias": foreign[f"{name}.bias"], "scale": foreign[f"{name}.weight"]}
    q, k, v = np.split(foreign["h.0.attn.qkv.weight"], 3)
    projections = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": foreign["h.0.attn.out.weight"]}
    block = {
        "attention": {name: {"kernel": kernel.T} for name, kernel in projections.items()},
        "attention_norm": norm("h.0.ln_1"),
        "feed_forward": {"up_proj": of("h.0.mlp.up"), "down_proj": of("h.0.mlp.down")},
        "feed_forward_norm": norm("h.0.ln_2"),
    }
    decoder = {"blocks": {0: block}, "norm": norm("ln_f")}
    return {"decoder": decoder, "embedding": {"embedding": foreign["wte.weight"]}}


def filled(weights: dict[str, Any]):
    model = nnx.eval_shape(lambda: DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, weights))
    nnx.update(model, state)
    return model


def recipe(batches: Batches, *, renamed: Callable[..., Any] = renamed, filled: Callable[[Any], Any] = filled):
    """The imported model gives the bits of the one that was exported."""
    origin = DecoderOnlyTransformer(CONFIG, rngs=nnx.Rngs(5))
    model = filled(renamed(checkpoint(to_weights(origin))))
    tokens = next(batches).inputs
    logits = model(tokens)

    assert np.array_equal(logits, origin(tokens)), "another output than before the export"
    return logits[0, 0]


@mistake()
def square_kernels_are_not_transposed(batches: Batches):
    """Of attention's projections, (D, D) each, no shape tells that they are (out, in)."""

    def straight(foreign):
        weights = renamed(foreign)
        for projection in weights["decoder"]["blocks"][0]["attention"].values():
            projection["kernel"] = projection["kernel"].T
        return weights

    recipe(batches, renamed=straight)


@mistake()
def a_kernel_is_not_transposed(batches: Batches):
    """(F, D) where (D, F) belongs."""

    def straight(foreign):
        weights = renamed(foreign)
        up = weights["decoder"]["blocks"][0]["feed_forward"]["up_proj"]
        up["kernel"] = up["kernel"].T
        return weights

    recipe(batches, renamed=straight)


@mistake()
def one_array_is_forgotten(batches: Batches):
    """The last norm is not in the dictionary."""

    def short(foreign):
        weights = renamed(foreign)
        del weights["decoder"]["norm"]
        return weights

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
        del weights["decoder"]["norm"]
        flat = {".".join(map(str, path)): array for path, array in nnx.to_flat_state(nnx.State(weights))}
        return from_weights(CONFIG, flat, model_class=DecoderOnlyTransformer)

    recipe(batches, filled=checked)


if __name__ == "__main__":
    demonstrate(__file__)
