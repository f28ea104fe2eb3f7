"""The main job: the same Transformer in Flax NNX and in Equinox, trained side by side, checked and compared."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from rich.console import Console

from core.config import TransformerConfig
from seq2seq.agreement import bit_difference, step_difference, text_identity
from seq2seq.batches import batch
from seq2seq.decoding import predict
from seq2seq.errors import UserError
from seq2seq.evaluation import sequence_scores, token_scores
from seq2seq.examples import Example, Pairs
from seq2seq.frontends import FRONTENDS, frontend
from seq2seq.measure import lines_of_code, measure_alone, timed
from seq2seq.optimizer import make_optimizer
from seq2seq.options import TrainingOptions
from seq2seq.pictures import attention_maps
from seq2seq.report import Report
from seq2seq.stream import endless_batches
from seq2seq.tasks import load_task
from seq2seq.training import progress_bar

_CHECK_EVERY = 100  # steps between comparisons of all weights and optimizer state
_CURVE_WORDS, _TEST_WORDS, _SHOWN_WORDS = 500, 2000, 8


class DisagreementError(Exception):
    """The frontends differ where they must not."""


def compare(folder: Path, *, minutes: float, seed: int, console: Console) -> Report:
    """Runs the whole comparison and writes its report into `folder`.

    Ctrl-C, like a disagreement, ends it with a report of all that is known by then.
    """
    if not 0 < minutes < float("inf"):
        raise UserError(f"minutes must be above 0 and finite, got {minutes}")
    comparison = Comparison(seed=seed, console=console)
    comparison.report = report = Report(folder)
    try:
        comparison.run(minutes=minutes)
    except KeyboardInterrupt:
        report.interrupted = True
        report.notes.append("Interrupted: what had not been measured by then is missing.")
    except DisagreementError as difference:
        report.agreed = False
        report.notes.append(f"THE FRONTENDS DISAGREE: {difference}")
    except BaseException as error:
        report.agreed = False
        report.notes.append(f"Ended by an error: {error!r}")
        raise
    finally:
        report.write(console)
    return report


class Comparison:
    """Both frontends, with equal weights, on one task."""

    report: Report

    def __init__(self, *, seed: int, console: Console):
        self.console = console
        # few lengths: each is compiled twice, and the minutes are better spent on training
        self.task = dataclasses.replace(load_task("pronounce"), buckets=(8, 12, 29))
        self.packages = {name: frontend(name) for name in FRONTENDS}
        self.options = TrainingOptions(seed=seed)
        self.config = TransformerConfig(
            source_vocab_size=len(self.task.source),
            target_vocab_size=len(self.task.target),
            d_model=128,
            num_heads=4,
            d_ff=512,
            num_encoder_layers=2,
            num_decoder_layers=2,
            norm_order="pre",
            max_length=self.task.buckets[-1],
        )
        self.trainers: dict[str, Any] = {}

    def run(self, *, minutes: float) -> None:
        """Programs, costs, training, evaluation, in this order."""
        self.build()
        self.compare_programs()
        self.measure_costs()
        self.train(minutes=minutes)
        self.evaluate()

    def build(self) -> None:
        """One trainer each, from the same weights; the same seed must have given the same bits."""
        weights = {
            name: package.to_weights(package.init_transformer(self.config, seed=self.options.seed))
            for name, package in self.packages.items()
        }
        self.require_equal_bits("the initial weights of one seed", weights)
        for name, package in self.packages.items():
            model = package.from_weights(self.config, weights["nnx"])
            self.trainers[name] = package.Trainer(
                model,
                make_optimizer(self.options),
                seed=self.options.seed,
                label_smoothing=self.options.label_smoothing,
            )
        self.report.about = {
            "task": self.task.name,
            "parameters": sum(array.size for array in weights["nnx"].values()),
            "config": dataclasses.asdict(self.config),
            "options": dataclasses.asdict(self.options),
        }
        self.report.both("initial weights of one seed", "equal bits")

    def compare_programs(self) -> None:
        """Do the two lower to the same StableHLO, and are their train steps the same dataflow?"""
        self.console.print("comparing programs …")
        data = batch(self.task.pairs("validation")[:4], self.task.buckets[-1], 4)
        weights = self.weights()["nnx"]
        for program, hashes in text_identity(self.config, weights, data).items():
            if len(set(hashes.values())) > 1:
                raise DisagreementError(f"the {program} programs have different StableHLO text, {hashes}")
            self.report.both(f"StableHLO text of the {program}", f"equal, sha256 {hashes['nnx'][:12]}")
        difference = step_difference(
            self.config, make_optimizer(self.options), weights, data, label_smoothing=self.options.label_smoothing
        )
        if difference:
            raise DisagreementError(f"the train steps part at {difference}")
        self.report.both("dataflow of the train step, dropout on", "equal")

    def measure_costs(self) -> None:
        """What each costs in a fresh process of its own."""
        self.console.print("measuring each frontend in a process of its own …")
        costs = {name: measure_alone(name, self.config) for name in FRONTENDS}
        for what, key, form in (
            ("compile the train step", "compile_s", "{:.1f} s"),
            ("build the model", "build_s", "{:.1f} s"),
            ("the host's work a step, over that of the raw compiled step", "host_overhead_ms", "{:.2f} ms"),
            ("peak memory of the process", "peak_memory_mib", "{:,.0f} MiB"),
        ):
            self.report.each(what, {name: cost[key] for name, cost in costs.items()}, form)
        code = {name: lines_of_code(package) for name, package in self.packages.items()}
        self.report.each("lines of code of the frontend", code, "{}")

    def train(self, *, minutes: float) -> None:
        """Every batch goes to both in turn; their losses must be equal in bits, and now and then all else too."""
        self.console.print(f"training both for {minutes:g} minutes …")
        curve_words = _sample(self.task.split("validation"), _CURVE_WORDS)
        seconds: dict[str, dict[int, list[float]]] = {name: {} for name in FRONTENDS}
        budget, spent, milestones, step = 60 * minutes, 0.0, [0.25, 0.5, 0.75, 1.0], 0
        self.record_error_rate(0, curve_words)
        train, options = self.task.pairs("train"), self.options
        data = endless_batches(train, self.task.buckets, tokens=options.tokens, seed=options.seed)
        with progress_bar(self.console) as progress:
            bar = progress.add_task("both frontends", total=budget, numbers="compiling", unit="s")
            for step, made in enumerate(data, 1):
                order = FRONTENDS if step % 2 else FRONTENDS[::-1]
                losses = {}
                for name in order:
                    taken, metrics = timed(self.trainers[name].train, made)
                    seconds[name].setdefault(made.source.shape[-1], []).append(taken)
                    spent += taken
                    losses[name] = {"loss": metrics.loss, "accuracy": metrics.accuracy}
                for name in FRONTENDS:
                    self.report.losses[name].append(float(losses[name]["loss"]))
                self.require_equal_bits(f"the losses of step {step}", losses)
                rate = (
                    len(FRONTENDS)
                    * int(np.asarray(made.target_mask).sum())
                    / sum(seconds[name][made.source.shape[-1]][-1] for name in FRONTENDS)
                )
                loss, accuracy = self.report.losses["nnx"][-1], float(losses["nnx"]["accuracy"])
                numbers = f"step {step}  loss {loss:.3f}  accuracy {accuracy:.1%}  {rate:,.0f} tokens/s"
                progress.update(bar, completed=min(spent, budget), numbers=numbers)
                if step % _CHECK_EVERY == 0:
                    self.require_equal_state(step)
                if spent >= milestones[0] * budget:
                    milestones.pop(0)
                    self.record_error_rate(step, curve_words)
                if not milestones:
                    break
        self.require_equal_state(step)
        self.report.both(f"losses of {step} steps, weights, optimizer state", "equal bits")
        median = {
            name: statistics.median(time for times in by_length.values() for time in times[1:])
            for name, by_length in seconds.items()
        }
        self.report.each("step, median", {name: 1000 * value for name, value in median.items()}, "{:.0f} ms")

    def evaluate(self) -> None:
        """Held-out words: scores, decoding speed, a few to read, and where the decoder looked."""
        self.console.print("pronouncing held-out words …")
        words, tokens = _sample(self.task.split("test"), _TEST_WORDS), self.options.tokens
        models = {name: self.trainers[name].model for name in FRONTENDS}
        scores = {
            name: sequence_scores(package, models[name], self.task, words, tokens=tokens)
            for name, package in self.packages.items()
        }
        if scores["nnx"].predictions != scores["equinox"].predictions:
            raise DisagreementError("the same weights pronounce a held-out word differently")
        self.report.both(f"pronunciations of {len(words)} held-out words", "equal")
        by_token = {n: token_scores(self.trainers[n], self.task, Pairs(words), tokens=tokens) for n in FRONTENDS}
        self.report.each("their token accuracy, teacher-forced", {n: s.accuracy for n, s in by_token.items()}, "{:.1%}")
        self.report.each("their phone error rate", {n: s.symbol_error_rate for n, s in scores.items()}, "{:.1%}")
        self.report.each("their word error rate", {n: s.word_error_rate for n, s in scores.items()}, "{:.1%}")
        self.report.each("greedy decoding, median", self.decoding_speed(words), "{:,.0f} tokens/s")
        for example, phones in list(zip(words, scores["nnx"].predictions, strict=True))[:_SHOWN_WORDS]:
            meant = " or ".join(map(self.task.target.decode, example.targets))
            word = self.task.source.decode(example.source)
            self.report.samples.append((word, self.task.target.decode(phones), meant))
        self.draw_attention(words[0])

    def decoding_speed(self, words: list[Example]) -> dict[str, float]:
        """Tokens a second, all words in their batches, the frontends in turn."""
        sources, speeds = [example.source for example in words], {name: [] for name in FRONTENDS}
        for _ in range(5):
            for name, package in self.packages.items():
                model = self.trainers[name].model
                taken, spoken = timed(
                    lambda p=package, m=model: predict(p, m, self.task, sources, tokens=self.options.tokens)
                )
                speeds[name].append(sum(len(phones) + 1 for phones in spoken) / taken)
        return {name: statistics.median(found) for name, found in speeds.items()}

    def draw_attention(self, example: Example) -> None:
        """The decoder's cross-attention while it is given the right pronunciation."""
        package, model = self.packages["nnx"], self.trainers["nnx"].model
        maps, phones, letters = attention_maps(package, model, self.task, example.source, example.targets[0])
        shown = {name: weights for name, weights in maps.items() if name.endswith("cross_attention")}
        self.report.attention(shown, phones, letters, title=f"where each phone of '{''.join(letters)}' looked")

    def record_error_rate(self, step: int, words: list[Example]) -> None:
        """One more point of the curve, from each frontend."""
        found = {}
        for name, package in self.packages.items():
            model = self.trainers[name].model
            scores = sequence_scores(package, model, self.task, words, tokens=self.options.tokens)
            found[name] = scores.word_error_rate
        for name, rate in found.items():
            steps, rates = self.report.error_rates[name]
            steps.append(step)
            rates.append(rate)
        self.report.each(f"word error rate after {step} steps, {len(words)} words", found, "{:.1%}")
        self.console.print(f"step {step}: word error rate {found['nnx']:.1%} on {len(words)} held-out words")

    def weights(self) -> dict[str, dict[str, Array]]:
        """Of both frontends, as they are now."""
        return {name: package.to_weights(self.trainers[name].model) for name, package in self.packages.items()}

    def require_equal_state(self, step: int) -> None:
        """Weights and optimizer state."""
        self.require_equal_bits(f"the weights after step {step}", self.weights())
        states = {name: trainer.optimizer_state() for name, trainer in self.trainers.items()}
        self.require_equal_bits(f"the optimizer state after step {step}", states)

    def require_equal_bits(self, what: str, values: Mapping[str, Mapping[str, Array]]) -> None:
        """DisagreementError, with the name, place and size of the first difference."""
        if difference := bit_difference(values["nnx"], values["equinox"]):
            raise DisagreementError(f"{what} differ, {difference} (here: nnx, there: equinox)")


def _sample(examples: Sequence[Example], number: int) -> list[Example]:
    """The same ones each time, in no alphabetical order."""
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:number]]
