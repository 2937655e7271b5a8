"""CIFAR-10, CIFAR-100 and STL-10 in their official layouts, held in memory."""

from __future__ import annotations

import http.client
import shutil
import socket
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from hjepa.data.source import Int64, Source, UInt8
from hjepa.errors import DataError

# What torchvision knows of each: names of folder and archive, address, checksums.
_OFFICIAL: dict[str, Any] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
}
_STL10_SIDE = 96
_TIMEOUT = 30.0  # seconds without an answer before a download is given up
_STALE = 24 * 3600.0  # seconds after which a half-finished download belongs to no living process


class ArraySource(Source):
    """Images that lie in memory."""

    def __init__(self, name: str, array: UInt8, labels: Int64 | None = None, num_classes: int = 0) -> None:
        """Keep `array`, `[N, 3, height, width]` uint8 RGB, as it lies."""
        assert array.dtype == np.uint8
        assert array.ndim == 4
        assert array.shape[1] == 3
        self.name = name
        # As a tensor: where loader processes are not forked, torch hands it over in shared memory, numpy byte by byte.
        self._images = torch.from_numpy(array)
        self.size = (array.shape[2], array.shape[3])
        self.labels = labels
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, height, width]` uint8 RGB."""
        return np.ascontiguousarray(self._images.numpy()[indices])


def cifar(name: str, root: str | Path, split: str, download: bool) -> ArraySource:
    """CIFAR-10 or CIFAR-100 (fine labels).

    Args:
        name: cifar10 or cifar100.
        root: folder that holds cifar-10-batches-py or cifar-100-python, or that folder itself.
        split: train, or test (val is the same).
        download: fetch the archive if it is missing.

    Raises:
        DataError: it is missing and cannot be had, or it is damaged.
    """
    official = _OFFICIAL[name]
    folder = _provide(name, root, download)
    try:
        # A pickle is code. torchvision compares the MD5 of every file before it opens one.
        dataset = official(folder.parent, train=split == "train")
    except RuntimeError as error:
        raise _damaged(name, folder, "files are missing or differ from the official ones") from error
    array = dataset.data.transpose(0, 3, 1, 2)
    return ArraySource(name, array, np.asarray(dataset.targets, np.int64), len(dataset.classes))


def stl10(root: str | Path, split: str, download: bool) -> ArraySource:
    """STL-10; unlabelled images have the label -1.

    The files are read here and not by torchvision, which holds 105,000 images twice while it joins them.

    Args:
        root: folder that holds stl10_binary, or that folder itself.
        split: train, test (val is the same), unlabeled or train+unlabeled.
        download: fetch the archive if it is missing.

    Raises:
        DataError: it is missing and cannot be had, or it is damaged.
    """
    folder = _provide("stl10", root, download)
    parts = [_stl10_part(folder, "test" if part == "val" else part) for part in split.split("+")]
    array = np.empty((sum(len(labels) for _, labels in parts), 3, _STL10_SIDE, _STL10_SIDE), np.uint8)
    start = 0
    for path, labels in parts:
        with open(path, "rb") as file:
            file.readinto(array[start : start + len(labels)].data.cast("B"))
        start += len(labels)
    # Stored column by column.
    return ArraySource("stl10", array.transpose(0, 1, 3, 2), np.concatenate([x for _, x in parts]), 10)


def _stl10_part(folder: Path, part: str) -> tuple[Path, Int64]:
    """File of the images, and the label of each."""
    images, targets = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
    if not images.is_file():
        raise _damaged("stl10", folder, f"{images.name} is missing")
    count, rest = divmod(images.stat().st_size, 3 * _STL10_SIDE**2)
    if rest or not count:
        raise _damaged("stl10", folder, f"{images.name} does not hold whole images of 96 x 96")
    if part == "unlabeled":
        return images, np.full(count, -1, np.int64)
    if not targets.is_file() or targets.stat().st_size != count:
        raise _damaged("stl10", folder, f"{targets.name} does not hold one label for each of {count} images")
    return images, np.fromfile(targets, np.uint8).astype(np.int64) - 1


def _provide(name: str, root: str | Path, download: bool) -> Path:
    """The unpacked folder of a data set: as it lies there, unpacked from its archive, or downloaded."""
    official = _OFFICIAL[name]
    root = Path(root).expanduser().absolute()
    if root.name == official.base_folder:
        root = root.parent
    folder: Path = root / official.base_folder
    _sweep(folder)
    if folder.is_dir():
        return folder
    archive = root / official.filename
    if archive.exists() and not check_integrity(archive, official.tgz_md5):
        raise DataError(
            f"{name}: {archive} is not the official archive (its MD5 is not {official.tgz_md5}); "
            "delete it or fetch it again"
        )
    if not archive.exists() and not download:
        raise _missing(name, root, "data.download is false (true fetches it)")
    try:
        _unpack(official, archive, folder)
    # URLError and a full disk are OSErrors; a wrong checksum is a RuntimeError.
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if type(error) is RuntimeError:  # torchvision's for a checksum
            reason = f"what arrived is cut off or changed, its MD5 is not {official.tgz_md5}"
        if archive.exists():
            raise DataError(f"{name}: cannot unpack {archive}: {reason}") from error
        raise _missing(name, root, f"the download failed ({reason})") from error
    return folder


def _unpack(official: Any, archive: Path, folder: Path) -> None:
    """Put `folder` in place whole or not at all, from `archive` or, where there is none, from the network."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        with tempfile.TemporaryDirectory(prefix=_staging_prefix(folder), dir=folder.parent) as staging:
            if not archive.exists():
                download_url(official.url, staging, official.filename, official.tgz_md5)
                archive = Path(staging, official.filename)
            extract_archive(str(archive), staging)
            try:
                Path(staging, folder.name).rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                    raise
    finally:
        socket.setdefaulttimeout(timeout)


def _staging_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-"


def _sweep(folder: Path) -> None:
    """Remove what a killed download left behind."""
    for staging in folder.parent.glob(f"{_staging_prefix(folder)}*"):
        if time.time() - staging.stat().st_mtime > _STALE:
            shutil.rmtree(staging, ignore_errors=True)


def _missing(name: str, root: Path, why: str) -> DataError:
    official = _OFFICIAL[name]
    return DataError(
        f"{name}: neither {official.base_folder}/ nor {official.filename} is in {root}, and {why}; "
        f"put the official archive ({official.url}) or its unpacked folder there, or name the folder that "
        "has it with data.datasets[i].path or data.data_path"
    )


def _damaged(name: str, folder: Path, what: str) -> DataError:
    return DataError(f"{name}: {folder} is damaged: {what}; delete the folder and fetch it again")
