"""The same budget in PyTorch's `nn.Transformer`: `python -m bench.translate_torch RUN --seconds N`.

RUN is a folder of `isoformer train --task translate`: its tokenizer, data, batches, options and first weights are
taken, its seconds or steps are given. Nothing else should run meanwhile: torch's threads wait for each other.
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from core.losses import Batch
from seq2seq import entry
from seq2seq.errors import UserError
from seq2seq.machine import machine, versions
from seq2seq.runs import Run
from seq2seq.tasks import Task

if TYPE_CHECKING:
    from bench.torch_trainer import Trainer

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class First(Enum):
    """Whose weights it begins with."""

    OURS = "ours"
    TORCH = "torch"


class Outcome(NamedTuple):
    """How a training went; the trainer's model has the weights of the lowest validation loss."""

    steps: int
    seconds: float  # validations included
    step_seconds: float  # validations left out
    tokens: int  # real target tokens
    loss: float  # of the last step, smoothed
    validations: list[dict[str, float]]
    best: dict[str, float]


def train(
    trainer: "Trainer", batches: Iterator[Batch], task: Task, *, steps: int | None = None, seconds: float | None = None
) -> Outcome:
    """Until so many steps or seconds are over; validates as often as the run does, and at the end.

    With a budget of seconds a cosine schedule goes by them once it is warm, for nobody knows how many steps they hold.
    """
    from seq2seq.evaluation import token_scores

    options, pairs = trainer.options, task.pairs("validation")
    validations: list[dict[str, float]] = []
    best, weights = {"loss": float("inf")}, None
    step, tokens, step_seconds, loss = 0, 0, 0.0, float("nan")
    start = time.perf_counter()

    def over() -> bool:
        late = seconds is not None and time.perf_counter() - start >= seconds
        return late or (steps is not None and step >= steps)

    def place() -> int | None:
        if seconds is None or options.schedule != "cosine" or trainer.steps < options.warmup:
            return None
        spent = (time.perf_counter() - start) / seconds
        return max(options.warmup, int(spent * options.steps))

    while True:
        began = time.perf_counter()
        metrics = trainer.train(next(batches), place=place())
        step_seconds += time.perf_counter() - began
        step, tokens, loss = step + 1, tokens + int(metrics.tokens), float(metrics.loss)
        ended = over()
        spent = time.perf_counter() - start
        if step % options.validate_every == 0 or ended:
            scores = token_scores(trainer, task, pairs, tokens=options.tokens)
            found = {"step": step, "seconds": spent, "loss": scores.loss, "accuracy": scores.accuracy}
            validations.append(found)
            console.print(
                f"step {step}, {spent:.0f} s, {tokens / step_seconds:,.0f} tokens/s: loss {loss:.3f}, validation loss "
                f"{scores.loss:.4f}, token accuracy {scores.accuracy:.2%}",
                highlight=False,
            )
            if scores.loss < best["loss"]:
                best, weights = found, {n: x.clone() for n, x in trainer.averaged.state_dict().items()}
        if ended or over():
            break
    if weights is None:
        raise UserError(f"no validation loss was finite in {step} steps; train a run of a lower --learning-rate")
    trainer.averaged.load_state_dict(weights)
    return Outcome(step, spent, step_seconds, tokens, loss, validations, best)


def translation_scores(model: Any, task: Task, split: str, *, tokens: int, beams: int) -> dict[str, Any]:
    """BLEU and chrF of a split, searched and scored by the same code as ours."""
    from bench import torch_transformer
    from seq2seq.decoding import DecodingOptions, hypotheses
    from seq2seq.evaluation import text_scores

    model.eval()
    examples, start = task.split(split), time.perf_counter()
    options = DecodingOptions(beams=beams)
    sources = [example.source for example in examples]
    found = hypotheses(torch_transformer, model, task, sources, tokens=tokens, options=options)
    predictions = [best[0].symbols for best in found]
    return {
        "split": split,
        "pairs": len(examples),
        "seconds": time.perf_counter() - start,
        "beams": beams,
        "length_penalty": options.length_penalty,
        **{name: value._asdict() for name, value in text_scores(task, examples, predictions).items()},
    }


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="A folder that `isoformer train --task translate` made.")],
    seconds: Annotated[float | None, typer.Option(help="How long to train, validations included.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the result.", show_default="RUN/torch.json")
    ] = None,
    first: Annotated[First, typer.Option(help="First weights: the run's own, or those torch draws.")] = First.OURS,
    split: Annotated[str, typer.Option(help="Which is translated in the end: validation or test.")] = "test",
    beams: Annotated[int, typer.Option(min=2, help="Hypotheses that are followed.")] = 4,
    device: Annotated[str, typer.Option(help="As torch names it: cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.", show_default="torch's choice")] = None,
) -> None:
    """Train torch.nn.Transformer on a run's data with its sizes and options, and score its translations.

    The layers, the optimizer and the attention are torch's own. For decoding, which torch lacks, there is a cache of
    keys and values and the same beam search as ours, written with torch.
    """
    if (seconds is None) == (steps is None):
        raise UserError(f"one budget is needed, got --seconds {seconds} and --steps {steps}; give one of the two")
    opened = Run.open(run)
    try:
        import torch  # pyright: ignore[reportMissingImports]

        from bench.torch_trainer import Trainer
        from bench.torch_transformer import Transformer, load_weights
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("this needs PyTorch; run: pip install 'isoformer[bench,torch]'") from None
    from seq2seq.frontends import frontend
    from seq2seq.stream import endless_batches

    options = opened.options if steps is None else dataclasses.replace(opened.options, steps=steps)
    task = opened.load_task()
    task.split(split)  # what cannot be done is said before hours of training
    file = output or run / "torch.json"
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written; give another --output")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device must be cpu, or cuda where torch sees one, got {device}")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    model = Transformer(opened.config)
    if first is First.OURS:
        package = frontend(opened.frontend)
        load_weights(model, package.to_weights(package.init_transformer(opened.config, seed=options.seed)))
    model = model.to(device)
    trainer = Trainer(model, options)
    sizes = {"tokens": options.tokens, "micro": options.accumulate, "seed": options.seed}
    batches = endless_batches(task.pairs("train"), task.buckets, **sizes)
    outcome = train(trainer, batches, task, steps=steps, seconds=seconds)
    result = {
        "command": shlex.join(["python", "-m", "bench.translate_torch", *sys.argv[1:]]),
        "run": str(run.absolute()),
        "budget": {"seconds": seconds, "steps": steps},
        **outcome._asdict(),
        "tokens_per_second": outcome.tokens / outcome.step_seconds,
        "skipped_steps": trainer.skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_weights": first.value,
        "translation": translation_scores(trainer.averaged, task, split, tokens=options.tokens, beams=beams),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        **machine(),
        "versions": {"python": platform.python_version()}
        | versions("torch", "numpy", "sacrebleu", "tokenizers", "grain"),
    }
    text = json.dumps(result, indent=2)
    console.print_json(text)
    file.write_text(text + "\n")


def main() -> None:
    """The entry point."""
    entry.run(app, name="translate_torch")


if __name__ == "__main__":
    main()
