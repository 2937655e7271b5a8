"""Which labelled images an evaluation looks at: the run's own, or those that were named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hjepa.config.data import Data, Dataset
from hjepa.data.files import has_test
from hjepa.data.sources import open_probe
from hjepa.errors import DataError
from hjepa.evaluation.chosen import Probe, usable

# Sources that are named without a path.
_NAMED = ("shapes", "cifar10", "cifar100", "stl10")


def datasets_of(words: Sequence[str], own: Sequence[Dataset]) -> list[Dataset]:
    """What `--data` names: a source by its name, or a folder of class folders; without it the run's own sources."""
    if not words:
        return list(own)
    return [Dataset.model_validate({"name": w} if w in _NAMED else {"name": "imagefolder", "path": w}) for w in words]


def open_labelled(datasets: Sequence[Dataset], data: Data, seed: int) -> tuple[list[Probe], list[str]]:
    """The sources with labels, each as a part to learn from and a part to ask, and what has to be said of them.

    Where class folders have a train/ and nothing beside it, a tenth of each class of train/ is held out.

    Raises:
        DataError: where nothing is left, or all of it is one class.
    """
    pairs: list[Probe | None] = []
    notes = []
    for dataset in datasets:
        root = Path(dataset.path or data.data_path).expanduser()
        if dataset.name in ("imagefolder", "imagenet") and not has_test(root) and (root / "train").is_dir():
            notes.append(f"{root}: has no val/ or test/; a tenth of each class of train/ is held out to ask")
            dataset = dataset.model_copy(update={"path": str(root / "train")})
        pairs.append(open_probe(dataset, data, seed))
    labelled = usable(pairs)
    names = ", ".join(dataset.path or dataset.name for dataset in datasets)
    if not labelled:
        raise DataError(
            f"nothing to evaluate: {names}: no labels, or no image to ask; name a folder with one subfolder per class "
            "and at least two images in one of them, --data FOLDER"
        )
    if sum(bank.num_classes for bank, _ in labelled) < 2:
        raise DataError(f"nothing to evaluate: {names}: all images are of one class; two or more are needed")
    return labelled, notes
