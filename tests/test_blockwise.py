"""Blockwise attention is the materialised one: same values, same gradients, same rules, without T x S memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import blockwise
from core.attention import IMPLEMENTATIONS, dot_product_attention
from core.blockwise import blockwise_attention
from core.grid import Block, Grid
from core.masks import Causal, Padding, Prefix, Segments, Window
from core.relative import T5, ALiBi, Shaw, TransformerXL
from tests.frontends import CONFIG, FRONTENDS, random_batch, random_weights, same_bits
from tests.strategies import RECTANGULAR_SHAPES, SQUARE_SHAPES, AttentionShape, attention_cases, qkv, seeds

CUTS = {  # queries and keys: with a rest, the other way round, exactly, one by one, all at once
    SQUARE_SHAPES[2]: (2, 3),
    RECTANGULAR_SHAPES[1]: (4, 2),
    AttentionShape((4, 2), 4, 6, 4, 2, 3, 5): (2, 3),
    AttentionShape((2,), 2, 5, 4, 4, 4, 4): (1, 1),
    SQUARE_SHAPES[0]: (64, 64),
}
shapes = st.sampled_from(list(CUTS))
few_shapes = st.sampled_from(list(CUTS)[:2])
materialised = functools.partial(dot_product_attention, implementation="materialised")


@functools.partial(jax.jit, static_argnames=("function", "static"))
def with_gradients(function, arrays, rules, cotangent, static):
    """The output, and the gradients by all of `arrays`: q, k, v and learned rules by name."""

    def attend(arrays):
        q, k, v, learned = arrays
        return function(q, k, v, **learned, **rules, **dict(static))

    out, pull = jax.vjp(attend, arrays)
    return out, pull(cotangent)[0]


def both_ways(problem, arrays, rules, seed, **static):
    """Of the blockwise form and of the materialised one."""
    shape = (*arrays[0].shape[:-1], arrays[2].shape[-1])
    cotangent = np.random.default_rng([seed, 5]).standard_normal(shape).astype(arrays[2].dtype)
    static = tuple(static.items())
    return (
        with_gradients(blockwise_of(CUTS[problem]), arrays, rules, cotangent, static),
        with_gradients(materialised, arrays, rules, cotangent, static),
    )


@functools.cache
def blockwise_of(block):
    return functools.partial(blockwise_attention, block=block)


def equal_within(got, wanted, units):
    """Every leaf, within so many roundings of its largest number."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        bound = units * jnp.finfo(x.dtype).eps * max(1.0, np.abs(np.asarray(y, "float64")).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


# every rule, forward and backward


@given(attention_cases(shapes, ["causal", "bias window", "mask bias causal window"]), seeds)
def test_masks_biases_windows_and_offsets_act_alike(case, seed):
    rules = dict(case.rules)
    static = {name: rules.pop(name) for name in ("causal", "window") if name in rules}
    learned = {"bias": rules.pop("bias")} if "bias" in rules else {}
    equal_within(*both_ways(case.shape, (*case.qkv, learned), rules, seed, **static), 64)


@given(few_shapes, seeds, st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
def test_masks_and_biases_of_which_some_axes_are_one_act_and_learn_alike(shape, seed, ones, one_row):
    """Of the heads, queries and keys, and of the rows of the batch."""
    rng = np.random.default_rng([seed, 10])
    batch = [1 if one_row else length for length in shape.batch]
    sizes = [1 if one else length for one, length in zip(ones, (shape.N, shape.T, shape.S), strict=True)]
    learned = {"bias": rng.standard_normal((*batch, *sizes)).astype("float32")}
    rules = {"mask": rng.random((*batch, *sizes)) < 0.7}
    equal_within(*both_ways(shape, (*qkv(shape, seed), learned), rules, seed), 64)


@given(shapes, seeds, st.sampled_from([(None, None), (0.7, -0.4)]))
def test_soft_caps_scales_and_sinks_act_alike(shape, seed, numbers):
    learned = {"sinks": np.random.default_rng([seed, 6]).standard_normal(shape.N).astype("float32")}
    static = dict(zip(("soft_cap", "scale"), numbers, strict=True))
    equal_within(*both_ways(shape, (*qkv(shape, seed), learned), {}, seed, **static), 64)


def relative_encodings(shape, rng):
    normal = lambda *size: jnp.asarray(rng.standard_normal(size), "float32")
    return {
        "alibi": ALiBi(),
        "t5": T5(normal(8, shape.N), max_distance=6),
        "shaw": Shaw(normal(5, shape.H), normal(5, shape.Hv)),
        "transformer_xl": TransformerXL(
            normal(shape.N, shape.H), normal(6, shape.N * shape.H), normal(shape.N, shape.H)
        ),
    }


@pytest.mark.parametrize("name", ["alibi", "t5", "shaw", "transformer_xl"])
@given(few_shapes, seeds)
def test_relative_encodings_act_and_learn_alike(name, shape, seed):
    rng = np.random.default_rng([seed, 7])
    learned = {"relative": relative_encodings(shape, rng)[name]}
    rules = {"q_offset": rng.integers(-1, shape.S, shape.batch).astype("int32")}
    equal_within(*both_ways(shape, (*qkv(shape, seed), learned), rules, seed, causal=True, scale=0.7), 256)


@given(shapes, seeds)
def test_composed_masks_act_alike(shape, seed):
    """Padding, segments, prefixes and windows under and, or, not."""
    equal_within(*both_ways(shape, (*qkv(shape, seed), {}), {"mask": composed(shape, seed), "q_offset": 1}, seed), 64)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int32", "int64"])
def test_a_prefix_of_its_own_for_each_row_acts_alike_whatever_its_integers_are(dtype):
    """The longest one reaches blocks of keys that the others leave out."""
    shape = SQUARE_SHAPES[2]
    with jax.enable_x64(dtype == "int64"):
        prefix = Prefix(jnp.asarray([0, 5, 4], dtype))
        assert [int(x) for x in prefix.span(jnp.int32(0), jnp.int32(1), 9)] == [0, 5]
        mask = Causal() | prefix
        equal_within(*both_ways(shape, (*qkv(shape, 0), {}), {"mask": mask}, 0), 64)


@pytest.mark.parametrize("shape", [SQUARE_SHAPES[2], SQUARE_SHAPES[0]])
def test_segments_of_queries_that_are_the_keys_act_alike(shape):
    mask = Segments(jnp.asarray(np.broadcast_to([4, 4, 1, 1, 1][: shape.T], (*shape.batch, shape.T))))
    equal_within(*both_ways(shape, (*qkv(shape, 0), {}), {"mask": mask}, 0), 64)


def composed(shape, seed):
    rng = np.random.default_rng([seed, 8])
    real = jnp.asarray(rng.random((*shape.batch, shape.S)) < 0.8)
    ids = [jnp.asarray(rng.integers(0, 2, (*shape.batch, length)), "int32") for length in (shape.T, shape.S)]
    prefix = Prefix(jnp.asarray(rng.integers(0, shape.S + 1, shape.batch), "int32"))
    return Padding(real) & (Causal() & Window(3, 0) | prefix | ~Segments(*ids))


@given(few_shapes, seeds, st.sampled_from(["bfloat16", "float16"]))
def test_in_16_bits_the_two_differ_by_a_rounding(shape, seed, dtype):
    """Sinks too: all is computed in float32 and rounded in the end."""
    learned = {"sinks": np.random.default_rng([seed, 6]).standard_normal(shape.N).astype(dtype)}
    equal_within(*both_ways(shape, (*qkv(shape, seed, dtype), learned), {"q_offset": 1}, seed, causal=True), 2)


@given(few_shapes, seeds)
def test_in_float64_the_two_differ_by_nothing_but_float64_rounding(shape, seed):
    with jax.enable_x64(True):
        arrays = (*qkv(shape, seed, "float64", scale=3), {})
        rules = {"mask": composed(shape, seed), "q_offset": 1}
        equal_within(*both_ways(shape, arrays, rules, seed), 256)


@given(attention_cases(shapes, ["mask causal", "bias", "bias window"]), st.sampled_from([np.nan, np.inf]))
def test_what_no_query_sees_may_hold_anything_and_has_no_gradient(case, poison):
    rules = dict(case.rules)
    static = {name: rules.pop(name) for name in ("causal", "window") if name in rules}
    unseen = ~case.seen[..., None]
    dead = ~case.allowed.any(-1).swapaxes(-1, -2)[..., None]
    poisoned = np.where(dead, poison, case.q), np.where(unseen, poison, case.k), np.where(unseen, poison, case.v)
    poisoned = [x.astype("float32") for x in poisoned]
    clean, _ = both_ways(case.shape, (*case.qkv, {}), rules, 1, **static)
    out, (q, k, v, _) = both_ways(case.shape, (*poisoned, {}), rules, 1, **static)[0]
    np.testing.assert_array_equal(out, clean[0])
    jax.tree.map(np.testing.assert_array_equal, (q, k, v), clean[1][:3])
    for gradient, without in ((q, dead), (k, unseen), (v, unseen)):
        assert not np.where(without, gradient, 0).any()


@given(attention_cases(shapes, ["mask"]), seeds)
def test_the_cotangent_of_a_query_that_sees_nothing_may_be_anything(case, seed):
    mask = np.array(case.rules["mask"])
    mask[..., 0, :] = False
    dead = ~mask.any(-1).swapaxes(-1, -2)[..., None]
    cotangent = np.random.default_rng([seed, 5]).standard_normal((*case.q.shape[:-1], case.shape.Hv)).astype("float32")
    clean, poisoned = (
        with_gradients(
            blockwise_of(CUTS[case.shape]), (*case.qkv, {}), {"mask": mask}, np.where(dead, x, cotangent), ()
        )
        for x in (np.float32(0), np.float32(np.nan))
    )
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)


@pytest.mark.parametrize("empty", ["rows", "queries", "keys", "heads", "width"])
def test_without_rows_queries_keys_heads_or_width_the_output_is_empty_or_zero(empty):
    sizes = {"rows": 2, "queries": 4, "keys": 3, "heads": 2, "width": 3} | {empty: 0}
    rows, queries, keys, heads, width = sizes.values()
    sizes = [(rows, queries, heads, 5), (rows, keys, heads or 1, 5), (rows, keys, heads or 1, width)]
    inputs = [np.random.default_rng(i).standard_normal(size).astype("float32") for i, size in enumerate(sizes)]
    for attend in (materialised, blockwise_attention):
        out, pull = jax.vjp(attend, *map(jnp.asarray, inputs))
        np.testing.assert_array_equal(out, np.zeros((rows, queries, heads, width), "float32"), strict=True)
        for gradient, x in zip(pull(out), inputs, strict=True):
            np.testing.assert_array_equal(gradient, np.zeros_like(x), strict=True)


@pytest.mark.parametrize("which", [0, 1, 2])
@given(few_shapes, seeds)
def test_where_nothing_is_hidden_nan_is_not_lost_on_the_way_back(which, shape, seed):
    arrays = [np.array(x) for x in qkv(shape, seed)]
    arrays[which][..., 0, 0, 0] = np.nan
    for _, (q, *_) in both_ways(shape, (*arrays, {}), {}, seed):
        assert np.isnan(q).any()


@given(attention_cases(shapes, ["mask causal"]), seeds)
def test_a_value_that_is_not_finite_spoils_the_queries_that_see_it_and_no_gradient_of_others(case, seed):
    rules = dict(case.rules)
    static = {name: rules.pop(name) for name in ("causal",) if name in rules}
    v = case.v.copy()
    v[..., 0, 0, 0] = np.nan
    (out, gradients), (wanted, wanted_gradients) = both_ways(case.shape, (case.q, case.k, v, {}), rules, seed, **static)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(wanted))
    equal_within(gradients, wanted_gradients, 64)


# dropout


@functools.partial(jax.jit, static_argnames="block")
def after_dropout(q, k, v, key, block):
    """A sum, and its gradients."""
    attend = lambda q, k, v: blockwise_attention(
        q, k, v, causal=True, q_offset=0, dropout_rate=0.4, dropout_key=key, block=block
    ).sum()
    return jax.value_and_grad(attend, (0, 1, 2))(q, k, v)


@given(few_shapes, seeds)
def test_the_gradient_is_that_of_the_very_weights_that_dropout_left(shape, seed):
    """Against differences of the function itself, for the materialised form draws other bits."""
    with jax.enable_x64(True):
        x, direction = (qkv(shape, seed + i, "float64") for i in range(2))
        moved = lambda step: (a + step * b for a, b in zip(x, direction, strict=True))
        values = [after_dropout(*moved(step), jax.random.key(seed), CUTS[shape])[0] for step in (1e-6, -1e-6)]
        _, gradients = after_dropout(*x, jax.random.key(seed), CUTS[shape])
        slope = sum((a * b).sum() for a, b in zip(gradients, direction, strict=True))
        np.testing.assert_allclose((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dropped", [{"dropout_rate": 0.5}, {"dropout_key": 0}], ids=str)
def test_dropout_without_a_key_or_a_rate_does_nothing(dropped):
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    dropped = {name: jax.random.key(x) if name == "dropout_key" else x for name, x in dropped.items()}
    np.testing.assert_array_equal(blockwise_attention(q, k, v, **dropped), blockwise_attention(q, k, v))


def test_dropout_keeps_the_mean_and_differs_between_rows_heads_and_blocks():
    shape, rate = AttentionShape((3,), 8, 8, 2, 2, 4, 8), 0.25
    q, k, _ = map(jnp.asarray, qkv(shape, 0))
    v = jnp.broadcast_to(np.eye(8, dtype="float32")[:, None], (3, 8, 2, 8))  # the output is the weights
    attend = jax.jit(
        jax.vmap(lambda key: blockwise_attention(q * 0, k, v, dropout_rate=rate, dropout_key=key, block=(4, 4)))
    )
    kept = np.array(attend(jax.random.split(jax.random.key(0), 500)) > 0)  # [draws, B, T, N, S]
    assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / kept.size) ** 0.5
    parts = kept.swapaxes(2, 3).reshape(500, 3, 2, 2, 4, 2, 4).transpose(1, 2, 3, 5, 0, 4, 6).reshape(24, -1)
    agreement = np.array([[(a == b).mean() for a in parts] for b in parts])
    expected = rate**2 + (1 - rate) ** 2
    assert (abs(agreement - expected)[~np.eye(24, dtype=bool)] < 0.05).all()


# blocks


@given(shapes, seeds)
def test_a_masks_part_is_the_part_of_the_mask(shape, seed):
    mask, grid = composed(shape, seed), Grid((*shape.batch, shape.N, shape.T, shape.S), 1)
    whole = np.broadcast_to(mask.cells(grid), grid.shape)
    rng = np.random.default_rng([seed, 9])
    for _ in range(3):
        row = tuple(int(rng.integers(n)) for n in shape.batch)
        heads, queries, keys = (
            (int(rng.integers(n - length + 1)), length)
            for n, length in ((shape.N, 1), (shape.T, min(2, shape.T)), (shape.S, min(3, shape.S)))
        )
        block = Block(row, heads, queries, keys)
        part = whole[row][tuple(slice(first, first + length) for first, length in (heads, queries, keys))]
        got = mask.cut(block).cells(block.grid(grid))
        np.testing.assert_array_equal(np.broadcast_to(got, part.shape), part)


def test_a_block_is_found_without_a_look_for_places_that_count_from_the_end():
    x = jnp.zeros((2, 3, 4, 5))

    def added(row, head, query, key):
        return Block((row,), (head, 1), (query, 2), (key, 3)).add(x, jnp.ones((1, 2, 3)), "NTS")

    program = jax.make_jaxpr(added)(*[jnp.int32(0)] * 4)
    assert not {"lt", "select_n"} & {equation.primitive.name for equation in program.eqns}


@given(shapes, seeds, st.integers(-3, 9), st.sampled_from([0, 1, 3, 2**31 - 1]), st.sampled_from([0, 1, 2**31 - 1]))
def test_outside_of_its_span_a_mask_allows_nothing(shape, seed, offset, left, right):
    prefix = Prefix(seed % (shape.S + 1))
    for mask in (Causal(), Window(left, right), prefix, Causal() & Window(left, right), Window(left, right) | prefix):
        grid = Grid((1, shape.T, shape.S), offset)
        begin, end = mask.span(jnp.int32(offset), jnp.int32(offset + shape.T - 1), shape.S)
        cells = np.broadcast_to(mask.cells(grid), grid.shape)[0]
        outside = (np.arange(shape.S) < begin) | (np.arange(shape.S) >= end)
        assert not cells[:, outside].any()


def test_sums_over_queries_are_laid_out_for_their_product():
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    gradient = jax.grad(lambda k: blockwise_attention(q, k, v).sum())
    assert str(jax.make_jaxpr(gradient)(k)).count("optimization_barrier") == 2  # of keys and of values


def test_only_a_length_that_leaves_a_rest_costs_a_choice():
    def choices(queries, keys):
        q, k = jnp.ones((queries, 1, 4)), jnp.ones((keys, 1, 4))
        loss = lambda q, k: blockwise_attention(q, k, k, block=(2, 2)).sum()
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(q, k)).count("select_n")

    assert choices(4, 4) == choices(4, 2) < min(choices(4, 5), choices(5, 4))


def test_only_arrays_are_looked_at_to_skip_a_block():
    """By positions alone it is known before."""
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    conditions = [
        str(jax.make_jaxpr(functools.partial(blockwise_attention, mask=mask))(q, k, v)).count("cond[")
        for mask in (Window(1, 1), Causal(), Causal() & Padding(jnp.ones((2, 3), bool)))
    ]
    assert conditions[0] == conditions[1] == conditions[2] - 1


@pytest.mark.parametrize(
    ("mask", "keys", "span"),
    [
        (Causal() & Window(3, 0), 50, (7, 13)),
        (Causal() & Window(3, 2), 8, (7, 8)),
        (Causal() & Window(2**40, 2**40), 50, (0, 13)),
        (Window(0, 1) & Window(3, 0), 50, (10, 13)),
        (Window(0, 1) | Window(3, 0), 50, (7, 14)),
        (Causal() | Prefix(20), 50, (0, 20)),
    ],
    ids=str,
)
def test_the_span_of_a_mask_is_tight(mask, keys, span):
    begin, end = mask.span(jnp.int32(10), jnp.int32(12), keys)
    assert (int(begin), int(end)) == span


def test_spans_hold_at_the_last_position():
    last = jnp.int32(2**31 - 1)
    for mask in (Causal(), Window(5, 5), Window(2**31 - 1, 2**31 - 1)):
        assert int(mask.span(last, last, 8)[1]) == 8


def counted_visits(monkeypatch, *methods):
    """How often each of these methods of a task has run."""
    seen = dict.fromkeys(methods, 0)

    def counted(name, method):
        def call(*args):
            jax.debug.callback(lambda: seen.update({name: seen[name] + 1}))
            return method(*args)

        return call

    for name in methods:
        monkeypatch.setattr(blockwise._Task, name, counted(name, getattr(blockwise._Task, name)))
    return seen


@pytest.mark.parametrize(("mask", "visits"), [(Causal(), 10), (Window(2, 0), 7), (Prefix(3), 8), (~Causal(), 16)])
def test_blocks_that_no_position_may_see_are_not_computed(mask, visits, monkeypatch):
    """Of 4 x 4 blocks, forward and backward."""
    seen = counted_visits(monkeypatch, "gather", "pull")
    q, k, v = map(jnp.asarray, qkv(AttentionShape((1,), 8, 8, 1, 1, 2, 2), 0))
    attend = lambda q: blockwise_attention(q, k, v, mask=mask, block=(2, 2)).sum()
    jax.block_until_ready(jax.grad(attend)(q))
    jax.effects_barrier()
    assert seen == {"gather": visits, "pull": visits}


NARROW, WIDE = (512, 512), (512, 2048)


@pytest.mark.parametrize(
    ("composed", "block"),
    [
        (lambda real: Causal(), NARROW),
        (lambda real: Window(600, 600), NARROW),
        (lambda real: Prefix(3), NARROW),
        (lambda real: Causal() & real, NARROW),
        (lambda real: Causal() | real, WIDE),
        (lambda real: ~Causal(), WIDE),
        (lambda real: real & ~real, WIDE),
        (lambda real: None, WIDE),
    ],
)
def test_blocks_are_narrow_where_positions_may_rule_them_out(composed, block):
    x = jax.ShapeDtypeStruct((1, 4096, 2, 4), jnp.float32)
    mask = composed(Padding(jnp.ones((1, 4096), bool)))
    text = lambda **kw: jax.jit(functools.partial(blockwise_attention, mask=mask, **kw)).lower(x, x, x).as_text()
    assert text() == text(block=block)
    assert (text() == text(block=NARROW)) is (block == NARROW)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "block", "visits"),
    [
        (8, 8, 4, 4, (4, 4), 2 * 4),
        (8, 8, 3, 3, (4, 4), 3 * 4),
        (8, 8, 4, 2, (4, 4), 4 * 4),
        (512, 1024, 2, 2, (1024, 512), 1 * 2),
        (1024, 512, 2, 2, (1024, 512), 2 * 1),
        (513, 512, 2, 2, (513, 513), 2 * 1),
    ],
)
def test_two_heads_are_computed_at_a_time_where_blocks_are_small(
    queries, keys, heads, key_heads, block, visits, monkeypatch
):
    seen = counted_visits(monkeypatch, "gather")
    q, k = jnp.zeros((1, queries, heads, 2)), jnp.zeros((1, keys, key_heads, 2))
    jax.block_until_ready(blockwise_attention(q, k, k, block=block))
    jax.effects_barrier()
    assert seen == {"gather": visits}


# what it is for


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        attend = lambda q, k, v: dot_product_attention(q, k, v, causal=True, implementation=implementation).sum()
        return jax.jit(jax.grad(attend, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192, "blockwise") < 20 * 2**20
    assert temporaries(8192, "materialised") > 20 * temporaries(8192, "blockwise")


def test_large_sizes_are_computed_by_blocks_unless_told_otherwise():
    x = jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32)
    text = lambda **kw: jax.jit(functools.partial(dot_product_attention, **kw)).lower(x, x, x).as_text()
    assert text() == text(implementation="blockwise") != text(implementation="materialised")


def test_the_materialised_form_has_derivatives_of_every_order_and_the_other_says_that_it_has_not():
    q, k, v = map(jnp.asarray, qkv(SQUARE_SHAPES[0], 0))
    attend = lambda q, **kw: dot_product_attention(q, k, v, **kw).sum()
    jax.jvp(functools.partial(attend, implementation="materialised"), (q,), (q,))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(functools.partial(attend, implementation="blockwise"), (q,), (q,))


@pytest.mark.parametrize("positions", ["shaw", pytest.param("rotary", marks=pytest.mark.slow)])
@given(seeds)
@settings(max_examples=2)
def test_models_of_either_implementation_have_the_same_outputs_and_gradients(positions, seed):
    """In both frontends, and beside the weights on request, which only the materialised form has."""
    with jax.enable_x64(True):
        config = CONFIG.replace(
            positions=positions, attention_window=(2, 1), attention_sinks=True, relative_distance=5,
            dtype="float64", param_dtype="float64",
        )  # fmt: skip
        weights, batch = random_weights(config, 0), random_batch(config, seed)
        for package in FRONTENDS.values():
            found = [model_numbers(package, config.replace(attention_implementation=name), weights, batch)
                     for name in IMPLEMENTATIONS]  # fmt: skip
            assert not same_bits(*found)  # for else it would be one form twice
            for a, b in zip(*map(jax.tree.leaves, found), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, np.abs(b).max(initial=0)))


def model_numbers(package, config, weights, batch):
    """Outputs, with and without weights, and gradients."""

    @jax.jit
    def numbers(weights, batch):
        def build(weights):
            return package.evaluation(package.from_weights(config, weights))

        gradients, model = jax.grad(lambda weights: package.loss_fn(build(weights), batch)[0])(weights), build(weights)
        masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
        shown = model.run(batch.source, batch.inputs, **masks, return_weights=True)
        return model(batch.source, batch.inputs, **masks), shown, gradients

    return numbers(weights, batch)
