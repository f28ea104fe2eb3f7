"""Training, keeping, evaluating and running a model, with either frontend; and what a user does wrong."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from core.config import TransformerConfig
from seq2seq import compare as comparing
from seq2seq import tasks
from seq2seq.cli import main
from seq2seq.decoding import predict
from seq2seq.evaluation import sequence_scores
from seq2seq.examples import Example
from seq2seq.frontends import frontend
from seq2seq.metrics import curves
from seq2seq.optimizer import make_optimizer
from seq2seq.options import TrainingOptions
from seq2seq.report import Report
from seq2seq.runs import Run
from seq2seq.vocabulary import Symbols
from tests.conftest import ROOT
from tests.frontends import random_weights, same_bits

SMALL = ["--d-model", "8", "--num-heads", "2", "--d-ff", "8", "--layers", "1", "--tokens", "110", "--warmup", "2"]


@pytest.fixture(autouse=True)
def _libraries_promote_as_they_like():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def isoformer(monkeypatch, capsys):
    """The command line: arguments to (exit code, what was printed to either stream)."""

    def run(*arguments: object, folded: bool = True) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["isoformer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        text = printed.out + printed.err
        return stop.value.code or 0, " ".join(text.split()) if folded else text

    return run


@pytest.mark.parametrize(
    ("name", "other"), [("nnx", "equinox"), pytest.param("equinox", "nnx", marks=pytest.mark.slow)]
)
def test_a_run_trained_in_one_frontend_is_evaluated_and_used_in_the_other(name, other, isoformer, tmp_path):
    run = tmp_path / "run"
    code, printed = isoformer(
        "train", "--task", "copy", "--frontend", name, "--run", run, "--steps", 4, "--validate-every", 2, *SMALL
    )
    assert code == 0, printed
    assert "Stopped after 4 steps: all steps done" in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [2, 4]
    results = [isoformer("evaluate", run, "--frontend", which, "--split", "validation") for which in (name, other)]
    assert [code for code, _ in results] == [0, 0]
    tables = [re.findall(r"[\d.]+%?(?= │)", printed) for _, printed in results]
    assert tables[0] == tables[1]
    assert float(tables[0][0]) == pytest.approx(min(line["validation_loss"] for line in validations), abs=1e-4)
    code, printed = isoformer("generate", run, "--frontend", other, "01 02 03")
    assert (code, printed.split("→")[0].strip()) == (0, "01 02 03")


def test_the_best_weights_are_kept_not_the_last(tmp_path):
    config = TransformerConfig(source_vocab_size=5, target_vocab_size=5, d_model=4, num_heads=1, d_ff=4)
    run = Run.create(tmp_path / "run", task="copy", frontend="nnx", config=config, options=TrainingOptions())
    task = dataclasses.replace(tasks.load_task("copy"), source=Symbols("ab"), target=Symbols("ab"))
    best, worse = random_weights(config, 0), random_weights(config, 1)
    keep = lambda step, weights, loss: run.save(step, {"weights": weights}, {"validation_loss": loss})
    keep(1, worse, 3.0)
    keep(2, best, 1.0)
    keep(3, worse, 2.0)
    keep(4, worse, None)
    opened = Run.open(tmp_path / "run")
    assert opened == run
    assert same_bits(opened.best_weights(), best)
    assert same_bits(frontend("equinox").to_weights(opened.load_model(frontend("equinox"), task)), best)


def test_training_stops_when_the_validation_loss_no_longer_falls(isoformer, tmp_path):
    code, printed = isoformer(
        "train", "--task", "copy", "--run", tmp_path / "run", "--steps", 60, "--validate-every", 1, "--patience", 2,
        "--learning-rate", 1000, *SMALL,
    )  # fmt: skip
    assert code == 0
    assert "the validation loss has not fallen for 2 validations" in printed


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A folder with a run, `run`, that has learned a little of a small text."""
    folder = tmp_path_factory.mktemp("translator")
    numbers = ["one", "two", "three", "four", "five", "six"], ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
    rng = np.random.default_rng(0)
    for name, size in (("train", 120), ("validation", 8), ("test", 8)):
        drawn = rng.integers(0, 6, (size, 3))
        lines = ("\t".join(" ".join(side[i] for i in row) for side in numbers) for row in drawn)
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    made = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "seq2seq.cli", *arguments], cwd=folder, check=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    texts = ["--text", "train.tsv", "--validation", "validation.tsv", "--test", "test.tsv"]
    made("prepare", *texts, "--output", "data", "--vocabulary", "290", "--max-length", "12")
    made(
        "train", "--task", "translate", "--data", "data", "--run", "run", "--steps", "40", "--validate-every", "20",
        "--learning-rate", "0.01", "--average", "0.5", *map(str, SMALL),
    )  # fmt: skip
    return folder


def test_a_translation_is_scored_alike_in_both_frontends(translator, isoformer, tmp_path):
    tables = []
    for name in ("nnx", "equinox"):
        code, printed = isoformer(
            "evaluate", translator / "run", "--frontend", name, "--beams", 2, "--predictions", tmp_path / name
        )
        assert code == 0
        tables.append(re.findall(r"[\d.]+%?(?= [ │])", printed))
        assert "BLEU" in printed
        assert "nrefs:1|case:mixed" in printed
        assert "chrF" in printed
    assert tables[0] == tables[1]
    first, second = ((tmp_path / name).read_text() for name in ("nnx", "equinox"))
    assert first == second
    assert len(first.splitlines()) == 8
    code, printed = isoformer("evaluate", translator / "run", "--predictions", tmp_path / "nnx")
    assert (code, "is already there; give another --predictions" in printed) == (2, True)


def test_what_is_read_line_by_line_is_written_line_by_line(translator, isoformer, tmp_path, monkeypatch):
    """An empty line stays one, so that the lines of both sides belong together."""
    lines = ["one two three", "", "six five"]
    (tmp_path / "in").write_text("\n".join(lines))
    code, from_file = isoformer("generate", translator / "run", "--file", tmp_path / "in", folded=False)
    assert code == 0
    monkeypatch.setattr(sys, "stdin", iter(f"{line}\n" for line in lines))
    assert isoformer("generate", translator / "run", folded=False) == (0, from_file)
    said = from_file.splitlines()
    assert len(said) == 3
    assert said[1] == ""
    code, given = isoformer("generate", translator / "run", *lines[::2], folded=False)
    assert given.splitlines() == [f"{lines[i]}  →  {said[i]}" for i in (0, 2)]


def test_outputs_are_n_best_drawn_and_begun_alike_in_both_frontends(translator, isoformer, tmp_path):
    for options in (
        ["--beams", 3, "--n-best", 2, "--length-penalty", 0],
        ["--temperature", 1.5, "--top-k", 9, "--top-p", 0.95, "--n-best", 3, "--seed", 5],
        ["--prefix", "zwei", "--min-length", 4, "--repetition-penalty", 1.3, "--no-repeat-ngram", 2],
    ):
        found = [
            isoformer("generate", translator / "run", "one two", "--frontend", name, *options, folded=False)
            for name in ("nnx", "equinox")
        ]
        assert found[0] == found[1]
        assert found[0][0] == 0
        lines = found[0][1].splitlines()
        if "--n-best" in options:
            scores = [float(line.split()[-1]) for line in lines]
            assert len(lines) == options[options.index("--n-best") + 1]
            assert all(score < 0 for score in scores)
            assert "--beams" not in options or scores == sorted(scores, reverse=True)
        else:
            assert lines[0].startswith("one two  →  zwei")


def test_generate_draws_where_each_translation_looked(translator, isoformer, tmp_path):
    arguments = ["one two", "three", "--attention", tmp_path / "pictures"]
    assert isoformer("generate", translator / "run", *arguments)[0] == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["0001.png", "0002.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_translation_goes_on_where_it_stopped_and_its_curves_are_drawn(translator, isoformer, tmp_path):
    run = shutil.copytree(translator / "run", tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    about["options"]["steps"] = 44
    (run / "run.json").write_text(json.dumps(about))
    code, printed = isoformer("resume", run, "--frontend", "equinox")
    assert code == 0
    assert "going on after step 40" in printed
    assert "Stopped after 44 steps" in printed
    assert isoformer("plot", run, translator / "run")[0] == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"loss", "validation_loss", "learning_rate"} <= curves(run).keys()
    code, printed = isoformer("plot", run, "--output", tmp_path / "none" / "x.png")
    assert (code, "cannot be drawn" in printed) == (2, True)


def test_digits_are_classified_alike_in_both_frontends_and_beside_a_baseline(isoformer, tmp_path):
    run = tmp_path / "run"
    options = ["--steps", 4, "--validate-every", 2, "--average", 0.5, *SMALL]
    assert isoformer("train", "--task", "digits", "--frontend", "equinox", "--run", run, *options)[0] == 0
    tables = []
    for name in ("nnx", "equinox"):
        code, printed = isoformer("evaluate", run, "--frontend", name, "--split", "validation")
        assert code == 0
        tables.append(re.findall(r"[\d.]+%?(?= │)", printed))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 3
    code, printed = isoformer("generate", run, "7")
    assert (code, "classifies images, '7' is none" in printed) == (2, True)
    code, printed = isoformer("evaluate", run, "--predictions", tmp_path / "said")
    assert (code, "the task digits classifies; leave it out" in printed) == (2, True)
    assert not (tmp_path / "said").exists()
    assert isoformer("encodings", run, "--output", tmp_path / "pictures")[0] == 0


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--task", "translate"], "the task translate needs --data, a folder that `isoformer prepare` made"),
        (["train", "--task", "copy", "--data", "x"], "the task copy has its own data, not --data"),
        (["train", "--task", "translate", "--data", "x"], "x is no prepared data"),
        (["prepare", "--text", "a.tsv", "--output", "x"], "a.tsv is no file; give a file, a glob"),
        (["generate", "nowhere", "a", "--beams", 2, "--n-best", 3], "n_best must be at most beams=2, got 3"),
        (["generate", "nowhere", "a", "--beams", 2, "--top-k", 3], "drawn or searched for by beams, not both"),
        (["generate", "nowhere", "a", "--temperature", -1], "temperature must be at least 0 and finite, got -1.0"),
        (["generate", "nowhere", "a", "--min-length", -1], "min_length must be an integer of at least 0, got -1"),
        (["plot", "nowhere"], "nowhere is no run folder"),
        (["train", "--task", "sing"], "unknown task 'sing'; choose one of copy, reverse, pronounce"),
        (["train", "--frontend", "torch"], "unknown frontend 'torch'; choose one of nnx, equinox"),
        (["train", "--d-model", 10], "d_model must be a multiple of num_heads, got d_model=10, num_heads=4"),
        (["train", "--positions", "round"], "positions must be one of"),
        (["train", "--dropout-rate", 1.0], "dropout_rate must be at least 0 and below 1, got 1.0"),
        (["train", "--learning-rate", "nan"], "learning_rate must be above 0 and finite, got nan"),
        (["train", "--steps", 0], "steps must be at least 1, got 0"),
        (["evaluate", ROOT / "README.md"], "README.md is no run folder, it has no run.json"),
        (["train", "--task", "copy", "--run", ROOT / "README.md" / "x"], "cannot be made: Not a directory"),
        (["compare", "--output", ROOT / "README.md"], "README.md cannot hold a report: File exists"),
        (["evaluate", "nowhere"], "nowhere is no run folder, it has no run.json"),
        (["generate", "nowhere", "word"], "nowhere is no run folder, it has no run.json"),
        (["compare", "--minutes", -1], "minutes must be above 0 and finite, got -1"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(arguments, message, isoformer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = isoformer(*arguments)
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_run_never_writes_over_another_folder(isoformer, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    code, printed = isoformer("train", "--task", "copy", "--run", tmp_path)
    assert code == 2
    assert "is already there and not empty; give another --run or remove it" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def run_with(tmp_path, **changes):
    config = TransformerConfig(
        source_vocab_size=23, target_vocab_size=23, d_model=4, num_heads=1, d_ff=4, num_encoder_layers=1,
        num_decoder_layers=0,
    )  # fmt: skip
    run = Run.create(tmp_path / "run", task="copy", frontend="nnx", config=config, options=TrainingOptions())
    run.save(1, {"weights": random_weights(config, 0)}, {"validation_loss": 1.0})
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(about | changes))
    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": {"d_model": 8}},
            "has source_vocab_size=None, target_vocab_size=None, the task copy source_vocab_size=23",
        ),
        ({"config": {"d_mdel": 8}}, "cannot be used: unknown configuration fields ['d_mdel']"),
        ({"options": {"speed": 8}}, "cannot be used: "),
        ({"task": "sing"}, "unknown task 'sing'"),
        ({"task": "[/sing]"}, "unknown task '[/sing]'"),
        (
            {"task": "pronounce"},
            "the task pronounce source_vocab_size=30, target_vocab_size=42; train the run again",
        ),
    ],
)
def test_a_run_of_another_kind_is_refused(changes, message, isoformer, tmp_path):
    run = run_with(tmp_path, **changes)
    code, printed = isoformer("evaluate", run.folder)
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_a_checkpoint_of_another_configuration_is_refused(isoformer, tmp_path):
    run = run_with(tmp_path)
    config = dataclasses.asdict(run.config) | {"d_ff": 6}
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(about | {"config": config}))
    code, printed = isoformer("evaluate", run.folder)
    assert code == 2
    assert "does not fit its run.json" in printed
    assert "encoder.blocks.0.feed_forward.up_proj.kernel must be float32[4, 6], got float32[4, 4]" in printed


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "remove", "add"])
def test_a_damaged_checkpoint_is_refused(damage, isoformer, tmp_path):
    run = run_with(tmp_path)
    path = max((run.folder / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    elif damage == "add":
        (path.parent / "more").touch()
    else:
        path.write_bytes(content if damage == "flip a bit" else content[:-1])
    code, printed = isoformer("evaluate", run.folder)
    assert code == 2
    assert "checkpoints/00000001 is damaged: arrays/" in printed


def test_a_missing_framework_is_named(monkeypatch, isoformer):
    for module in [name for name in sys.modules if name.split(".")[0] in ("nnx_impl", "flax")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "flax", None)
    code, printed = isoformer("train", "--frontend", "nnx")
    assert code == 2
    assert "the nnx frontend needs flax; run: pip install 'isoformer[nnx]'" in printed


class Parrot:
    """A frontend that says what it is told to say."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def generate(self, model, source, *, source_mask, max_length, constraints):
        rows = [[*next(self.answers, ()), 2] for _ in range(source.shape[0])]
        return jnp.asarray([row + [0] * (max_length - len(row)) for row in rows])


def test_any_reference_counts_and_the_nearest_sets_the_error_rate():
    task = dataclasses.replace(tasks.load_task("copy"), buckets=(6,))
    examples = [
        Example((3,), ((4, 5), (6, 7, 8))),  # the second reference, right
        Example((3,), ((4, 5, 6, 7),)),  # one wrong, one missing
        Example((3,), ((9, 9, 9, 9), (5, 5))),  # one too many for the second
    ]
    parrot = Parrot([(6, 7, 8), (4, 9, 6), (5, 5, 5)])
    scores = sequence_scores(parrot, None, task, examples, tokens=18)
    assert scores.word_error_rate == pytest.approx(2 / 3)
    assert scores.symbol_error_rate == pytest.approx((0 + 2 + 1) / (3 + 4 + 2))


@pytest.mark.parametrize("name", ["nnx", "equinox"])
def test_predictions_come_in_order_and_do_not_depend_on_the_batch(name):
    task, package = dataclasses.replace(tasks.load_task("pronounce"), buckets=(8, 29)), frontend(name)
    config = TransformerConfig(
        source_vocab_size=len(task.source), target_vocab_size=len(task.target), d_model=8, num_heads=2, d_ff=8,
        num_encoder_layers=1, num_decoder_layers=1, norm_order="pre", tie_embeddings="none",
    )  # fmt: skip
    model = package.from_weights(config, random_weights(config, 3))
    sources = [example.source for example in task.split("test")[::700]]
    together = predict(package, model, task, sources, tokens=200)
    alone = [predict(package, model, task, [source], tokens=8)[0] for source in sources[:6]]
    assert together[:6] == alone
    assert len(set(together)) > 1


def test_the_learning_rate_of_update_k_is_that_of_step_k():
    options = TrainingOptions(learning_rate=0.5, warmup=4, weight_decay=0.0, clip_norm=1e9)
    tx, weights = make_optimizer(options), jnp.zeros(3)
    state = tx.init(weights)
    expected = [0.5 * min((k + 1) / 4, (4 / (k + 1)) ** 0.5) for k in range(8)]
    for rate in expected:  # Adam's first steps along a constant gradient have length one times the rate
        updates, state = tx.update(jnp.asarray([1.0, -2.0, 3.0]), state, weights)
        assert jnp.abs(updates).tolist() == pytest.approx([rate] * 3, rel=1e-5)


@pytest.fixture
def small_comparison(tmp_path, monkeypatch):
    """The main job on a tiny model, with nothing measured in other processes."""
    measured = {"compile_s": 1.0, "build_s": 1.0, "host_overhead_ms": 1.0, "peak_memory_mib": 1.0}
    monkeypatch.setattr(comparing, "measure_alone", lambda name, config: measured)
    monkeypatch.setattr(comparing, "_CURVE_WORDS", 8)
    monkeypatch.setattr(comparing, "_TEST_WORDS", 8)
    original = comparing.Comparison.__init__

    def smaller(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.config = self.config.replace(d_model=8, num_heads=2, d_ff=8, num_encoder_layers=1, num_decoder_layers=1)

    monkeypatch.setattr(comparing.Comparison, "__init__", smaller)
    return tmp_path / "report"


@pytest.mark.slow
def test_the_comparison_agrees_and_leaves_its_report(small_comparison):
    report = comparing.compare(small_comparison, minutes=0.15, seed=0, console=Console(width=200))
    assert report.agreed
    names = {path.name for path in small_comparison.iterdir()}
    assert names == {"report.md", "results.json", "loss.png", "wer.png", "attention.png"}
    results = json.loads((small_comparison / "results.json").read_text())
    assert results["losses"]["nnx"] == results["losses"]["equinox"]
    text = (small_comparison / "report.md").read_text()
    for row in ("StableHLO text of the forward | equal", "dataflow of the train step, dropout on | equal"):
        assert row in text


def test_a_disagreement_stops_the_comparison_and_is_reported(small_comparison, monkeypatch, isoformer):
    package = frontend("equinox")
    original = package.Trainer.train

    def drifting(self, batch):
        metrics = original(self, batch)
        return metrics._replace(loss=metrics.loss * (1 + 2e-7))

    monkeypatch.setattr(package.Trainer, "train", drifting)
    code, printed = isoformer("compare", "--minutes", 0.2, "--output", small_comparison)
    assert code == 1
    assert "THE FRONTENDS DISAGREE: the losses of step 1 differ, loss at []:" in printed
    assert "DISAGREE" in (small_comparison / "report.md").read_text()


def test_an_interrupted_comparison_leaves_a_usable_report(small_comparison, monkeypatch, isoformer):
    original = Report.each

    def interrupted(self, what, *args):
        original(self, what, *args)
        if what.startswith("compile"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "each", interrupted)
    code, printed = isoformer("compare", "--minutes", 0.2, "--output", small_comparison)
    assert code == 130
    assert "Interrupted" in printed
    assert "StableHLO text of the forward | equal" in (small_comparison / "report.md").read_text()


@pytest.mark.slow
def test_an_interrupt_between_the_two_frontends_leaves_a_usable_report(small_comparison, monkeypatch):
    package, calls = frontend("equinox"), []
    original = package.Trainer.train

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(package.Trainer, "train", interrupted)
    report = comparing.compare(small_comparison, minutes=5, seed=0, console=Console(width=200))
    assert report.interrupted
    assert len(report.losses["nnx"]) == len(report.losses["equinox"]) == 2
    names = {path.name for path in small_comparison.iterdir()}
    assert {"report.md", "results.json", "loss.png", "wer.png"} <= names


@pytest.mark.slow
def test_ctrl_c_while_training_leaves_a_usable_report(tmp_path):
    command = [sys.executable, "-m", "seq2seq.cli", "compare", "--minutes", "10", "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(150)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert (tmp_path / "loss.png").exists()
    assert "equal, sha256" in (tmp_path / "report.md").read_text()
