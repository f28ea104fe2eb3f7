"""The tasks hold what they say, split by hash."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from core.decoding import BOS, EOS, PAD
from seq2seq import scan
from seq2seq.batches import batch, batches, rows
from seq2seq.digits import logistic_regression
from seq2seq.errors import UserError
from seq2seq.examples import Example, Pair
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
    spoken = {task("pronounce").target.decode(target) for target in example.targets}
    assert spoken == {"R EH D", "R IY D"}


@pytest.mark.parametrize("name", ["copy", "reverse", "pronounce", "scan", "digits"])
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
    text = " ".join(vocabulary.symbols[3:])
    assert vocabulary.decode([*vocabulary.encode(text), EOS, 5]) == text
    assert vocabulary.pieces([-1, 10_000]) == ["<?>", "<?>"]


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


@given(data=some_pairs)
def test_batches_have_every_pair_once_and_few_shapes(data):
    found, shapes = [], set()
    for made in batches(data, (4, 8, 13), tokens=26):
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


def test_empty_rows_fill_a_batch_up():
    made = batch([Pair((4, 5), (6,))], 3, 2)
    assert made.source.tolist() == [[4, 5, PAD], [PAD] * 3]
    assert made.inputs.tolist() == [[BOS, 6, PAD], [PAD] * 3]
    assert made.labels.tolist() == [[6, EOS, PAD], [PAD] * 3]
    assert made.source_mask.tolist() == [[True, True, False], [False] * 3]
    assert made.target_mask.tolist() == [[True, True, False], [False] * 3]


def test_scan_is_the_published_set():
    """Its size, the sizes of the length split, and examples of the paper."""
    known = dict(scan.pairs())
    assert len(known) == 20_910
    assert known["jump opposite left after walk around left"] == (
        "I_TURN_LEFT I_WALK I_TURN_LEFT I_WALK I_TURN_LEFT I_WALK I_TURN_LEFT I_WALK I_TURN_LEFT I_TURN_LEFT I_JUMP"
    )
    assert known["turn left twice"] == "I_TURN_LEFT I_TURN_LEFT"
    assert known["jump thrice and turn around right"] == "I_JUMP I_JUMP I_JUMP" + 4 * " I_TURN_RIGHT"
    assert known["look after run twice"] == "I_RUN I_RUN I_LOOK"
    assert max(len(actions.split()) for actions in known.values()) == 48


def test_the_length_split_of_scan_trains_on_short_outputs_alone():
    task = load_task("scan-length")
    sizes = {name: {len(example.targets[0]) for example in task.split(name)} for name in task.splits}
    assert len(task.split("train")) + len(task.split("validation")) == 16_990
    assert len(task.split("test")) == 3_920
    assert max(sizes["train"] | sizes["validation"]) == 22
    assert min(sizes["test"]) == 24
    by_chance = load_task("scan")
    assert {name: len(split) for name, split in by_chance.splits.items()}["test"] == pytest.approx(2091, abs=150)
    assert max(len(example.targets[0]) for example in by_chance.split("train")) == 48


def test_the_patches_of_a_digit_are_its_pixels():
    images, labels = load_digits(return_X_y=True)
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    examples = [example for split in task("digits").splits.values() for example in split]
    assert len(examples) == len(known) == 1797
    for example in examples[::50]:
        rows = np.array(example.source).reshape(4, 4, 2, 2)  # patch row, patch column, pixel row, pixel column
        image = np.block([[rows[i, j] for j in range(4)] for i in range(4)])
        assert task("digits").target.decode(example.targets[0]) == str(known[(16 * image).ravel().tobytes()])


def test_a_batch_of_vectors_has_one_label_a_row():
    made = batch([Pair(((0.5, 1.0), (0.25, 0.75)), (7,)), Pair(((0.125, 0.0),), (4,))], 3, 3)
    assert made.source.tolist() == [[[0.5, 1.0], [0.25, 0.75], [0, 0]], [[0.125, 0.0], [0, 0], [0, 0]], [[0, 0]] * 3]
    assert made.source_mask.tolist() == [[True, True, False], [True, False, False], [False] * 3]
    assert made.labels.tolist() == [[7], [4], [PAD]]
    assert made.target_mask.tolist() == [[True], [True], [False]]


def test_logistic_regression_learns_what_a_line_can_tell_apart():
    rng = np.random.default_rng(0)
    made = [
        Example(tuple(map(tuple, x.tolist())), ((3 + int(x.sum() > 0),),)) for x in rng.standard_normal((300, 4, 2))
    ]
    assert logistic_regression(made[:200], made[200:]) > 0.95
    swapped = [Example(e.source, ((7 - e.targets[0][0],),)) for e in made[200:]]
    assert logistic_regression(made[:200], swapped) < 0.05
