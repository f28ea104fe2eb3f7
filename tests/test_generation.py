"""Laws of generating with either frontend: every way of decoding, by whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.constraints import Constraints
from core.sampling import Sampling
from tests.frontends import CONFIG, FRONTENDS, random_weights

every_frontend = pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
every_model = pytest.mark.parametrize("name", ["Transformer", "DecoderOnlyTransformer"])
SOURCE = jnp.asarray([[3, 4, 5, 6], [7, 8, 0, 0], [9, 3, 10, 0]], jnp.int32)
REAL = SOURCE != 0
RULES = Constraints(no_repeat_ngram=1, min_length=2)


def model_of(package, name, **fields):
    config = CONFIG.replace(target_vocab_size=11, **fields)
    weights = random_weights(config, 4, model_class=name)
    return package.from_weights(config, weights, model_class=getattr(package, name))


def key_of(package, key):
    return {"rngs" if package.__name__ == "nnx_impl" else "key": key}


@every_model
@every_frontend
def test_the_score_of_a_hypothesis_is_that_of_its_tokens(package, name):
    model = model_of(package, name)
    options = {"source_mask": REAL, "max_length": 6, "constraints": RULES}
    found = package.beam_search(model, SOURCE, **options, beam_size=4, n_best=3)
    for i in range(3):
        each = np.asarray(package.score(model, SOURCE, found.tokens[:, i], source_mask=REAL))
        length = np.where((found.tokens[:, i] == 2).any(-1), (found.tokens[:, i] == 2).argmax(-1) + 1, 6)
        np.testing.assert_allclose(each.sum(-1) / ((5 + length) / 6) ** 0.6, found.scores[:, i], rtol=0, atol=1e-5)
        assert (each[np.arange(6) >= length[:, None]] == 0).all()


@every_model
@every_frontend
def test_a_ragged_batch_is_its_rows_one_by_one(package, name):
    """By beams and drawn with a key for each row."""
    model, keys = model_of(package, name), jax.random.split(jax.random.key(0), 3)
    beams = {"max_length": 5, "beam_size": 3, "n_best": 2}
    drawn = {"max_length": 5, "sampling": Sampling(top_p=0.9)}
    found = package.beam_search(model, SOURCE, source_mask=REAL, **beams)
    said = package.generate(model, SOURCE, source_mask=REAL, **drawn, **key_of(package, keys))
    for i, length in [*enumerate(REAL.sum(-1).tolist())][1:]:  # the first row is of full length
        alone = SOURCE[i : i + 1, :length]
        one = package.beam_search(model, alone, **beams)
        np.testing.assert_array_equal(found.tokens[i], one.tokens[0])
        np.testing.assert_allclose(found.scores[i], one.scores[0], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(
            said[i], package.generate(model, alone, **drawn, **key_of(package, keys[i : i + 1]))[0]
        )


@every_model
@every_frontend
def test_all_that_only_take_the_likeliest_agree(package, name):
    model, options = model_of(package, name), {"source_mask": REAL, "max_length": 6, "constraints": RULES}
    greedy = package.generate(model, SOURCE, **options)
    key = key_of(package, jax.random.key(5))
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1)):
        np.testing.assert_array_equal(package.generate(model, SOURCE, **options, sampling=sampling, **key), greedy)
    np.testing.assert_array_equal(package.beam_search(model, SOURCE, **options, beam_size=1).tokens[:, 0], greedy)


@every_frontend
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_a_prompt_read_in_chunks_is_the_prompt(package, chunk):
    model, options = model_of(package, "DecoderOnlyTransformer"), {"source_mask": REAL, "max_length": 5}
    whole = package.generate(model, SOURCE, **options)
    np.testing.assert_array_equal(package.generate(model, SOURCE, **options, prefill_chunk=chunk), whole)
    target = jnp.asarray([[4, 5, 6]] * 3, jnp.int32)
    found = [package.score(model, SOURCE, target, source_mask=REAL, prefill_chunk=c) for c in (chunk, None)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@every_frontend
def test_an_end_in_a_prompt_ends_nothing(package):
    """Documents or turns came before. Neither 2 nor 10 is said here, so it is all one which of them is the end."""
    model = model_of(package, "DecoderOnlyTransformer")
    prompt = jnp.asarray([[3, 2, 4], [2, 3, 2]], jnp.int32)

    def said(eos_id, other):
        options = {"max_length": 4, "eos_id": eos_id, "constraints": Constraints(min_length=4, banned=(other,))}
        return package.generate(model, prompt, **options), *package.beam_search(model, prompt, **options)

    for found, wanted in zip(said(2, 10), said(10, 2), strict=True):
        np.testing.assert_array_equal(found, wanted)


@every_frontend
def test_a_score_is_the_log_softmax_of_the_whole_forward_pass(package):
    model = package.evaluation(model_of(package, "Transformer"))
    target = jnp.asarray([[4, 5, 2], [6, 2, 0], [7, 8, 9]], jnp.int32)
    inputs = jnp.concatenate([jnp.ones((3, 1), jnp.int32), target[:, :-1]], axis=1)
    logits = np.float64(model(SOURCE, inputs, source_mask=REAL))
    each = np.take_along_axis(logits, np.asarray(target)[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    mask = np.array([[True] * 3, [True, True, False], [True] * 3])
    np.testing.assert_allclose(package.score(model, SOURCE, target, source_mask=REAL), each * mask, rtol=0, atol=1e-5)
    given = package.score(model, SOURCE, target, source_mask=REAL, target_mask=jnp.asarray(~mask))
    np.testing.assert_allclose(given, each * ~mask, rtol=0, atol=1e-5)


@every_frontend
def test_what_cannot_be_decoded_is_named_with_the_rule(package, untyped):
    pair, alone, key = model_of(package, "Transformer"), model_of(package, "DecoderOnlyTransformer"), jax.random.key(0)
    for call, message in (
        (lambda: package.generate(pair, SOURCE, max_length=2, prefix=True), "are for decoder-only models"),
        (lambda: package.generate(pair, SOURCE, max_length=2, prefill_chunk=2), "are for decoder-only models"),
        (
            lambda: package.generate(alone, SOURCE, source_mask=REAL, max_length=2, prefix=True, prefill_chunk=2),
            "see each other, so they are read at once; leave out prefill_chunk",
        ),
        (lambda: package.generate(alone, SOURCE, max_length=2, prefill_chunk=0), "prefill_chunk must be an integer of"),
        (lambda: package.generate(pair, SOURCE, max_length=2, sampling=Sampling()), "go together"),
        (lambda: package.generate(pair, SOURCE, max_length=2, **key_of(package, key)), "go together"),
        (
            lambda: package.generate(pair, SOURCE, max_length=2, sampling=Sampling(0.0, 0), **key_of(package, key)),
            "top_k must be an integer of at least 1, got 0",
        ),
        (
            lambda: package.generate(
                pair, SOURCE, max_length=2, sampling=Sampling(), **key_of(package, jax.random.split(key, 2))
            ),
            r"one key or one for each row, \(3,\), got keys of shape \(2,\)",
        ),
        (lambda: package.beam_search(pair, SOURCE, max_length=2, beam_size=0), "beam_size must be at least 1, got 0"),
        (lambda: package.beam_search(pair, SOURCE, max_length=-1), "max_length must be at least 0, got -1"),
        (
            lambda: package.beam_search(pair, SOURCE, max_length=2, constraints=Constraints(banned=(11,))),
            r"banned must lie in the target vocabulary \[0, 11\), got 11",
        ),
        (lambda: package.score(pair, SOURCE, SOURCE + 9), r"target must lie in \[0, 11\)"),
        (lambda: package.score(pair, SOURCE, SOURCE, target_mask=REAL[:1]), "target_mask must be bool and of target"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    legacy = key_of(package, jax.random.key_data(key))
    with pytest.raises(TypeError, match=r"keys must be typed, as jax\.random\.key makes them, got uint32"):
        package.generate(pair, SOURCE, max_length=2, sampling=Sampling(), **legacy)


@every_frontend
@every_model
def test_a_loop_begins_with_a_token_and_a_length_that_can_be(package, name, untyped):
    """Before anything is computed; a prompt has its first token itself."""
    model = package.evaluation(model_of(package, name))
    for options, error, message in (
        ({"max_length": -1}, ValueError, "max_length must be at least 0, got -1"),
        ({"max_length": 2.7}, TypeError, "max_length must be an integer, got 2.7"),
        ({"bos_id": 11}, ValueError, r"bos_id must lie in the target vocabulary \[0, 11\), got 11"),
        ({"bos_id": 1.9}, TypeError, "bos_id must be an integer, got 1.9"),
    ):
        if "bos_id" not in options or name == "Transformer":
            with pytest.raises(error, match=message):
                model.start(SOURCE, **{"max_length": 2, **options})


@every_frontend
@every_model
def test_numbers_that_are_no_integers_are_named(package, name, untyped):
    model = model_of(package, name)
    for argument, call in (
        ("max_length", package.generate),
        ("beam_size", package.beam_search),
        ("n_best", package.beam_search),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be an integer, got 2.7"):
            call(model, SOURCE, source_mask=REAL, **{"max_length": 2, argument: 2.7})


@every_frontend
def test_a_cache_goes_with_its_model_and_its_batch(package, untyped):
    pair, one = (package.evaluation(model_of(package, name)) for name in ("Transformer", "DecoderOnlyTransformer"))
    deep, wide, low = (
        package.evaluation(model_of(package, "Transformer", **fields))
        for fields in ({"num_decoder_layers": 2}, {"d_model": 16}, {"dtype": "bfloat16"})
    )
    token, rows = jnp.ones((3, 1), jnp.int32), r"got 1 layers and rows \(3,\) for"
    for begun, model, tokens, message in (
        (pair, pair, token[:2], rf"a cache goes with its model and its batch, {rows} 1 layers and rows \(2,\)"),
        (pair, deep, token, rf"a cache goes with its model and its batch, {rows} 2 layers and rows \(3,\)"),
        (pair, wide, token, r"k must fit the cache in all but its length, got float32\[3, 1, 2, 8\]"),
        (pair, low, token, r"k must fit the cache in all but its length, got bfloat16.*for a cache of float32"),
        (one, pair, token, "a block with cross-attention needs a memory, and one without takes none"),
        (pair, one, token, "a block with cross-attention needs a memory, and one without takes none"),
        (pair, pair, token.repeat(4, 1), "the cache holds 3 tokens a row, 0 are there and 4 more came"),
    ):

        def step(begun=begun, model=model, tokens=tokens):
            return model.decode_step(tokens, begun.start(SOURCE, max_length=3)[1])

        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step)


@every_frontend
def test_a_memory_is_that_of_its_source_alone(package):
    """Another source in row 1 changes what is said in row 1, and nothing else of the memory or the logits."""

    @jax.jit
    def said(weights, source):
        model = package.evaluation(package.from_weights(CONFIG, weights))
        _, cache = model.start(source, source_mask=REAL, max_length=3)
        return cache.memory, model.decode_step(jnp.ones((3, 1), jnp.int32), cache)[0]

    weights, other = random_weights(CONFIG, 4), np.arange(3) == 1
    before, after = (jax.tree.leaves(said(weights, source)) for source in (SOURCE, SOURCE.at[1, 0].set(3)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[~other], b[~other])
        assert (a[other] != b[other]).any()


TRACED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: TRACED.append(about.get("fun_name")) if event.endswith("jaxpr_trace_duration") else None
)


@every_frontend
def test_numbers_of_any_type_are_the_same_program(package, untyped):
    """One trace for a Python number, one of NumPy and one of JAX."""
    model = model_of(package, "Transformer")

    def say(length, temperature, p):
        TRACED.clear()
        sampling = Sampling(temperature, 4, p)
        package.generate(model, SOURCE, max_length=length, sampling=sampling, **key_of(package, jax.random.key(0)))
        return [name for name in TRACED if "_generate" in str(name)]

    assert say(2, 0.75, 0.5)
    for length, temperature, p in (
        (np.int64(2), np.float32(0.5), 0.75),
        (jnp.int32(2), jnp.asarray(1.5), jnp.float32(1)),
    ):
        assert not say(length, temperature, p)
