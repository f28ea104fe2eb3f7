"""The command line: `isoformer prepare | train | resume | plot | evaluate | generate | attention | …`."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from conformance.cli import conform
from core.config import NormOrder, Positions, TransformerConfig
from seq2seq import entry
from seq2seq.errors import UserError
from seq2seq.options import TASKS, NonFinite, Schedule

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
def prepare(
    text: Annotated[
        str,
        typer.Option(
            help="Parallel text: a tab-separated file or a glob of such, or two aligned files with a comma between, "
            "as in train.en,train.de.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="A new folder for the data.", show_default=False)],
    validation: Annotated[
        str | None, typer.Option(help="Text of its own for validation.", show_default="2 % of --text, by hash")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Likewise for the test.", show_default="10 % of --text, by hash")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Subwords of the joint vocabulary, at most.")] = 8000,
    max_length: Annotated[int, typer.Option(help="Tokens of a side at most, the end counted.")] = 128,
) -> None:
    """Make parallel text ready for `train --task translate`: a tokenizer, and the text as its numbers."""
    from seq2seq.corpus import prepare as make_ready

    with console.status("reading, learning subwords, writing"):
        about = make_ready(
            output, text=text, validation=validation, test=test, vocabulary=vocabulary, max_length=max_length
        )
    table = Table(title=f"{output}: {about['vocabulary']} subwords")
    for column in ("split", "pairs", "left out"):
        table.add_column(column)
    for split, number in about["pairs"].items():
        faults = ", ".join(f"{n} {fault}" for fault, n in about["left_out"][split].items())
        table.add_row(split, f"{number:,}", faults or "none")
    console.print(table)
    console.print(f"Next: isoformer train --task translate --data {output}")


@app.command()
def train(
    task: Annotated[str, typer.Option(help=f"{', '.join(TASKS)}.")] = "pronounce",
    data: Annotated[
        Path | None, typer.Option(help="For translate: what `isoformer prepare` made.", show_default=False)
    ] = None,
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
    scan_layers: Annotated[
        bool, typer.Option("--scan-layers", help="Compile one block for all layers, whatever their number.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and dropout.")] = 0,
) -> None:
    """Train a model; the latest state and the best by validation loss are kept."""
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.options import TrainingOptions
    from seq2seq.runs import Run
    from seq2seq.tasks import load_task
    from seq2seq.training import train as run_training

    package, loaded = load_frontend(frontend), load_task(task, data=data)
    config = task_config(
        loaded,
        tie_embeddings="all" if loaded.source is loaded.target and loaded.measure == "text" else "target",
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
        scan_layers=scan_layers,
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
    created = Run.create(folder, task=task, frontend=frontend, config=config, options=options, data=data)
    _report(created, run_training(created, package, loaded, console=console))


@app.command()
def resume(run: RunFolder, frontend: OtherFrontend = None) -> None:
    """Go on with a run that was interrupted, in either frontend, to the same bits as without the interruption."""
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run
    from seq2seq.training import train as run_training

    opened = Run.open(run)
    package, task = load_frontend(frontend or opened.frontend), opened.load_task()
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
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `isoformer train` made.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The picture, PNG, SVG or PDF.", show_default="curves.png in the first folder")
    ] = None,
) -> None:
    """Draw the loss and the accuracy of runs, step by step; also while they train."""
    from seq2seq.metrics import curves
    from seq2seq.plots import plot_training
    from seq2seq.runs import Run

    found = {str(run): curves(Run.open(run).folder) for run in runs}
    if empty := [name for name, curve in found.items() if not curve]:
        raise UserError(f"{empty[0]} has logged nothing yet; let it train for a while")
    path = output or runs[0] / "curves.png"
    try:
        plot_training(path, found)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be drawn: {error}; give another --output") from None
    console.print(f"{path} shows {', '.join(found)}")


Beams = Annotated[int, typer.Option(min=1, help="Hypotheses that are followed; 1 is greedy decoding.")]
LengthPenalty = Annotated[float, typer.Option(help="Of beams: scores are log P over ((5 + length) / 6) to this power.")]


@app.command()
def evaluate(
    run: RunFolder,
    frontend: OtherFrontend = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    beams: Beams = 1,
    length_penalty: LengthPenalty = 0.6,
    predictions: Annotated[
        Path | None, typer.Option(help="A new file for the outputs, a line each.", show_default="not kept")
    ] = None,
) -> None:
    """Score a run's best weights on held-out examples."""
    import math

    import optax

    from seq2seq.decoding import DecodingOptions
    from seq2seq.digits import logistic_regression
    from seq2seq.evaluation import sequence_scores, text_scores, token_scores
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run

    if predictions is not None and predictions.exists():
        raise UserError(f"{predictions} is already there; give another --predictions or remove it")
    opened = Run.open(run)
    name = frontend or opened.frontend
    package, task = load_frontend(name), opened.load_task()
    if predictions is not None and task.measure == "classes":
        raise UserError(f"--predictions keeps what is generated, the task {task.name} classifies; leave it out")
    model = opened.load_model(package, task)
    examples, tokens = task.split(split), opened.options.tokens
    trainer = package.Trainer(model, optax.identity())
    said: list[tuple[int, ...]] = []
    table = Table(title=f"{opened.task}, {split} split, {len(examples)} examples, in {name}", show_header=False)
    with console.status(f"evaluating {len(examples)} examples in {name}"):
        by_token = token_scores(trainer, task, task.pairs(split), tokens=tokens)
        if task.measure == "classes":
            table.add_row("loss, nats", f"{by_token.loss:.4f}")
            table.add_row("accuracy", f"{by_token.accuracy:.2%}")
            table.add_row(
                "accuracy of logistic regression", f"{logistic_regression(task.split('train'), examples):.2%}"
            )
        else:
            options = DecodingOptions(beams=beams, length_penalty=length_penalty)
            found = sequence_scores(package, model, task, examples, tokens=tokens, options=options)
            said, how = found.predictions, "greedily" if beams == 1 else f"by {beams} beams"
            table.add_row("loss, nats a token", f"{by_token.loss:.4f}")
            table.add_row("perplexity of a token", f"{math.exp(min(by_token.loss, 700)):.3f}")
            table.add_row("token accuracy, teacher-forced", f"{by_token.accuracy:.2%}")
            table.add_row(f"sequence accuracy, generated {how}", f"{found.sequence_accuracy:.2%}")
            if task.measure == "phones":
                table.add_row("word error rate (WER)", f"{found.word_error_rate:.2%}")
                table.add_row("phone error rate (PER)", f"{found.symbol_error_rate:.2%}")
    if task.measure == "text":
        for metric, text in text_scores(task, examples, said).items():
            table.add_row(metric, f"{text.score:.2f}  {text.signature}")
    console.print(table)
    if predictions is not None:
        predictions.write_text("".join(f"{task.target.decode(symbols)}\n" for symbols in said))


@app.command()
def generate(
    run: RunFolder,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to transform; quote a sequence with blanks.", show_default="--file, or lines of standard input"
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file of it, a line each.", show_default=False)] = None,
    frontend: OtherFrontend = None,
    beams: Beams = 1,
    n_best: Annotated[int, typer.Option(min=1, help="So many outputs are shown, with their scores.")] = 1,
    length_penalty: LengthPenalty = 0.6,
    temperature: Annotated[
        float | None, typer.Option(help="Outputs are drawn; below 1 likely ones more often.", show_default="not drawn")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Drawn from the k likeliest symbols.", show_default="all")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Drawn from the likeliest symbols with that much mass.", show_default="all")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drawn from symbols at least that likely beside the likeliest.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    prefix: Annotated[str, typer.Option(help="With which every output begins.")] = "",
    min_length: Annotated[int, typer.Option(help="Symbols before an output may end.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: symbols that came are less likely.")] = 1.0,
    no_repeat_ngram: Annotated[int, typer.Option(help="No so many symbols come twice in the same order.")] = 0,
    attention: Annotated[
        Path | None, typer.Option(help="A folder for pictures of where each output looked.", show_default="none drawn")
    ] = None,
) -> None:
    """Show what a run's best weights make of texts: given here, in a file, or line by line on standard input.

    Of a file and of standard input only the outputs are printed, as many lines as came in.
    """
    from core.constraints import Constraints
    from core.sampling import Sampling, check_sampling
    from seq2seq.decoding import DecodingOptions, Hypothesis, hypotheses
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.runs import Run

    drawn = any(rule is not None for rule in (temperature, top_k, top_p, min_p))
    sampling = Sampling(1.0 if temperature is None else temperature, top_k, top_p, min_p) if drawn else None
    try:
        rules = Constraints(
            repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram, min_length=min_length
        )
        if sampling is not None:
            check_sampling(sampling)
    except ValueError as error:
        raise UserError(str(error)) from None
    options = DecodingOptions(
        beams=beams, n_best=n_best, length_penalty=length_penalty, sampling=sampling, seed=seed, constraints=rules,
        prefix=prefix,
    )  # fmt: skip
    opened = Run.open(run)
    if attention is not None:
        check_layers(opened)
    package, task = load_frontend(frontend or opened.frontend), opened.load_task()
    model = opened.load_model(package, task)
    folder = None if attention is None else make_folder(attention)
    number = itertools.count(1)
    with _lines(texts, file) as lines:
        while group := list(itertools.islice(lines, len(texts) if texts else 1 if file is None else 64)):
            asked = [text for text in group if text]
            sources = [task.parse(text) for text in asked]
            tokens = 1 if texts is None and file is None else opened.options.tokens
            found = hypotheses(package, model, task, sources, tokens=tokens, options=options)
            answers = dict(zip(asked, zip(sources, found, strict=True), strict=True))
            for text in group:
                source, best = answers.get(text, ((), [Hypothesis((), None)]))  # an empty line stays one
                for symbols, score in best:
                    said = task.target.decode(symbols)
                    shown = f"{text}  →  {said}" if texts else said
                    if n_best > 1 and score is not None:
                        shown += f"  {score:.3f}"
                    console.print(shown, highlight=False, markup=False, soft_wrap=True)
                if folder is not None and text:
                    from seq2seq.pictures import draw_cross_attention  # only here: its library starts slowly

                    path = folder / f"{next(number):04}.png"
                    draw_cross_attention(path, package, model, task, source, best[0].symbols, title=text)
    if folder is not None:
        console.print(f"the pictures are in {folder}")


@contextlib.contextmanager
def _lines(texts: list[str] | None, file: Path | None) -> Iterator[Iterator[str]]:
    """The texts, or the lines of the file or of standard input, one at a time."""
    if texts and file is not None:
        raise UserError("texts are given as arguments or by --file, not both")
    try:
        with contextlib.nullcontext(texts or sys.stdin) if file is None else file.open(encoding="utf-8") as source:
            yield (line.strip() for line in source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file or 'standard input'} cannot be read: {error}") from None


@app.command()
def export(
    run: RunFolder, file: Annotated[Path, typer.Argument(help="A new safetensors file.", show_default=False)]
) -> None:
    """Write a run's best weights to one file to hand on, which says what they are and whose every bit is checked."""
    from seq2seq.exports import export as export_weights
    from seq2seq.runs import Run

    about = export_weights(Run.open(run), file)
    console.print(f"the weights of step {about['step']}, validation loss {about['validation_loss']}, are in {file}")


@app.command()
def attention(
    run: RunFolder,
    word: Annotated[str, typer.Argument(help="What to transform; quote a sequence with blanks.")],
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/attention"),
    frontend: OtherFrontend = None,
) -> None:
    """Draw where a run's best weights look, by layer and head, while they transform a word."""
    from seq2seq.decoding import predict
    from seq2seq.frontends import frontend as load_frontend
    from seq2seq.pictures import attention_maps
    from seq2seq.plots import plot_attention
    from seq2seq.runs import Run

    opened = Run.open(run)
    check_layers(opened)
    package, task = load_frontend(frontend or opened.frontend), opened.load_task()
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
        plot_attention(folder / file, shown, queries, keys, title=f"{word}: {task.target.decode(target)}")
    console.print(f"encoder.png, decoder.png and cross.png are in {folder}")


@app.command()
def encodings(
    run: Annotated[
        Path | None, typer.Argument(help="A folder that `isoformer train` made.", show_default="every kind, untrained")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/encodings"),
    length: Annotated[int, typer.Option(min=1, help="Positions to show.")] = 48,
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
        return TransformerConfig(**task.sizes(), max_length=task.buckets[-1], **fields)
    except ValueError as error:
        raise UserError(str(error)) from None


def make_folder(folder: Path) -> Path:
    """The folder, made if it was not there. UserError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot hold pictures: {error.strerror}; give another --output") from None
    return folder


def check_layers(run: "Run") -> None:
    """UserError where there is no attention to draw."""
    layers = run.config.num_encoder_layers, run.config.num_decoder_layers
    if 0 in layers:
        raise UserError(
            "attention is drawn of at least one encoder and one decoder layer, got {} and {}; train with --layers 1 "
            "or more".format(*layers)
        )


def main() -> None:
    """The entry point."""
    entry.run(app, name="isoformer")


if __name__ == "__main__":
    main()
