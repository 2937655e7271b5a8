"""Pictures of what a run looks at and what its encoder makes of it: few images, the same at each call.

All of it is computed on the CPU, so that the page of a run is the same wherever it is written and never asks a GPU for
memory that training holds. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hjepa.build import create_hjepa_from_config
from hjepa.config import Config
from hjepa.config.walk import differences
from hjepa.data.source import Source
from hjepa.data.sources import open_probe, open_training
from hjepa.data.views import center_views, plain_views
from hjepa.errors import DataError
from hjepa.evaluation.chosen import shares
from hjepa.model.hjepa import HJEPA
from hjepa.report.features import feature_strips, nearest
from hjepa.report.records import Record
from hjepa.report.samples import samples_of
from hjepa.report.tiles import Strip, Tile, pixels_of, tile_of
from hjepa.rng import permute

NUM_IMAGES, NUM_NEIGHBOURS = 8, 5
# Among how many images neighbours are looked for; fewer for a large encoder, whose multiplications have a limit.
BANK, SMALLEST_BANK, BUDGET = 256, 32, 5e11
BATCH = 32


@dataclass
class Pictures:
    """What the page shows.

    Attributes:
        samples: see `samples_of`.
        features: the images, and what the encoder makes of them.
        neighbours: for each query its tile and those of its neighbours, the nearest first.
        encoder: which one is looked at.
        part: of which images.
        bank: among how many images neighbours were looked for.
        labelled: whether a neighbour of the query's class is marked.
        gone: why something is missing, in words; empty where nothing is.
    """

    samples: list[list[list[Tile]]] = field(default_factory=list)
    features: list[Strip] = field(default_factory=list)
    neighbours: list[list[Tile]] = field(default_factory=list)
    encoder: str = ""
    part: str = ""
    bank: int = 0
    labelled: bool = False
    gone: str = ""


class Chosen(NamedTuple):
    """Some images.

    Attributes:
        images: `[n, 3, S, S]` float32 normalised, the centre square of each.
        classes: of each, a class of another source being another one; None without labels.
    """

    images: Tensor
    classes: list[tuple[int, int] | None]


def draw(record: Record) -> Pictures:
    """All pictures of a run that its images and its checkpoint allow; why others are missing is said in words."""
    pictures = Pictures()
    data = record.config.data.model_copy(update={"download": False})  # images that are not here stay away
    config = record.config.model_copy(update={"data": data})
    try:
        training = open_training(config.data, config.experiment.seed)
        pictures.samples = samples_of(config, training)
        pictures.gone = _no_model(record)
        if record.saved is not None and not pictures.gone:
            model = create_hjepa_from_config(config, continued=True)
            model.load_state_dict(record.saved.weights)
            _look(pictures, model.eval(), config, training)
    except DataError as error:
        pictures.gone = f"the images cannot be read: {str(error).splitlines()[0]}"
    return pictures


def _no_model(record: Record) -> str:
    """Why there is no encoder to look at, or an empty text."""
    if record.saved is None:
        return record.missing
    changed = differences(record.saved.config, record.config.model_dump(mode="json"))
    differing = [key for key in changed if key.startswith(("model.", "loss.", "data.image_size"))]
    return f"config.yaml is not what the checkpoint was trained with: {', '.join(differing)}" if differing else ""


@torch.no_grad()
def _look(pictures: Pictures, model: HJEPA, config: Config, training: list[Source]) -> None:
    """What the encoder makes of some images, of the test part if there is one."""
    seed = config.experiment.seed
    pairs = [pair for dataset in config.data.datasets if (pair := open_probe(dataset, config.data, seed)) is not None]
    banks, queries = (training, training) if not pairs else ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    pictures.part = "of the test part, never trained on" if pairs else "of the training images (there is no test part)"
    if model.target_encoder is not None:
        pictures.encoder = "target encoder"
    else:
        pictures.encoder = "encoder" if model.slow_encoder is None else "average of the encoder's weights"
    encoder = model.slow_encoder or model.context_encoder

    asked = _choose(queries, NUM_IMAGES, config)
    encoded = encoder(asked.images, taps=model.taps)
    if not all(part.isfinite().all() for part in (encoded.tokens, *encoded.taps)):
        pictures.gone = "the encoder's features are not finite"
        return
    shown = pixels_of(asked.images, config.data.augmentation)
    tiles = [tile_of(picture, f"image {i + 1}") for i, picture in enumerate(shown)]
    pictures.features = [Strip("Image", pictures.part, tiles), *feature_strips(model, encoded)]

    cost = sum(p.numel() for p in encoder.parameters()) * model.grid.size
    bank = _choose(banks, int(min(BANK, max(SMALLEST_BANK, BUDGET // cost))), config, 0 if pairs else len(tiles))
    pictures.bank = len(bank.images)
    if pictures.bank:
        features = torch.cat([encoder(part).tokens.mean(dim=1) for part in bank.images.split(BATCH)])
        pictures.labelled = all(known is not None for known in (*asked.classes, *bank.classes))
        found = nearest(encoded.tokens.mean(dim=1), features, min(NUM_NEIGHBOURS, pictures.bank))
        pictures.neighbours = _neighbours(asked, bank, tiles, found, config)


def _choose(sources: list[Source], count: int, config: Config, start: int = 0) -> Chosen:
    """Some images, spread over the sources by their sizes; `start` leaves out those of an earlier choice."""
    plain = plain_views(config.data.augmentation, config.data.image_size)
    sizes = [len(source) for source in sources]
    before, until = shares(sizes, start), shares(sizes, start + count)
    images, classes = [torch.empty(0, 3, config.data.image_size, config.data.image_size)], []
    for number, (source, first, last) in enumerate(zip(sources, before, until, strict=True)):
        places = np.arange(first, max(first, last), dtype=np.int64)
        for index in permute(config.experiment.seed, f"report {number}", np.zeros_like(places), places, len(source)):
            # One at a time: files are decoded to one stored size, but a page needs few of them.
            read = source.read(np.asarray([index], np.int64))
            images.append(plain(torch.from_numpy(read.images), center_views(read.true_sizes)))
            known = source.labels
            classes.append(None if known is None else (number, int(known[read.indices[0]])))
    return Chosen(torch.cat(images), classes)


def _neighbours(
    asked: Chosen, bank: Chosen, tiles: list[Tile], found: tuple[Tensor, Tensor], config: Config
) -> list[list[Tile]]:
    """A row for each query."""
    rows = []
    for i, (values, indices) in enumerate(zip(*found, strict=True)):
        row = [Tile(tiles[i].src, f"query {i + 1}", "query", tiles[i].sharp)]
        for rank, (value, j) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            (picture,) = pixels_of(bank.images[j : j + 1], config.data.augmentation)
            same = asked.classes[i] is not None and asked.classes[i] == bank.classes[j]
            said = f"neighbour {rank + 1} of image {i + 1}, cosine {value:.2f}{', same class' if same else ''}"
            row.append(tile_of(picture, said, f"{value:.2f}", same))
        rows.append(row)
    return rows
