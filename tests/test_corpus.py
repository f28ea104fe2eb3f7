"""Parallel text: what is good is kept in every byte, what is bad is counted, and nothing is half prepared."""

import itertools
import json
import os
import shutil
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.decoding import EOS
from seq2seq.corpus import Corpus, Prepared, lengths, prepare
from seq2seq.errors import CheckpointError, UserError
from seq2seq.examples import Pairs
from seq2seq.parallel_text import text_pairs
from seq2seq.splits import split_by_hash
from seq2seq.tasks import load_task
from seq2seq.vocabulary import SPECIAL, Subwords

SENTENCES = [
    (f"the cat number {i} sat on {i % 7} mats", f"die Katze Nummer {i} saß auf {i % 7} Matten") for i in range(300)
]
WORDS = Subwords.train(iter(text for pair in SENTENCES for text in pair), size=320)


def tsv(path, pairs):
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    about = prepare(
        folder / "made",
        text=tsv(folder / "all.tsv", SENTENCES),
        validation=None,
        test=None,
        vocabulary=320,
        max_length=40,
    )
    return folder / "made", about


# subwords


@given(st.text())
def test_any_text_comes_back_in_every_byte(text):
    ids = WORDS.encode(text)
    assert WORDS.decode([*ids, EOS, 7]) == text
    assert all(len(SPECIAL) <= i < len(WORDS) for i in ids)
    assert WORDS.encode_all([text, "x"])[0] == list(ids)


@pytest.mark.parametrize("text", ["<eos>", "a <pad> b", "<bos><eos>"])
def test_a_text_that_looks_like_a_special_symbol_is_text(text, tmp_path):
    WORDS.save(tmp_path / "t.json")
    for words in (WORDS, Subwords.load(tmp_path / "t.json")):
        assert not set(words.encode(text)) & set(SPECIAL.values())
        assert words.decode(words.encode(text)) == text


def test_numbers_that_stand_for_nothing_say_nothing():
    assert WORDS.decode([0, 1, *WORDS.encode("cat"), 10_000, -1]) == "cat"
    assert WORDS.pieces(WORDS.encode("the cat"))[-1].endswith("at")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json is no tokenizer"):
        Subwords.load(tmp_path / "t.json")


def test_a_vocabulary_holds_every_byte():
    with pytest.raises(UserError, match="a vocabulary holds every byte and 3 special symbols, 259, got 258"):
        Subwords.train(iter(["a"]), size=258)


# lines


def read(where):
    faults = Counter()
    return list(text_pairs(str(where), faults)), dict(faults)


def test_bad_lines_are_counted_by_their_fault_and_good_ones_kept_in_order(tmp_path):
    lines = [b"\xef\xbb\xbfa\tb", b"", b"c\t", b"\t", b"one column", b"x\ty\tz", b"\xff\xfe\tb", b" d \t e \r", b"f\tg"]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(lines))
    pairs, faults = read(tmp_path / "t.tsv")
    assert pairs == [("a", "b"), ("d", "e"), ("f", "g")]
    assert faults == {"an empty side": 3, "not two columns": 2, "not UTF-8": 1}


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Of all that Unicode lets end a line: else two files would slip against each other."""
    odd = "one\u2028two\x0bthree\x85four\x1cfive"
    (tmp_path / "a").write_text(f"{odd}\nsecond\n")
    (tmp_path / "b").write_text("eins\nzweitens")
    assert read(f"{tmp_path / 'a'},{tmp_path / 'b'}") == ([(odd, "eins"), ("second", "zweitens")], {})


@pytest.mark.parametrize(("first", "second", "number"), [("a\nb\n", "c\n", 2), ("a\n", "b\nc\nd\n", 2)])
def test_files_that_are_not_aligned_stop_the_reading(first, second, number, tmp_path):
    (tmp_path / "a").write_text(first)
    (tmp_path / "b").write_text(second)
    with pytest.raises(UserError, match=rf"are not aligned: .* ends before line {number} of the other"):
        read(f"{tmp_path / 'a'},{tmp_path / 'b'}")


def test_globs_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("2.de", "1.de", "2.en", "1.en"):
        (tmp_path / name).write_text(f"{name}\n")
    assert read(f"{tmp_path}/*.en,{tmp_path}/*.de")[0] == [("1.en", "1.de"), ("2.en", "2.de")]
    (tmp_path / "3.en").write_text("more\n")
    with pytest.raises(UserError, match=r"as many on both sides of the comma, are needed: .* names 3 and 2"):
        read(f"{tmp_path}/*.en,{tmp_path}/*.de")
    with pytest.raises(UserError, match="none is no file; give a file, a glob"):
        read(tmp_path / "none")


# prepared data


def test_what_is_prepared_is_the_text_split_by_the_hash_of_the_source(data):
    folder, about = data
    task = load_task("translate", data=folder)
    found = {
        split: [(task.source.decode(e.source), task.target.decode(e.targets[0])) for e in task.split(split)]
        for split in task.splits
    }
    for split, pairs in found.items():
        assert pairs == [pair for pair in SENTENCES if split_by_hash(pair[0]) == split]
        assert len(pairs) == about["pairs"][split] > 0
    assert list(Pairs(task.split("test"))) == list(task.pairs("test"))
    assert task.split("train")[2:4] == [task.split("train")[2], task.split("train")[3]]
    assert task.split("train")[-1] == task.split("train")[len(found["train"]) - 1]


def test_texts_of_their_own_leave_all_of_the_text_for_training(tmp_path):
    one, two, three = (
        tsv(tmp_path / name, SENTENCES[part])
        for name, part in (("1", slice(200)), ("2", slice(200, 250)), ("3", slice(250, 300)))
    )
    about = prepare(tmp_path / "made", text=one, validation=two, test=three, vocabulary=300, max_length=60)
    assert about["pairs"] == {"train": 200, "validation": 50, "test": 50}


def test_pairs_that_are_too_long_are_counted_and_left_out(tmp_path):
    pairs = [*SENTENCES[:50], ("cat " * 60, "Katze"), ("cat", "Katze " * 60)]
    about = prepare(
        tmp_path / "made",
        text=tsv(tmp_path / "t", pairs),
        validation=tsv(tmp_path / "v", SENTENCES[50:60]),
        test=tsv(tmp_path / "w", SENTENCES[60:70]),
        vocabulary=320,
        max_length=40,
    )
    assert about["left_out"]["train"] == {"too long": 2}
    assert about["pairs"]["train"] == 50
    longest = max(
        max(len(p.source), len(p.target) + 1) for p in load_task("translate", data=tmp_path / "made").pairs("train")
    )
    assert longest <= 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "none.tsv"}, "none.tsv is no file"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 2}, "no pair is left for train: .* too long; give other text, or another --max-length"),
        ({"vocabulary": 3}, "a vocabulary holds every byte"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing_behind(changes, message, tmp_path):
    arguments = {
        "text": tsv(tmp_path / "t", SENTENCES),
        "validation": None,
        "test": None,
        "vocabulary": 300,
        "max_length": 40,
    }
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "made", **arguments | changes)
    assert os.listdir(tmp_path) == ["t"]


def test_data_is_not_prepared_over_what_is_there(data):
    with pytest.raises(UserError, match="is already there; give another --output"):
        prepare(data[0], text="", validation=None, test=None, vocabulary=300, max_length=40)


@pytest.mark.parametrize("name", ["train.tokens", "test.ends", "tokenizer.json"])
def test_a_changed_bit_is_refused_before_anything_is_used(name, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data[0], copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 4
    (copy / name).write_bytes(content)
    with pytest.raises((CheckpointError, UserError), match=rf"{name} has changed|is no tokenizer"):
        load_task("translate", data=copy).split("train")


def test_a_run_reads_and_writes_text_without_the_data_and_refuses_other_data(data, tmp_path):
    kept = tmp_path / "kept"
    Prepared(data[0]).keep(kept)
    away = load_task("translate", data=tmp_path / "moved", kept=kept)
    assert away.source.decode(away.parse("the cat")) == "the cat"
    with pytest.raises(UserError, match="moved is no prepared data"):
        away.split("test")
    prepare(
        tmp_path / "moved",
        text=tsv(tmp_path / "t", SENTENCES[:250]),
        validation=None,
        test=None,
        vocabulary=320,
        max_length=40,
    )
    with pytest.raises(UserError, match=r"holds other data than .* was made with"):
        load_task("translate", data=tmp_path / "moved", kept=kept).split("test")


def test_data_of_a_future_format_is_refused(data, tmp_path):
    shutil.copytree(data[0], tmp_path / "copy")
    about = json.loads((tmp_path / "copy/about.json").read_text())
    (tmp_path / "copy/about.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(UserError, match="has format 9, this version reads 1"):
        load_task("translate", data=tmp_path / "copy")


def test_a_corpus_is_read_from_the_disk_not_into_memory(tmp_path):
    pairs = [(f"{i} cat", "Katze " * 20) for i in range(20_000)]
    held = [tsv(tmp_path / name, SENTENCES[:5]) for name in "vw"]
    tracemalloc.start()
    prepare(
        tmp_path / "made",
        text=tsv(tmp_path / "t", pairs),
        validation=held[0],
        test=held[1],
        vocabulary=300,
        max_length=200,
    )
    after_preparing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    corpus = Corpus(tmp_path / "made", "train")
    assert sum(len(corpus[i].source) for i in range(0, len(corpus), 1000)) > 0
    used = tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(corpus) == 20_000
    assert used < 100_000
    assert after_preparing < 12e6  # one chunk of encoded pairs, and the text that the test itself holds


@given(st.integers(2, 4000))
def test_rows_are_padded_by_half_at_most(longest):
    found = lengths(longest)
    assert found[-1] == longest
    assert all(a < b <= 1.5 * a + 0.5 for a, b in itertools.pairwise(found))
