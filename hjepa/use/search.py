"""Nearest neighbours of an image in a file of features."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.checkpoint import MANIFEST
from hjepa.console import Console
from hjepa.data.decode import decode
from hjepa.errors import ConfigError, DataError, StorageError
from hjepa.use.embed import Request
from hjepa.use.features import FeatureFile, Header
from hjepa.use.frozen import Encoder, encoder_of
from hjepa.weights import load_weights

_THUMBNAIL = 224


class Neighbour(NamedTuple):
    """An image that is near.

    Attributes:
        file: its name in the file of features.
        similarity: cosine of the angle between the two embeddings, in [-1, 1].
    """

    file: str
    similarity: float


def search(features: Path, image: Path, k: int = 10, picture: Path | None = None) -> list[Neighbour]:
    """Show the k nearest neighbours of an image by cosine similarity, and draw them if asked.

    Args:
        features: a file that `hjepa embed` made, without `--tokens`.
        image: any image file; it is embedded by the encoder that made the features.
        k: how many.
        picture: file for the image and its neighbours side by side, in a format that matplotlib writes.

    Raises:
        ConfigError: where the features are of patches, or were not of files and a picture is wanted.
        DataError: when the image or the file cannot be read.
        StorageError: when the checkpoint is gone or another one, or the picture cannot be written.
    """
    file = FeatureFile(features)
    if len(file.header.shape) != 1:
        raise ConfigError(f"{features}: holds tokens (--tokens); a search needs one embedding per image")
    console = Console()
    encoder = encoder_of_features(features, file.header)
    root = Path(file.header.images)
    if picture is not None:
        _check_picture(picture, features, root)
    level = None if file.header.kind == "pooled" else int(file.header.kind.removeprefix("level"))
    request = Request(level=level, online=file.header.online)
    query = request.of(encoder, encoder.preprocess(image))[0].cpu().numpy()
    found = [Neighbour(file.files[row], cosine) for row, cosine in nearest(file.blocks(), query, k)]
    rows = [[str(rank), neighbour.file, f"{neighbour.similarity:.4f}"] for rank, neighbour in enumerate(found, 1)]
    console.table(["", "file", "cosine"], rows)
    if picture is not None:
        _draw(picture, image, root, found)
        console.say(f"Picture: {picture}")
    return found


def nearest(blocks: Iterable[NDArray[np.float32]], query: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    """Rows nearest to a vector by cosine similarity, best first; of equal ones the first.

    Args:
        blocks: `[m, D]` each, all rows in order.
        query: `[D]`.
        k: how many, all where there are fewer.
    """
    numbers, cosines = np.empty(0, np.int64), np.empty(0)
    query = query / max(float(np.linalg.norm(query)), 1e-12)
    done = 0
    for block in blocks:
        here = block @ query / np.linalg.norm(block, axis=1).clip(1e-12)
        numbers = np.concatenate((numbers, np.arange(done, done + len(block))))
        cosines = np.concatenate((cosines, here))
        best = np.lexsort((numbers, -cosines))[:k]
        numbers, cosines = numbers[best], cosines[best]
        done += len(block)
    return list(zip(numbers.tolist(), cosines.tolist(), strict=True))


def encoder_of_features(features: Path, header: Header) -> Encoder:
    """The encoder that made the features.

    Raises:
        StorageError: when its checkpoint is gone, or another one lies in its place.
    """
    path = Path(header.checkpoint)
    if not (path / MANIFEST).is_file():
        raise StorageError(
            f"{features}: the checkpoint that made it is gone ({path}); put it back, or embed the images again"
        )
    saved = load_weights(path)
    if saved.sha256 != header.sha256:
        raise StorageError(
            f"{features}: the checkpoint that made it has changed ({path} holds step {saved.step}, other weights); "
            "embed the images again"
        )
    return encoder_of(saved, header.online)


def _check_picture(picture: Path, features: Path, root: Path) -> None:
    """Before anything is computed."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix.lstrip(".").lower() not in known:
        raise ConfigError(f"--picture {picture}: choose a suffix of {', '.join(sorted(known))}")
    if not root.is_absolute():
        raise ConfigError(f"--picture: {features} was not made of a folder of images, so there is nothing to draw")


def _draw(picture: Path, image: Path, root: Path, found: list[Neighbour]) -> None:
    from matplotlib.figure import Figure

    shown = [(image, "query"), *((root / one.file, f"{one.similarity:.3f}") for one in found)]
    columns = min(len(shown), 6)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows), layout="constrained")
    for place, (path, title) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
        try:
            pixels, (height, width) = decode(path, _THUMBNAIL)
        except DataError:  # it was there when it was embedded
            axes.text(0.5, 0.5, "gone", ha="center", va="center", fontsize=8)
            continue
        axes.imshow(pixels.transpose(1, 2, 0), aspect=height / width)
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise StorageError(f"{picture}: cannot be written ({error.strerror})") from None
