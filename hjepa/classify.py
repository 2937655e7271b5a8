"""`hjepa classify`: from a few labelled images to a class for every image of a folder, and how far to believe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa.console import Console
from hjepa.data.bad_files import listed
from hjepa.data.files import FileSource
from hjepa.data.labelled import Copy, Labelled, copy_of, read_labelled, rows_of_table
from hjepa.data.source import Int64
from hjepa.data.sources import decode_side
from hjepa.device import choose
from hjepa.errors import ConfigError, DataError, StorageError
from hjepa.evaluation.features import pixel_features
from hjepa.evaluation.few_labels import Accuracy, cross_validate, fit
from hjepa.report.predictions import Prediction, Worth, is_table, write_page, write_table
from hjepa.use.classifier import Classifier, load_classifier
from hjepa.use.frozen import Encoder, encoder_of, untrained_of
from hjepa.use.listing import Listing, list_folder, pieces
from hjepa.weights import Weights, find_weights

Float64 = NDArray[np.float64]

CLASSIFIER = "classifier.safetensors"
KINDS = {"encoder": "trained encoder", "pixels": "raw pixels", "untrained": "untrained encoder"}
_SHOWN = 20


@dataclass(frozen=True)
class Given:
    """What is known of the labelled images beside their labels.

    Attributes:
        labelled: those that could be read.
        probabilities: `[n, C]` float64 by classifiers that were fitted without the image; nan where there is none.
    """

    labelled: Labelled
    probabilities: Float64


def classify(
    run: Path,
    labelled: Path,
    folder: Path | None = None,
    output: Path = Path("predictions.csv"),
    online: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> Classifier:
    """Fit a classifier to labelled images, or take a fitted one, and name the class of every image of a folder.

    Writes `output`, a page of pictures beside it (`.html`), and a classifier that was fitted (`CLASSIFIER`).

    Args:
        run: folder of a run or of a checkpoint.
        labelled: see `read_labelled`; or a classifier that was written before.
        folder: of images, nested or not; None for the labelled ones themselves.
        output: a `.csv` file with the columns file, predicted, probability and label (where one was given: such an
            image is named by classifiers that were fitted without it).
        online: the context encoder in place of its slow average.
        batch_size: images per forward pass.
        device: see `hjepa.device.choose`.

    Raises:
        ConfigError, DataError, StorageError: in one line, for everything that the user can mend.
    """
    _check_output(output, labelled)
    kind, console = choose(device), Console()
    ready = load_classifier(labelled) if labelled.suffix == ".safetensors" else None
    if ready is not None and folder is None:
        raise ConfigError(f"{labelled}: is a classifier; name the folder of images that it is to classify")
    if ready is not None and online and not ready.origin.online:
        raise ConfigError(f"--online: {labelled} was fitted to the averaged encoder; leave it out, or fit another")
    saved = find_weights(run, console.warn)
    encoder = encoder_of(saved, online if ready is None else ready.origin.online).to(kind.name)
    if ready is not None:
        ready.check(labelled, encoder)
    listing = None if folder is None else list_folder(folder, encoder.data)
    if ready is None:
        classifier, given = _fit(read_labelled(labelled, folder), saved, encoder, batch_size, console)
    else:
        classifier, given = ready, None
    _show(classifier, console)
    if listing is not None:
        predictions = _predict(listing, classifier, given, encoder, batch_size, console)
    else:
        assert given is not None
        predictions = _of_labelled(given)
    _keep_labels(output, predictions, console)
    write_table(output, predictions)
    console.say(f"{output}: {len(predictions)} images")
    page = output.with_suffix(".html")
    worth = Worth(classifier.origin.run, counts_of(classifier), rows_of(classifier))
    write_page(page, worth, predictions, encoder.data)
    console.say(f"Page: {page}")
    if ready is None:
        path = output.with_name(CLASSIFIER)
        classifier.save(path)
        console.say(f"Classifier: {path}")
    return classifier


def _check_output(output: Path, labelled: Path) -> None:
    if output.suffix.lower() != ".csv":
        raise ConfigError(f"{output}: predictions are a table; choose a name that ends in .csv")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent} to write it to")
    if labelled.exists() and output.exists() and output.samefile(labelled):
        raise ConfigError(f"{output}: holds the labels; choose another name for the predictions with -o")
    if output.exists() and not is_table(output):
        raise ConfigError(
            f"{output}: is there already and was not made by hjepa classify; remove it, or choose another with -o"
        )


def _keep_labels(output: Path, predictions: list[Prediction], console: Console) -> None:
    """Set a table aside in which somebody filled in labels that these predictions do not know."""
    known = {one.name for one in predictions if one.label}
    lost = sum(bool(label) and name not in known for _, name, label in rows_of_table(output)) if output.exists() else 0
    if lost:
        kept = output.with_name(f"{output.name}.old")
        try:
            output.replace(kept)
        except OSError as error:
            raise StorageError(f"{kept}: cannot be written ({error.strerror})") from None
        console.warn(f"{output}: had {lost} label(s) that were not given here; it is kept as {kept}")


def _fit(
    labelled: Labelled, saved: Weights, encoder: Encoder, batch_size: int, console: Console
) -> tuple[Classifier, Given]:
    """The classifier of these labels and what cross-validation says of it, beside what costs nothing."""
    _check_counts(labelled)
    features, readable = _features(labelled, encoder, untrained_of(saved), batch_size, console)
    if len(readable) < len(labelled):
        labelled = labelled.only(readable.tolist())
        _check_counts(labelled)
    alone = [name for name, count in labelled.counts().items() if count == 1]
    if alone:
        console.warn(
            f"{labelled.origin}: one image of {', '.join(alone)}: it cannot be left out and its class be known, so the "
            "accuracy is that of the other classes; label a second one"
        )
    labels, number = torch.from_numpy(labelled.labels), len(labelled.classes)
    bar = console.bar("Cross-validating", 1)
    with console:
        accuracies, said = cross_validate(
            features, labels, number, progress=lambda done, total: bar.update(done, total=total)
        )
    bar.close()
    counts = list(labelled.counts().values())
    tested = [count for count in counts if count > 1]
    classifier = Classifier(
        encoder.origin,
        labelled.classes,
        counts,
        fit(features["encoder"], labels, number),
        accuracies,
        100 * max(tested) / sum(tested),
    )
    return classifier, Given(labelled, said["encoder"].numpy())


def _check_counts(labelled: Labelled) -> None:
    """Refuse labels that nothing can be learned from, or whose worth nothing could be said of."""
    counts = labelled.counts()
    if len(counts) < 2:
        raise DataError(
            f"{labelled.origin}: all labelled images are of the class {labelled.classes[0]}; a classifier needs two"
        )
    if sum(count > 1 for count in counts.values()) < 2:
        raise DataError(
            f"{labelled.origin}: {len(counts)} classes, of which fewer than two have two images; cross-validation "
            "leaves one out and needs another to know the class by: label more"
        )


@torch.no_grad()
def _features(
    labelled: Labelled, encoder: Encoder, untrained: Encoder, batch_size: int, console: Console
) -> tuple[dict[str, Tensor], Int64]:
    """Features `[n, d]` float32 by the names of `KINDS`, and which of the images could be read, `[n]` int64."""
    untrained = untrained.to(next(encoder.parameters()).device)
    source = FileSource(str(labelled.origin), labelled.paths, decode_side(encoder.data), max_bad=1.0)
    listing = Listing([source], labelled.names, str(labelled.origin), "", None)
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    readable: list[Int64] = []
    bad: dict[str, str] = {}
    bar = console.bar("Labelled images", len(labelled))
    with console:
        for piece in pieces(listing, 0, len(labelled), batch_size):
            bad |= piece.read.bad
            squares = encoder.preprocess.squares(torch.from_numpy(piece.read.images), piece.read.true_sizes)
            rows = torch.from_numpy(np.flatnonzero(piece.readable))
            for kind, features in (
                ("encoder", encoder(squares).pooled),
                ("pixels", pixel_features(squares)),
                ("untrained", untrained(squares).pooled),
            ):
                found[kind].append(features.float().cpu()[rows])
            readable.append(piece.numbers[piece.readable])
            bar.update(int(piece.numbers[-1]) + 1)
    bar.close()
    if bad:
        console.warn(f"{len(bad)} labelled image(s) cannot be read and are left out: {listed(bad)}")
    features = {kind: torch.cat(rows) for kind, rows in found.items()}
    if not features["encoder"].isfinite().all():
        raise StorageError(f"{encoder.origin.checkpoint}: its encoder gives features that are not finite")
    return features, np.concatenate(readable)


def _show(classifier: Classifier, console: Console) -> None:
    """What the classifier is worth, beside what costs nothing."""
    console.say(f"Labelled: {counts_of(classifier)}")
    console.table(["cross-validated on them", "accuracy", "over repeats", "95 % interval"], rows_of(classifier))
    own = classifier.accuracies["encoder"]
    console.say(f"Mean probability of the class named: {own.confidence:.0f} %; right: {own.mean:.0f} %")


def counts_of(classifier: Classifier) -> str:
    """What it was fitted to, in words."""
    counts = [f"{count} {name}" for name, count in zip(classifier.classes, classifier.counts, strict=True)]
    shown = ", ".join(counts[:_SHOWN]) + (", ..." if len(counts) > _SHOWN else "")
    return f"{sum(classifier.counts)} images of {len(counts)} classes ({shown})"


def rows_of(classifier: Classifier) -> list[list[str]]:
    """Its accuracy and those of what costs nothing: name, accuracy, spread over repeats, interval."""
    rows = [[label, *_cells(classifier.accuracies[kind])] for kind, label in KINDS.items()]
    return [*rows, ["always the most frequent class", f"{classifier.most_frequent:.1f} %", "", ""]]


def _cells(accuracy: Accuracy) -> list[str]:
    low, high = accuracy.interval
    spread = "one" if accuracy.spread is None else f"+- {accuracy.spread:.1f}"
    return [f"{accuracy.mean:.1f} %", spread, f"{low:.0f} to {high:.0f} %"]


@torch.no_grad()
def _predict(
    listing: Listing, classifier: Classifier, given: Given | None, encoder: Encoder, batch_size: int, console: Console
) -> list[Prediction]:
    """A class for each image that can be read, in the order of the folder."""
    known = _Known(given)
    total = len(listing.names)
    bad: dict[str, str] = {}
    (source,) = listing.sources
    predictions: list[Prediction] = []
    bar = console.bar("Classifying", total)
    with console:
        for piece in pieces(listing, 0, total, batch_size):
            bad |= piece.read.bad
            squares = encoder.preprocess.squares(torch.from_numpy(piece.read.images), piece.read.true_sizes)
            said = classifier.linear.probabilities(encoder(squares).pooled.cpu())
            for number, row in zip(piece.numbers[piece.readable], said.numpy()[piece.readable], strict=True):
                path = source.place(int(number))
                label, own = known.of(path)
                sure = row if own is None or np.isnan(own).any() else own
                best = int(sure.argmax())
                predictions.append(
                    Prediction(path, listing.names[number], classifier.classes[best], float(sure[best]), label)
                )
            bar.update(int(piece.numbers[-1]) + 1)
    bar.close()
    if bad:
        console.warn(f"{len(bad)} of {total} image file(s) cannot be read and are left out: {listed(bad)}")
    return predictions


class _Known:
    """Which images of a folder were labelled: the same files, or copies of them elsewhere."""

    def __init__(self, given: Given | None) -> None:
        self._given = given
        self._rows: dict[Copy, int] = {}
        for row, path in enumerate(given.labelled.paths if given is not None else ()):
            content = copy_of(path)
            if content is not None:
                self._rows[content] = row
        self._sizes = {size for size, _ in self._rows}

    def of(self, path: str) -> tuple[str, Float64 | None]:
        """The label that was given to an image, "" for none, and `[C]` probabilities by fits without it."""
        content = copy_of(path, self._sizes)
        row = None if content is None else self._rows.get(content)
        if self._given is None or row is None:
            return "", None
        labelled = self._given.labelled
        return labelled.classes[labelled.labels[row]], self._given.probabilities[row]


def _of_labelled(given: Given) -> list[Prediction]:
    """The labelled images themselves, each as classifiers without it name it; one alone in its class has no such."""
    labelled, found = given.labelled, []
    for row, said in enumerate(given.probabilities):
        if not np.isnan(said).any():
            best = int(said.argmax())
            label = labelled.classes[labelled.labels[row]]
            found.append(
                Prediction(labelled.paths[row], labelled.names[row], labelled.classes[best], float(said[best]), label)
            )
    return found
