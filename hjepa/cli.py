"""The command line. torch is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hjepa.errors import UserError

app = typer.Typer(
    name="hjepa",
    help="Self-supervised image pretraining with a Hierarchical Joint-Embedding Predictive Architecture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="A config file and key=value overrides, such as training.epochs=3.")
]


@app.callback()
def _root() -> None:
    """Keep `hjepa train` a subcommand whatever the number of commands."""


@app.command()
def train(
    settings: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Config file (YAML).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="List the settings (of the sections named) and stop.")
    ] = False,
) -> None:
    """Pretrain an encoder: `hjepa train configs/quickstart.yaml`, or `hjepa train data=./photos`."""
    words = list(settings or [])
    if help_config:
        from hjepa.config.describe import settings_table

        typer.echo(settings_table(words))
        return
    if config is None and words and "=" not in words[0]:
        config = Path(words.pop(0))
    from hjepa.config import load_config

    typer.echo("Loading config...")
    resolved = load_config(config, words)
    from hjepa.train import train as run

    run(resolved, resume=resume)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as evaluation.knn.k=10.")] = None,
) -> None:
    """Probe the newest checkpoint of a run beside raw pixels and an untrained encoder."""
    from hjepa.evaluate import evaluate_run

    evaluate_run(run, list(overrides or []))


def main() -> None:
    """Run the command line; a user's mistake ends in its message and its exit code."""
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
