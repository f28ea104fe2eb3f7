"""What is drawn: attention by layer and head, and encodings of positions."""

import sys
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
from seq2seq.runs import Run
from seq2seq.tasks import load_task
from tests.conftest import ROOT
from tests.frontends import random_weights

TASK = load_task("copy")
KINDS = [kind for kind in get_args(Positions) if kind != "none"]


@pytest.fixture(autouse=True)
def _libraries_promote_as_they_like():
    with jax.numpy_dtype_promotion("standard"):
        yield


def small_config(positions: Positions) -> TransformerConfig:
    return TransformerConfig(
        source_vocab_size=len(TASK.source), target_vocab_size=len(TASK.target), d_model=8, num_heads=2, d_ff=8,
        num_encoder_layers=1, num_decoder_layers=2, max_length=TASK.buckets[-1], positions=positions,
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


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["isoformer", "encodings", "--output", str(ROOT / "README.md")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "README.md cannot hold pictures: File exists; give another --output" in " ".join(
        capsys.readouterr().err.split()
    )
