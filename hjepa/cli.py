"""The command line. torch is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hjepa.errors import ConfigError, StorageError, UserError

if TYPE_CHECKING:
    from hjepa.config import Config

STARTED = time.monotonic()

# What a folder of images alone is trained by.
NIGHT = Path(__file__).parent / "recipes" / "folder.yaml"

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


Hours = Annotated[
    float | None, typer.Option("--hours", help="Time for the whole run; sets training.max_time.", min=0.001)
]


@app.callback()
def _root() -> None:
    """Keep `hjepa train` a subcommand whatever the number of commands."""


@app.command()
def train(
    settings: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Config file (YAML).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", help="A setting that may differ from the continued run's.")
    ] = None,
    hours: Hours = None,
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
    file = _file(words, config)
    typer.echo("Loading config..." + (" none given: configs/folder.yaml, for a night" if file == NIGHT else ""))
    resolved = _load(words, file, hours)
    from hjepa.train import train as run

    run(resolved, resume=resume, accept=accept or [])


@app.command()
def check(
    settings: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Config file (YAML).")] = None,
    hours: Hours = None,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="Decode every image file in search of unreadable ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same for programs.")] = False,
) -> None:
    """Look at everything a run needs and say what it will cost, before it is started."""
    words = list(settings or [])
    file = _file(words, config)
    if file == NIGHT and not as_json:
        typer.echo("No config file: configs/folder.yaml, for a night")
    resolved = _load(words, file, hours)
    from hjepa.preflight import check as look

    report = look(resolved, started=STARTED, all_images=all_images)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(report.json() if as_json else report.table())
    sys.exit(report.exit_code)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A config file.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for both.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show the settings that are equal, too.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time both on this device.")] = False,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
) -> None:
    """Two configs side by side: what differs, what that means, and (with --measure) what it costs."""
    from hjepa.compare import compare as side_by_side

    comparison = side_by_side(first, second, list(overrides or []), show_all, measure)
    if markdown is None:
        typer.echo(comparison.text())
    else:
        _write(markdown, comparison.markdown())


@app.command()
def migrate(
    old: Annotated[Path, typer.Argument(help="A config of the first H-JEPA project.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output when not given.")
    ] = None,
) -> None:
    """Write an old config in today's vocabulary, and say what became of every key."""
    from hjepa.config import migrate as migration

    result = migration.migrate(old)
    if output is None:
        typer.echo(result.yaml, nl=False)
    else:
        migration.save(result, output)
    typer.echo(migration.show(result), err=output is None)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a checkpoint.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as evaluation.knn.k=10.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Folder with a subfolder per class, or shapes, cifar10, ...; may be repeated."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder of PNG class masks for the images of --data.")
    ] = None,
    probes: Annotated[
        str | None, typer.Option("--probes", help="Comma-separated, or all; the quick ones when not given.")
    ] = None,
    features: Annotated[str, typer.Option("--features", help="last, taps, levels, fpn, or all.")] = "last,levels",
    encoder: Annotated[str, typer.Option("--encoder", help="target, online or both.")] = "both",
    neighbours: Annotated[str | None, typer.Option("--k", help="Numbers of neighbours, such as 1,20,200.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over train for sgd, attentive and finetune.", min=1)
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """What an encoder is worth by the usual probes, beside raw pixels and an untrained encoder.

    Probes: knn, linear, few-shot, clusters, rankme, dense (quick); logistic, sgd, attentive, finetune (minutes).
    """
    from hjepa.assess.request import FEATURES, PROBES, Request, numbers, words

    request = Request(
        run,
        tuple(overrides or ()),
        tuple(data or ()),
        masks,
        None if probes is None else words(probes, "--probes", PROBES),
        words(features, "--features", FEATURES),
        encoder,
        None if neighbours is None else numbers(neighbours, "--k"),
        epochs,
        json,
    )
    from hjepa.assess.assess import assess

    assess(request)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a checkpoint.")],
    images: Annotated[
        list[str] | None, typer.Argument(help="A folder of images; or data.datasets=[...]; the run's own data without.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .parquet, .npy or .safetensors.")
    ] = Path("features.parquet"),
    data: Annotated[str | None, typer.Option("--data", help="A source of the config by name, such as cifar10.")] = None,
    level: Annotated[int | None, typer.Option("--level", help="Features of this level (0 = finest).")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="All tokens of an image in place of their mean.")] = False,
    online: Annotated[bool, typer.Option("--online", help="The context encoder in place of its average.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per forward pass.", min=1)] = 64,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Embed a folder of images into a file; started again with the same arguments, it goes on where it was."""
    words = list(images or [])
    folder = Path(words.pop(0)) if words and "=" not in words[0] else None
    if folder is not None and (data is not None or words):
        raise ConfigError(f"{folder}: a folder stands alone; leave out {'--data' if data is not None else words[0]}")
    if data is not None:
        words.insert(0, f"data.datasets=[{{name: {data}}}]")
    from hjepa.use.embed import Request
    from hjepa.use.embed import embed as run_through

    run_through(run, folder, output, Request(level, tokens, online), words, batch_size, device)


@app.command()
def search(
    features: Annotated[Path, typer.Argument(help="A file that hjepa embed made.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    k: Annotated[int, typer.Option("-k", help="Number of neighbours.", min=1)] = 10,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw them into this file, such as out.png.")
    ] = None,
) -> None:
    """Find the images that are nearest to one, by cosine similarity of their embeddings."""
    from hjepa.use.search import search as look_up

    look_up(features, image, k, picture)


@app.command()
def classify(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a checkpoint.")],
    labelled: Annotated[
        Path,
        typer.Argument(
            help="A folder with one subfolder of images per class; a table (.csv, .tsv) with the columns file,label; "
            "or a classifier.safetensors of an earlier call."
        ),
    ],
    images: Annotated[
        Path | None, typer.Argument(help="A folder of images to classify; the labelled ones themselves without.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Table to write; the page of pictures and the classifier lie beside.")
    ] = Path("predictions.csv"),
    online: Annotated[bool, typer.Option("--online", help="The context encoder in place of its average.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per forward pass.", min=1)] = 64,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Learn classes from a few labelled images, say how far to believe it, and classify a folder."""
    from hjepa.classify import classify as learn

    learn(run, labelled, images, output, online, batch_size, device)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a checkpoint.")],
    to: Annotated[str, typer.Option("--to", help="timm, hf, onnx, torchscript or safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; for hf a folder.")],
    online: Annotated[bool, typer.Option("--online", help="The context encoder in place of its average.")] = False,
) -> None:
    """Write the encoder for another library, and print the lines that load it there."""
    from hjepa.use.export import export as write_out

    write_out(run, to, output, online)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folder of a run, or of several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write: report.html in the run's folder when not given."),
    ] = None,
) -> None:
    """Write one page of HTML about a run: curves, probes, pictures, settings; or about several side by side."""
    from hjepa.report import write_report

    typer.echo(f"Report: {write_report(runs, output)}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def _file(words: list[str], config: Path | None) -> Path | None:
    """The config file of a command line, taken out of its words; a folder of images needs none."""
    if config is None and words and "=" not in words[0]:
        config = Path(words.pop(0))
    if config is None and any(word.startswith("data=") for word in words):
        config = NIGHT
    return config


def _load(words: list[str], file: Path | None, hours: float | None) -> Config:
    """What a config file and overrides come to."""
    from hjepa.config import load_config
    from hjepa.config.checks import process_checks

    if hours is not None:
        words = [*words, f"training.max_time={hours:g}h"]
    resolved = load_config(file, words)
    # As torchrun sets it; the rest of the house asks again, after torch is there.
    wrong = process_checks(resolved.data, resolved.training, int(os.environ.get("WORLD_SIZE", "1")))
    if wrong:
        raise ConfigError(wrong)
    return resolved


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
