"""The report says what was measured, whole in one file; what is measured for it is what it says."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest

import equinox_impl.layers
from bench import agreement, figures, forms, kept, memory, report
from bench.findings import findings
from bench.recipes import CONFIG
from tests.conftest import ROOT

KEPT = ROOT / "docs/report"
RESULTS = {name: kept.load(KEPT / f"{name}.json") for name in report.SECTIONS}
SECTIONS = ("answer", "agreement", "speed", "memory", "compile", "dispatch", "recipes", "conformance", "machine")
CSS = (report.PAGE / "report.css").read_text()
HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both pages and the plots, built from what docs/report keeps."""
    output = tmp_path_factory.mktemp("report")
    report.write(KEPT, output)
    return output


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text):
    """Parsed; what is not valid raises."""
    return html5lib.HTMLParser(strict=True).parse(text)


def said(element):
    return " ".join("".join(element.itertext()).split())


def by_id(page):
    return {element.get("id"): element for element in page.iter() if element.get("id")}


# the page


def test_every_section_is_there_under_a_heading_and_in_the_navigation(page):
    found = by_id(page)
    (nav,) = page.iter(f"{HTML}nav")
    assert [link.get("href") for link in nav.iter(f"{HTML}a")] == [f"#{name}" for name in SECTIONS]
    assert all(next(found[name].iter(f"{HTML}h2")) is not None for name in SECTIONS)


def test_the_page_needs_no_other_file_and_no_script(page, text):
    names = {element.tag.rpartition("}")[2] for element in page.iter() if isinstance(element.tag, str)}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "video", "base"}
    targets = [
        value
        for element in page.iter()
        for name, value in element.attrib.items()
        if name.rpartition("}")[2] in ("href", "src", "srcset", "data", "action", "poster")
    ]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.findall(r"@import|url\((?!#)", text)


def test_every_link_has_its_target_and_no_id_stands_twice(page):
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    targets = {value[1:] for e in page.iter() for name, value in e.attrib.items() if name.endswith("href")}
    assert targets <= set(ids)


def test_every_figure_and_section_has_its_command(page):
    found = by_id(page)
    for name, one in RESULTS.items():
        places = [found[name], *found[name].iter(f"{HTML}figure")]
        assert all(one.command in said(place) for place in places), name
        assert one.command.startswith(f"python -m bench {name} ")


def test_every_plot_has_words_that_stand_for_it(page):
    plots = list(page.iter(f"{SVG}svg"))
    assert len(plots) == 8
    assert all(plot.get("role") == "img" and len(plot.get("aria-label")) > 60 for plot in plots)


def test_every_recipe_and_every_mistake_is_shown_with_its_code(page):
    found = by_id(page)
    for recipe in RESULTS["recipes"].results:
        shown = said(found[f"recipe-{recipe['task']}"])
        assert recipe["title"] in shown
        assert "def recipe(" in shown
        for outcome in recipe["outcomes"]:
            assert " ".join(f"{outcome['outcome']}: {outcome['mistake']}".split()) in shown
            assert f"def {outcome['name']}(" in shown
            assert " ".join(outcome["message"].split()) in shown


def test_every_law_and_every_broken_one_is_shown(page):
    shown = said(by_id(page)["conformance"])
    for one in RESULTS["conformance"].results["implementations"]:
        assert one["name"] in shown
        assert all(verdict["law"] in shown for verdict in one["verdicts"])


def contrast(first, second):
    """Of two colours, by WCAG 2."""
    light = []
    for colour in (first, second):
        colour = colour.lstrip("#")
        colour = "".join(2 * c for c in colour) if len(colour) == 3 else colour
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize(("scheme", "style"), [(0, "default"), (1, "github-dark")], ids=["light", "dark"])
def test_text_and_code_and_lines_stand_out_from_the_page(scheme, style):
    root = re.findall(r":root \{(.*?)\}", CSS, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w+)", root))
    grounds = [colours.pop("page"), colours.pop("card")]
    del colours["line"]  # parts table rows, and says nothing
    written = report._formatter(style).get_style_defs(".code")
    code = re.findall(r"\.code \.(?!w |err )\w+ { color: (#\w+)", written)
    assert len(code) > 20
    assert all(contrast(colour, ground) >= 4.5 for colour in {*colours.values(), *code} for ground in grounds)
    lines = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.RED, figures.PURPLE, figures.GREY)
    assert all(contrast(line, grounds[0]) >= 3 for line in lines)


# the Markdown


def test_the_pages_in_docs_are_what_docs_keeps(folder):
    """The drawing of plots aside, which is matplotlib's."""
    for name in ("report.html", "report.md"):
        built, committed = (
            re.sub("<svg.*?</svg>", "", (place / name).read_text(), flags=re.S) for place in (folder, ROOT / "docs")
        )
        assert built == committed, "write it anew: python -m bench report --kept docs/report --output docs"


def test_the_markdown_shows_every_plot_and_command(folder):
    shown = (folder / "report.md").read_text()
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", shown)
    assert sorted(Path(path).name for _, path in pictures) == sorted(p.name for p in (folder / "report").iterdir())
    assert all(ElementTree.parse(folder / path).getroot().tag == f"{SVG}svg" for _, path in pictures)
    assert all(f"    {one.command}\n" in shown for one in RESULTS.values())
    assert all(f"[{finding.question}](#{finding.section})" in shown for finding in findings(RESULTS))


# what the top of the page says


def test_the_frontends_exchanged_exchange_the_answers():
    pairs = [
        ("nnx", "equinox"),
        ("nnx.jit", "eqx.filter_jit"),
        *((f"nnx_impl.{ours}", f"equinox_impl.{ours}") for ours in ("compiled", "Trainer's way")),
        ("nnx.split once, jax.jit of the State", "eqx.partition once, jax.jit of the tree"),
        ("nnx.cached_partial", "eqx.partition each call, jax.jit"),
        ("nnx.MultiHeadAttention", "eqx.nn.MultiheadAttention"),
    ]
    swap = dict(pairs) | {there: here for here, there in pairs}

    def swapped(value, key=None):
        if isinstance(value, dict):
            return {key: swapped(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [swapped(item) for item in value]
        return swap.get(value, value) if key in ("frontend", "style", "name") else value

    def figures_alone(text):
        return text.rpartition(": ")[2]  # without the name of a style

    there = {name: one._replace(results=swapped(one.results)) for name, one in RESULTS.items()}
    for here, exchanged in zip(findings(RESULTS), findings(there), strict=True):
        assert figures_alone(here.nnx) == figures_alone(exchanged.equinox)
        assert figures_alone(here.equinox) == figures_alone(exchanged.nnx)
        assert swap.get(here.less, here.less) == exchanged.less


def test_one_difference_is_said_at_the_top_and_in_its_cell():
    results = json.loads(json.dumps(RESULTS["agreement"].results))
    results[0] |= {"equal": False, "sha256": {"NNX, graph mode": "a" * 64, "Equinox": "b" * 64}}
    broken = RESULTS | {"agreement": RESULTS["agreement"]._replace(results=results)}
    found = findings(broken)
    assert [one.less for one in found[:2]] == ["they differ"] * 2
    assert found[0].nnx.startswith(f"{len(results) - 1} of {len(results)}")
    shown = report.as_html(kept=broken, plots=dict.fromkeys(report.PLOTS, ()), findings=found)
    assert "WHERE THEY DIFFER" in shown
    assert f"✗ NNX, graph mode {'a' * 8}, Equinox {'b' * 8}" in shown


def test_times_that_differ_by_less_than_noise_are_no_reason_to_choose():
    def compiled(nnx, equinox, spread=0.0):
        times = {"nnx": nnx, "equinox": equinox}
        results = [
            one
            | {"compile_s": times[one["frontend"]], "spread": [times[one["frontend"]] - spread, times[one["frontend"]]]}
            for one in RESULTS["compile"].results
        ]
        found = findings(RESULTS | {"compile": RESULTS["compile"]._replace(results=results)})
        return {one.less for one in found if one.section == "compile"}

    assert compiled(10.0, 10.9) == compiled(10.9, 10.0) == {"the same"}
    assert (compiled(10.0, 11.1), compiled(11.1, 10.0)) == ({"nnx"}, {"equinox"})
    assert (compiled(10.0, 20.0, spread=10.0), compiled(10.0, 20.0, spread=9.9)) == ({"the same"}, {"nnx"})


# what is measured


def test_what_was_found_is_kept_with_command_machine_and_versions(tmp_path):
    found = kept.about([{"a": 1}], arguments=["speed", "--json", "a file.json"])
    kept.keep(tmp_path / "new/speed.json", found)
    assert kept.load(tmp_path / "new/speed.json") == found
    assert found.command == "python -m bench speed --json 'a file.json'"
    assert {"jax", "flax", "equinox"} <= found.versions.keys()
    assert found.machine["cores"] >= 1


@pytest.mark.parametrize("fresh", [False, True])
def test_only_what_is_missing_is_measured_unless_all_is_to_be_fresh(fresh, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(forms.subprocess, "run", lambda command, check: ran.append(command))
    (tmp_path / "speed.json").touch()
    report.measure(tmp_path, fresh=fresh)
    names = [command[3] for command in ran]
    assert names == [name for name in report.SECTIONS if fresh or name != "speed"]
    assert all(command[-2:] == ["--json", str(tmp_path / f"{command[3]}.json")] for command in ran)


def test_one_changed_line_is_seen_by_the_bench(monkeypatch):
    forward = lambda package, config: {"forward": programs(package, config)["forward"]}
    programs = agreement.programs
    monkeypatch.setattr(agreement, "programs", forward)
    monkeypatch.setattr(agreement, "_more_programs", lambda *_: {})
    monkeypatch.setattr(agreement, "_trained", lambda *_: {})
    monkeypatch.setattr(agreement, "step_difference", lambda *_, **__: None)
    equal = [one.equal for one in agreement.comparisons({"the smallest": CONFIG})]
    original = equinox_impl.layers.layer_norm
    change = lambda *args, **options: original(*args, **options | {"epsilon": 2e-6})
    monkeypatch.setattr(equinox_impl.layers, "layer_norm", change)
    changed = {one.what: one.equal for one in agreement.comparisons({"the smallest": CONFIG})}
    assert equal == [True, True, True]
    assert changed == {"forward": False, "train step, dropout on": True, "initial weights of one seed": True}


def test_materialised_attention_takes_memory_by_the_square_of_the_length_blockwise_by_the_length(monkeypatch):
    contenders = memory.jax_contenders
    ours = lambda length: {name: c[:2] for name, c in contenders(length).items() if name.startswith("isoformer, ")}
    monkeypatch.setattr(memory, "jax_contenders", ours)
    monkeypatch.setattr(memory, "KINDS", ("forward",))
    found = {(one.implementation, one.length): one.bytes for one in memory.attention_memory((4096, 16384))}
    growth = {name: found[name, 16384] / found[name, 4096] for name, _ in found}
    assert growth["isoformer, materialised"] > 14
    assert growth["isoformer, blockwise"] < 4.5


# in a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser; install chromium")
    with api.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(
    ("width", "scheme", "scripts"), [(1280, "light", True), (390, "dark", True), (390, "light", False)]
)
def test_a_browser_shows_it_without_complaint_or_overflow(browser, folder, width, scheme, scripts, tmp_path):
    size = {"width": width, "height": 844}
    with browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=scripts) as context:
        view, complaints, asked = context.new_page(), [], []
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto((folder / "report.html").as_uri())
        recipe = view.locator("#recipe-train_step")
        assert not recipe.locator("pre").first.is_visible()
        recipe.locator("summary").first.click()
        assert recipe.locator("pre").first.is_visible()
        inner = recipe.locator("details").first
        inner.locator("summary").click()
        assert inner.locator("pre").is_visible()
        sides = [side.bounding_box() for side in recipe.locator("> .pair > div").all()]
        assert (sides[0]["y"] == sides[1]["y"]) == (width == 1280)  # beside each other, or one below the other
        if scripts:
            assert view.evaluate("document.documentElement.scrollWidth") == width
        view.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert not complaints
        assert asked == [(folder / "report.html").as_uri()]
