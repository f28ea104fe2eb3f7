"""The peer in PyTorch is the same model, trained and searched by the same rules; and what a user does wrong."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import equinox_impl
from bench import translate_torch
from core.config import TransformerConfig
from core.constraints import Constraints
from core.losses import Batch, Metrics
from seq2seq.corpus import prepare
from seq2seq.errors import UserError
from seq2seq.optimizer import make_optimizer
from seq2seq.options import TrainingOptions
from seq2seq.runs import Run, averaged
from seq2seq.tasks import load_task
from tests.frontends import random_weights

HAS_TORCH = importlib.util.find_spec("torch") is not None
if HAS_TORCH:
    import torch

    from bench import torch_transformer
    from bench.torch_trainer import Trainer

SMALL = TransformerConfig(
    source_vocab_size=13, target_vocab_size=13, d_model=8, num_heads=2, d_ff=16, num_encoder_layers=2,
    num_decoder_layers=2, dropout_rate=0.0, norm_order="pre", tie_embeddings="all", max_length=8, norm_epsilon=1e-3,
)  # fmt: skip


def double(**choices):
    """The small configuration in float64."""
    return SMALL.replace(dtype="float64", param_dtype="float64", **choices)


@pytest.fixture(autouse=True)
def _double(x64):
    """In float64, so that rounding hides nothing; one thread, for others wait for each other on a busy machine."""
    threads = torch.get_num_threads() if HAS_TORCH else 0
    if HAS_TORCH:
        torch.set_num_threads(1)
    with jax.numpy_dtype_promotion("standard"):
        yield
    if HAS_TORCH:
        torch.set_num_threads(threads)


def random_batch(seed, *, rows=4, length=6):
    """Padding at the end of rows, the last of which may be empty."""
    rng = np.random.default_rng(seed)
    source, inputs, labels = rng.integers(3, 13, (3, rows, length)).astype(np.int32)
    lengths = rng.integers(1, length + 1, (2, rows, 1)) * np.where(np.arange(rows) == rows - 1, seed % 2, 1)[:, None]
    source_mask, target_mask = np.arange(length) < lengths
    return Batch(*map(jnp.asarray, (source, source_mask, inputs, labels, target_mask)))


def both(config, seed):
    """The same random weights in our model and in torch's."""
    weights = random_weights(config, seed)
    model = torch_transformer.Transformer(config).eval()
    torch_transformer.load_weights(model, {name: np.asarray(x) for name, x in weights.items()})
    return equinox_impl.evaluation(equinox_impl.from_weights(config, weights)), model


def as_torch(batch):
    return Batch(*(torch.tensor(np.asarray(x)) for x in batch))


@pytest.mark.torch
@pytest.mark.parametrize("norm_order", ["pre", "post"])
@pytest.mark.parametrize(
    "choice",
    [
        {"tie_embeddings": "all"},
        {"tie_embeddings": "target", "attention_bias": True},
        {"tie_embeddings": "none", "activation": "gelu", "scale_embeddings": False},
    ],
)
def test_with_the_same_weights_the_logits_are_the_same(norm_order, choice):
    ours, theirs = both(double(norm_order=norm_order, **choice), 1)
    batch = random_batch(1)
    masks = {"source_mask": batch.source_mask, "target_mask": batch.target_mask}
    wanted = np.asarray(ours(batch.source, batch.inputs, **masks))
    x = as_torch(batch)
    with torch.inference_mode():
        found = theirs(x.source, x.inputs, x.source_mask)
        chosen = theirs(x.source, x.inputs, x.source_mask, x.target_mask)
    np.testing.assert_allclose(found[x.target_mask], wanted[np.asarray(batch.target_mask)], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(chosen, found[x.target_mask], rtol=1e-9, atol=1e-10)


@pytest.mark.torch
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_token_by_token_the_logits_are_those_of_the_whole(norm_order):
    _, model = both(double(norm_order=norm_order, attention_bias=True), 2)
    x = as_torch(random_batch(3))
    with torch.inference_mode():
        wanted = model(x.source, x.inputs, x.source_mask)
        cache = torch_transformer.start(model, x.source, x.source_mask, 2)
        for t in range(x.inputs.shape[1]):
            logits, cache = torch_transformer.step(model, x.inputs[:, t, None].expand(-1, 2), cache)
            for slot in range(2):
                np.testing.assert_allclose(logits[:, slot], wanted[:, t], rtol=1e-9, atol=1e-10)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_the_search_finds_what_ours_finds(seed, length_penalty):
    ours, theirs = both(double(num_encoder_layers=1, num_decoder_layers=1), seed)
    batch = random_batch(2 * seed + 1)
    options = {"max_length": 7, "beam_size": 4, "n_best": 2, "length_penalty": length_penalty}
    wanted = equinox_impl.beam_search(ours, batch.source, source_mask=batch.source_mask, **options)
    found = torch_transformer.beam_search(theirs, batch.source, source_mask=batch.source_mask, **options)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-9)
    with pytest.raises(ValueError, match="knows no constraints"):
        torch_transformer.beam_search(
            theirs, batch.source, source_mask=batch.source_mask, constraints=Constraints(min_length=2), **options
        )


OPTIONS = TrainingOptions(
    learning_rate=0.02, warmup=3, weight_decay=0.1, clip_norm=0.5, label_smoothing=0.1, average=0.5, steps=10
)


@pytest.mark.torch
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_same_steps_lead_to_the_same_weights(accumulate, average):
    options = dataclasses.replace(OPTIONS, accumulate=accumulate, average=average)
    ours, theirs = both(double(), 4)
    trainer = equinox_impl.Trainer(
        equinox_impl.from_weights(double(), equinox_impl.to_weights(ours)), make_optimizer(options),
        label_smoothing=0.1, accumulate=accumulate > 1,
    )  # fmt: skip
    peer = Trainer(theirs, options)
    for n in range(6):
        parts = [random_batch(10 * n + i) for i in range(accumulate)]
        batch = parts[0] if accumulate == 1 else Batch(*map(jnp.stack, zip(*parts, strict=True)))
        np.testing.assert_allclose(peer.train(batch), trainer.train(batch), rtol=1e-5)
    weights = averaged(trainer.optimizer_state()) if average else equinox_impl.to_weights(trainer.model)
    wanted = torch_transformer.Transformer(double())
    torch_transformer.load_weights(wanted, {name: np.asarray(x) for name, x in weights.items()})
    for name, value in wanted.state_dict().items():
        np.testing.assert_allclose(peer.averaged.state_dict()[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    held_out = random_batch(100)
    ours = equinox_impl.Trainer(equinox_impl.from_weights(double(), weights), optax.identity()).evaluate(held_out)
    np.testing.assert_allclose(peer.evaluate(held_out), ours, rtol=1e-5)


@pytest.mark.torch
def test_the_loss_of_one_batch_falls_to_nothing():
    options = dataclasses.replace(OPTIONS, weight_decay=0.0, label_smoothing=0.0, average=0.0, warmup=10)
    torch.manual_seed(0)
    peer, batch = Trainer(torch_transformer.Transformer(double(dropout_rate=0.1)), options), random_batch(1)
    losses = [float(peer.train(batch).loss) for _ in range(100)]
    assert losses[0] > 2
    assert peer.evaluate(batch).loss < 0.1


@pytest.mark.torch
def test_a_step_whose_gradients_are_not_finite_changes_nothing():
    _, model = both(double(), 0)
    with torch.no_grad():
        model.target_table[3] = torch.nan
    peer = Trainer(model, OPTIONS)
    before = {name: x.clone() for name, x in peer.averaged.state_dict().items()}
    peer.train(random_batch(1))
    assert (peer.steps, peer.skipped) == (0, 1)
    for name, value in peer.averaged.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(UserError, match="a gradient was not finite"):
        Trainer(model, dataclasses.replace(OPTIONS, non_finite="stop")).train(random_batch(1))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"positions": "rotary"}, "where positions is 'sinusoidal', got 'rotary'; train a run with that"),
        ({"norm_order": "sandwich"}, "where norm_order is 'post' or 'pre', got 'sandwich'"),
        ({"num_kv_heads": 1}, "where num_kv_heads is None, got 1"),
    ],
)
def test_what_torch_has_no_place_for_is_refused(choice, message):
    with pytest.raises(UserError) as error:
        torch_transformer.Transformer(double(**choice))
    assert message in str(error.value)


@pytest.mark.torch
def test_frozen_parameters_are_refused():
    with pytest.raises(UserError, match="the peer trains all parameters"):
        Trainer(torch_transformer.Transformer(double()), dataclasses.replace(OPTIONS, frozen=("encoder.*",)))


@pytest.fixture
def run(tmp_path):
    """A run of tiny data that has not been trained."""
    words = ["red", "blue", "green", "old", "new", "tall"]
    lines = [f"{a} {b} {c}\t{c} {b} {a}\n" for a in words for b in words for c in words]
    (tmp_path / "text.tsv").write_text("".join(lines))
    prepare(
        tmp_path / "data", text=str(tmp_path / "text.tsv"), validation=None, test=None, vocabulary=300, max_length=16
    )
    vocabulary = len(load_task("translate", data=tmp_path / "data").source)
    config = SMALL.replace(source_vocab_size=vocabulary, target_vocab_size=vocabulary, max_length=16, dropout_rate=0.1)
    options = dataclasses.replace(OPTIONS, tokens=160, validate_every=2)
    return Run.create(
        tmp_path / "run", task="translate", frontend="equinox", config=config, options=options, data=tmp_path / "data"
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line: arguments to (exit code, what was printed to either stream)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["translate_torch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            translate_torch.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, " ".join((printed.out + printed.err).split())

    return call


@pytest.mark.torch
@pytest.mark.parametrize("first", ["ours", "torch"])
def test_a_budget_of_steps_is_trained_and_scored(run, command, first):
    code, printed = command(run.folder, "--steps", 5, "--first", first, "--beams", 2)
    assert code == 0, printed
    result = json.loads((run.folder / "torch.json").read_text())
    assert (result["steps"], result["skipped_steps"], result["first_weights"]) == (5, 0, first)
    assert [v["step"] for v in result["validations"]] == [2, 4, 5]
    assert result["best"] == min(result["validations"], key=lambda v: v["loss"])
    assert 0 < result["step_seconds"] <= result["seconds"]
    assert result["tokens_per_second"] == result["tokens"] / result["step_seconds"]
    assert 0 <= result["translation"]["BLEU"]["score"] <= 100
    assert "version:" in result["translation"]["chrF"]["signature"]
    assert result["translation"]["pairs"] == len(run.load_task().split("test"))
    assert result["versions"]["torch"] == torch.__version__
    assert (result["threads"], result["device"]) == (torch.get_num_threads(), "cpu")


@pytest.mark.torch
def test_a_budget_of_seconds_ends_in_time(run, command, tmp_path):
    code, printed = command(
        run.folder, "--seconds", 0.5, "--output", tmp_path / "it.json", "--threads", 1, "--split", "validation"
    )
    assert code == 0, printed
    result = json.loads((tmp_path / "it.json").read_text())
    assert 0.5 <= result["seconds"] < 5
    assert result["validations"][-1]["step"] == result["steps"] > 0
    assert (result["threads"], result["translation"]["split"]) == (1, "validation")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "exam"), "unknown split 'exam'; choose one of train, validation, test"),
        (("--output", "/no/where.json"), "/no/where.json cannot be written; give another --output"),
        (("--device", "abacus"), "--device must be cpu, or cuda where torch sees one, got abacus"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_training(arguments, message, run, command):
    assert command(run.folder, "--seconds", 1e9, *arguments) == (2, f"translate_torch: {message}")


def test_without_torch_one_sentence_says_what_to_install(run, command, monkeypatch):
    for name in ("torch", "bench.torch_trainer", "bench.torch_transformer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    message = "translate_torch: this needs PyTorch; run: pip install 'isoformer[bench,torch]'"
    assert command(run.folder, "--steps", 1) == (2, message)


def test_without_one_budget_or_without_a_run_it_says_so(command, tmp_path):
    for arguments, got in (((), "None and --steps None"), (("--seconds", 2, "--steps", 1), "2.0 and --steps 1")):
        message = f"translate_torch: one budget is needed, got --seconds {got}; give one of the two"
        assert command(tmp_path, *arguments) == (2, message)
    code, printed = command(tmp_path, "--steps", 1)
    assert code == 2
    assert f"{tmp_path} is no run folder" in printed


class Fake:
    """A trainer that notes the places in the schedule; time passes by one second a step."""

    def __init__(self, options, clock):
        self.options, self.clock, self.steps, self.places = options, clock, 0, []
        self.averaged = self

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        del state

    def train(self, batch, *, place):
        self.places.append(self.steps if place is None else place)
        self.steps += 1
        self.clock[0] += 1
        return Metrics(*(jnp.asarray(x) for x in (2.0, 0.5, 3.0)))

    evaluate = lambda self, batch: Metrics(*(jnp.asarray(x) for x in (1.0, 0.5, 3.0)))


@pytest.mark.parametrize(
    ("schedule", "places"),
    [
        ("inverse_sqrt", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("cosine", [0, 1, 20, 30, 40, 50, 60, 70, 80, 90]),  # warm after two steps, then by the seconds of ten
    ],
)
def test_with_a_budget_of_seconds_a_cosine_ends_with_them(schedule, places, run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(translate_torch.time, "perf_counter", lambda: clock[0])
    options = dataclasses.replace(OPTIONS, schedule=schedule, steps=100, warmup=2, validate_every=4)
    fake = Fake(options, clock)
    outcome = translate_torch.train(fake, iter([None] * 99), run.load_task(), seconds=10)
    assert fake.places == places
    assert (outcome.steps, outcome.seconds, outcome.step_seconds, outcome.tokens) == (10, 10, 10, 30)
    assert [v["step"] for v in outcome.validations] == [4, 8, 10]
    assert outcome.best == outcome.validations[0]
