"""The museum: each defect that others had and that could come back here, as one small regression with its source.

The numbers are those of the collection that this project was planned with. Runs have theirs in tests/test_training.py:
38 (random keys and optimiser state at resume) and 39 (resume off by one) by a run that goes on in the other frontend
and ends in the same bits, 40 (a checkpoint taken for temporary when copied) and 41 (ties lost at resume) by what a
copied run resumes to. Most exhibits are laws elsewhere, drawn for many shapes; here each is the case that was reported.
"""

import functools
import json
import struct
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.attention import attention_weights, dot_product_attention
from core.beam_search import beam_search
from core.cache import KeysValues, KVCache, append, as_slots, cached_attention
from core.layers import layer_norm
from core.losses import cross_entropy
from core.masks import Causal, Grid, Padding, Window
from core.positions import sinusoidal_table
from core.relative import T5, ALiBi, alibi_slopes, rel_shift
from core.rotary import rotary
from core.sampling import Sampling, kept_tokens
from core.weights import load, save
from tests.frontends import CONFIG, FRONTENDS, logits, random_batch, random_weights
from tests.strategies import AttentionShape, qkv
from tests.test_attention import attend, both, exactly, weigh


class Exhibit(NamedTuple):
    """One defect, where it was reported, and what would notice it."""

    sources: tuple[str, ...]
    check: Callable


MUSEUM: dict[int, Exhibit] = {}


def exhibit(number: int, *sources: str) -> Callable:
    """Puts a check into the museum."""

    def put(check: Callable) -> Callable:
        assert number not in MUSEUM
        MUSEUM[number] = Exhibit(sources, check)
        return check

    return put


SHAPE = AttentionShape((2,), 3, 3, 4, 2, 4, 2)
Q, K, V = qkv(SHAPE, 0)
ONES = np.ones((2, 4, 3, 3), bool)
NAN = np.float32(np.nan)
REAL = np.array([[True, True, False], [True, False, False]])  # the tokens of either row
PADS = REAL[:, None, None]


def refuses(error, message, call, *arguments, **options):
    with pytest.raises(error, match=message):
        call(*arguments, **options)


@exhibit(1, "equinox#274", "pytorch#41508", "pytorch#103963", "pytorch#160064", "mlx#2608", "rten#1321")
def a_row_without_keys_is_nan():
    for rules in ({"mask": ONES & (np.arange(3) > 0)[:, None]}, {"causal": True, "q_offset": np.int32([-1, -1])}):
        out, weights = both(Q, K, V, **rules)
        assert (out[:, 0] == 0).all()
        assert (weights[..., 0, :] == 0).all()
        assert np.isfinite(out).all()


@exhibit(2, "pytorch#101967")
def nan_leaks_from_masked_positions():
    hidden = ~REAL[..., None, None]
    foul = attend(Q, np.where(hidden, NAN, K), np.where(hidden, NAN, V), mask=PADS)
    exactly(foul, attend(Q, K, V, mask=PADS))


@exhibit(3, "flax#982", "flax#1527", "darts#3087")
def the_fill_value_overflows_in_float16():
    q, k, v = (x.astype("float16") for x in (200 * Q, 200 * K, V))
    out, weights = both(q, k, v, mask=PADS)
    assert np.isfinite(out).all()
    assert (weights[~(ONES & PADS)] == 0).all()


@exhibit(4, "jax#37422", "jax#37457")
def the_fill_value_of_float64_overflows_in_float32():
    with jax.enable_x64(True):
        out, weights = both(Q, K, V.astype("float64"), mask=PADS)
    assert np.isfinite(out).all()
    assert (weights[~(ONES & PADS)] == 0).all()


@exhibit(5, "pytorch#108108", "flash-attention#436", "flash-attention#951", "flash-attention#1778", "mlx#2835",
         "mlx#2967", "onnx#8068", "x-transformers#187")  # fmt: skip
def causal_is_aligned_in_silence_where_lengths_differ():
    q = jnp.asarray(Q[:, :2])
    refuses(ValueError, "needs q_offset", attention_weights, q, jnp.asarray(K), causal=True)
    for offset in (0, 1):
        seen = weigh(Q[:, :2], K, V, causal=True, q_offset=np.int32([offset] * 2)) > 0
        exactly(seen[0, 0], np.tri(2, 3, offset, dtype=bool))


def cache_of(length, junk=0.0):
    """Slots for 3 tokens a row, `length` of them filled."""
    filled = (np.arange(3) < np.asarray(length)[:, None])[..., None, None]
    slots = KeysValues(*(jnp.asarray(np.where(filled, x, np.float32(junk))) for x in (K, V)))
    return KVCache(as_slots(slots), jnp.asarray(length, jnp.int32))


step = jax.jit(cached_attention)


def decoded(sizes):
    cache, outs, start = cache_of([0, 0]), [], 0
    for size in sizes:
        out, cache = step(*(x[:, start : start + size] for x in (Q, K, V)), cache)
        outs.append(out)
        start += size
    return np.concatenate(outs, axis=1)


def close(got, wanted, tolerance=2e-6):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@exhibit(6, "flax#5591")
def a_step_of_decoding_sees_the_first_key_alone():
    close(decoded([1, 1, 1]), attend(Q, K, V, causal=True))


@exhibit(7, "keras#23038", "keras#22910")
def the_causal_mask_is_dropped_off_the_fast_path():
    later = [np.concatenate([x[:, :2], 9 + x[:, 2:]], axis=1) for x in (Q, K, V)]
    dropout = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    for rules in ({}, dropout):
        for now, then in zip(both(*later, causal=True, **rules), both(Q, K, V, causal=True, **rules), strict=True):
            axis = now.ndim - (3 if now.shape[-1] == 2 else 2)
            exactly(np.take(now, [0, 1], axis), np.take(then, [0, 1], axis))
    exactly(attend(Q[0], K[0], V[0], causal=True)[:2], attend(*(x[0] for x in later), causal=True)[:2])
    exactly(attend(Q[None], K[None], V[None], causal=True)[0], attend(Q, K, V, causal=True))


@exhibit(8, "Mikyx-1/TinyLLM#18")
def filling_the_cache_forgets_the_mask():
    close(decoded([3]), attend(Q, K, V, causal=True))
    close(decoded([2, 1]), attend(Q, K, V, causal=True))


@exhibit(9, "jax#32300", "jax#32357")
def a_window_without_a_mask_is_ignored():
    windowed = attend(Q, K, V, window=(0, 0))
    exactly(windowed, np.repeat(V, 2, axis=2))
    exactly(windowed, attend(Q, K, V, window=(0, 0), mask=ONES))


@exhibit(10, "transformers#39408", "transformers#29623", "Megatron-Bridge#2656", "mlx-lm#390")
def a_window_is_off_by_one():
    for w in (1, 2, 3, 4):
        seen = np.asarray((Causal() & Window(w - 1, 0)).cells(Grid((1, 5, 5)))).sum(-1)
        assert seen.tolist() == [[min(i + 1, w) for i in range(5)]]


@exhibit(11, "jax#23349")
def lengths_of_rows_are_not_respected():
    out = attend(Q, K, V, mask=PADS)
    for row, length in enumerate(REAL.sum(-1)):
        close(out[row], attend(Q[row], K[row, :length], V[row, :length]))


@exhibit(12, "burn#4778", "jax#28974", "jax#36702", "lighthouse#77")
def a_mask_that_broadcasts_reaches_the_first_head_alone():
    for size in ((2, 1, 1, 3), (1, 4, 1, 3), (1, 1, 3, 3), (2, 4, 3, 1)):
        mask = np.random.default_rng(sum(size)).random(size) < 0.5
        exactly(weigh(Q, K, V, mask=mask), weigh(Q, K, V, mask=mask & ONES))
        assert (weigh(Q, K, V, mask=mask)[~(mask & ONES)] == 0).all()


@exhibit(13, "hyunwoongko/transformer#40")
def padding_hides_queries_and_not_keys():
    weights = weigh(Q, K, V, mask=Padding(jnp.asarray(REAL)))
    exactly(weights != 0, PADS & ONES)


@exhibit(14, "pytorch-image-models#2236")
def the_mask_comes_after_the_softmax():
    close(weigh(Q, K, V, mask=PADS).sum(-1), np.ones((2, 4, 3)), 1e-6)


@exhibit(15, "pytorch#107084")
def a_float_mask_is_inverted():
    for mask in (jnp.zeros((2, 1, 1, 3)), jnp.where(jnp.asarray(PADS), 0.0, -1e9), jnp.ones((2, 1, 1, 3), jnp.int8)):
        refuses(TypeError, "mask must be bool, True where", attend, Q, K, V, mask=mask)


@exhibit(16, "pytorch#86120", "pytorch#97111", "pytorch#128209")
def training_and_evaluation_disagree_about_padding():
    identity = np.broadcast_to(np.eye(3, dtype="float32")[:, None], (2, 3, 2, 3))
    dropped, weights = both(Q, K, identity, mask=PADS, dropout_rate=0.5, dropout_key=jax.random.key(1))
    exactly(weights, weigh(Q, K, V, mask=PADS))
    dropped = dropped.swapaxes(1, 2)
    exactly(dropped, np.where(dropped == 0, 0, 2 * weights))
    assert (dropped != 0).any()


@exhibit(17, "flax#5497")
def a_dropout_rate_is_not_checked():
    arrays = [jnp.asarray(x) for x in (Q, K, V)]
    for rate in (-0.5, 1.0, 1.5, float("nan")):
        for key in (None, jax.random.key(0)):
            refuses(ValueError, "dropout rate", dot_product_attention, *arrays, dropout_rate=rate, dropout_key=key)


@exhibit(18, "transformers#28059", "equinox#287", "torchtune#1791", "torch-harmonics#221")
def dropout_is_never_applied_or_in_evaluation():
    plain = attend(Q, K, V)
    assert (attend(Q, K, V, dropout_rate=0.5, dropout_key=jax.random.key(0)) != plain).any()
    exactly(attend(Q, K, V, dropout_rate=0.5), plain)


BATCH = random_batch(CONFIG, 3)


@exhibit(19, "Megatron-LM#411", "lerobot#3668")
def evaluation_switches_dropout_off_for_good():
    for name, package in FRONTENDS.items():
        model = package.Dropout(0.5)
        x, key = jnp.ones((8, 8)), {"rngs" if name == "nnx" else "key": jax.random.key(0)}
        before = model(x, **key)
        assert (package.evaluation(model)(x) == 1).all()
        exactly(np.asarray(model(x, **key)), np.asarray(before))
        assert (before == 0).any()


@exhibit(20, "flax#2665", "netket#241")
def parameters_are_drawn_from_one_key():
    with jax.debug_key_reuse(True):
        weights = FRONTENDS["equinox"].to_weights(FRONTENDS["equinox"].Transformer(CONFIG, key=jax.random.key(0)))
    kernels = [np.asarray(x).ravel() for name, x in weights.items() if name.endswith(("kernel", "embedding"))]
    firsts = [tuple(x[:4] / np.abs(x[:4]).max()) for x in kernels]
    assert len(set(firsts)) == len(kernels) > 9


@exhibit(21, "onnx#7274", "jax-js#180", "candle-vllm#52")
def key_heads_are_tiled_and_not_repeated():
    exactly(attend(Q, K, V), attend(Q, K, V, mask=ONES))
    close(attend(Q, K, V), attend(Q, K.repeat(2, axis=2), V.repeat(2, axis=2)))
    assert np.abs(attend(Q, K, V) - attend(Q, np.tile(K, (1, 1, 2, 1)), np.tile(V, (1, 1, 2, 1)))).max() > 0.1


POSITIONS = jnp.array([[0, 1, 1_000_003], [5, 2**20, 2]])


@exhibit(22, "gpt-neox#1003", "transformers#25681", "transformers#29285", "transformers#29496")
def rotary_tables_have_sixteen_bits():
    x = jnp.asarray(Q, jnp.bfloat16)
    exactly(np.asarray(rotary(x, POSITIONS)), np.asarray(rotary(x.astype(jnp.float32), POSITIONS).astype(jnp.bfloat16)))


def turned(x, positions):
    """Pairs half a head apart, in float64."""
    angle = np.float64(positions)[..., None, None] * 10_000.0 ** (-np.arange(2) / 2)
    a, b = np.split(np.float64(x), 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


@exhibit(23, "vllm-ascend#12820")
def the_rotary_layout_is_ignored():
    q, order = jnp.asarray(Q), np.array([0, 2, 1, 3])
    half, pairs = (rotary(q, POSITIONS, layout=layout) for layout in ("half", "interleaved"))
    assert (half != pairs).any()
    exactly(np.asarray(rotary(q[..., order], POSITIONS, layout="interleaved")[..., order]), np.asarray(half))


@exhibit(24, "equinox PR#799")
def an_offset_leaves_the_rotary_table():
    close(rotary(jnp.asarray(Q), POSITIONS), turned(Q, POSITIONS))


@exhibit(25, "BERT-pytorch#78", "pyaptamer#526", "pyaptamer#607", "Informer2020#224")
def an_odd_width_has_no_sinusoid():
    exactly(np.asarray(sinusoidal_table(4, 5)), np.asarray(sinusoidal_table(4, 6))[:, :5])


@exhibit(26, "transformers#8518", "transformers#4499", "candle#899", "x-transformers#10")
def t5_forgets_the_direction_or_where_the_cache_stands():
    embedding, q, k = jnp.arange(32.0).reshape(8, 4), jnp.asarray(Q), jnp.asarray(K)
    for both_ways in (True, False):
        bias = np.asarray(T5(embedding, both_ways, 8).logits(q, k, Grid((2, 4, 3, 3)), scale=1.0))
        bias = np.broadcast_to(bias, (2, 4, 3, 3))
        assert (bias[..., 0, 2] != bias[..., 2, 0]).all()
        assert both_ways == (bias[..., 0, 2] != bias[..., 0, 0]).all()
        last = T5(embedding, both_ways, 8).logits(q[:, 2:], k, Grid((2, 4, 1, 3), 2), scale=1.0)
        exactly(np.broadcast_to(last, (2, 4, 1, 3)), bias[..., 2:, :])


@exhibit(27, "espnet#2684", "OpenTransformer#25", "labml#185", "x-transformers#103", "transformers#14832")
def the_relative_shift_leaks_rows():
    for T, S in ((3, 3), (2, 5), (5, 2)):
        x = np.random.default_rng(T).standard_normal((2, T, T + S - 1)).astype("float32")
        wanted = np.stack([x[:, t, T - 1 - t : T - 1 - t + S] for t in range(T)], axis=1)
        exactly(np.asarray(rel_shift(jnp.asarray(x), S)), wanted)


@exhibit(28, "mlx#343", "mlx#3071", "transformers#28380", "aprender#2143", "flash-attention#845")
def alibi_knows_powers_of_two_alone():
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    weights = weigh(*(x.astype(jnp.bfloat16) for x in (0 * Q, K, V)), relative=ALiBi())
    slopes, distance = np.array(alibi_slopes(4)), np.abs(np.arange(3)[:, None] - np.arange(3))
    wanted = np.exp(-slopes[:, None, None] * distance)
    close(weights[0], wanted / wanted.sum(-1, keepdims=True), 1e-7)


@exhibit(29, "x-transformers#219", "tiny-llm#46", "transformers#25420", "mosaicml/examples#257")
def the_cache_shows_junk_or_drifts():
    last = np.array([2, 1])[:, None, None, None]
    new = [np.take_along_axis(x, last, axis=1) for x in (Q, K, V)]
    out, _ = step(*new, cache_of([2, 1], junk=np.nan))
    close(out, np.take_along_axis(attend(Q, K, V, causal=True), last, axis=1))


@exhibit(30, "nanochat#627", "tokenspeed#506")
def a_full_cache_says_nothing():
    new = [jnp.asarray(x[:, :1]) for x in (Q, K, V)]
    refuses(
        ValueError, "the cache holds 3 tokens a row, 3 are there and 1 more came", append, cache_of([3, 1]), *new[1:]
    )
    out, _ = step(*new, cache_of([3, 1]))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.float32)
LABELS = jnp.array([[1, 2, 3], [4, 0, 0]])
TOKENS = jnp.asarray(REAL, jnp.float32)


@exhibit(31, "transformers#46612", "TensorRT-LLM#15444")
def beams_read_each_others_caches():
    for package in FRONTENDS.values():
        model, source = package.from_weights(CONFIG, random_weights(CONFIG, 2)), jnp.asarray([[3, 4, 5], [6, 7, 8]])
        found = package.beam_search(model, source, max_length=5, beam_size=3, n_best=3)
        for i in range(3):
            said = package.score(model, source, found.tokens[:, i])
            length = (np.asarray(said) != 0).sum(-1)
            close(np.asarray(said).sum(-1) / ((5 + length) / 6) ** 0.6, found.scores[:, i], 1e-5)


@exhibit(32, "transformers#8722", "transformers#27808", "ParlAI#2058", "sockeye#483", "sockeye#233", "joeynmt#149")
def hypotheses_go_on_behind_their_end_or_are_scored_by_another_length():
    likely = jnp.log(jnp.asarray([0.05, 0.05, 0.3, 0.6]))  # the end is never the likeliest token, yet it is the best
    step = lambda tokens, cache: (jnp.broadcast_to(likely, (*tokens.shape, 4)), cache)
    found = beam_search(step, jnp.zeros((), jnp.int32), jnp.zeros(()), max_length=3, beam_size=3, n_best=3)
    assert found.tokens.tolist() == [[2, 0, 0], [3, 3, 3], [3, 2, 0]]
    wanted = [np.log(0.3), 3 * np.log(0.6) / (8 / 6) ** 0.6, np.log(0.6 * 0.3) / (7 / 6) ** 0.6]
    close(found.scores, wanted, 1e-5)


@exhibit(33, "mesh-transformer-jax#164", "esm#360", "reasoning-from-scratch#164", "TensorRT-LLM#19496")
def top_k_keeps_one_more_and_top_p_drops_the_crossing_token():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.1, 0.3, 0.1]))
    kept = lambda **rules: np.flatnonzero(kept_tokens(logits, Sampling(**rules))).tolist()
    assert kept(top_k=3) == [0, 1, 3]
    assert kept(top_p=0.5) == [1, 3]
    assert kept(top_p=0.9999999) == kept(top_p=1.0) == [0, 1, 2, 3, 4]


@exhibit(34, "transformers#24725", "torchtune#1875", "OpenNMT-py#2209", "keras#19990", "optax#145")
def accumulation_takes_the_mean_of_means():
    parts = [cross_entropy(LOGITS[i], LABELS[i], weights=TOKENS[i]) * TOKENS[i].sum() for i in range(2)]
    close(sum(parts) / TOKENS.sum(), cross_entropy(LOGITS, LABELS, weights=TOKENS))


@exhibit(35, "pytorch#73205", "cosmos-rl#155")
def smoothing_counts_what_is_ignored():
    loss = functools.partial(cross_entropy, label_smoothing=0.2)
    ignored = jnp.where(jnp.asarray(REAL)[..., None], LOGITS, 77.0)
    exactly(np.asarray(loss(ignored, LABELS, weights=TOKENS)), np.asarray(loss(LOGITS, LABELS, weights=TOKENS)))
    assert loss(LOGITS, LABELS, weights=0 * TOKENS) == 0


@exhibit(36, "transformers#17463", "LightRAG#3675", "tensorflow#30161", "pytorch#70529")
def padding_enters_what_the_model_says():
    said = functools.partial(logits, FRONTENDS["equinox"], CONFIG, random_weights(CONFIG, 0))
    other = BATCH._replace(source=jnp.where(BATCH.source_mask, BATCH.source, (BATCH.source + 3) % 11))
    say = jax.jit(said)
    exactly(np.asarray(say(other)), np.asarray(say(BATCH)))


@exhibit(37, "flax#1491", "jax#30426", "jax PR#33496", "equinox#314", "pytorch#51102")
def the_variance_cancels_where_the_mean_is_large():
    x = np.float32(1e4) + np.random.default_rng(0).standard_normal((3, 8)).astype("float32")
    wide = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    close(layer_norm(jnp.asarray(x), jnp.ones(8), jnp.zeros(8), epsilon=1e-6), wanted, 2e-3)
    flat = layer_norm(jnp.full((3, 8), 1e4), jnp.ones(8), jnp.zeros(8), epsilon=1e-6)
    close(flat, np.zeros((3, 8)), 1e-2)


@exhibit(42, "safetensors#825")
def the_order_in_memory_is_lost(folder):
    x = np.arange(12, dtype="float32").reshape(3, 4)
    views = {"transposed": x.T, "strided": x[:, ::2], "reversed": x[::-1]}
    save(folder / "w", views)
    for name, array in load(folder / "w").items():
        exactly(np.asarray(array), np.ascontiguousarray(views[name]))


@exhibit(43, "safetensors#598", "safetensors PR#382")
def bfloat16_does_not_come_back(folder):
    x = jnp.asarray([1.5, -0.0, jnp.inf, 3e38], jnp.bfloat16)
    save(folder / "w", {"x": x})
    exactly(np.asarray(load(folder / "w")["x"]), np.asarray(x))


@exhibit(44, "mlx#3363", "lattice#752", "safetensors#401")
def offsets_are_not_checked(folder):
    for offsets in ([4, 8], [0, 4], [0, 16], [8, 4], [-4, 4]):
        one, two = ({"dtype": "F32", "shape": [1], "data_offsets": x} for x in ([0, 4], offsets))
        header = json.dumps({"a": one, "b": two}).encode()
        (folder / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        if offsets == [4, 8]:
            assert set(load(folder / "w")) == {"a", "b"}
        else:
            refuses(ValueError, "not a whole safetensors file", load, folder / "w")


@exhibit(45, "equinox#136", "equinox#498", "equinox#914")
def leaves_are_told_apart_by_their_order():
    weights = random_weights(CONFIG, 1)
    for package in FRONTENDS.values():
        model = package.from_weights(CONFIG, dict(reversed(weights.items())))
        for name, array in package.to_weights(model).items():
            exactly(np.asarray(array), np.asarray(weights[name]))


@exhibit(46, "jax#35916", "pytorch#163588")
def one_backend_is_silently_wrong():
    k, v = (np.float64(x).repeat(2, axis=2) for x in (K, V))
    scores = np.where(np.tri(3, dtype=bool), np.einsum("btnh,bsnh->bnts", np.float64(Q), k) / 2, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    for device in jax.local_devices():
        arrays = [jax.device_put(x, device) for x in (Q, K, V)]
        close(attend(*arrays, causal=True), wanted)


@exhibit(47, "jax#37762", "jax#29594", "array-api-tests#42", "coordinax#711", "unxt#753", "hypothesis#4552")
def flushed_subnormals_and_slow_first_calls_are_false_alarms():
    tiny = np.float32(1e-40)
    out, weights = both(Q * tiny, K, np.full_like(V, tiny))
    close(weights, np.full(weights.shape, 1 / 3), 1e-6)
    assert (np.abs(out) <= 2 * tiny).all()
    assert hypothesis.settings().deadline is None


@pytest.mark.parametrize("number", MUSEUM, ids=lambda n: f"{n}-{MUSEUM[n].check.__name__}-{MUSEUM[n].sources[0]}")
def test_what_happened_elsewhere_does_not_happen_here(number, tmp_path, untyped):
    check = MUSEUM[number].check
    check(tmp_path) if check.__code__.co_argcount else check()


def test_the_museum_is_whole():
    assert sorted(MUSEUM) == [*range(1, 38), *range(42, 48)]
