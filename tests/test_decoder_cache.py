"""The state machine of caches, for the decoders of both frontends: beams that share slots, and rows that own theirs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.adapters import Cache
from conformance.law import judge
from conformance.laws import laws_for
from core.cache import _OWNED_UP_TO, select_beams, spread_beams
from tests.frontends import CONFIG, FRONTENDS, random_weights

KIND, VOCAB = "DecoderOnlyTransformer", CONFIG.vocab_size("target")
MANY = _OWNED_UP_TO + 1
ROTARY = {"positions": "rotary", "num_decoder_layers": 2, "num_kv_heads": 1}
CHANGES = {
    "rotary, two layers": ROTARY,
    "the same in float64": ROTARY | {"dtype": "float64", "param_dtype": "float64"},
    "T5 and a window": {"positions": "t5", "relative_buckets": 4, "relative_distance": 5, "attention_window": (2, 0)},
}


def decoder(package, changes, beams):
    """An adapter: vectors are read as token ids, and what comes out are logits; with `beams` the rows are those."""
    wide = "dtype" in changes
    context = (lambda: jax.enable_x64(True)) if wide else contextlib.nullcontext
    with context():
        config = CONFIG.replace(**changes)
        weights = random_weights(config, 0, model_class=KIND)
    ids = lambda x: (jnp.abs(x[..., 0]) * 1000).astype(jnp.int32) % VOCAB

    def model(weights):
        return package.evaluation(package.from_weights(config, weights, model_class=getattr(package, KIND)))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def start(weights, rows, capacity):
        if not beams:
            return model(weights).decoder.init_cache((rows,), capacity)
        return spread_beams(model(weights).decoder.init_cache((1,), capacity), rows)

    @jax.jit
    def step(weights, state, x):
        logits, state = model(weights).decode_step(ids(x)[None] if beams else ids(x), state)
        return logits[0] if beams else logits, state

    return Cache(
        f"{package.__name__} decoder",
        lambda state, x: step(weights, state, jnp.asarray(x)),
        {"reorder"} if beams else {"reorder", "chunks"},
        context,
        tolerance=1e-12 if wide else 2e-5,
        width=1,
        start=functools.partial(start, weights),
        full=jax.jit(lambda x: model(weights)(ids(x))),
        select=(
            (lambda state, rows: select_beams(state, jnp.asarray(rows, jnp.int32)[None]))
            if beams
            else (lambda state, rows: jax.tree.map(lambda x: x[np.asarray(rows)], state))
        ),
    )


@pytest.mark.parametrize("beams", [False, True], ids=["rows", "beams"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
def test_the_caches_of_decoders_conform(package, name, beams):
    adapter = decoder(package, CHANGES[name], beams)
    for law in laws_for(adapter):
        verdict = judge(law, adapter, shrinks=0)
        assert verdict.status in ("holds", "not offered"), (law.name, verdict.failure)
