"""Tiny data sets in the official layouts, and what tests ask of sources."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from hjepa.config.data import Data, Dataset
from hjepa.data.source import Source
from hjepa.errors import DataError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A tiny data set in the official layout, its checksums made the official ones; images by part."""
    official = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / official.base_folder
    folder.mkdir(parents=True)
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    images: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        rows, listed = [], []
        for i, (file, _) in enumerate(getattr(official, f"{part}_list")):
            data = np.random.default_rng(i).integers(0, 256, (4, 3072), dtype=np.uint8)
            (folder / file).write_bytes(pickle.dumps({"data": data, key: [0, 1, 2, classes - 1]}))
            rows.append(data)
            listed.append([file, md5(folder / file)])
        monkeypatch.setattr(official, f"{part}_list", listed)
        images[part] = np.concatenate(rows).reshape(-1, 3, 32, 32)
    meta = folder / official.meta["filename"]
    meta.write_bytes(pickle.dumps({official.meta["key"]: [str(i) for i in range(classes)]}))
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": md5(meta)})
    return images


def write_stl10(root: Path) -> dict[str, np.ndarray]:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = {}
    for i, (part, count) in enumerate({"train": 3, "test": 2, "unlabeled": 4}.items()):
        images[part] = np.random.default_rng(i).integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        images[part].transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            np.array([10, 1, 2][:count], np.uint8).tofile(folder / f"{part}_y.bin")
    return images


def everything(source: Source) -> np.ndarray:
    return source.images(np.arange(len(source)))


def refused(action: Callable[[], object], *fragments: str) -> str:
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def config(name: str, root: Path, **settings: Any) -> tuple[Dataset, Data]:
    dataset = Dataset(name=name, path=None if name == "shapes" else str(root))
    return dataset, Data(datasets=(dataset,), **{"download": False, "image_size": 28, **settings})
