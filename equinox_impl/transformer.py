"""The encoder-decoder, the encoder-only, the decoder-only model and the classifier, as Equinox modules."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from core.cache import DecoderCache
from core.config import MaybeNone, TransformerConfig
from core.constraints import check_id
from core.decoding import BOS, check_max_length, prefill, prompt_lengths, whole
from core.layers import masked_mean, site_keys, source_vectors
from core.masks import Offset, combine, padding, pair_segments, segment_positions, segments
from equinox_impl.layers import Embedding, Linear, Unembedding
from equinox_impl.stacks import Decoder, Encoder


class Transformer(eqx.Module):
    """The encoder-decoder of Vaswani et al. (2017).

    >>> config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=16)
    >>> model = eqx.nn.inference_mode(Transformer(config, key=jax.random.key(0)))
    >>> model(jnp.array([[1, 2, 3]]), jnp.array([[1, 2]])).shape
    (1, 2, 9)
    """

    config: TransformerConfig = eqx.field(static=True)
    decoder: Decoder
    encoder: Encoder
    output_proj: Unembedding | MaybeNone
    source_embedding: Embedding | MaybeNone
    target_embedding: Embedding

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = iter(site_keys(key, 5))
        source, target = config.vocab_size("source"), config.vocab_size("target")
        self.config = config
        table = functools.partial(Embedding, scale=config.embedding_scale, param_dtype=config.param_dtype)
        self.decoder = Decoder(config, key=next(keys))
        self.encoder = Encoder(config, key=next(keys))
        self.output_proj = None
        if config.tie_embeddings == "none":
            self.output_proj = Unembedding(config.d_model, target, param_dtype=config.param_dtype, key=next(keys))
        self.source_embedding = None
        if config.tie_embeddings != "all":
            self.source_embedding = table(source, config.d_model, key=next(keys))
        self.target_embedding = table(target, config.d_model, key=next(keys))

    def __call__(
        self,
        source: Integer[Array, "*B S"],
        target: Integer[Array, "*B T"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        target_mask: Bool[Array, "*B T"] | None = None,
        source_segments: Integer[Array, "*B S"] | None = None,
        target_segments: Integer[Array, "*B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T V"]:
        """Logits of the token after each target token; masks are True at real tokens.

        Segment ids tell apart pairs that are packed into one row: a target reads the source of its own id.
        """
        return self.run(
            source, target, source_mask=source_mask, target_mask=target_mask, source_segments=source_segments,
            target_segments=target_segments, key=key,
        )[0]  # fmt: skip

    def run(
        self,
        source: Integer[Array, "*B S"],
        target: Integer[Array, "*B T"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        target_mask: Bool[Array, "*B T"] | None = None,
        source_segments: Integer[Array, "*B S"] | None = None,
        target_segments: Integer[Array, "*B T"] | None = None,
        return_weights: bool = False,
        project: bool = True,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B T V"], dict[str, Any]]:
        """The same, and if asked for every attention's weights, before dropout, by the name of its module.

        Not projected, the vectors that `logits` would read take the place of the logits.
        """
        keys = site_keys(key, 2)
        memory_mask, own = padding(source_mask, source.shape), segments(source_segments, source.shape)
        memory, encoder = self.encoder.run(
            self.embed_source(source), mask=combine(memory_mask, own),
            positions=None if source_segments is None else segment_positions(source_segments),
            return_weights=return_weights, key=keys[0],
        )  # fmt: skip
        across = pair_segments(target_segments, source_segments)
        x, decoder = self.decoder.run(
            self.embed_target(target), memory,
            mask=combine(padding(target_mask, target.shape), segments(target_segments, target.shape)),
            memory_mask=combine(memory_mask, across),
            positions=None if target_segments is None else segment_positions(target_segments),
            return_weights=return_weights, key=keys[1],
        )  # fmt: skip
        extras = {f"encoder.{name}": value for name, value in encoder.items()}
        return self.logits(x) if project else x, extras | {f"decoder.{name}": value for name, value in decoder.items()}

    def encode(
        self, source: Integer[Array, "*B S"], *, source_mask: Bool[Array, "*B S"] | None = None
    ) -> Float[Array, "*B S D"]:
        """The memory of a source, for use in evaluation."""
        return self.encoder(self.embed_source(source), mask=padding(source_mask, source.shape))

    def start(
        self,
        source: Integer[Array, "*B S"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        max_length: int,
        bos_id: int = BOS,
    ) -> tuple[Integer[Array, "*B"], DecoderCache]:
        """What a decoding loop begins with: each row's first token, and the cache that holds its source."""
        check_id("bos_id", whole("bos_id", bos_id), self.config.vocab_size("target"))
        check_max_length(max_length)
        memory, mask = self.encode(source, source_mask=source_mask), padding(source_mask, source.shape)
        cache = self.decoder.init_cache(source.shape[:-1], max_length, memory, memory_mask=mask)
        return jnp.full(source.shape[:-1], bos_id, jnp.int32), cache

    def decode_step(
        self, tokens: Integer[Array, "*B T"], cache: DecoderCache
    ) -> tuple[Float[Array, "*B T V"], DecoderCache]:
        """Logits after each of T more tokens, and the grown cache."""
        x, cache = self.decoder.step(self.embed_target(tokens), cache)
        return self.logits(x), cache

    def embed_source(self, source: Integer[Array, "*B S"]) -> Float[Array, "*B S D"]:
        """Vectors of the source tokens, from the joint table if there is one."""
        if self.source_embedding is None:
            return self.embed_target(source)
        with jax.named_scope("source_embedding"):
            return self.source_embedding(source)

    @jax.named_scope("target_embedding")
    def embed_target(self, target: Integer[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Vectors of the target tokens."""
        return self.target_embedding(target)

    @jax.named_scope("logits")
    def logits(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
        """Over the target vocabulary, by the tied table or by a projection of its own."""
        return self.target_embedding.attend(x) if self.output_proj is None else self.output_proj(x)


class EncoderOnlyTransformer(eqx.Module):
    """Every token sees every other: logits over the source vocabulary, as in masked language modelling."""

    config: TransformerConfig = eqx.field(static=True)
    embedding: Embedding
    encoder: Encoder
    output_proj: Unembedding | MaybeNone

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = iter(site_keys(key, 3))
        vocab, width = config.vocab_size("source"), config.d_model
        self.config = config
        self.embedding = Embedding(
            vocab, width, scale=config.embedding_scale, param_dtype=config.param_dtype, key=next(keys)
        )
        self.encoder = Encoder(config, key=next(keys))
        self.output_proj = None
        if config.tie_embeddings == "none":
            self.output_proj = Unembedding(width, vocab, param_dtype=config.param_dtype, key=next(keys))

    def __call__(
        self,
        source: Integer[Array, "*B S"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        source_segments: Integer[Array, "*B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B S V"]:
        """Logits at each token; the mask is True at real ones, segment ids tell apart what is packed into one row."""
        return self.run(source, source_mask=source_mask, source_segments=source_segments, key=key)[0]

    def run(
        self,
        source: Integer[Array, "*B S"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        source_segments: Integer[Array, "*B S"] | None = None,
        return_weights: bool = False,
        project: bool = True,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B S V"], dict[str, Any]]:
        """The same, and if asked for every attention's weights by the name of its module.

        Not projected, the vectors that `logits` would read take the place of the logits.
        """
        x, extras = self.encoder.run(
            self.embedding(source),
            mask=combine(padding(source_mask, source.shape), segments(source_segments, source.shape)),
            positions=None if source_segments is None else segment_positions(source_segments),
            return_weights=return_weights, key=key,
        )  # fmt: skip
        return self.logits(x) if project else x, {f"encoder.{name}": value for name, value in extras.items()}

    @jax.named_scope("logits")
    def logits(self, x: Float[Array, "*B S D"]) -> Float[Array, "*B S V"]:
        """Over the source vocabulary, by the tied table or by a projection of its own."""
        return self.embedding.attend(x) if self.output_proj is None else self.output_proj(x)


class DecoderOnlyTransformer(eqx.Module):
    """A causal language model over the target vocabulary."""

    config: TransformerConfig = eqx.field(static=True)
    decoder: Decoder
    embedding: Embedding
    output_proj: Unembedding | MaybeNone

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = iter(site_keys(key, 3))
        vocab, width = config.vocab_size("target"), config.d_model
        self.config = config
        self.decoder = Decoder(config, cross_attention=False, key=next(keys))
        self.embedding = Embedding(
            vocab, width, scale=config.embedding_scale, param_dtype=config.param_dtype, key=next(keys)
        )
        self.output_proj = None
        if config.tie_embeddings == "none":
            self.output_proj = Unembedding(width, vocab, param_dtype=config.param_dtype, key=next(keys))

    def __call__(
        self,
        target: Integer[Array, "*B T"],
        *,
        target_mask: Bool[Array, "*B T"] | None = None,
        target_segments: Integer[Array, "*B T"] | None = None,
        prefix: Offset | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B T V"]:
        """Logits of the token after each; the mask is True at real ones, segment ids tell apart what is packed.

        With `prefix`, one number or one a row, that many first tokens see each other (a prefix language model).
        """
        return self.run(
            target, target_mask=target_mask, target_segments=target_segments, prefix=prefix, key=key
        )[0]  # fmt: skip

    def run(
        self,
        target: Integer[Array, "*B T"],
        *,
        target_mask: Bool[Array, "*B T"] | None = None,
        target_segments: Integer[Array, "*B T"] | None = None,
        prefix: Offset | None = None,
        history: tuple[Float[Array, "*B M D"], ...] | None = None,
        return_weights: bool = False,
        project: bool = True,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B T V"], dict[str, Any]]:
        """The same, and if asked for every attention's weights by the name of its module.

        A configuration with a history_length adds "decoder.history", which is `history` of the segment that follows.

        Not projected, the vectors that `logits` would read take the place of the logits.
        """
        mask = combine(padding(target_mask, target.shape), segments(target_segments, target.shape))
        if history is not None and (mask is not None or prefix is not None):
            raise ValueError("a history continues whole rows: masks, segments and prefix go without")
        x, extras = self.decoder.run(
            self.embedding(target), mask=mask, prefix=prefix, history=history,
            positions=None if target_segments is None else segment_positions(target_segments),
            return_weights=return_weights, key=key,
        )  # fmt: skip
        return self.logits(x) if project else x, {f"decoder.{name}": value for name, value in extras.items()}

    def start(
        self,
        source: Integer[Array, "*B T"],
        *,
        source_mask: Bool[Array, "*B T"] | None = None,
        prefix: bool = False,
        chunk: int | None = None,
        max_length: int,
        bos_id: int = BOS,
    ) -> tuple[Integer[Array, "*B"], DecoderCache]:
        """What a decoding loop begins with: the prompt's last token, and the cache of those before it.

        Each row of the prompt has its real tokens first; `bos_id` is the prompt's own affair. With `prefix` its
        tokens see each other; otherwise it may be read `chunk` tokens at a time.
        """
        check_max_length(max_length)
        lengths = prompt_lengths(source_mask, source)
        capacity = source.shape[-1] + max_length
        cache = self.decoder.init_cache(source.shape[:-1], capacity, prefix=lengths if prefix else None)

        def grow(tokens: Array, cache: DecoderCache, count: Array) -> DecoderCache:
            return self.decoder.step(self.embedding(tokens), cache, count=count)[1]

        cache = prefill(grow, source, cache, lengths=lengths - 1, chunk=chunk)
        return jnp.take_along_axis(source, lengths[..., None] - 1, axis=-1)[..., 0], cache

    def decode_step(
        self, tokens: Integer[Array, "*B T"], cache: DecoderCache
    ) -> tuple[Float[Array, "*B T V"], DecoderCache]:
        """Logits after each of T more tokens, and the grown cache."""
        x, cache = self.decoder.step(self.embedding(tokens), cache)
        return self.logits(x), cache

    @jax.named_scope("logits")
    def logits(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
        """Over the target vocabulary, by the tied table or by a projection of its own."""
        return self.embedding.attend(x) if self.output_proj is None else self.output_proj(x)


class Classifier(eqx.Module):
    """An encoder of vectors, such as the patches of an image: logits over the classes, `target_vocab_size` of them.

    Of the encoder's outputs it reads the mean over the real ones; a row that has none gets logits of 0.

    >>> config = TransformerConfig(source_features=4, target_vocab_size=3, d_model=8, num_heads=2, d_ff=16)
    >>> model = eqx.nn.inference_mode(Classifier(config, key=jax.random.key(0)))
    >>> model(jnp.ones((1, 5, 4))).shape
    (1, 3)
    """

    config: TransformerConfig = eqx.field(static=True)
    encoder: Encoder
    output_proj: Unembedding
    source_proj: Linear

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        keys = iter(site_keys(key, 3))
        width, classes = config.source_width, config.vocab_size("target")
        self.config = config
        self.encoder = Encoder(config, key=next(keys))
        self.output_proj = Unembedding(config.d_model, classes, param_dtype=config.param_dtype, key=next(keys))
        self.source_proj = Linear(width, config.d_model, param_dtype=config.param_dtype, key=next(keys))

    def __call__(
        self,
        source: Float[Array, "*B S P"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B C"]:
        """Logits of each row's class; the mask is True at real vectors, and what stands at others does not matter."""
        return self.run(source, source_mask=source_mask, key=key)[0]

    def run(
        self,
        source: Float[Array, "*B S P"],
        *,
        source_mask: Bool[Array, "*B S"] | None = None,
        return_weights: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*B C"], dict[str, Any]]:
        """The same, and if asked for every attention's weights by the name of its module."""
        mask = padding(source_mask, source.shape[:-1])
        vectors = source_vectors(source, source_mask, features=self.config.source_width, dtype=self.config.dtype)
        with jax.named_scope("source_proj"):
            x = self.source_proj(vectors)
        x, extras = self.encoder.run(x, mask=mask, return_weights=return_weights, key=key)
        logits = self.output_proj(masked_mean(x, source_mask))
        return logits, {f"encoder.{name}": value for name, value in extras.items()}
