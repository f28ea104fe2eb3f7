"""The tasks hold what they say, split by hash."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.decoding import BOS, EOS, PAD
from seq2seq.batches import Pair, batch, batches, pairs, rows
from seq2seq.errors import UserError
from seq2seq.tasks import load_task
from tests.strategies import seeds

task = functools.cache(load_task)


def test_pronounce_has_the_published_numbers():
    splits = task("pronounce").splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 109_811,
        "validation": 2_550,
        "test": 12_565,
    }
    assert sum(len(example.targets) for split in splits.values() for example in split) == 133_667
    assert len(task("pronounce").target) == 39 + 3


def test_pronounce_knows_a_word_with_two_pronunciations():
    spelling = task("pronounce").source.encode("read")
    (example,) = (e for split in task("pronounce").splits.values() for e in split if e.source == spelling)
    spoken = {" ".join(task("pronounce").target.decode(target)) for target in example.targets}
    assert spoken == {"R EH D", "R IY D"}


@pytest.mark.parametrize("name", ["copy", "reverse", "pronounce"])
def test_no_source_is_in_two_splits(name):
    sources = [{example.source for example in split} for split in task(name).splits.values()]
    assert all(sources)
    assert sum(map(len, sources)) == len(set.union(*sources))
    assert sum(map(len, sources)) == sum(map(len, task(name).splits.values()))


@pytest.mark.parametrize(("name", "step"), [("copy", 1), ("reverse", -1)])
def test_copy_copies_and_reverse_reverses(name, step):
    for example in task(name).splits["test"]:
        assert example.targets == (example.source[::step],)
        assert len(example.source) == 10


@pytest.mark.parametrize("name", ["copy", "pronounce"])
def test_what_is_encoded_comes_back_decoded(name):
    vocabulary = task(name).target
    symbols = vocabulary.symbols[3:]
    assert vocabulary.decode([*vocabulary.encode(symbols), EOS, 5]) == symbols
    assert vocabulary.decode([-1, 10_000]) == ["<?>", "<?>"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pronounce", "naïve", "the task has no symbol 'ï'; it knows: ' a b"),
        ("pronounce", "", "'' has 0 symbols; the task pronounce takes 1 to 28"),
        ("copy", "01 2", "the task has no symbol '2'; it knows: 00 01"),
    ],
)
def test_what_cannot_be_parsed_is_refused(name, text, message):
    with pytest.raises(UserError) as error:
        task(name).parse(text)
    assert message in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown task 'sing'; choose one of copy, reverse, pronounce"):
        load_task("sing")
    with pytest.raises(UserError, match="unknown split 'exam'; choose one of train, validation, test"):
        task("copy").split("exam")


some_pairs = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 11), seeds).map(
        lambda drawn: Pair(
            tuple(np.random.default_rng(drawn[2]).integers(3, 30, drawn[0]).tolist()),
            tuple(np.random.default_rng(drawn[2] + 1).integers(3, 30, drawn[1]).tolist()),
        )
    ),
    min_size=1,
    max_size=40,
)


@given(data=some_pairs, seed=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_an_epoch_has_every_pair_once_and_few_shapes(data, seed):
    found, shapes = [], set()
    for made in batches(data, (4, 8, 13), tokens=26, seed=seed):
        shapes.add(made.source.shape)
        assert made.source.shape == made.labels.shape
        for source, inputs, labels, mask in zip(made.source, made.inputs, made.labels, made.target_mask, strict=True):
            source, inputs, labels = (np.asarray(array).tolist() for array in (source, inputs, labels))
            length = int(mask.sum())
            if length:
                assert inputs[0] == BOS
                assert labels[length - 1] == EOS
                assert inputs[1:length] == labels[: length - 1]
                found.append(Pair(tuple(i for i in source if i != PAD), tuple(labels[: length - 1])))
            assert not any(labels[length:])
            assert not any(inputs[length:])
    assert sorted(found) == sorted(data)
    assert shapes <= {(rows(length, 26), length) for length in (4, 8, 13)}


def test_the_same_seed_gives_the_same_order_and_another_epoch_another():
    data = pairs(task("copy").split("validation"))

    def order(seed):
        return [np.asarray(made.source).tobytes() for made in batches(data, (11,), tokens=220, seed=seed)]

    assert order((0, 0)) == order((0, 0))
    assert order((0, 0)) != order((0, 1)) != order((1, 0))


def test_empty_rows_fill_a_batch_up():
    made = batch([Pair((4, 5), (6,))], 3, 2)
    assert made.source.tolist() == [[4, 5, PAD], [PAD] * 3]
    assert made.inputs.tolist() == [[BOS, 6, PAD], [PAD] * 3]
    assert made.labels.tolist() == [[6, EOS, PAD], [PAD] * 3]
    assert made.source_mask.tolist() == [[True, True, False], [False] * 3]
    assert made.target_mask.tolist() == [[True, True, False], [False] * 3]
