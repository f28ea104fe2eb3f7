"""English to another language from the help of LibreOffice: `python -m seq2seq.libreoffice_help --language de`.

The Debian packages of the help have the same pages in every language, whose paragraphs and headings carry the same
ids: the alignment is exact. The texts are under the Mozilla Public License 2.0.
"""

import collections
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from seq2seq import entry
from seq2seq.errors import UserError
from seq2seq.splits import SPLITS, split_by_hash

_PACKAGE = "libreoffice-help-{}"
_PAGES = Path("usr/share/libreoffice/help")
_ELSEWHERE = "or get both .deb files by other means and give --packages"

Pair = tuple[str, str]
Element = tuple[str, int]  # an id, and how often it came before on the page: pages embed parts of others


def elements(page: str) -> dict[Element, str]:
    """The text of each element of a page whose id is that of a paragraph or of a heading, without tags.

    >>> elements('<h1 id="hd_id1">Save</h1> <p id="par_id2">Choose\\n<b>File</b>.</p>')
    {('hd_id1', 0): 'Save', ('par_id2', 0): 'Choose File.'}
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    times: collections.Counter[str] = collections.Counter()
    texts = {}
    for name, parts in reader.found:
        texts[name, times[name]] = " ".join("".join(parts).split())
        times[name] += 1
    return texts


class _Reader(HTMLParser):
    """Collects the pieces of text inside elements with such an id; they do not lie in each other."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if name.startswith(("par_id", "hd_id")):
            self.found.append((name, []))
            self.inside = tag
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.found[-1][1].append(data)


def aligned_pages(english: Path, other: Path) -> dict[str, list[Pair]]:
    """The pairs of each page that both folders have, by its path; texts that are empty or the same are left out."""
    paths = sorted(path.relative_to(english).as_posix() for path in english.rglob("*.html"))
    pages = {}
    for path in paths:
        if (other / path).is_file():
            sources, targets = (elements((folder / path).read_text(encoding="utf-8")) for folder in (english, other))
            pairs = ((source, targets.get(element, "")) for element, source in sources.items())
            pages[path] = [(source, target) for source, target in pairs if source and target and source != target]
    return pages


def split_pages(pages: Mapping[str, Iterable[Pair]]) -> dict[str, list[Pair]]:
    """Unique pairs by the split of their page's path; a source of several splits stays in the last of them alone.

    So no source of the test pages is in validation or train, and none of the validation pages is in train.
    """
    found: dict[str, dict[Pair, None]] = {name: {} for name in SPLITS}
    for path, pairs in pages.items():
        found[split_by_hash(path)].update(dict.fromkeys(pairs))
    taken: set[str] = set()
    for name in reversed(SPLITS):
        found[name] = {pair: None for pair in found[name] if pair[0] not in taken}
        taken |= {source for source, _ in found[name]}
    return {name: list(pairs) for name, pairs in found.items()}


def make(language: str, output: Path, *, packages: Path | None = None) -> dict:
    """Writes train.tsv, validation.tsv, test.tsv and about.json, whose content it returns."""
    language = language.lower()
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]{2,4})?", language) or language == "en-us":
        raise UserError(f"--language must be the code of one other than en-us, as in de or pt-br, got {language!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is already there and not empty; give another --output or remove it")
    names = [_PACKAGE.format(code) for code in ("en-us", language)]
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            _download(names, Path(scratch))
        files = [_file(name, Path(scratch) if packages is None else packages) for name in names]
        versions = [_dpkg_deb("--field", str(file), "Version") for file in files]
        if versions[0] != versions[1]:
            raise UserError(
                f"both packages must be of one version, got {' and '.join(file.name for file in files)}; "
                "leave --packages out, or fetch the same version of both"
            )
        folders = []
        for file, code in zip(files, ("en-us", language), strict=True):
            _dpkg_deb("--extract", str(file), f"{scratch}/{code}")
            folders.append(_texts(Path(scratch) / code, code, file))
        pages = aligned_pages(*folders)
    splits = split_pages(pages)
    if not any(splits.values()):
        raise UserError(f"{names[0]} and {names[1]} share no translated text; give packages of another version")
    about = {
        "source": folders[0].parent.name,
        "target": folders[1].parent.name,
        "packages": dict(zip(names, versions, strict=True)),
        "licence": "MPL-2.0",
        "pages": len(pages),
        "unique_pairs": len({pair for pairs in pages.values() for pair in pairs}),
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "source_words": {name: sum(len(source.split()) for source, _ in pairs) for name, pairs in splits.items()},
        "command": shlex.join(["python", "-m", "seq2seq.libreoffice_help", *sys.argv[1:]]),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, pairs in splits.items():
            text = "".join(f"{source}\t{target}\n" for source, target in pairs)
            (output / f"{name}.tsv").write_text(text, encoding="utf-8")
        (output / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; give another --output") from None
    return about


def _download(names: list[str], folder: Path) -> None:
    _needs("apt-get", f"run this on Debian or Ubuntu, {_ELSEWHERE}")
    done = subprocess.run(["apt-get", "download", *names], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    known = subprocess.run(["apt-cache", "pkgnames", _PACKAGE.format("")], capture_output=True, text=True, check=False)
    codes = {name.removeprefix(_PACKAGE.format("")) for name in known.stdout.split()} - {"common", "en-us"}
    asked = names[1].removeprefix(_PACKAGE.format(""))
    if codes and asked not in codes:
        raise UserError(f"--language must be one of {', '.join(sorted(codes))}, got {asked}")
    why = next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr.strip())
    raise UserError(
        f"apt-get could not download {' and '.join(names)}: {why.removeprefix('E: ')}; run apt-get update and see "
        f"that the network works, {_ELSEWHERE}"
    )


def _file(name: str, folder: Path) -> Path:
    found = sorted(folder.glob(f"{name}_*.deb"))
    if len(found) != 1:
        what = f"{len(found)} of them" if found else "none"
        raise UserError(f"{folder} must hold one file {name}_VERSION_all.deb, got {what}; apt-get download {name}")
    return found[0]


def _texts(root: Path, code: str, file: Path) -> Path:
    """Where a package has its pages; the folder is written pt-BR where the package is pt-br."""
    folders = [path for path in (root / _PAGES).glob("*/text") if path.parent.name.lower() == code]
    if not folders:
        raise UserError(f"{file.name} must have pages in {_PAGES}/{code}/text, got none; give another version of it")
    return folders[0]


def _dpkg_deb(*arguments: str) -> str:
    _needs("dpkg-deb", "install the package dpkg")
    done = subprocess.run(["dpkg-deb", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a package cannot be used: {done.stderr.strip()}; fetch it again")
    return done.stdout.strip()


def _needs(program: str, remedy: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"this needs the program {program}, which is not here; {remedy}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    language: Annotated[str, typer.Option(help="What English is translated into: de, fr, pt-br, about thirty more.")],
    output: Annotated[Path, typer.Option(help="A new folder for train.tsv, validation.tsv, test.tsv and about.json.")],
    packages: Annotated[
        Path | None,
        typer.Option(help="A folder with both packages as .deb files.", show_default="downloaded by apt-get"),
    ] = None,
) -> None:
    """Make a parallel text, English to another language, from the help of LibreOffice in Debian.

    Each line of a file is a source, a tab and its translation. Pages are split by the hash of their path: 10 % test,
    2 % validation, the rest train, and no source of one file is in another. The texts are under the MPL-2.0.
    """
    console = Console()
    about = make(language, output, packages=packages)
    table = Table("", "pairs", "English words", title=f"LibreOffice Help, {about['source']} to {about['target']}")
    for name in SPLITS:
        table.add_row(name, f"{about['pairs'][name]:,}", f"{about['source_words'][name]:,}")
    console.print(table)
    console.print(
        f"{about['unique_pairs']:,} unique pairs of {about['pages']:,} pages, version "
        f"{next(iter(about['packages'].values()))}; those that would be in two splits are in one. Kept in {output}",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """The entry point."""
    entry.run(app, name="libreoffice_help")


if __name__ == "__main__":
    main()
