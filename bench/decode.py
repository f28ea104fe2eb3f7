"""How fast we decode, beside CTranslate2 and Hugging Face's Marian: `python -m bench decode`.

All hold the same weights, and must give the same tokens before anything is timed.
"""

import functools
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.table import Table

import equinox_impl
import nnx_impl
from bench.decode_peers import Decode, peers
from bench.turns import in_turn
from core.config import TransformerConfig
from core.decoding import EOS

CONFIG = TransformerConfig(
    source_vocab_size=8000, target_vocab_size=8000, d_model=256, d_ff=1024, num_heads=4, num_encoder_layers=3,
    num_decoder_layers=3, max_length=64, attention_bias=True, norm_epsilon=1e-5, tie_embeddings="all",
)  # fmt: skip
LENGTH = 64  # tokens of a target, and of the longest source
BATCHES, BEAMS = (1, 16, 64), (1, 4)  # one beam is greedy decoding
ROUNDS, SECONDS = 9, 30.0  # after that long, 3 rounds are enough
OURS = {"isoformer, NNX": nnx_impl, "isoformer, Equinox": equinox_impl}
PEERS = ("CTranslate2", "Marian")


class Speed(NamedTuple):
    """Tokens a second of one decoder, and our NNX frontend's time over its time: in the same rounds, and at best."""

    beam_size: int
    batch: int
    name: str
    median: float
    low: float  # the quartiles
    high: float
    ratio: float
    best_ratio: float  # threads that wait by spinning lose more than others on a busy machine, and least at best


def weights(config: TransformerConfig = CONFIG, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ones with which a row says tens of tokens that differ, and rounding decides none of them."""
    rng = np.random.default_rng(seed)
    shapes = nnx_impl.to_weights(nnx_impl.init_transformer(config, seed=0))
    made = {name: _random(name, array.shape, rng) for name, array in sorted(shapes.items())}
    made["target_embedding.embedding"][EOS] = 0  # a logit of 0 is never among the best of thousands
    return made


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    drawn = rng.standard_normal(shape)
    if name.endswith("down_proj.kernel"):
        drawn -= drawn.mean(axis=0)  # or the mean of what ReLU lets through would be most of the output
    if name.endswith("kernel"):
        gain = 3 if "feed_forward" in name else 2 if "q_proj" in name or "k_proj" in name else 1
        return (gain * drawn / np.sqrt(shape[0])).astype("float32")
    if name.endswith("embedding"):
        return (drawn / np.sqrt(shape[1])).astype("float32")
    return (name.endswith("scale") + 0.1 * drawn).astype("float32")


def decode_speeds(*, rounds: int = ROUNDS) -> list[Speed]:
    """Of every number of beams and rows, with a thread for each core that this process may use."""
    return [speed for beams in BEAMS for batch in BATCHES for speed in speeds(batch, beams, rounds=rounds)]


def speeds(batch: int, beam_size: int, *, rounds: int = ROUNDS) -> list[Speed]:
    """Of all that are here, in an order drawn anew for each round; AssertionError unless their tokens are the same."""
    source, lengths = sources(batch)
    decoders = _decoders(len(os.sched_getaffinity(0)))
    wanted: np.ndarray | None = None
    for name, decode in decoders.items():
        found = decode(source, lengths, beam_size)
        wanted = found if wanted is None else wanted
        np.testing.assert_array_equal(found, wanted, err_msg=f"{name}, batch {batch}, {beam_size} beams")
    contenders = {name: functools.partial(decode, source, lengths, beam_size) for name, decode in decoders.items()}
    samples = in_turn(contenders, rounds=rounds, enough=SECONDS)
    return [_speed(beam_size, batch, name, samples) for name in samples]


def _speed(beam_size: int, batch: int, name: str, samples: dict[str, list[float]]) -> Speed:
    rates = [batch * LENGTH / seconds for seconds in samples[name]]
    low, median, high = statistics.quantiles(rates, n=4)
    ours, theirs = next(iter(samples.values())), samples[name]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Speed(beam_size, batch, name, median, low, high, ratio, min(ours) / min(theirs))


def sources(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [B, S] and how many are real in each row, from half of S on; the first row is full."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, batch)
    lengths[0] = LENGTH
    tokens = rng.integers(3, CONFIG.vocab_size("source"), (batch, LENGTH))
    return np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0).astype("int32"), lengths


@functools.cache
def _decoders(threads: int) -> dict[str, Decode]:
    shared = weights()
    ours = {name: _ours(package, shared) for name, package in OURS.items()}
    return ours | peers(CONFIG, shared, max_length=LENGTH, threads=threads)


def _ours(package, shared: dict[str, np.ndarray]) -> Decode:
    model = package.from_weights(CONFIG, {name: jnp.asarray(array) for name, array in shared.items()})
    greedy = package.compiled(
        lambda model, source, mask: package.generate(model, source, source_mask=mask, max_length=LENGTH), model
    )
    searches = {
        beam_size: package.compiled(functools.partial(_search, package, beam_size), model) for beam_size in BEAMS[1:]
    }

    def decode(source: np.ndarray, lengths: np.ndarray, beam_size: int) -> np.ndarray:
        call = greedy if beam_size == 1 else searches[beam_size]
        return np.asarray(call(source, np.arange(source.shape[1]) < lengths[:, None]))

    return decode


def _search(package, beam_size: int, model, source, mask):
    return package.beam_search(
        model, source, source_mask=mask, max_length=LENGTH, beam_size=beam_size, length_penalty=0.0
    ).tokens[..., 0, :]  # fmt: skip


def tables(results: Sequence[Speed]) -> list[Table]:
    """Decoders by batch and beams: tokens a second (quartiles), and our time over theirs."""
    cases = [(beam_size, batch) for beam_size in BEAMS for batch in BATCHES]
    heads = [f"{'greedy' if beam_size == 1 else f'beam {beam_size}'}, batch {batch}" for beam_size, batch in cases]
    shown = Table(
        "decoder", *heads, title=f"tokens a second (quartiles), NNX's time / its time (at best); {LENGTH} tokens a row"
    )
    found = {(speed.name, speed.beam_size, speed.batch): speed for speed in results}
    for name in (*OURS, *PEERS):
        speeds = [found.get((name, *case)) for case in cases]
        shown.add_row(
            name,
            *("not installed" if s is None
              else f"{s.median:,.0f} ({s.low:,.0f}-{s.high:,.0f}), {s.ratio:.2f} ({s.best_ratio:.2f})"
              for s in speeds),
        )  # fmt: skip
    return [shown]
