"""Laws of training: accumulated micro-batches, the optimizer's options, and runs that go on where they stopped."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from core.config import TransformerConfig
from core.losses import Metrics
from core.training import accumulated
from seq2seq import checkpoints, stream, tasks
from seq2seq import training as loop
from seq2seq.errors import UserError
from seq2seq.optimizer import by_name, learning_rate, make_optimizer, weight_average
from seq2seq.options import TrainingOptions
from seq2seq.runs import Run, averaged
from tests.frontends import CONFIG, FRONTENDS, optimizer, random_batch, random_weights, same_bits
from tests.strategies import seeds

every_frontend = pytest.mark.parametrize("package", FRONTENDS.values(), ids=FRONTENDS)
few = settings(max_examples=2, phases=[Phase.explicit, Phase.generate])


def stacked(config, seed, number=3):
    return jax.tree.map(lambda *x: jnp.stack(x), *(random_batch(config, seed + i) for i in range(number)))


@pytest.fixture
def lenient():
    """optax adds integers to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# micro-batches


@every_frontend
@few
@given(seed=st.integers(0, 2**20))
def test_micro_batches_give_the_step_of_the_whole_batch(package, seed):
    """Weighted by their tokens, of which each has another number; all of them may be padding."""
    with jax.enable_x64(True):
        config = CONFIG.replace(dropout_rate=0.0, dtype="float64", param_dtype="float64")
        weights, batch = random_weights(config, seed), stacked(config, seed)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        found = []
        for data, accumulate in ((batch, True), (whole, False)):
            trainer = package.Trainer(package.from_weights(config, weights), optax.sgd(0.5), accumulate=accumulate)
            found.append((trainer.train(data), package.to_weights(trainer.model)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6 if a.dtype == np.float32 else 1e-12, atol=1e-13)


def test_micro_batches_without_any_token_are_no_nan():
    batch = stacked(CONFIG, 0)._replace(target_mask=jnp.zeros((3, 2, 4), bool))
    package = FRONTENDS["equinox"]
    trainer = package.Trainer(package.from_weights(CONFIG, random_weights(CONFIG, 0)), optax.sgd(0.5), accumulate=True)
    metrics = trainer.train(batch)
    assert (float(metrics.loss), float(metrics.tokens)) == (0.0, 0.0)
    assert same_bits(package.to_weights(trainer.model), random_weights(CONFIG, 0))


@given(seeds)
def test_each_micro_batch_drops_by_a_key_of_its_own(seed):
    key, batch = jax.random.key(seed), stacked(CONFIG, 0)

    def gradients(batch, key):
        return jax.random.normal(key, (3,)), Metrics(*[jnp.float32(1)] * 3)

    shares = np.asarray(batch.target_mask.sum((1, 2)) / batch.target_mask.sum())
    wanted = sum(s * np.asarray(jax.random.normal(jax.random.fold_in(key, i), (3,))) for i, s in enumerate(shares))
    np.testing.assert_allclose(accumulated(gradients, batch, key)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_single_token_counts_whole_and_without_a_key_there_is_none():
    mask = jnp.zeros((3, 2, 4), bool).at[1, 0, 2].set(True)

    def gradients(batch, key):
        assert key is None
        return batch.labels.sum().astype("float32") / 2, Metrics(*[jnp.float32(1)] * 3)

    batch = stacked(CONFIG, 0)._replace(target_mask=mask)
    found, metrics = accumulated(gradients, batch, None)
    assert float(found) == float(batch.labels[1].sum()) / 2 != 0
    assert (float(metrics.tokens), metrics.tokens.dtype) == (1, jnp.float32)


@pytest.mark.usefixtures("lenient")
def test_the_twins_train_alike_for_two_hundred_steps():
    """With dropout, micro-batches, a schedule, an average of weights and frozen parameters: equal in every bit."""
    options = TrainingOptions(steps=200, warmup=20, schedule="cosine", average=0.99, frozen=("encoder.*bias",))
    weights, trainers = random_weights(CONFIG, 0), {}
    for name, package in FRONTENDS.items():
        model = package.from_weights(CONFIG, weights)
        trainers[name] = package.Trainer(model, make_optimizer(options), seed=3, label_smoothing=0.1, accumulate=True)
    data = [stacked(CONFIG, seed, 2) for seed in range(5)]
    for step in range(200):
        metrics = [trainer.train(data[step % 5]) for trainer in trainers.values()]
        assert same_bits(*metrics), step
    assert same_bits(*(FRONTENDS[name].to_weights(trainer.model) for name, trainer in trainers.items()))
    states = [trainer.optimizer_state() for trainer in trainers.values()]
    assert states[0].keys() == states[1].keys()
    assert all(same_bits(states[0][name], states[1][name]) for name in states[0])


# the optimizer


def rates(options):
    return [float(learning_rate(options)(k)) for k in range(options.steps)]


def test_the_rate_goes_up_in_a_line_and_then_by_its_schedule():
    options = TrainingOptions(steps=12, warmup=4, learning_rate=0.5)
    line = [0.125, 0.25, 0.375, 0.5]
    after = {
        "inverse_sqrt": [0.5 * (4 / (k + 1)) ** 0.5 for k in range(4, 12)],
        "cosine": [0.25 * (1 + np.cos(np.pi * (k + 1 - 4) / 8)) for k in range(4, 12)],
        "constant": [0.5] * 8,
    }
    for schedule, wanted in after.items():
        found = rates(dataclasses.replace(options, schedule=schedule))
        np.testing.assert_allclose(found, line + wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("lenient")
@every_frontend
def test_frozen_parameters_do_not_move_and_all_others_do(package):
    options = TrainingOptions(frozen=("encoder.*", "target_embedding.embedding"))
    weights = random_weights(CONFIG, 0)
    trainer = package.Trainer(package.from_weights(CONFIG, weights), make_optimizer(options))
    for seed in range(3):
        trainer.train(random_batch(CONFIG, seed))
    for name, array in package.to_weights(trainer.model).items():
        frozen = name.startswith("encoder.") or name == "target_embedding.embedding"
        assert same_bits(array, weights[name]) == frozen, name


@pytest.mark.usefixtures("lenient")
@every_frontend
def test_only_matrices_decay(package):
    """Without gradients nothing else moves a weight."""
    options = TrainingOptions(weight_decay=0.5, learning_rate=0.1, warmup=1)
    weights = random_weights(CONFIG, 0)
    trainer = package.Trainer(package.from_weights(CONFIG, weights), make_optimizer(options))
    trainer.train(random_batch(CONFIG, 0)._replace(target_mask=jnp.zeros((2, 4), bool)))
    for name, array in package.to_weights(trainer.model).items():
        wanted = np.asarray(weights[name]) * (1 - 0.05 * (weights[name].ndim > 1))
        np.testing.assert_allclose(array, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("lenient")
@every_frontend
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_scan_over_layers_decays_and_freezes_what_the_loop_does(package, scan):
    """A stacked vector is no matrix, and a layer's name stands for its slice."""
    config = CONFIG.replace(num_encoder_layers=2, scan_layers=scan)
    weights, frozen = random_weights(config, 0), ("encoder.blocks.[01].feed_forward.*",)
    options = TrainingOptions(weight_decay=0.5, learning_rate=0.1, warmup=1, frozen=frozen)
    trainer = package.Trainer(package.from_weights(config, weights), make_optimizer(options))
    trainer.train(random_batch(config, 0)._replace(target_mask=jnp.zeros((2, 4), bool)))
    for name, array in package.to_weights(trainer.model).items():
        decays = weights[name].ndim > 1 and not name.startswith(("encoder.blocks.0.feed", "encoder.blocks.1.feed"))
        np.testing.assert_allclose(array, np.asarray(weights[name]) * (1 - 0.05 * decays), rtol=1e-6, err_msg=name)
    one = make_optimizer(dataclasses.replace(options, frozen=("encoder.blocks.1.*",)))
    if scan:
        with pytest.raises(UserError, match=r"with scanned layers all of encoder\.blocks\.stacked\.\S+ is frozen or"):
            package.Trainer(package.from_weights(config, weights), one)
    else:
        package.Trainer(package.from_weights(config, weights), one)


def test_the_average_of_weights_is_its_formula():
    weights = {"a": jnp.asarray([1.0, 2.0])}
    tx, rng = weight_average(0.9), np.random.default_rng(0)
    state = tx.init(weights)
    wanted = np.asarray(weights["a"], "float64")
    for n in range(30):
        updates = {"a": jnp.asarray(rng.standard_normal(2), jnp.float32)}
        given, state = tx.update(updates, state, weights)
        assert given is updates
        weights = optax.apply_updates(weights, updates)
        keep = min(0.9, (1 + n) / (10 + n))
        wanted = keep * wanted + (1 - keep) * np.asarray(weights["a"], "float64")
        np.testing.assert_allclose(state.average["a"], wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="weight_average needs the parameters"):
        tx.update(updates, state)


@pytest.mark.usefixtures("lenient")
@every_frontend
def test_the_average_is_found_by_the_names_of_the_weights(package):
    weights = random_weights(CONFIG, 0)
    trainer = package.Trainer(package.from_weights(CONFIG, weights), make_optimizer(TrainingOptions(average=0.9)))
    assert same_bits(averaged(trainer.optimizer_state()), package.to_weights(trainer.model))
    assert averaged(trainer.optimizer_state()).keys() == weights.keys()


@pytest.mark.usefixtures("lenient")
@every_frontend
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(package):
    weights, good = random_weights(CONFIG, 0), random_batch(CONFIG, 0)
    trainer = package.Trainer(package.from_weights(CONFIG, weights), make_optimizer(TrainingOptions(average=0.9)))
    bad = good._replace(source=jnp.full_like(good.source, 99), source_mask=jnp.ones_like(good.source_mask))
    before = trainer.optimizer_state()
    before = {name: np.asarray(array) for name, array in before.items()}
    trainer.train(bad)
    after = trainer.optimizer_state()
    assert same_bits(package.to_weights(trainer.model), weights)
    changed = {name.rpartition(".")[2] for name in before if not same_bits(before[name], after[name])}
    assert changed == {"total_notfinite", "notfinite_count", "last_finite"}
    trainer.train(good)
    assert int(trainer.optimizer_state()["total_notfinite"]) == 1
    assert not same_bits(package.to_weights(trainer.model), weights)


@every_frontend
def test_parameters_have_the_same_names_for_the_optimizer(package):
    found = []
    note = lambda params: by_name(lambda name, x: found.append(name) or True, params)
    package.Trainer(package.from_weights(CONFIG, random_weights(CONFIG, 0)), optax.masked(optax.identity(), note))
    assert set(found) == random_weights(CONFIG, 0).keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"average": 1.0}, "average must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"schedule": "steps"}, "schedule must be one of inverse_sqrt, cosine, constant, got 'steps'"),
        ({"non_finite": "ignore"}, "non_finite must be one of skip, stop, got 'ignore'"),
        ({"schedule": "cosine", "steps": 400}, "needs more steps than warmup=400, got steps=400"),
    ],
)
def test_options_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainingOptions(**fields)


# runs


SILENT = Console(quiet=True)
OPTIONS = TrainingOptions(
    steps=12, validate_every=5, tokens=60, accumulate=2, average=0.9, warmup=3, keep=1, frozen=("*.norm.bias",)
)


@pytest.fixture
def task():
    loaded = tasks.load_task("reverse")
    return dataclasses.replace(loaded, splits={name: split[:60] for name, split in loaded.splits.items()})


def new_run(folder, options=OPTIONS):
    config = TransformerConfig(
        source_vocab_size=23, target_vocab_size=23, d_model=8, num_heads=2, d_ff=8, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    return Run.create(folder, task="reverse", frontend="nnx", config=config, options=options)


def interrupted_after(monkeypatch, package, steps, send=signal.SIGTERM):
    """The training gets a signal in that step."""
    original, count = package.Trainer.train, itertools.count(1)

    def train(self, batch):
        if next(count) == steps:
            os.kill(os.getpid(), send)
        return original(self, batch)

    monkeypatch.setattr(package.Trainer, "train", train)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "order", [("nnx", "equinox"), pytest.param(("equinox", "nnx"), marks=pytest.mark.slow)], ids="-".join
)
def test_a_run_begun_in_one_frontend_ends_in_the_other_as_if_it_had_never_stopped(order, task, tmp_path, monkeypatch):
    whole, parts = new_run(tmp_path / "whole"), new_run(tmp_path / "parts")
    first, second = (FRONTENDS[name] for name in order)
    outcome = loop.train(whole, first, task, console=SILENT)
    assert (outcome.steps, outcome.stopped) == (12, "all steps done")
    with monkeypatch.context() as patch:
        interrupted_after(patch, first, 7)
        outcome = loop.train(parts, first, task, console=SILENT)
    assert (outcome.steps, outcome.stopped) == (7, "interrupted by SIGTERM")
    assert checkpoints.steps(parts.checkpoint_folder) == [5, 7]
    outcome = loop.train(Run.open(parts.folder), second, task, console=SILENT)
    assert (outcome.steps, outcome.stopped) == (12, "all steps done")
    wanted, found = whole.latest(), parts.latest()
    assert wanted.about == found.about
    for group in ("weights", "optimizer"):
        assert wanted.arrays[group].keys() == found.arrays[group].keys()
        assert all(same_bits(array, found.arrays[group][name]) for name, array in wanted.arrays[group].items())
    assert same_bits(whole.best_weights(), parts.best_weights())


@pytest.mark.usefixtures("lenient")
def test_a_finished_run_stays_as_it_is(task, tmp_path):
    run = new_run(tmp_path / "run", dataclasses.replace(OPTIONS, steps=2))
    loop.train(run, FRONTENDS["equinox"], task, console=SILENT)
    before = {path: path.read_bytes() for path in run.checkpoint_folder.rglob("*") if path.is_file()}
    assert loop.train(run, FRONTENDS["equinox"], task, console=SILENT).stopped == "all steps done"
    assert {path: path.read_bytes() for path in run.checkpoint_folder.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("lenient")
def test_a_copied_run_is_a_run_with_ties_kept(task, tmp_path):
    """The tied table is stored once, and a copied checkpoint is no temporary one."""
    run = new_run(tmp_path / "run", dataclasses.replace(OPTIONS, steps=2))
    loop.train(run, FRONTENDS["equinox"], task, console=SILENT)
    shutil.copytree(run.folder, tmp_path / "copy")
    copy = Run.open(tmp_path / "copy")
    assert same_bits(copy.best_weights(), run.best_weights())
    state = copy.latest()
    assert not any("output_proj" in name for name in state.arrays["weights"])
    model = FRONTENDS["nnx"].from_weights(copy.config, state.arrays["weights"])
    assert model.output_proj is None
    again = loop.train(copy, FRONTENDS["nnx"], task, console=SILENT)
    assert (again.steps, again.stopped) == (2, "all steps done")


@pytest.mark.usefixtures("lenient")
def test_two_processes_do_not_train_one_run(task, tmp_path):
    run = new_run(tmp_path / "run")
    with run.training(), pytest.raises(UserError, match="is being trained by another process; wait for it"):
        loop.train(run, FRONTENDS["equinox"], task, console=SILENT)


@pytest.mark.usefixtures("lenient")
def test_a_run_that_is_to_stop_at_a_gradient_that_is_not_finite_says_at_which_step(task, tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", dataclasses.replace(OPTIONS, non_finite="stop", accumulate=1))
    original = stream.batch

    def spoiled(*arguments):
        made = original(*arguments)
        return made._replace(source=jnp.full_like(made.source, 99))  # out of the vocabulary: NaN under jit

    monkeypatch.setattr(stream, "batch", spoiled)
    with pytest.raises(UserError, match=r"a gradient was not finite, 1 of 1 steps so far; .*--non-finite skip"):
        loop.train(run, FRONTENDS["nnx"], task, console=SILENT)


def test_the_best_checkpoints_and_the_latest_are_kept(tmp_path):
    run = new_run(tmp_path / "run", dataclasses.replace(OPTIONS, keep=2))
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 5.0, 4.0], 1):
        run.save(step, {"weights": {"a": jnp.float32([step])}}, {"validation_loss": loss})
    assert checkpoints.steps(run.checkpoint_folder) == [2, 3, 6]


def test_a_run_says_how_it_was_made(tmp_path):
    about = json.loads((new_run(tmp_path / "run").folder / "run.json").read_text())
    assert about["options"]["frozen"] == ["*.norm.bias"]
    assert set(about["versions"]) >= {"jax", "jaxlib", "optax"}
    assert about["command"].startswith("isoformer")
    assert Run.open(tmp_path / "run").options == OPTIONS


@pytest.mark.usefixtures("lenient")
@every_frontend
def test_resuming_with_the_state_of_another_optimizer_names_what_is_missing(package):
    trainer = package.Trainer(package.from_weights(CONFIG, random_weights(CONFIG, 0)), optimizer())
    with pytest.raises(ValueError, match=r"missing .*mu\."):
        trainer.resume({}, step=3)
