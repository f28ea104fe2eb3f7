"""Evaluation mode, and jitted, cached generation with a Flax NNX model."""

import functools
from typing import TypeVar

from flax import nnx
from jaxtyping import Array, Bool, Integer

from core.decoding import BOS, EOS, PAD, check_generation, greedy, prompt_lengths
from core.layers import check_tokens
from nnx_impl.transformer import DecoderOnlyTransformer, Transformer

Model = TypeVar("Model", bound=nnx.Module)


def evaluation(model: Model) -> Model:
    """A view of the model with dropout off; it shares the parameters."""
    return nnx.view(model, deterministic=True)


def generate(
    model: Transformer | DecoderOnlyTransformer,
    source: Integer[Array, "*B S"],
    *,
    source_mask: Bool[Array, "*B S"] | None = None,
    prefix: bool = False,
    max_length: int,
    bos_id: int = BOS,
    eos_id: int = EOS,
    pad_id: int = PAD,
) -> Integer[Array, "*B L"]:
    """The likeliest next token, again and again: L = max_length tokens a row, `eos_id`, then padding.

    A decoder-only model continues the prompt `source`, whose rows have their real tokens first; with
    `prefix` the prompt's tokens see each other. Dropout is off.

    >>> config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=16)
    >>> model = Transformer(config, rngs=nnx.Rngs(0))
    >>> generate(model, jnp.array([[3, 4, 5]]), max_length=4).shape
    (1, 4)
    """
    ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
    check_generation(model.config.vocab_size("target"), max_length=max_length, **ids)
    if isinstance(model, DecoderOnlyTransformer):
        check_tokens(source, model.config.vocab_size("target"), "source")
        prompt_lengths(source_mask, source)
    else:
        if prefix:
            raise ValueError("prefix is for decoder-only models; the tokens of an encoder see each other anyway")
        check_tokens(source, model.config.vocab_size("source"), "source")
    return _generate(model, source, source_mask, prefix=bool(prefix), max_length=int(max_length), **ids)


@nnx.jit(static_argnames=("prefix", "max_length", "bos_id", "eos_id", "pad_id"))
def _generate(model, source, source_mask, *, prefix, max_length, bos_id, eos_id, pad_id):
    model = evaluation(model)
    start = functools.partial(model.start, prefix=True) if prefix else model.start
    tokens, cache = start(source, source_mask=source_mask, max_length=max_length, bos_id=bos_id)
    return greedy(model.decode_step, tokens, cache, max_length=max_length, eos_id=eos_id, pad_id=pad_id)
