"""Evaluation mode; generation, beam search and scoring with an Equinox model, jitted and cached."""

import functools
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key

from core.beam_search import Beams, Hypotheses, check_beams
from core.beam_search import beam_search as search
from core.cache import select_beams, spread_beams
from core.constraints import FREE, Constraints
from core.decoding import (
    BOS,
    EOS,
    PAD,
    Prompt,
    Rules,
    check_generation,
    greedy,
    next_tokens,
    prompt_lengths,
    sample,
    until_end,
    whole,
)
from core.layers import check_tokens
from core.losses import token_cross_entropy
from core.sampling import Sampling, as_arrays, check_sampling, row_keys
from equinox_impl.transformer import DecoderOnlyTransformer, Transformer

Model = TypeVar("Model", bound=eqx.Module)


def evaluation(model: Model) -> Model:
    """The model with dropout off; it shares the parameters."""
    return eqx.nn.inference_mode(model)


def generate(
    model: Transformer | DecoderOnlyTransformer,
    source: Integer[Array, "*B S"],
    *,
    source_mask: Bool[Array, "*B S"] | None = None,
    prefix: bool = False,
    prefill_chunk: int | None = None,
    max_length: int,
    sampling: Sampling | None = None,
    key: Key[Array, "..."] | None = None,
    constraints: Constraints = FREE,
    forced: Integer[Array, "... P"] | None = None,
    bos_id: int = BOS,
    eos_id: int = EOS,
    pad_id: int = PAD,
) -> Integer[Array, "*B L"]:
    """Token after token: L = max_length tokens a row, `eos_id`, then padding. Dropout is off.

    Without `sampling` each is the likeliest, with it drawn; then `key` is a key, or a key for each row.
    `forced` says which token must stand where, -1 for any: a row that begins with given tokens, say. A decoder-only
    model continues the prompt `source`, whose rows have their real tokens first; ends in it, of earlier documents or
    turns, are tokens like others, and only a generated one ends a row. With `prefix` the prompt's tokens see each
    other, with `prefill_chunk` it is read that many tokens at a time, to save memory.

    >>> config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=16)
    >>> model = Transformer(config, key=jax.random.key(0))
    >>> generate(model, jnp.array([[3, 4, 5]]), max_length=4).shape
    (1, 4)
    >>> sampling = Sampling(temperature=0.8, top_p=0.9)
    >>> generate(model, jnp.array([[3, 4, 5]]), max_length=4, sampling=sampling, key=jax.random.key(1)).shape
    (1, 4)
    """
    prompt = Prompt(bool(prefix), prefill_chunk, bos_id)
    rules = Rules(whole("max_length", max_length), constraints, eos_id, pad_id)
    _check(model, source, source_mask, prompt, rules, forced)
    if (sampling is None) != (key is None):
        raise ValueError("sampling and key go together: how tokens are drawn, and the randomness that draws them")
    if sampling is not None and key is not None:
        check_sampling(sampling)
        sampling, key = as_arrays(sampling), row_keys(key, source.shape[:-1])
    return _generate(model, source, source_mask, forced, sampling, key, prompt=prompt, rules=rules)


def beam_search(
    model: Transformer | DecoderOnlyTransformer,
    source: Integer[Array, "*B S"],
    *,
    source_mask: Bool[Array, "*B S"] | None = None,
    prefix: bool = False,
    prefill_chunk: int | None = None,
    max_length: int,
    beam_size: int = 4,
    n_best: int = 1,
    length_penalty: float = 0.6,
    constraints: Constraints = FREE,
    forced: Integer[Array, "... P"] | None = None,
    bos_id: int = BOS,
    eos_id: int = EOS,
    pad_id: int = PAD,
) -> Hypotheses:
    """The n best translations of each source, or continuations of each prompt, and their scores.

    `core.beam_search` says what is searched and how it is scored, `generate` what the other arguments mean.

    >>> config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=16)
    >>> model = Transformer(config, key=jax.random.key(0))
    >>> found = beam_search(model, jnp.array([[3, 4, 5]]), max_length=4, n_best=2)
    >>> found.tokens.shape, found.scores.shape
    ((1, 2, 4), (1, 2))
    """
    beams = Beams(whole("beam_size", beam_size), whole("n_best", n_best), float(length_penalty))
    check_beams(beams)
    prompt = Prompt(bool(prefix), prefill_chunk, bos_id)
    rules = Rules(whole("max_length", max_length), constraints, eos_id, pad_id)
    _check(model, source, source_mask, prompt, rules, forced)
    return _search(model, source, source_mask, forced, prompt=prompt, rules=rules, beams=beams)


def score(
    model: Transformer | DecoderOnlyTransformer,
    source: Integer[Array, "*B S"],
    target: Integer[Array, "*B T"],
    *,
    source_mask: Bool[Array, "*B S"] | None = None,
    target_mask: Bool[Array, "*B T"] | None = None,
    prefix: bool = False,
    prefill_chunk: int | None = None,
    bos_id: int = BOS,
    eos_id: int = EOS,
) -> Float[Array, "*B T"]:
    """The log probability of each target token after all before it, in nats; 0 where `target_mask` is False.

    Without a mask a target goes up to its first `eos_id`. Their sum is the log probability of the row, and exp of
    minus their mean its perplexity.
    """
    prompt = Prompt(bool(prefix), prefill_chunk, bos_id)
    _check(model, source, source_mask, prompt, Rules(target.shape[-1], FREE, eos_id, PAD))
    mask = until_end(target, eos_id) if target_mask is None else target_mask
    if mask.shape != target.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"target_mask must be bool and of target's shape {target.shape}, got {mask.dtype} {mask.shape}"
        )
    check_tokens(jnp.where(mask, target, PAD), model.config.vocab_size("target"), "target")
    return _score(model, source, source_mask, target, mask, prompt=prompt)


def _check(model, source, source_mask, prompt: Prompt, rules: Rules, forced=None) -> None:
    vocab = model.config.vocab_size("target")
    check_generation(vocab, source.shape[:-1], rules, bos_id=prompt.bos_id, forced=forced)
    if isinstance(model, DecoderOnlyTransformer):
        check_tokens(source, vocab, "source")
        prompt_lengths(source_mask, source)
        if prompt.prefix and prompt.chunk is not None:
            raise ValueError("the tokens of a prefix see each other, so they are read at once; leave out prefill_chunk")
        return
    if prompt.prefix or prompt.chunk is not None:
        raise ValueError(
            "prefix and prefill_chunk are for decoder-only models; an encoder reads its source at once, "
            "and its tokens see each other anyway"
        )
    check_tokens(source, model.config.vocab_size("source"), "source")


def _start(model, source, source_mask, prompt: Prompt, max_length: int):
    own = {"prefix": prompt.prefix, "chunk": prompt.chunk} if isinstance(model, DecoderOnlyTransformer) else {}
    return model.start(source, source_mask=source_mask, max_length=max_length, bos_id=prompt.bos_id, **own)


@eqx.filter_jit
def _generate(model, source, source_mask, forced, sampling, keys, *, prompt: Prompt, rules: Rules):
    model = evaluation(model)
    tokens, cache = _start(model, source, source_mask, prompt, rules.max_length)
    choose = greedy if sampling is None else functools.partial(sample, sampling=sampling, keys=keys)
    return choose(model.decode_step, tokens, cache, forced=forced, **rules._asdict())


@eqx.filter_jit
def _search(model, source, source_mask, forced, *, prompt: Prompt, rules: Rules, beams: Beams):
    model = evaluation(model)
    tokens, cache = _start(model, source, source_mask, prompt, rules.max_length)
    options = {**rules._asdict(), **beams._asdict()}
    return search(model.decode_step, tokens, cache, forced=forced, select=select_beams, spread=spread_beams, **options)


@eqx.filter_jit
def _score(model, source, source_mask, target, mask, *, prompt: Prompt):
    model = evaluation(model)
    first, cache = _start(model, source, source_mask, prompt, target.shape[-1])
    logits, _ = model.decode_step(next_tokens(first, target), cache)
    return jnp.where(mask, -token_cross_entropy(logits, target), 0)
