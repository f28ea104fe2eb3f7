"""The command line: `isoformer train | resume | evaluate | generate | attention | encodings | conform | compare`."""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from conformance.cli import conform
from core.config import NormOrder, Positions, TransformerConfig
from seq2seq.errors import UserError
from seq2seq.options import NonFinite, Schedule

if TYPE_CHECKING:
    from seq2seq.runs import Run
    from seq2seq.tasks import Task
    from seq2seq.training import Outcome

# each command imports what it needs: --help answers at once, and `conform` goes without the rest of the application
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One Transformer, two structures: train, evaluate and run it in Flax NNX or in Equinox, or compare the two.",
)
console = Console()
app.command()(conform)

RunFolder = Annotated[Path, typer.Argument(help="A folder that `isoformer train` made.", show_default=False)]
OtherFrontend = Annotated[
    str | None,
    typer.Option(help="nnx or equinox; any run works in either.", show_default="the one it was trained with"),
]


@app.command()
def train(
    task: Annotated[str, typer.Option(help="copy, reverse, pronounce, scan or scan-length.")] = "pronounce",
    frontend: Annotated[str, typer.Option(help="nnx or equinox.")] = "nnx",
    run: Annotated[
        Path | None, typer.Option(help="A new folder for the run.", show_default="runs/TASK-FRONTEND")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 5000,
    tokens: Annotated[int, typer.Option(help="Target positions in a batch, or in a micro-batch.")] = 2048,
    accumulate: Annotated[int, typer.Option(help="Micro-batches that make one step, to save memory.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warm-up.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps until that peak.")] = 400,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate after the warm-up.")] = "inverse_sqrt",
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 1e-3,
    average: Annotated[
        float, typer.Option(help="Decay of the moving average of weights that is evaluated and kept; 0: none.")
    ] = 0.0,
    frozen: Annotated[
        list[str] | None, typer.Option(help="Parameters that stay as they are, as in 'encoder.*'; may be repeated.")
    ] = None,
    non_finite: Annotated[
        NonFinite, typer.Option(help="What gradients that are not finite do: skip their step, or stop the run.")
    ] = "skip",
    keep: Annotated[int, typer.Option(help="Checkpoints of the lowest validation losses to keep.")] = 1,
    label_smoothing: Annotated[float, typer.Option(help="From 0, none, to below 1.")] = 0.1,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 200,
    patience: Annotated[int, typer.Option(help="Validations without a lower loss before it stops.")] = 5,
    d_model: Annotated[int, typer.Option(help="Model width.")] = 128,
    num_heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    d_ff: Annotated[int, typer.Option(help="Feed-forward width.")] = 512,
    layers: Annotated[int, typer.Option(help="Encoder layers, and as many decoder layers.")] = 2,
    positions: Annotated[str, typer.Option(help=f"{', '.join(get_args(Positions))}.")] = "sinusoidal",
    norm_order: Annotated[str, typer.Option(help=f"{', '.join(get_args(NormOrder))}.")] = "pre",
    dropout_rate: Annotated[float, typer.Option(help="From 0 to below 1.")] = 0.1,
    compute: Annotated[str, typer.Option(help="In which numbers it computes: float32 or bfloat16.")] = "float32",
    remat: Annotated[bool, typer.Option("--remat", help="Compute blocks twice, to save memory.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and dropout.")] = 0,
) -> None:
    """Train a model; the latest state and the best by validation loss are kept."""
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.options import TrainingOptions
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task
    from seq2seq.training import train as run_training

    package, loaded = load_frontend(frontend), load_task(task)
    config = task_config(
        loaded,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        positions=positions,
        norm_order=norm_order,
        dropout_rate=dropout_rate,
        dtype=compute,
        remat=remat,
    )
    options = TrainingOptions(
        steps=steps,
        tokens=tokens,
        accumulate=accumulate,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        average=average,
        frozen=tuple(frozen or ()),
        non_finite=non_finite,
        keep=keep,
        label_smoothing=label_smoothing,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
    )
    folder = run or Path("runs") / f"{task}-{frontend}"
    created = Run.create(folder, task=task, frontend=frontend, config=config, options=options)
    _report(created, run_training(created, package, loaded, console=console))


@app.command()
def resume(run: RunFolder, frontend: OtherFrontend = None) -> None:
    """Go on with a run that was interrupted, in either frontend, to the same bits as without the interruption."""
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task
    from seq2seq.training import train as run_training

    opened = Run.open(run)
    package, task = load_frontend(frontend or opened.frontend), load_task(opened.task)
    _report(opened, run_training(opened, package, task, console=console))


def _report(run: "Run", outcome: "Outcome") -> None:
    text = f"Stopped after {outcome.steps} steps: {outcome.stopped}. "
    if outcome.best_step:
        text += f"Best validation loss {outcome.best_loss:.4f} at step {outcome.best_step}, kept in {run.folder}."
    else:
        text += "No validation loss was finite, or none was reached."
    follow = "resume" if outcome.stopped.startswith("interrupted") else "evaluate"
    console.print(f"{text}\nNext: isoformer {follow} {run.folder}")


@app.command()
def evaluate(
    run: RunFolder,
    frontend: OtherFrontend = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    beams: Annotated[int, typer.Option(min=1, help="Hypotheses that are followed; 1 is greedy decoding.")] = 1,
) -> None:
    """Score a run's best weights on held-out examples."""
    import optax

    from seq2seq.evaluation import sequence_scores, token_scores
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task

    opened = Run.open(run)
    name = frontend or opened.frontend
    package, task = load_frontend(name), load_task(opened.task)
    model = opened.load_model(package, task)
    examples, tokens = task.split(split), opened.options.tokens
    trainer = package.Trainer(model, optax.identity())
    with console.status(f"evaluating {len(examples)} examples in {name}"):
        by_token = token_scores(trainer, task, examples, tokens=tokens)
        by_sequence = sequence_scores(package, model, task, examples, tokens=tokens, beams=beams)
    table = Table(title=f"{opened.task}, {split} split, {len(examples)} examples, in {name}", show_header=False)
    table.add_row("loss, nats a token", f"{by_token.loss:.4f}")
    table.add_row("token accuracy, teacher-forced", f"{by_token.accuracy:.2%}")
    table.add_row("sequence accuracy, generated", f"{by_sequence.sequence_accuracy:.2%}")
    if opened.task == "pronounce":
        table.add_row("word error rate (WER)", f"{by_sequence.word_error_rate:.2%}")
        table.add_row("phone error rate (PER)", f"{by_sequence.symbol_error_rate:.2%}")
    console.print(table)


@app.command()
def generate(
    run: RunFolder,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="What to transform; quote a sequence with blanks.", show_default="lines of standard input"),
    ] = None,
    frontend: OtherFrontend = None,
    beams: Annotated[int, typer.Option(min=1, help="Hypotheses that are followed; 1 is greedy decoding.")] = 1,
    n_best: Annotated[int, typer.Option(min=1, help="Of the hypotheses so many are shown, with scores.")] = 1,
) -> None:
    """Show what a run's best weights make of words that you type, or pipe in line by line."""
    from seq2seq.evaluation import hypotheses
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task

    opened = Run.open(run)
    package, task = load_frontend(frontend or opened.frontend), load_task(opened.task)
    if n_best > beams:
        raise UserError(f"--n-best must be at most --beams {beams}, got {n_best}")
    model = opened.load_model(package, task)
    lines = iter(words or (line.strip() for line in sys.stdin if line.strip()))
    while group := list(itertools.islice(lines, len(words) if words else 1)):
        sources = [task.parse(word) for word in group]
        options = {"tokens": opened.options.tokens if words else 1, "beams": beams, "n_best": n_best}
        for word, found in zip(group, hypotheses(package, model, task, sources, **options), strict=True):
            for symbols, score in found:
                output = f"{word}  →  {' '.join(task.target.decode(symbols))}"
                console.print(output if n_best == 1 else f"{output}  {score:.3f}", highlight=False, markup=False)


@app.command()
def attention(
    run: RunFolder,
    word: Annotated[str, typer.Argument(help="What to transform; quote a sequence with blanks.")],
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/attention"),
    frontend: OtherFrontend = None,
) -> None:
    """Draw where a run's best weights look, by layer and head, while they transform a word."""
    from seq2seq.evaluation import predict
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.pictures import attention_maps
    from seq2seq.plots import plot_attention
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task

    opened = Run.open(run)
    package, task = load_frontend(frontend or opened.frontend), load_task(opened.task)
    model, source = opened.load_model(package, task), task.parse(word)
    (target,) = predict(package, model, task, [source], tokens=opened.options.tokens)
    maps, symbols, letters = attention_maps(package, model, task, source, target)
    folder = make_folder(output)
    for file, suffix, queries, keys in (
        ("encoder.png", "attention", letters, letters),
        ("decoder.png", "attention", symbols, symbols),
        ("cross.png", "cross_attention", symbols, letters),
    ):
        side = "encoder" if file == "encoder.png" else "decoder"
        shown = {n: m for n, m in maps.items() if n.startswith(side) and n.rpartition(".")[2] == suffix}
        plot_attention(folder / file, shown, queries, keys, title=f"{word}: {' '.join(task.target.decode(target))}")
    console.print(f"encoder.png, decoder.png and cross.png are in {folder}")


@app.command()
def encodings(
    run: Annotated[
        Path | None, typer.Argument(help="A folder that `isoformer train` made.", show_default="every kind, untrained")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/encodings"),
    length: Annotated[int, typer.Option(help="Positions to show.")] = 48,
) -> None:
    """Draw encodings of positions: those that a run has learned, or a gallery of every kind."""
    from seq2seq.pictures import gallery, run_encodings
    from seq2seq.plots import plot_absolute_encodings, plot_relative_encodings
    from seq2seq.runs import Run

    opened, folder = None if run is None else Run.open(run), make_folder(output)
    absolute, relative = gallery(length) if opened is None else run_encodings(opened, length)
    if absolute:
        plot_absolute_encodings(folder / "absolute.png", absolute)
    if relative:
        plot_relative_encodings(folder / "relative.png", relative)
    drawn = [name for name, found in (("absolute.png", absolute), ("relative.png", relative)) if found]
    console.print(f"{' and '.join(drawn)} in {folder}" if drawn else "this run has no positions to draw")


@app.command()
def compare(
    minutes: Annotated[float, typer.Option(help="How long to train, both frontends together.")] = 4.0,
    output: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("runs/compare"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and dropout.")] = 0,
) -> None:
    """Train both frontends side by side on pronunciation, check that they agree bit for bit, and compare them."""
    from seq2seq.compare import compare as run_comparison

    report = run_comparison(output, minutes=minutes, seed=seed, console=console)
    raise typer.Exit(1 if not report.agreed else 130 if report.interrupted else 0)


def task_config(task: "Task", **fields) -> TransformerConfig:
    """The configuration of a model for a task. UserError for what the fields may not be."""
    try:
        return TransformerConfig(
            source_vocab_size=len(task.source),
            target_vocab_size=len(task.target),
            max_length=task.buckets[-1],
            **fields,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def make_folder(folder: Path) -> Path:
    """The folder, made if it was not there. UserError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot hold pictures: {error.strerror}; give another --output") from None
    return folder


def main() -> None:
    """The entry point: what a user can mend is one sentence and exit code 2."""
    try:
        app()
    except (UserError, ModuleNotFoundError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        text = f"this command needs {error.name}; run: pip install 'isoformer[app]'" if missing else error
        Console(stderr=True).print(f"isoformer: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
