"""A file of weights to hand on says what it holds, and is refused if any of it has changed."""

import json
import os
import sys

import numpy as np
import pytest

from core import weights
from core.config import TransformerConfig
from seq2seq.cli import main
from seq2seq.corpus import prepare
from seq2seq.errors import CheckpointError, UserError
from seq2seq.exports import export
from seq2seq.options import TrainingOptions
from seq2seq.runs import Run
from tests.frontends import FRONTENDS, random_weights, same_bits

SIZES = {"d_model": 4, "num_heads": 1, "d_ff": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
CONFIG = TransformerConfig(source_vocab_size=23, target_vocab_size=23, **SIZES)
BEST, LATEST, AVERAGE = (random_weights(CONFIG, seed) for seed in range(3))


def new_run(folder, task="copy", config=CONFIG, data=None, **options):
    """Its best state is not the latest."""
    run = Run.create(folder, task=task, frontend="nnx", config=config, options=TrainingOptions(**options), data=data)
    for step, found, loss in ((3, BEST, 0.125), (4, LATEST, 2.0)):
        optimizer = {f"1.average.{name}": array for name, array in AVERAGE.items()} if step == 3 else {}
        run.save(
            step, {"weights": found, "optimizer": {"0.count": np.int32(step), **optimizer}}, {"validation_loss": loss}
        )
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return new_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(run):
    export(run, run.folder.parent / "w.safetensors")
    return run.folder.parent / "w.safetensors"


@pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
def test_either_frontend_builds_the_best_model_from_the_file_alone(package, exported):
    config = TransformerConfig.from_json(weights.metadata(exported)["config"])
    model = package.from_weights(config, weights.load(exported))
    assert config == CONFIG
    assert same_bits(package.to_weights(model), BEST)


def test_the_weights_are_averaged_if_the_run_averages(tmp_path):
    about = export(new_run(tmp_path / "run", average=0.5), tmp_path / "w")
    assert same_bits(weights.load(tmp_path / "w"), AVERAGE)
    assert about["averaged"] == "true"


def test_the_file_says_what_it_holds_and_how_that_was_made(run, exported):
    said = weights.metadata(exported)
    assert (said["task"], said["model"], said["step"], said["validation_loss"]) == ("copy", "Transformer", "3", "0.125")
    assert said["averaged"] == "false"
    assert json.loads(said["run"]) == json.loads((run.folder / "run.json").read_text())
    for side in ("source", "target"):
        symbols = json.loads(said[f"{side}_symbols"])
        assert symbols[:4] == ["<pad>", "<bos>", "<eos>", "00"]
        assert [symbols[i] for i in run.load_task().source.encode("07 19")] == ["07", "19"]
    assert "from_weights" in said["what"]


def test_a_file_of_subwords_has_the_tokenizer(tmp_path):
    (tmp_path / "text.tsv").write_text("".join(f"word {i}\tWort {i}\n" for i in range(100)))
    text = str(tmp_path / "text.tsv")
    made = prepare(tmp_path / "data", text=text, validation=None, test=None, vocabulary=270, max_length=20)
    config = CONFIG.replace(source_vocab_size=made["vocabulary"], target_vocab_size=made["vocabulary"])
    run = new_run(tmp_path / "run", "translate", config, tmp_path / "data")
    said = export(run, tmp_path / "w")
    assert said["tokenizer"] == (tmp_path / "data" / "tokenizer.json").read_text()
    assert weights.metadata(tmp_path / "w") == said


def test_a_flipped_bit_anywhere_in_the_file_is_refused(exported):
    """Of a small one every bit is tried by tests of `core.weights`."""
    content = exported.read_bytes()
    with exported.open("r+b", buffering=0) as file:
        for place in [*range(0, len(content), 13), len(content) - 1]:
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << place % 8]), place)
            with pytest.raises(ValueError, match=r"is not a whole safetensors file|has changed since it was written"):
                weights.load(exported)
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert same_bits(weights.load(exported), BEST)


def test_a_file_that_is_there_stays(run, tmp_path):
    for make in (lambda path: path.write_text("mine"), lambda path: path.symlink_to("nowhere"), os.mkdir):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        make(path)
        before = path.lstat()
        with pytest.raises(UserError, match="is already there; give another FILE or remove it"):
            export(run, path)
        assert path.lstat() == before


def test_a_place_that_cannot_be_written_is_named(run, tmp_path):
    with pytest.raises(UserError, match="w cannot be written: No such file or directory; give another FILE"):
        export(run, tmp_path / "none" / "w")


def test_of_a_damaged_checkpoint_no_file_is_made(tmp_path):
    run = new_run(tmp_path / "run")
    path = next((run.checkpoint_folder / "00000003" / "arrays" / "d").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00000003 is damaged: arrays/d/.* has changed"):
        export(run, tmp_path / "w")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_says_which_weights_went_where(run, tmp_path, monkeypatch, capsys):
    for code, text in (
        (0, "the weights of step 3, validation loss 0.125, are in"),
        (2, "w is already there; give ano"),
    ):
        monkeypatch.setattr(sys, "argv", ["isoformer", "export", str(run.folder), str(tmp_path / "w")])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert (stop.value.code or 0) == code
        assert text in " ".join((printed.out + printed.err).split())
    assert same_bits(weights.load(tmp_path / "w"), BEST)
