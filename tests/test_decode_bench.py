"""Laws of the decoding bench that need no peer, and that its peers hold the same model where they are installed."""

import importlib.util

import numpy as np
import pytest

from bench import decode_peers
from bench.decode import CONFIG, Speed, sources, speeds, tables, weights
from core.decoding import EOS


def test_a_peer_that_is_missing_is_left_out_and_the_table_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert decode_peers.peers(CONFIG, {}, max_length=3, threads=1) == {}
    (shown,) = tables([Speed(1, 1, "isoformer, NNX", 9.0, 8.0, 10.0, 1.0, 1.0)])
    cells = {name: list(shown.columns[1].cells)[i] for i, name in enumerate(shown.columns[0].cells)}
    assert cells["isoformer, NNX"] == "9 (8-10), 1.00 (1.00)"
    assert cells["CTranslate2"] == cells["Marian"] == "not installed"


def test_sources_are_ragged_and_padded_behind():
    tokens, lengths = sources(16)
    assert len(set(lengths)) > 3
    assert lengths[0] == tokens.shape[1]
    np.testing.assert_array_equal(tokens != 0, np.arange(tokens.shape[1]) < lengths[:, None])


def test_the_end_is_a_token_without_a_vector():
    """So that its logit is 0, which is never the best."""
    made = weights(CONFIG.replace(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=8))
    table = made["target_embedding.embedding"]
    assert [i for i in range(9) if not table[i].any()] == [EOS]
    assert all(np.std(array) > 0 for array in made.values())


@pytest.mark.torch
@pytest.mark.parametrize("beam_size", [1, 4])
def test_peers_decode_the_same_tokens(beam_size):
    for package in ("ctranslate2", "transformers"):
        pytest.importorskip(package)
    assert [speed.name for speed in speeds(1, beam_size, rounds=2)][2:] == ["CTranslate2", "Marian"]
