"""How a command line begins and ends: what a user can mend is one sentence and exit code 2, without a traceback."""

import sys

import typer
from rich.console import Console

from seq2seq.errors import UserError


def run(app: typer.Typer, *, name: str) -> None:
    """Runs the command that was typed; `name` stands before the sentence."""
    try:
        app()
    except (UserError, ModuleNotFoundError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        text = f"this command needs {error.name}; run: pip install 'isoformer[app]'" if missing else error
        Console(stderr=True).print(f"{name}: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
