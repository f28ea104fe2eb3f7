"""The parallel text of LibreOffice's help: what is aligned, that splits do not leak, and what a user does wrong."""

import json
import shutil
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seq2seq import libreoffice_help
from seq2seq.errors import UserError
from seq2seq.libreoffice_help import aligned_pages, elements, main, make, split_pages
from seq2seq.splits import split_by_hash

ENGLISH, GERMAN = "libreoffice-help-en-us", "libreoffice-help-de"
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb builds the packages")


def page(*texts: tuple[str, str]) -> str:
    return "<html><body><p>Help</p>" + "".join(f'<p id="{i}">{text}</p>\n' for i, text in texts) + "</body></html>"


def package(folder, name, language, pages, version="4:7.4"):
    """A .deb file of these pages, as `apt-get download` leaves it."""
    root = folder / "build" / name
    for path, text in pages.items():
        file = root / "usr/share/libreoffice/help" / language / "text" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: help\n"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(control)
    file = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, file], check=True, capture_output=True)


@pytest.fixture
def packages(tmp_path):
    """Forty pages in English and in German, which share one sentence."""
    folder = tmp_path / "packages"
    folder.mkdir()
    common = ("par_id9", "Click <b>OK</b>."), ("par_id9", "Auf <b>OK</b> klicken.")
    names = [f"swriter/guide/{i}.html" for i in range(40)]
    for name, language, word, last in ((ENGLISH, "en-US", "Page", common[0]), (GERMAN, "de", "Seite", common[1])):
        pages = {n: page(("hd_id1", f"{word} {n}"), ("par_id2", "print &amp; run"), last) for n in names}
        package(folder, name, language, pages)
    return folder


def lines(output, split):
    return [line.split("\t") for line in (output / f"{split}.tsv").read_text(encoding="utf-8").splitlines()]


def test_the_text_of_an_element_has_neither_tags_nor_runs_of_blanks():
    text = '<p id="par_id1" class="x">a <i>b</i>c\n\td&nbsp;&auml;<img alt="no">\u2028e<br>f </p> no <p>no</p>'
    assert elements(text) == {("par_id1", 0): "a bc d ä e f"}


def test_only_paragraphs_and_headings_with_an_id_of_their_own_count():
    text = '<p id="bm_id1">no</p><h2 id="hd_id2">a</h2><div id="par">no</div><p id="par_id3">b'
    assert elements(text) == {("hd_id2", 0): "a", ("par_id3", 0): "b"}


words = st.text(string.ascii_letters, max_size=3)


@given(
    texts=st.lists(st.tuples(st.sampled_from(["par_id1", "par_id2", "hd_id3"]), words, words), max_size=12),
    data=st.data(),
)
def test_pages_are_aligned_by_id_and_not_by_order(texts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    by_id: dict[str, list[tuple[str, str]]] = {}
    for i, source, target in texts:
        by_id.setdefault(i, []).append((source, target))
    order = data.draw(st.permutations(sorted(by_id)))
    there = [(i, source) for i, source, _ in texts], [(i, target) for i in order for _, target in by_id[i]]
    for name, found in zip(("en", "de"), there, strict=True):
        (folder / name).mkdir()
        (folder / name / "a.html").write_text(page(*found))
    (folder / "en" / "untranslated.html").write_text(page(("par_id1", "alone")))
    pages = aligned_pages(folder / "en", folder / "de")
    assert pages == {
        "a.html": [(source, target) for _, source, target in texts if source and target and source != target]
    }


pairs = st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"))


@given(pages=st.dictionaries(st.integers(0, 200).map("page{}.html".format), st.lists(pairs, max_size=5), max_size=40))
def test_no_source_is_in_two_splits_and_none_is_lost(pages):
    splits = split_pages(pages)
    sources = {name: {source for source, _ in found} for name, found in splits.items()}
    assert sum(map(len, sources.values())) == len(set.union(*sources.values()))
    assert set.union(*sources.values()) == {source for found in pages.values() for source, _ in found}
    assert set(splits["test"]) == {p for path, found in pages.items() if split_by_hash(path) == "test" for p in found}
    for name, found in splits.items():
        assert len(found) == len(set(found))
        assert set(found) <= {p for path, some in pages.items() if split_by_hash(path) == name for p in some}


@needs_dpkg
def test_two_packages_make_three_files_of_what_they_share(packages, tmp_path, monkeypatch, capsys):
    output = tmp_path / "made/help-de"
    monkeypatch.setattr(sys, "argv", ["x", "--language", "DE", "--output", str(output), "--packages", str(packages)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = {split: lines(output, split) for split in ("train", "validation", "test")}
    everything = [pair for split in found.values() for pair in split]
    headings = [[f"Page swriter/guide/{i}.html", f"Seite swriter/guide/{i}.html"] for i in range(40)]
    assert sorted(everything) == sorted([*headings, ["Click OK.", "Auf OK klicken."]])
    for split, pairs in found.items():
        for source, _ in pairs:
            assert source == "Click OK." or split_by_hash(source.removeprefix("Page ")) == split
    assert ["Click OK.", "Auf OK klicken."] in found["test"]
    about = json.loads((output / "about.json").read_text())
    assert about["packages"] == {ENGLISH: "4:7.4", GERMAN: "4:7.4"}
    assert (about["source"], about["target"], about["licence"]) == ("en-US", "de", "MPL-2.0")
    assert (about["pages"], about["unique_pairs"]) == (40, 41)
    assert about["pairs"] == {name: len(pairs) for name, pairs in found.items()}
    assert "--language DE --output" in about["command"]
    assert "41 unique pairs of 40 pages" in capsys.readouterr().out


@needs_dpkg
def test_a_language_of_a_region_is_found(packages, tmp_path):
    package(packages, "libreoffice-help-pt-br", "pt-BR", {"swriter/guide/1.html": page(("hd_id1", "Página"))})
    assert make("pt-br", tmp_path / "out", packages=packages)["target"] == "pt-BR"


@needs_dpkg
def test_the_same_packages_give_the_same_files(packages, tmp_path):
    for name in ("one", "two"):
        make("de", tmp_path / name, packages=packages)
    for file in ("train.tsv", "validation.tsv", "test.tsv", "about.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def refused(message, *arguments, **options):
    with pytest.raises(UserError) as error:
        make(*arguments, **options)
    assert message in str(error.value)


@needs_dpkg
def test_packages_that_cannot_be_used_are_refused(packages, tmp_path):
    output = tmp_path / "out"
    one_file = f"{packages} must hold one file {GERMAN}_VERSION_all.deb, got"
    refused(one_file.replace("-de_", "-fr_") + " none; apt-get download", "fr", output, packages=packages)
    package(packages, "libreoffice-help-es", "es", {"a.html": page(("par_id1", "sí"))}, version="4:6.0")
    refused("both packages must be of one version, got", "es", output, packages=packages)
    package(packages, "libreoffice-help-it", "xy", {"a.html": page(("par_id1", "sì"))})
    refused("must have pages in usr/share/libreoffice/help/it/text, got none", "it", output, packages=packages)
    package(packages, "libreoffice-help-nl", "nl", {"other.html": page(("par_id1", "ja"))})
    refused("share no translated text", "nl", output, packages=packages)
    file = next(packages.glob(f"{GERMAN}_*"))
    shutil.copy(file, packages / f"{GERMAN}_5_all.deb")
    refused(f"{one_file} 2 of them", "de", output, packages=packages)
    (packages / f"{GERMAN}_5_all.deb").unlink()
    file.write_bytes(b"torn")
    refused("a package cannot be used: dpkg-deb: error: ", "de", output, packages=packages)
    assert not output.exists()


@pytest.mark.parametrize("language", ["german!", "en-US", "", "--help"])
def test_what_is_no_other_language_is_refused(language, tmp_path):
    refused(f"as in de or pt-br, got {language.lower()!r}", language, tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    refused(f"{tmp_path} is already there and not empty; give another --output", "de", tmp_path)


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("libreoffice-help-common libreoffice-help-en-us libreoffice-help-fr", "--language must be one of fr, got de"),
        ("", "E: no network"),
        ("libreoffice-help-de", f"could not download {ENGLISH} and {GERMAN}: no network; run apt-get update"),
    ],
)
def test_a_download_that_fails_says_why(known, message, tmp_path, monkeypatch):
    program(tmp_path / "bin", "apt-get", "echo 'W: warned' >&2; echo 'E: no network' >&2; exit 100")
    program(tmp_path / "bin", "apt-cache", f"echo {known}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    refused(message.removeprefix("E: "), "de", tmp_path / "out")


def test_without_apt_another_way_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("this needs the program apt-get, which is not here; run this on Debian", "de", tmp_path / "out")
    refused("must hold one file", "de", tmp_path / "out", packages=tmp_path)
    for name in (ENGLISH, GERMAN):
        (tmp_path / f"{name}_1_all.deb").touch()
    refused("this needs the program dpkg-deb", "de", tmp_path / "out", packages=tmp_path)


def test_an_error_is_one_sentence_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--language", "9", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        libreoffice_help.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("libreoffice_help: --language must be the code of one other than en-us")
