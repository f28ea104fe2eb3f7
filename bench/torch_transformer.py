"""`torch.nn.Transformer` in the sizes of a configuration, and a search with it: the peer that we are compared with.

Its layers are torch's own. Tables, positions and logits, which it lacks, are added as in the paper; so are, for
decoding, a cache of keys and values and beam search, which it lacks too.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from core.beam_search import Hypotheses
from core.config import TransformerConfig
from core.constraints import FREE, Constraints
from core.decoding import BOS, EOS, PAD
from core.positions import sinusoidal
from seq2seq.errors import UserError

_CHOICES = {
    "positions": ("sinusoidal",),
    "activation": ("relu", "gelu"),
    "norm": ("layer_norm",),
    "norm_order": ("post", "pre"),
    "dtype": ("float32", "bfloat16", "float64"),
    "param_dtype": ("float32", "float64"),
}
_MUST_BE_DEFAULT = (
    "num_kv_heads", "value_dim", "attention_scale", "attention_soft_cap", "attention_sinks", "attention_window",
    "qk_norm", "history_length", "feed_forward_bias", "parallel_residual", "stochastic_depth_rate",
)  # fmt: skip


class Transformer(torch.nn.Module):
    """The encoder-decoder; drops where ours drops, so not inside the feed-forward network.

    UserError for a configuration that torch's layers have no place for.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        _check(config)
        self.config = config
        self.layers = torch.nn.Transformer(
            config.d_model,
            config.num_heads,
            custom_encoder=_stack(config, "Encoder", config.num_encoder_layers),
            custom_decoder=_stack(config, "Decoder", config.num_decoder_layers),
            batch_first=True,
        )  # Glorot's initial weights, as ours
        width, target = config.d_model, config.vocab_size("target")
        table = lambda size: torch.nn.Parameter(torch.randn(size, width) / math.sqrt(width))
        self.target_table = table(target)
        self.source_table = self.target_table if config.tie_embeddings == "all" else table(config.vocab_size("source"))
        self.output_table = table(target) if config.tie_embeddings == "none" else self.target_table
        positions = sinusoidal(jnp.arange(config.max_length, dtype=jnp.int32), width, jnp.dtype(config.param_dtype))
        self.register_buffer("positions", torch.tensor(np.asarray(positions)), persistent=False)
        self.dropout = torch.nn.Dropout(config.stack_dropout_rate)
        self.to(getattr(torch, str(config.param_dtype)))

    def forward(self, source, inputs, source_mask, target_mask=None):
        """Logits [B, T, V]; of the R real target tokens alone, [R, V], if a target mask tells which.

        Padding stands at the end of a row, where a causal mask already hides it from real tokens.
        """
        causal = torch.nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=inputs.device)
        x = self.layers(
            self.embed(source, self.source_table), self.embed(inputs, self.target_table),
            tgt_mask=causal.to(self.target_table.dtype), tgt_is_causal=True,
            src_key_padding_mask=~source_mask, memory_key_padding_mask=~source_mask,
        )  # fmt: skip
        return self.logits(x if target_mask is None else x[target_mask])

    def embed(self, tokens, table, start: int = 0):
        """Vectors of tokens that stand at `start` and after."""
        x = functional.embedding(tokens, table) * self.config.embedding_scale
        return self.dropout(x + self.positions[start : start + tokens.shape[1]])

    def logits(self, x):
        """Over the target vocabulary."""
        return functional.linear(x, self.output_table)


def _stack(config: TransformerConfig, side: str, number: int):
    layer = getattr(torch.nn, f"Transformer{side}Layer")(
        config.d_model, config.num_heads, config.d_ff, dropout=config.dropout_rate, activation=config.activation,
        layer_norm_eps=config.norm_epsilon, norm_first=config.norm_order == "pre", batch_first=True,
    )  # fmt: skip
    attention = functools.partial(
        torch.nn.MultiheadAttention, config.d_model, config.num_heads, dropout=config.attention_dropout_rate,
        bias=config.attention_bias, batch_first=True,
    )  # fmt: skip
    layer.self_attn = attention()
    if side == "Decoder":
        layer.multihead_attn = attention()
    layer.dropout = torch.nn.Identity()  # the one inside the feed-forward network
    norm = None if config.norm_order == "post" else torch.nn.LayerNorm(config.d_model, eps=config.norm_epsilon)
    options = {"enable_nested_tensor": False} if side == "Encoder" else {}
    return getattr(torch.nn, f"Transformer{side}")(layer, number, norm, **options)


def _check(config: TransformerConfig) -> None:
    usual = TransformerConfig()
    wanted = _CHOICES | {name: (getattr(usual, name),) for name in _MUST_BE_DEFAULT}
    for name, choices in wanted.items():
        if getattr(config, name) not in choices:
            known = " or ".join(map(repr, choices))
            raise UserError(
                f"torch.nn.Transformer can only be compared where {name} is {known}, got {getattr(config, name)!r}; "
                "train a run with that"
            )


def load_weights(model: Transformer, weights: Mapping[str, np.ndarray]) -> None:
    """Puts weights of ours, by their dotted names, into torch's parameters."""
    state = {}
    tables = {"target_embedding.embedding": "target_table", "source_embedding.embedding": "source_table"}
    for name, value in weights.items():
        parts = name.split(".")
        if name in tables:
            state[tables[name]] = value
        elif name == "output_proj.kernel":
            state["output_table"] = value.T
        elif parts[1] == "norm":
            state[f"layers.{parts[0]}.norm.{_leaf(parts[2])}"] = value
        else:
            side, _, number, *rest = parts
            theirs = _block_name(side, rest)
            if theirs is not None:
                state[f"layers.{side}.layers.{number}.{theirs}"] = value.T
    for name in {name.rpartition(".q_proj.")[0] for name in weights if ".q_proj." in name}:
        side, _, number, part = name.split(".")
        theirs = f"layers.{side}.layers.{number}.{_ATTENTIONS[part]}.in_proj_"
        for leaf in ("kernel", "bias"):
            if f"{name}.q_proj.{leaf}" in weights:
                packed = [weights[f"{name}.{letter}_proj.{leaf}"].T for letter in "qkv"]
                state[theirs + _leaf(leaf)] = np.concatenate(packed)
    for tied in ("source_table", "output_table"):
        if getattr(model, tied) is model.target_table:
            state[tied] = state["target_table"]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()})


_ATTENTIONS = {"attention": "self_attn", "cross_attention": "multihead_attn"}
_LINEARS = {"up_proj": "linear1", "down_proj": "linear2"}


def _leaf(name: str) -> str:
    return "bias" if name == "bias" else "weight"


def _block_name(side: str, parts: list[str]) -> str | None:
    """Torch's name of a block's parameter; None for q, k and v, which it keeps in one."""
    norms = [n for n in ("attention", "cross_attention", "feed_forward") if side == "decoder" or n != "cross_attention"]
    match parts:
        case [("attention" | "cross_attention") as name, "o_proj", leaf]:
            return f"{_ATTENTIONS[name]}.out_proj.{_leaf(leaf)}"
        case ["attention" | "cross_attention", _, _]:
            return None
        case ["feed_forward", projection, leaf]:
            return f"{_LINEARS[projection]}.{_leaf(leaf)}"
        case [norm, leaf]:
            return f"norm{norms.index(norm.removesuffix('_norm')) + 1}.{_leaf(leaf)}"
    raise ValueError(f"torch.nn.Transformer has no place for {'.'.join(parts)}")


class KeysValues(NamedTuple):
    """[B, N, S, H] each."""

    keys: torch.Tensor
    values: torch.Tensor


def keys_values(attention, x) -> KeysValues:
    """What an attention of torch's makes of the vectors that it reads."""
    return KeysValues(*(_heads(attention, x, i) for i in (1, 2)))


def _heads(attention, x, i: int):
    """Queries, keys or values, the i-th third of the packed projection."""
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[i]
    projected = functional.linear(x, attention.in_proj_weight.chunk(3)[i], bias)
    return projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def attend(attention, x, known: KeysValues, mask=None):
    """[B, T, D] for the queries x; the mask, True where a query may look, broadcasts to [B, N, T, S]."""
    out = functional.scaled_dot_product_attention(_heads(attention, x, 0), *known, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class Cache(NamedTuple):
    """Of each decoder layer the memory's and the own keys and values; hypotheses of a source stand side by side."""

    memory: list[KeysValues]  # [B, N, S, H]
    memory_mask: torch.Tensor  # [B, 1, 1, S]
    own: list[KeysValues]  # [B * W, N, T, H]


def start(model: Transformer, source, source_mask, beam_size: int) -> Cache:
    """The cache before the first token."""
    memory = model.layers.encoder(model.embed(source, model.source_table), src_key_padding_mask=~source_mask)
    layers = model.layers.decoder.layers
    empty = memory.new_empty(len(source) * beam_size, model.layers.nhead, 0, memory.shape[-1] // model.layers.nhead)
    return Cache(
        [keys_values(layer.multihead_attn, memory) for layer in layers],
        source_mask[:, None, None],
        [KeysValues(empty, empty) for _ in layers],
    )


def step(model: Transformer, tokens, cache: Cache, parents=None):
    """Logits [B, W, V] after one more token [B, W] of each hypothesis, and the grown cache.

    `parents` [B * W] are the hypotheses that they continue.
    """
    batch, beams = tokens.shape
    position = cache.own[0].keys.shape[2] if cache.own else 0
    x = model.embed(tokens.reshape(-1, 1), model.target_table, position)
    own = []
    for layer, memory, known in zip(model.layers.decoder.layers, cache.memory, cache.own, strict=True):
        known = known if parents is None else KeysValues(*(part[parents] for part in known))

        def to_self(x, layer=layer, known=known):
            new = keys_values(layer.self_attn, x)
            own.append(KeysValues(*(torch.cat(pair, dim=2) for pair in zip(known, new, strict=True))))
            return attend(layer.self_attn, x, own[-1])

        def to_memory(x, layer=layer, memory=memory):  # hypotheses are as queries of one row, the memory is not copied
            found = attend(layer.multihead_attn, x.view(batch, beams, -1), memory, cache.memory_mask)
            return found.reshape(batch * beams, 1, -1)

        def forward(x, layer=layer):
            return layer.linear2(layer.activation(layer.linear1(x)))

        for sublayer, norm in ((to_self, layer.norm1), (to_memory, layer.norm2), (forward, layer.norm3)):
            x = x + sublayer(norm(x)) if layer.norm_first else norm(x + sublayer(x))
    norm = model.layers.decoder.norm
    x = x if norm is None else norm(x)
    return model.logits(x).view(batch, beams, -1), cache._replace(own=own)


@torch.inference_mode()
def beam_search(
    model: Transformer,
    source,
    *,
    source_mask,
    max_length: int,
    beam_size: int,
    n_best: int = 1,
    length_penalty: float = 0.6,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """The n best hypotheses of each source by the rules of `core.beam_search`, called like a frontend's."""
    if constraints != FREE:
        raise ValueError(f"this search knows no constraints, got {constraints}")
    device = model.target_table.device
    source, source_mask = (torch.tensor(np.array(x), device=device) for x in (source, source_mask))
    batch, beams = len(source), beam_size
    cache, parents = start(model, source, source_mask, beams), None
    last = torch.full((batch, beams), BOS, device=device)
    tokens = last.new_full((batch, beams, max_length), PAD)
    log_prob = torch.full((batch, beams), -torch.inf, dtype=model.target_table.dtype, device=device)
    log_prob[:, 0] = 0  # at the beginning all slots are the same one
    length, ended = torch.zeros_like(log_prob), torch.zeros_like(last, dtype=torch.bool)
    itself, row = torch.arange(beams, device=device), torch.arange(batch, device=device)[:, None]
    final = lambda log_prob, length: log_prob / ((5 + length) / 6) ** length_penalty
    for position in range(max_length):
        logits, cache = step(model, last, cache, parents)
        extended = log_prob[..., None] + logits.to(log_prob.dtype).log_softmax(-1)
        extended = extended.masked_fill(ended[..., None], -torch.inf)
        best, place = extended.flatten(1).topk(beams)
        turn = ((~ended).cumsum(1) - 1).clamp(min=0)  # one that has ended keeps its slot, the best take the others
        slots = torch.where(ended, itself, place.gather(1, turn) // logits.shape[-1])
        log_prob = torch.where(ended, log_prob, best.gather(1, turn))
        last = torch.where(ended | log_prob.isneginf(), PAD, place.gather(1, turn) % logits.shape[-1])
        tokens = tokens[row, slots]
        tokens[..., position] = last
        length = torch.where(ended, length, position + 1)
        ended = ended | ((last == EOS) & ~log_prob.isneginf())
        parents = (row * beams + slots).flatten()
        reach = torch.maximum(final(log_prob, position + 1), final(log_prob, max_length))
        reach = reach.masked_fill(ended, -torch.inf).amax(1)  # what goes on can only become less likely
        kept = final(log_prob, length).masked_fill(~ended, -torch.inf).topk(n_best).values[:, -1]
        if not ((reach >= kept) & ~reach.isneginf()).any():
            break
    else:
        ended = torch.ones_like(ended)
    scores, order = final(log_prob, length).masked_fill(~ended, -torch.inf).topk(n_best)
    return Hypotheses(tokens[row, order].cpu().numpy(), scores.cpu().numpy())
