"""The stream of training batches: every epoch all pairs in an order of its own, and any place can be gone back to."""

import itertools
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.examples import Pair
from seq2seq.stream import endless_batches
from tests.frontends import same_bits
from tests.strategies import seeds

BUCKETS = (4, 12)


def some_pairs(seed, number):
    """Of different lengths; a pair's number is its label."""
    rng = np.random.default_rng(seed)
    return [Pair(tuple(rng.integers(3, 9, n).tolist()), (i + 3,)) for i, n in enumerate(rng.integers(1, 12, number))]


def labels(batches):
    return [int(x) for made in batches for x in np.asarray(made.labels)[..., 0][np.asarray(made.target_mask)[..., 0]]]


@settings(max_examples=10)
@given(seed=seeds, number=st.sampled_from([1, 23, 40]), micro=st.sampled_from([1, 3]))
def test_every_epoch_has_all_pairs_once_in_an_order_of_its_own(seed, number, micro):
    stream = endless_batches(some_pairs(seed, number), BUCKETS, tokens=24, micro=micro, seed=seed)
    made = list(itertools.islice(stream, 60))
    flat = labels(made)
    assert sorted(flat[:number]) == [*range(3, number + 3)]
    if len(flat) >= 2 * number > 2:
        assert sorted(flat[number : 2 * number]) == sorted(flat[:number])
        assert flat[number : 2 * number] != flat[:number]
    assert all(b.labels.ndim == (2 if micro == 1 else 3) for b in made)
    assert {b.labels.shape[-1] for b in made} <= set(BUCKETS)


@settings(max_examples=10)
@given(seed=seeds, start=st.integers(0, 25), micro=st.sampled_from([1, 3]))
def test_from_any_noted_place_the_same_batches_follow(seed, start, micro):
    """In another process too: what is noted is JSON."""
    data = some_pairs(seed, 40)
    stream = endless_batches(data, BUCKETS, tokens=24, micro=micro, seed=seed)
    list(itertools.islice(stream, start))
    place = json.loads(json.dumps(stream.get_state()))
    wanted = list(itertools.islice(stream, 30))
    again = endless_batches(data, BUCKETS, tokens=24, micro=micro, seed=seed)
    again.set_state(place)
    assert all(same_bits(a, b) for a, b in zip(wanted, itertools.islice(again, 30), strict=True))
    assert stream.get_state() == again.get_state()


def test_another_seed_is_another_order():
    data = some_pairs(0, 40)
    first, second = (labels(itertools.islice(endless_batches(data, BUCKETS, tokens=24, seed=s), 9)) for s in (0, 1))
    assert first != second
