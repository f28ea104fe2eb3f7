"""What is drawn: attention by layer and head, and encodings of positions."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from core.config import Positions, TransformerConfig
from seq2seq import cli
from seq2seq.frontends import frontend
from seq2seq.options import TrainingOptions
from seq2seq.pictures import absolute_encodings, attention_maps, gallery, relative_encodings
from seq2seq.plots import plot_absolute_encodings, plot_attention, plot_relative_encodings
from seq2seq.runs import Run
from seq2seq.tasks import load_task
from tests.conftest import ROOT
from tests.frontends import random_weights
from tests.svg import seen

TASK = load_task("copy")
KINDS = [kind for kind in get_args(Positions) if kind != "none"]


@pytest.fixture(autouse=True)
def _libraries_promote_as_they_like():
    with jax.numpy_dtype_promotion("standard"):
        yield


def small_config(positions: Positions, *, layers: tuple[int, int] = (1, 2)) -> TransformerConfig:
    return TransformerConfig(
        source_vocab_size=len(TASK.source), target_vocab_size=len(TASK.target), d_model=8, num_heads=2, d_ff=8,
        num_encoder_layers=layers[0], num_decoder_layers=layers[1], max_length=TASK.buckets[-1], positions=positions,
        relative_distance=6, relative_buckets=4,
    )  # fmt: skip


def test_attention_maps_are_what_the_model_looked_at_without_the_padding():
    config = small_config("sinusoidal")
    package, source, target = frontend("equinox"), TASK.parse("05 03 11"), TASK.parse("07 01")
    model = package.from_weights(config, random_weights(config, 0))
    maps, symbols, letters = attention_maps(package, model, TASK, source, target)
    assert (symbols, letters) == (["07", "01", "end"], ["05", "03", "11"])
    assert {name: value.shape for name, value in maps.items()} == {
        "encoder.blocks.0.attention": (2, 3, 3),
        **{f"decoder.blocks.{i}.{kind}": (2, 3, 3) for i in range(2) for kind in ("attention", "cross_attention")},
    }
    for name, value in maps.items():
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)
        if name.endswith("attention") and name.startswith("decoder") and "cross" not in name:
            assert (np.triu(value, 1) == 0).all()
    bos, pad = jnp.asarray([[1, *target]]), jnp.asarray([[*source]])
    _, wanted = package.evaluation(model).run(pad, bos, return_weights=True)
    for name, value in maps.items():
        np.testing.assert_allclose(value, wanted[name][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_either_absolute_or_relative_and_the_relative_depend_on_distance_alone(kind):
    config = small_config(kind)
    weights = random_weights(config, 0)
    absolute = absolute_encodings(config, weights, length=7)
    relative = relative_encodings(config, weights, length=7)
    assert bool(absolute) != bool(relative)
    assert all(table.shape == (7, 8) for table in absolute.values())
    for logits in relative.values():
        assert logits.shape == (2, 7, 7)
        np.testing.assert_allclose(logits[:, 1:, 1:], logits[:, :-1, :-1], rtol=1e-4, atol=1e-4)
        assert np.ptp(logits) > 0
    if kind in ("shaw", "transformer_xl"):
        assert len(relative) == 3  # one a block
    if kind == "t5":
        ahead = [logits[0, 0, 1] == logits[0, 0, 0] for logits in relative.values()]
        assert dict(zip(relative, ahead, strict=True)) == {"decoder.relative": True, "encoder.relative": False}


def test_the_gallery_has_every_kind():
    absolute, relative = gallery(5)
    assert sorted({*absolute, *relative}) == sorted(KINDS)
    assert list(absolute) == ["sinusoidal", "learned"]


def random_maps(*shape: int, layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"blocks.{i}": rng.random(shape, np.float32) for i in range(layers)}


def strength(image: np.ndarray) -> np.ndarray:
    """`[rows, columns]` colours as numbers from -1, rust, to 1, blue."""
    return np.where(image[..., 2] > image[..., 0], image[..., 3], -image[..., 3])


def test_attention_is_drawn_by_layer_and_head_in_cells_as_strong_as_the_weights(tmp_path):
    maps = {name: 0.3 * value for name, value in random_maps(3, 4, 5).items()}
    plot_attention(tmp_path / "maps.svg", maps, "abcd", "vwxyz", title="all of it")
    texts, images = seen(tmp_path / "maps.svg")
    strongest = max(value.max() for value in maps.values())
    drawn = [head / strongest for value in maps.values() for head in value]
    for image, head in zip(images, drawn, strict=True):
        np.testing.assert_allclose(strength(image), head, atol=0.01)
    assert [text for text in texts if text.startswith(("blocks", "head"))] == [
        text for i in range(2) for text in (f"blocks.{i}", "head 0", "head 1", "head 2")
    ]
    assert f"key · clear 0, blue {strongest:.2g}" in texts
    assert "all of it" in texts
    assert [texts.count(name) for name in "abcdvwxyz"] == [2] * 4 + [6] * 5  # once a row of panels, and in each


def test_layers_of_one_head_stand_three_to_a_row_with_names_of_their_own(tmp_path):
    maps = random_maps(1, 4, 5, layers=3) | {"other": np.ones((1, 2, 3))}
    queries, keys = dict.fromkeys(maps, "abcd") | {"other": "AB"}, dict.fromkeys(maps, "vwxyz") | {"other": "XYZ"}
    plot_attention(tmp_path / "maps.svg", maps, queries, keys)
    texts, images = seen(tmp_path / "maps.svg")
    assert [image.shape[:2] for image in images] == [(4, 5)] * 3 + [(2, 3)]
    assert [texts.count(name) for name in "abcdvwxyz"] == [3] * 9
    assert [texts.count(name) for name in "ABXYZ"] == [1] * 5
    rows = re.findall(r' y="([\d.]+)"[^>]*>(?:blocks|other)', (tmp_path / "maps.svg").read_text())
    assert [rows.count(y) for y in dict.fromkeys(rows)] == [3, 1]


def test_encodings_are_rust_below_0_and_blue_above_each_on_a_scale_of_its_own(tmp_path):
    logits = {name: value - 0.5 for name, value in random_maps(2, 4, 4).items()}
    logits["blocks.1"][1] *= 100
    tables = {name: value[0] for name, value in logits.items()}
    plot_relative_encodings(tmp_path / "relative.svg", logits)
    plot_absolute_encodings(tmp_path / "absolute.svg", tables)
    heads = [head for value in logits.values() for head in value]
    for name, panels in (("relative", heads), ("absolute", tables.values())):
        texts, images = seen(tmp_path / f"{name}.svg")
        for image, panel in zip(images[::2], panels, strict=True):  # a scale after each
            np.testing.assert_allclose(strength(image), panel / np.abs(panel).max(), atol=0.01)
            assert f"{np.abs(panel).max():.2g}" in texts
        for scale in images[1::2]:
            np.testing.assert_allclose(strength(scale)[:, 0], np.linspace(1, -1, 101), atol=0.01)


def test_what_is_not_finite_is_grey_and_the_strongest_of_the_rest_has_the_full_colour(tmp_path):
    logits = np.array([[[np.nan, -np.inf, 2.0, 0.0]]])
    plot_relative_encodings(tmp_path / "signed.svg", {"a": logits})
    plot_attention(tmp_path / "weights.svg", {"a": abs(logits)}, "t", "wxyz")
    for name in ("signed", "weights"):
        row = seen(tmp_path / f"{name}.svg")[1][0][0]
        np.testing.assert_allclose(row[:2], [[0.5, 0.5, 0.5, 1]] * 2, atol=0.01)
        np.testing.assert_allclose(strength(row)[2:], [1, 0], atol=0.01)


def test_a_token_may_be_a_dollar_and_a_long_one_is_cut(tmp_path):
    plot_attention(tmp_path / "a.svg", {"a": np.ones((1, 1, 2))}, ["antidisestablishmentarianism"], ["$\\x$", "<"])
    texts, _ = seen(tmp_path / "a.svg")
    assert {"$\\x$", "<", "antidisestablis…"} <= set(texts)


@pytest.mark.parametrize(("heads", "length", "named"), [(2, 12, 12), (8, 300, 20)])
def test_a_picture_stops_growing_and_names_as_many_keys_as_it_has_room_for(heads, length, named, tmp_path):
    maps = random_maps(heads, length, length, layers=1)
    names = [f"s{i}" for i in range(length)]
    plot_attention(tmp_path / "maps.png", maps, names, names)
    down, across, _ = imread(tmp_path / "maps.png").shape
    assert max(down, across) <= 150 * 22
    plot_attention(tmp_path / "maps.svg", maps, names, names)
    shown = [text for text in seen(tmp_path / "maps.svg")[0] if text in names]
    assert shown[:named] == names[:: length // named]
    assert len(shown) == named * (heads + 1)


def test_panels_stay_half_an_inch_and_pictures_of_very_many_take_6000_pixels(tmp_path):
    plot_attention(tmp_path / "wide.png", random_maps(58, 2, 2, layers=1), "ab", "xy")
    plot_attention(tmp_path / "long.png", random_maps(2, 900, 1), ["x"] * 900, "a")
    plot_attention(tmp_path / "wide.svg", random_maps(45, 2, 2, layers=1), "ab", "xy")
    assert imread(tmp_path / "wide.png").shape[1] == pytest.approx(6000, abs=1)
    assert imread(tmp_path / "long.png").shape[0] < 150 * 22
    panels = re.findall(r'<rect [^>]*width="([\d.]+)"', (tmp_path / "wide.svg").read_text())
    assert [float(width) / 72 for width in panels] == pytest.approx([0.5] * 45)


def test_a_png_has_a_white_ground_and_an_svg_none(tmp_path):
    for name in ("a.png", "a.svg"):
        plot_attention(tmp_path / name, random_maps(1, 2, 2), "ab", "xy")
    np.testing.assert_array_equal(imread(tmp_path / "a.png")[0, 0], np.ones(4))
    assert 'fill: #ffffff"' not in (tmp_path / "a.svg").read_text()
    assert "#000000" not in (tmp_path / "a.svg").read_text()


MAPS = {"a": np.ones((2, 3, 4)), "b": np.ones((2, 3, 4))}
NAMES = {"queries": "123", "keys": "1234"}


@pytest.mark.parametrize(
    ("draw", "maps", "names", "message"),
    [
        (plot_attention, {}, NAMES,
         "weights must be [N, T, S] by layer name, of at least one layer, got none; give those of a layer by its name, "
         "of one sequence of the batch"),
        (plot_relative_encodings, {}, {},
         "logits must be [N, T, S] by layer name, of at least one layer, got none; encodings that are added to vectors "
         "are drawn by plot_absolute_encodings"),
        (plot_absolute_encodings, {}, {},
         "tables must be [L, D] by name, at least one, got none; encodings that act on logits are drawn by "
         "plot_relative_encodings"),
        (plot_attention, {"a": np.ones((1, 2, 3, 4))}, NAMES,
         "weights must be [N, T, S], none of them 0, got 'a' of shape (1, 2, 3, 4); take one sequence of a batch, and "
         "one position at least"),
        (plot_relative_encodings, {"a": np.ones((2, 0, 0))}, {},
         "logits must be [N, T, S], none of them 0, got 'a' of shape (2, 0, 0); take one sequence of a batch, and one "
         "position at least"),
        (plot_absolute_encodings, {"a": np.ones((0, 8))}, {},
         "tables must be [L, D], none of them 0, got 'a' of shape (0, 8); take one sequence of a batch, and one "
         "position at least"),
        *(
            (draw, {**MAPS, "c": np.ones((4, 3, 4))}, names,
             f"{what} of all layers must have as many heads, got 2 in 'a' and 4 in 'c'; draw them in pictures of their "
             "own")
            for draw, names, what in ((plot_attention, NAMES, "weights"), (plot_relative_encodings, {}, "logits"))
        ),
        (plot_attention, MAPS, {**NAMES, "queries": "1234"},
         "queries must be a name each, got 4 names for the 3 queries of 'a'; give as many as its [N, T, S] weights "
         "have, by layer name where layers differ"),
        (plot_attention, MAPS, {**NAMES, "keys": {"a": "1234", "b": "123"}},
         "keys must be a name each, got 3 names for the 4 keys of 'b'; give as many as its [N, T, S] weights have, by "
         "layer name where layers differ"),
        (plot_attention, MAPS, {**NAMES, "keys": {"a": "1234"}},
         "keys by layer must name those of each, got none for 'b'; add them, or give one list"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named_before_anything_is_written(draw, maps, names, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        draw(tmp_path / "a.png", maps, **names)
    assert not list(tmp_path.iterdir())


def test_arithmetic_and_module_trees_import_no_plotting():
    for folder in ("core", "nnx_impl", "equinox_impl"):
        for file in Path(ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) (matplotlib|seq2seq)", file.read_text(), re.M), file


def test_the_command_line_draws_a_run_and_the_gallery(tmp_path, monkeypatch, capsys):
    def isoformer(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["isoformer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = "".join(capsys.readouterr())
        assert not stop.value.code, printed
        return printed

    config, folder = small_config("t5"), tmp_path / "run"
    run = Run.create(folder, task="copy", frontend="nnx", config=config, options=TrainingOptions())
    run.save(1, {"weights": random_weights(config, 0)}, {"validation_loss": 1.0})
    isoformer("attention", folder, "05 03 11", "--output", tmp_path / "maps")
    isoformer("encodings", folder, "--output", tmp_path / "own", "--length", 9)
    isoformer("encodings", "--output", tmp_path / "all", "--length", 9)
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.png"))
    assert drawn == [
        "all/absolute.png", "all/relative.png", "maps/cross.png", "maps/decoder.png", "maps/encoder.png",
        "own/relative.png",
    ]  # fmt: skip
    for name in drawn:
        assert np.ptp(imread(tmp_path / name)) > 0.5


def refusal(*arguments: object) -> str:
    """What the command line says when it refuses."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["isoformer", *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", said.getvalue()).split())


def test_a_folder_that_cannot_be_made_is_named():
    said = refusal("encodings", "--output", ROOT / "README.md")
    assert "README.md cannot hold pictures: File exists; give another --output" in said


@pytest.mark.parametrize("length", [0, -1])
def test_at_least_one_position_is_drawn(length, tmp_path):
    said = refusal("encodings", "--length", length, "--output", tmp_path / "pictures")
    assert re.search(r"Invalid value for '--length': .*\b1\b", said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("command", ["attention", "generate"])
def test_a_run_without_layers_has_no_attention_to_draw(command, layers, tmp_path):
    config = small_config("sinusoidal", layers=layers)
    run = Run.create(tmp_path / "run", task="copy", frontend="nnx", config=config, options=TrainingOptions())
    run.save(1, {"weights": random_weights(config, 0)}, {"validation_loss": 1.0})
    option = "--output" if command == "attention" else "--attention"
    said = refusal(command, tmp_path / "run", "05 03", option, tmp_path / "maps")
    rule = "attention is drawn of at least one encoder and one decoder layer"
    assert f"{rule}, got {layers[0]} and {layers[1]}; train with --layers 1 or more" in said
    assert not (tmp_path / "maps").exists()
