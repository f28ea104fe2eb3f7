"""Bugs of beam search and of sampling, in NumPy."""

import numpy as np

from conformance.adapters import Sampling, Search
from conformance.museum.exhibit import Exhibit


class NumpySearch:
    """A right one, W slots a row side by side; an exhibit replaces the method that is wrong."""

    def __call__(self, table, first, *, max_length, beam_size, eos, pad, length_penalty=0.0):
        rows, vocab = len(first), table.shape[-1]
        tokens = np.full((rows, beam_size, max_length), pad)
        last = np.repeat(first[:, None], beam_size, axis=1)
        total, length = np.zeros((2, rows, beam_size), int)
        log_prob = np.where(np.arange(beam_size) == 0, np.zeros((rows, 1)), -np.inf)
        ended = np.zeros((rows, beam_size), bool)
        for n in range(max_length):
            total = total + last
            logits = table[self.sources(rows, beam_size), n, (last + total) % vocab].astype(np.float64)
            step = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            stays = np.where(np.arange(vocab) == pad, 0, -np.inf)
            grown = log_prob[..., None] + np.where(ended[..., None], stays, step)
            rank = np.where(ended[..., None] & (grown > -np.inf), np.inf, grown)  # what has ended keeps its slot
            place = np.argsort(-rank.reshape(rows, -1), axis=-1, kind="stable")[:, :beam_size]
            parents, last = place // vocab, place % vocab
            log_prob = np.take_along_axis(grown.reshape(rows, -1), place, axis=-1)
            tokens, length, ended = (self.of(x, parents) for x in (tokens, length, ended))
            total = self.cache_of(total, parents)
            tokens[..., n] = last
            length = length + ~ended
            ended = ended | (self.is_end(last, eos) & (log_prob > -np.inf))
            over = self.is_over(log_prob, ended)[:, None]
            log_prob = np.where(over & ~ended, -np.inf, log_prob)
        score = log_prob / ((5 + self.lengths(length, ended)) / 6) ** length_penalty
        return self.of(tokens, score.argmax(axis=-1)[:, None])[:, 0]

    def of(self, x, parents):
        """The slots [B, W, ...] of the parents."""
        return x[np.arange(len(x))[:, None], parents]

    def cache_of(self, total, parents):
        return self.of(total, parents)

    def sources(self, rows, beam_size):
        """Whose table each slot reads."""
        return np.repeat(np.arange(rows), beam_size).reshape(rows, beam_size)

    def is_end(self, token, eos):
        return token == eos

    def is_over(self, log_prob, ended):
        """Rows in which nothing goes on."""
        return ended.all(axis=-1)

    def lengths(self, length, ended):
        return length


class CacheStays(NumpySearch):
    def cache_of(self, total, parents):
        return total


class SourcesAreTiled(NumpySearch):
    """Slots that lie row after row get the sources one after the other, over and over."""

    def sources(self, rows, beam_size):
        return np.tile(np.arange(rows), beam_size).reshape(rows, beam_size)


class EndIsNotCounted(NumpySearch):
    def lengths(self, length, ended):
        return length - ended


class EndIsATokenLikeOthers(NumpySearch):
    def is_end(self, token, eos):
        return np.zeros(token.shape, bool)


class LikeliestHasEnded(NumpySearch):
    """It is taken for the best: by log P it is, by the score another may be."""

    def is_over(self, log_prob, ended):
        return np.take_along_axis(ended, log_prob.argmax(axis=-1)[:, None], axis=-1)[:, 0]


class NumpySampling:
    """A right one: tokens in the order of their logits, then one number of the generator a row."""

    def __call__(self, logits, *, seed, temperature=1.0, top_k=None, top_p=None):
        order = np.argsort(-logits, axis=-1, kind="stable")
        p = self.probabilities(np.take_along_axis(np.float64(logits), order, axis=-1), temperature)
        if top_k is not None:
            p = self.again(p, self.highest(np.arange(p.shape[-1]), top_k))
        if top_p is not None:
            p = self.again(p, self.nucleus(p, top_p))
        drawn = np.random.default_rng(seed).random((len(p), 1))
        place = (np.cumsum(p, axis=-1) <= drawn).sum(axis=-1, keepdims=True)
        place = np.minimum(place, (p > 0).sum(axis=-1, keepdims=True) - 1)
        return np.take_along_axis(order, place, axis=-1)[:, 0]

    def probabilities(self, logits, temperature):
        exponentials = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
        return self.again(exponentials, True)

    def again(self, p, kept):
        p = np.where(kept, p, 0)
        return p / p.sum(axis=-1, keepdims=True)

    def highest(self, rank, top_k):
        return rank < top_k

    def nucleus(self, p, top_p):
        """[B, V] bool: the mass before a token does not suffice yet."""
        return np.cumsum(p, axis=-1) - p < top_p


class OneMore(NumpySampling):
    """No logit below that of rank k, counted from 0."""

    def highest(self, rank, top_k):
        return rank <= top_k


class CrossingIsDropped(NumpySampling):
    def nucleus(self, p, top_p):
        return (np.cumsum(p, axis=-1) <= top_p) | (np.arange(p.shape[-1]) == 0)


class CrossingIsNowhere(NumpySampling):
    """Looked up in a mass of float32, which need not come to p."""

    def nucleus(self, p, top_p):
        crossing = (np.cumsum(p.astype(np.float32), axis=-1) < np.float32(top_p)).sum(axis=-1)
        kept = np.arange(p.shape[-1]) < crossing[:, None]
        np.put_along_axis(kept, crossing[:, None], True, axis=-1)
        return kept


CAN_SEARCH = {"length penalty"}
CAN_DRAW = {"temperature", "top k", "top p"}
EXHIBITS = (
    Exhibit(
        31,
        "the cache does not follow its beam",
        "transformers#46612",
        Search("cache stays", CacheStays(), CAN_SEARCH),
        ("a_narrow_beam_is_the_search_written_down",),
    ),
    Exhibit(
        31,
        "beams read the source of another row",
        "TensorRT-LLM#15444",
        Search("sources are tiled", SourcesAreTiled(), CAN_SEARCH),
        ("a_batch_is_its_rows_one_by_one",),
    ),
    Exhibit(
        32,
        "the length in the score is one short",
        "transformers#8722, #27808, sockeye#483",
        Search("end not counted", EndIsNotCounted(), CAN_SEARCH),
        ("the_length_in_the_score_counts_the_end_token",),
    ),
    Exhibit(
        32,
        "hypotheses go on behind their end",
        "ParlAI#2058, sockeye#233",
        Search("end like others", EndIsATokenLikeOthers(), CAN_SEARCH),
        ("nothing_but_padding_follows_the_end",),
    ),
    Exhibit(
        32,
        "the search stops when the likeliest has ended",
        "joeynmt#149",
        Search("likeliest has ended", LikeliestHasEnded(), CAN_SEARCH),
        ("the_search_goes_on_while_a_longer_hypothesis_could_win",),
    ),
    Exhibit(
        33,
        "top-k keeps k + 1",
        "mesh-transformer-jax#164",
        Sampling("one more", OneMore(), CAN_DRAW),
        ("top_k_gives_each_of_the_k_highest_and_no_other",),
    ),
    Exhibit(
        33,
        "top-p drops the token that crosses p",
        "esm#360",
        Sampling("crossing dropped", CrossingIsDropped(), CAN_DRAW),
        ("top_p_gives_the_fewest_tokens_whose_mass_reaches_p",),
    ),
    Exhibit(
        33,
        "top-p near 1 leaves the vocabulary",
        "TensorRT-LLM#19496",
        Sampling("crossing nowhere", CrossingIsNowhere(), CAN_DRAW),
        ("a_top_p_just_below_one_takes_no_token_away",),
    ),
)
right_search = Search("NumPy search", NumpySearch(), CAN_SEARCH)
right_sampling = Sampling("NumPy sampling", NumpySampling(), CAN_DRAW)
