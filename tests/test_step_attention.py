"""Laws of one query's attention: what `dot_product_attention` gives, though nothing is copied first."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.attention import dot_product_attention
from core.beam_search import beam_search
from core.cache import (
    DecoderCache,
    KeysValues,
    KVCache,
    Slots,
    as_slots,
    cached_attention,
    select_beams,
    slot_attention,
    spread_beams,
)
from core.constraints import Constraints
from core.masks import Padding
from core.relative import T5, ALiBi, Shaw, TransformerXL
from core.step_attention import step_attention
from tests.frontends import CONFIG, FRONTENDS, random_weights
from tests.strategies import AttentionShape, qkv, seeds

SHAPE = AttentionShape((2, 3), 1, 6, 4, 2, 2, 3)
few = settings(max_examples=max(3, settings.default.max_examples // 4))
step = eqx.filter_jit(step_attention)
whole = eqx.filter_jit(dot_product_attention)


def learned(seed, *shape):
    return jnp.asarray(np.random.default_rng([seed, 5]).standard_normal(shape))


RULES = {
    "mask": lambda seed: {"mask": jnp.asarray(np.random.default_rng(seed).random((2, 3, 4, 1, 6)) < 0.5)},
    "bias": lambda seed: {"bias": learned(seed, 2, 3, 4, 1, 6)},
    "window": lambda seed: {"window": (2, 0)},
    "capped": lambda seed: {"soft_cap": 1.5, "scale": 0.7, "sinks": learned(seed, 4)},
    "alibi": lambda seed: {"relative": ALiBi()},
    "t5": lambda seed: {"relative": T5(learned(seed, 4, 4), bidirectional=False, max_distance=3)},
    "shaw": lambda seed: {"relative": Shaw(learned(seed, 5, 2), learned(seed + 1, 5, 3))},
    "transformer_xl": lambda seed: {
        "relative": TransformerXL(learned(seed, 4, 2), learned(seed + 1, 6, 8), learned(seed + 2, 4, 2))
    },
}
every_rule = pytest.mark.parametrize("name", RULES)


def given_rules(name, seed):
    """Causal, from another position in each row."""
    offset = np.random.default_rng([seed, 2]).integers(0, 6, SHAPE.batch).astype("int32")
    return {"causal": True, "q_offset": jnp.asarray(offset), **RULES[name](seed)}, offset


def gathered(x, owners):
    return np.take_along_axis(x, owners[..., None, None], axis=1)


def drawn_owners(seed):
    """Of each of the 3 beams, whose slots hold what it has at each of 6 positions."""
    return np.random.default_rng([seed, 3]).integers(0, 3, (2, 3, 6)).astype("int32")


@every_rule
@few
@given(seed=seeds)
def test_one_query_gets_what_the_general_form_gives(name, seed):
    with jax.enable_x64(True):
        rules, _ = given_rules(name, seed)
        arrays = [jnp.asarray(x, jnp.float64) for x in qkv(SHAPE, seed)]
        np.testing.assert_allclose(step(*arrays, **rules), whole(*arrays, **rules), rtol=0, atol=1e-12)


@every_rule
@pytest.mark.parametrize("owned", [False, True])
@settings(max_examples=1)
@given(seed=seeds)
def test_one_query_has_the_gradients_of_the_general_form(owned, name, seed):
    """By queries, keys, values and all that is learned."""
    with jax.enable_x64(True):
        rules, _ = given_rules(name, seed)
        leaves, tree = jax.tree.flatten((rules, *map(jnp.asarray, qkv(SHAPE, seed))), is_leaf=lambda x: x is None)
        learn = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]
        owners = jnp.asarray(drawn_owners(seed)) if owned else None
        cotangent = jnp.asarray(np.random.default_rng([seed, 6]).standard_normal((2, 3, 1, 4, 3)))

        def of_all(attend, learned):
            given = leaves.copy()
            for i, x in zip(learn, learned, strict=True):
                given[i] = x
            rules, q, k, v = jax.tree.unflatten(tree, given)
            return (attend(q, k, v, **rules) * cotangent).sum()

        def general(q, k, v, **rules):
            own = lambda x: x if owners is None else jnp.take_along_axis(x, owners[..., None, None], axis=1)
            return dot_product_attention(q, own(k), own(v), **rules)

        gradients = jax.jit(
            lambda learned: [
                jax.grad(functools.partial(of_all, attend))(learned)
                for attend in (functools.partial(step_attention, owners=owners), general)
            ]
        )
        for got, wanted in zip(*gradients([leaves[i].astype(jnp.float64) for i in learn]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


@given(seed=seeds, owned=st.booleans())
@few
def test_without_a_rule_all_keys_are_seen(seed, owned):
    q, k, v = qkv(SHAPE, seed)
    owners = drawn_owners(seed)
    more = {"owners": jnp.asarray(owners)} if owned else {}
    seen = [gathered(x, owners) if owned else x for x in (k, v)]
    wanted = whole(*map(jnp.asarray, (q, *seen)))
    np.testing.assert_allclose(step(*map(jnp.asarray, (q, k, v)), **more), wanted, rtol=0, atol=2e-6)


@every_rule
@few
@given(seed=seeds)
def test_a_beam_reads_the_slots_that_hold_its_past(name, seed):
    with jax.enable_x64(True):
        rules, _ = given_rules(name, seed)
        q, k, v = (np.float64(x) for x in qkv(SHAPE, seed))
        owners = drawn_owners(seed)
        out = step(*map(jnp.asarray, (q, k, v)), owners=jnp.asarray(owners), **rules)
        wanted = whole(*map(jnp.asarray, (q, gathered(k, owners), gathered(v, owners))), **rules)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)


@few
@given(seed=seeds)
def test_rows_may_have_any_leading_axes_or_none(seed):
    q, k, v = map(jnp.asarray, qkv(SHAPE, seed))
    owners = jnp.asarray(drawn_owners(seed))
    wanted = step(q, k, v, owners=owners)
    first = step(q[0], k[0], v[0], owners=owners[0])
    apart = step(*(x[None, :, None] for x in (q, k, v)), owners=owners[None, :, None])
    np.testing.assert_allclose(first, wanted[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(apart[0, :, 0], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["bias", "shaw"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@few
@given(seed=seeds)
def test_in_16_bits_a_beam_sums_in_32_and_rounds_once(dtype, name, seed):
    """And once more each what relative positions add, and the sum of both."""
    rules, _ = given_rules(name, seed)
    q, k, v = (np.asarray(jnp.asarray(x, dtype)) for x in qkv(SHAPE, seed))
    owners = drawn_owners(seed)
    out = step(*map(jnp.asarray, (q, k, v)), owners=jnp.asarray(owners), **rules)
    wanted = whole(*(jnp.asarray(x, jnp.float32) for x in (q, gathered(k, owners), gathered(v, owners))), **rules)
    assert out.dtype == dtype
    half = float(jnp.finfo(dtype).eps) / 2
    more = 0 if name == "bias" else 4 * np.abs(wanted).max()
    np.testing.assert_allclose(np.float32(out), wanted, rtol=1.01 * half, atol=2e-6 + half * more)


@pytest.mark.parametrize("owned", [False, True])
def test_wide_values_stay_wide_beside_narrow_queries_and_keys(owned):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, dtype) for x, dtype in zip(qkv(SHAPE, 0), ["float32"] * 2 + ["float64"], strict=True))
        owners = drawn_owners(0)
        more = {"owners": jnp.asarray(owners)} if owned else {}
        seen = [jnp.asarray(gathered(np.asarray(x), owners)) if owned else x for x in (k, v)]
        out, wanted = step(q, k, v, **more), whole(q, *seen)
        assert out.dtype == wanted.dtype == "float64"
        np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("owned", [False, True])
@few
@given(seed=seeds, junk=st.sampled_from([np.nan, np.inf, -np.inf]), into=st.sampled_from(["k", "v"]))
def test_what_is_not_finite_reaches_those_alone_that_may_see_it(owned, seed, junk, into):
    rules, offset = given_rules("bias", seed)
    q, k, v = qkv(SHAPE, seed)
    foul = {"k": k.copy(), "v": v.copy()}
    foul[into][0, 1, 3, :, 0] = junk  # in the slots of one beam of one row, at one position, once in each vector
    owners = drawn_owners(seed) if owned else np.broadcast_to(np.arange(3, dtype="int32")[:, None], (2, 3, 6))
    more = {"owners": jnp.asarray(owners)} if owned else {}
    clean = np.asarray(step(*map(jnp.asarray, (q, k, v)), **rules, **more))
    out = np.asarray(step(*map(jnp.asarray, (q, foul["k"], foul["v"])), **rules, **more))
    first = np.arange(2)[:, None] == 0
    met = first & (owners[..., 3] == 1) & (offset >= 3)
    beside = first if owned else met  # a beam's products are with the slots of its whole row
    beside = np.broadcast_to(beside, met.shape)
    np.testing.assert_array_equal(out[~beside], clean[~beside])
    np.testing.assert_allclose(out[~met], clean[~met], rtol=0, atol=2e-6)
    if into == "v" or np.isnan(junk):
        assert np.isnan(out[met]).all()


def test_a_query_that_may_see_nothing_gets_zero():
    q, k, v = qkv(SHAPE, 0)
    v[0] = np.nan
    out = step(*map(jnp.asarray, (q, k, v)), mask=jnp.zeros((2, 3, 1, 1, 6), bool))
    assert (np.asarray(out) == 0).all()


@few
@given(seeds)
def test_beams_may_share_the_slots_of_their_row(seed):
    q, k, v = qkv(SHAPE, seed)
    real = np.random.default_rng(seed).random((2, 1, 6)) < 0.7
    shared = as_slots(KeysValues(jnp.asarray(k[:, :1]), jnp.asarray(v[:, :1])))
    out = jax.jit(slot_attention)(jnp.asarray(q), shared, mask=Padding(jnp.asarray(real)))
    each = [np.broadcast_to(x[:, :1], x.shape) for x in (k, v)]
    wanted = whole(*map(jnp.asarray, (q, *each)), mask=Padding(jnp.asarray(np.broadcast_to(real, (2, 3, 6)))))
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6)


def test_shapes_that_do_not_fit_are_refused(untyped):
    q, k, v = map(jnp.asarray, qkv(SHAPE, 0))
    with pytest.raises(ValueError, match=r"all axes but the last, got k \(2, 3, 6, 2, 2\), v \(2, 3, 5, 2, 3\)"):
        step_attention(q, k, v[..., :5, :, :])
    with pytest.raises(ValueError, match=r"must agree in \*B and H"):
        step_attention(q[..., :1], k, v)


MODELS = {
    "grouped": {"num_kv_heads": 1, "value_dim": 3},
    "rotary": {"positions": "rotary", "tie_embeddings": "none"},
    "transformer_xl": {"positions": "transformer_xl"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("beam_size", [3, 9])
@pytest.mark.parametrize("name", MODELS)
def test_beams_that_leave_their_slots_in_place_find_what_beams_that_move_them_find(name, beam_size):
    """Few and many beams, an encoder-decoder with ragged sources; by default the search copies all leaves."""
    config, package = CONFIG.replace(target_vocab_size=11, **MODELS[name]), FRONTENDS["equinox"]
    model = package.evaluation(package.from_weights(config, random_weights(config, 4)))
    source = jnp.asarray([[3, 4, 5, 6], [7, 8, 0, 0]], jnp.int32)

    @functools.partial(jax.jit, static_argnames="in_place")
    def search(in_place):
        tokens, cache = model.start(source, source_mask=source != 0, max_length=6)
        ways = {"select": select_beams, "spread": spread_beams} if in_place else {}
        rules = {"beam_size": beam_size, "n_best": 3, "constraints": Constraints(no_repeat_ngram=1, min_length=3)}
        return beam_search(model.decode_step, tokens, cache, max_length=6, **rules, **ways)

    found, wanted = search(True), search(False)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=2e-2 if name == "bfloat16" else 1e-5)
    assert len(np.unique(np.asarray(found.tokens))) > 5


def test_a_selected_beam_has_the_length_and_the_prefix_of_its_parent():
    length, prefix = jnp.array([[1, 2, 3]], jnp.int32), jnp.array([[4, 5, 6]], jnp.int32)
    slots = Slots(jnp.zeros((1, 3, 1, 6, 2)), jnp.zeros((1, 3, 1, 6, 2)))
    owners = jnp.asarray(drawn_owners(0)[:1])
    cache = DecoderCache(attention=(slots,), memory=(), memory_mask=None, length=length, prefix=prefix, owners=owners)
    for held in (cache, cache._replace(owners=None)):
        picked = select_beams(held, jnp.array([[2, 0, 0]]))
        np.testing.assert_array_equal(picked.length, [[3, 1, 1]])
        np.testing.assert_array_equal(picked.prefix, [[6, 4, 4]])


def test_beams_of_a_decoder_without_layers_have_no_past():
    cache = DecoderCache(attention=(), memory=(), memory_mask=None, length=jnp.zeros((2,), jnp.int32), prefix=None)
    assert spread_beams(cache, 3).length.shape == (2, 3)


def test_the_form_of_attention_that_is_asked_for_is_passed_on():
    q, k, v = map(jnp.asarray, qkv(SHAPE._replace(T=2), 0))
    slots, shared = as_slots(KeysValues(k, v)), as_slots(KeysValues(k[:, :1], v[:, :1]))
    cache = KVCache(Slots(*map(jnp.zeros_like, slots)), jnp.zeros((2, 3), jnp.int32))
    for call in (
        lambda **how: slot_attention(q, slots, **how),
        lambda **how: slot_attention(q[:, :, :1], shared, **how),
        lambda **how: cached_attention(q, k[:, :, :2], v[:, :, :2], cache, **how),
    ):
        call(implementation="blockwise")
        with pytest.raises(ValueError, match="implementation must be None or one of"):
            call(implementation="dense")


@pytest.mark.parametrize("queries", [1, 2])
def test_what_is_accepted_does_not_depend_on_how_many_come_at_once(queries, untyped):
    q, k, v = map(jnp.asarray, qkv(SHAPE._replace(T=queries), 0))
    slots = as_slots(KeysValues(k, v))
    cache = KVCache(Slots(*map(jnp.zeros_like, slots)), jnp.zeros((2, 3), jnp.int32))
    for call in (
        functools.partial(slot_attention, q, slots),
        functools.partial(cached_attention, q, k[:, :, :queries], v[:, :, :queries], cache),
    ):
        for wrong in ({"wndow": (1, 0)}, {"dropout_rate": 0.9, "dropout_key": jax.random.key(0)}):
            with pytest.raises(
                TypeError, match=f"attention has no rule {', '.join(sorted(wrong))}; the rules are mask"
            ):
                call(**wrong)
        with pytest.raises(ValueError, match="implementation must be None or one of"):
            call(implementation="fast")


def test_beams_that_share_their_slots_take_one_token_at_a_time(untyped):
    q, k, v = map(jnp.asarray, qkv(SHAPE._replace(T=2), 0))
    with pytest.raises(ValueError, match="beams that share their slots take one token at a time, got T=2"):
        slot_attention(q, as_slots(KeysValues(k, v)), owners=jnp.asarray(drawn_owners(0)), q_offset=3, causal=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_what_relative_encodings_add_is_not_rounded_apart(dtype):
    rng = np.random.default_rng(0)
    sizes = [(2, 1, 4, 3), (2, 5, 2, 3), (2, 5, 2, 5), (5, 3), (5, 5)]
    low = [jnp.asarray(4 * rng.standard_normal(size), dtype) for size in sizes]
    found, wanted = (
        step_attention(q, k, v, relative=Shaw(of_keys, of_values), q_offset=3, causal=True)
        for q, k, v, of_keys, of_values in (low, [x.astype(jnp.float32) for x in low])
    )
    np.testing.assert_array_equal(found, wanted.astype(dtype), strict=True)
