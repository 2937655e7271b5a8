import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import config, everything, refused
from PIL import Image

from hjepa.config.data import Data, Dataset
from hjepa.data import files
from hjepa.data.archives import ArraySource
from hjepa.data.files import ClassFolderSource, FolderSource
from hjepa.data.sources import CachedSource, cache, decode_side, open_probe, open_source, open_training


def write(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(root / name / f"{i:03d}.png", 10 * label + i)


def names(source: Any) -> list[str]:
    return [Path(path).name for path in source.paths]


# Folders


def test_folder_is_walked_in_order_and_skips_what_is_no_image(tmp_path: Path) -> None:
    root, outside = tmp_path / "photos", tmp_path / "outside"
    write(outside / "secret.png")
    for name in ("b/2.JPG", "b/1.png", "a/deep/er/3.webp", "c.bmp", ".hidden.png", ".cache/4.png"):
        write(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "same.png").symlink_to(root / "c.bmp")

    source = FolderSource(root, 8)
    assert names(source) == ["3.webp", "1.png", "2.JPG", "c.bmp", "same.png"]
    assert source.labels is None
    assert source.num_classes == 0
    assert (len(source), source.size, source.name) == (5, (8, 8), "folder")


def test_folder_decodes_what_is_asked_for(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i:02d}.png", i, size=(10 + i, 30))
    source = FolderSource(tmp_path, 8)
    indices = np.array([7, 0, 19, 7])
    expected = [[30, 17], [30, 10], [30, 29], [30, 17]]
    assert source.true_sizes(indices).tolist() == expected  # from the headers
    pixels = source.images(indices)
    assert pixels.shape == (4, 3, 8, 8)
    assert (pixels == indices.reshape(4, 1, 1, 1)).all()
    for path in source.paths:
        Path(path).unlink()
    assert source.true_sizes(indices).tolist() == expected  # remembered
    assert source.true_sizes(indices).dtype == np.float32
    assert source.images(np.arange(0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for i in range(20):
        write(tmp_path / f"{i:02d}.png", i)
    assert everything(FolderSource(tmp_path, 8))[:, 0, 0, 0].tolist() == list(range(20))
    (tmp_path / "05.png").write_bytes(b"damaged")
    refused(lambda: everything(FolderSource(tmp_path, 8)), "05.png")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refused(lambda: FolderSource(tmp_path / "empty", 8), "no images", str(tmp_path / "empty"), ".jpeg, .jpg")
    refused(lambda: FolderSource(tmp_path / "gone", 8), "is missing", str(tmp_path / "gone"))
    refused(lambda: FolderSource(tmp_path / "file", 8), "not a folder")


# Class folders


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_class_folders_with_parts(tmp_path: Path, name: str) -> None:
    class_folders(tmp_path / "train", {"n01": 3, "n02": 2, "n03": 1})
    class_folders(tmp_path / "val", {"n01": 1, "n03": 2})
    dataset, data = config(name, tmp_path)
    bank, test = open_probe(dataset, data, seed=0)
    assert (bank.name, bank.num_classes, bank.size) == (name, 3, (32, 32))
    assert bank.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert bank.labels.dtype == np.int64
    assert everything(bank)[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 20]
    # Labels are those of train, though val lacks a class.
    assert test.labels.tolist() == [0, 2, 2]
    assert test.num_classes == 3
    assert bank.classes == test.classes == ["n01", "n02", "n03"]


def test_val_and_test_stand_in_for_each_other(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3})
    assert open_probe(*config("imagefolder", tmp_path), seed=0) is None
    refused(lambda: ClassFolderSource(tmp_path, 8, "test"), "no test part")
    class_folders(tmp_path / "test", {"a": 1})
    assert len(ClassFolderSource(tmp_path, 8, "val")) == 1
    class_folders(tmp_path / "val", {"a": 2})
    assert len(ClassFolderSource(tmp_path, 8, "val")) == 2
    assert len(ClassFolderSource(tmp_path, 8, "test")) == 1
    assert len(open_probe(*config("imagefolder", tmp_path), seed=0)[1]) == 2


def test_a_tenth_is_held_out_where_there_are_no_parts(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 20, "b": 31, "c": 2, "d": 1})
    bank, test = open_probe(*config("imagefolder", tmp_path), seed=0)
    assert np.bincount(bank.labels).tolist() == [18, 28, 1, 1]
    assert np.bincount(test.labels).tolist() == [2, 3, 1]
    assert test.num_classes == 4
    assert not set(bank.paths) & set(test.paths)
    assert len(set(bank.paths) | set(test.paths)) == 54
    # Neither the seed of the run nor another class changes the choice.
    held_out = [path for path in test.paths if "/b/" in path]
    class_folders(tmp_path, {"_first": 3})
    assert held_out == [path for path in ClassFolderSource(tmp_path, 8, "test").paths if "/b/" in path]


def test_one_image_per_class_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1, "b": 1})
    assert open_probe(*config("imagefolder", tmp_path), seed=0) is None


def test_class_folders_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "loose/1.png")
    refused(lambda: ClassFolderSource(tmp_path / "loose", 8), "no class folders", "name: folder")
    (tmp_path / "bare/a").mkdir(parents=True)
    refused(lambda: ClassFolderSource(tmp_path / "bare", 8), "no images", "split train")
    class_folders(tmp_path / "odd/val", {"a": 1})
    refused(lambda: ClassFolderSource(tmp_path / "odd", 8), "val/ but no train/")
    class_folders(tmp_path / "odd/train", {"b": 1})
    refused(lambda: ClassFolderSource(tmp_path / "odd", 8, "val"), "class a")


# From the config


def test_shapes_parts() -> None:
    dataset = Dataset(name="shapes", length=64)
    data = Data(datasets=(dataset, Dataset(name="shapes")))
    assert [len(source) for source in open_training(data, seed=1)] == [64, 20000]
    bank, test = open_probe(dataset, data, seed=1)
    assert (len(bank), len(test)) == (64, 1000)
    assert len(open_source(data.datasets[1], data, 1, "test")) == 2000
    index = np.arange(4)
    assert (bank.images(index) != test.images(index)).any()
    assert (bank.images(index) != open_source(dataset, data, 2).images(index)).any()


def test_folder_has_no_probe(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png")
    dataset, data = config("folder", tmp_path)
    assert open_probe(dataset, data, seed=0) is None
    assert len(open_training(data, seed=0)) == 1


@pytest.mark.parametrize(("image_size", "side"), [(224, 256), (96, 112), (64, 80), (32, 40), (28, 32)])
def test_decode_side(image_size: int, side: int) -> None:
    assert decode_side(Data(image_size=image_size)) == side
    assert decode_side(Data(image_size=image_size, decode_size=50)) == 50


# In memory


def test_cached_source_is_the_source(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 200, "b": 100})
    write(tmp_path / "train/a/000.png", 0, size=(30, 12))
    source = ClassFolderSource(tmp_path, 8)
    calls: list[tuple[int, int]] = []
    cached = CachedSource(source, lambda done, total: calls.append((done, total)))
    assert calls == [(256, 300), (300, 300)]
    indices = np.array([299, 0, 5, 5])
    assert (cached.images(indices) == source.images(indices)).all()
    assert (cached.true_sizes(indices) == source.true_sizes(indices)).all()
    assert cached.true_sizes(np.array([0])).tolist() == [[12, 30]]
    assert (cached.labels == source.labels).all()
    assert (cached.name, cached.size, cached.num_classes, len(cached)) == ("imagefolder", (8, 8), 2, 300)
    for path in source.paths:
        Path(path).unlink()
    assert (cached.images(indices)[:, 0, 0, 0] == [99 + 10, 0, 5, 5]).all()


def test_cached_source_travels_to_a_worker_without_its_pixels() -> None:
    source = ArraySource("x", np.zeros((100, 3, 64, 64), np.uint8))
    assert len(ForkingPickler.dumps(CachedSource(source))) < 10_000


def test_cache_takes_the_smallest_first(tmp_path: Path) -> None:
    for name, count in {"a": 30, "b": 10, "c": 5}.items():
        for i in range(count):
            write(tmp_path / name / f"{i}.png", i)
    large, small, smallest = (FolderSource(tmp_path / name, 8) for name in "abc")
    in_memory = ArraySource("x", np.zeros((1, 3, 8, 8), np.uint8))
    calls: list[tuple[int, int]] = []
    out = cache(
        [large, in_memory, small, smallest],
        16 * 192 / 1e9,
        lambda done, total: calls.append((done, total)),
    )
    assert out[0] is large
    assert out[1] is in_memory
    assert isinstance(out[2], CachedSource)
    assert isinstance(out[3], CachedSource)
    assert [len(source) for source in out] == [30, 1, 10, 5]
    assert calls == [(5, 15), (15, 15)]
    assert cache([small], 0.0) == [small]


@pytest.mark.parametrize(("processes", "threads"), [("1", 3), ("2", 4), ("16", 1)])
def test_a_process_of_several_decodes_on_its_share_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str, threads: int
) -> None:
    # torchrun leaves each process one thread of torch's own.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 if processes == "1" else 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    paths = []
    for i in range(12):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.effect_noise((20, 20), 60).convert("RGB").save(paths[-1])
    used: list[int] = []

    class Counted(ThreadPoolExecutor):
        def __init__(self, max_workers: int) -> None:
            used.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(files, "ThreadPoolExecutor", Counted)
    images = files.FileSource("photos", paths, 16).images(np.arange(12))
    assert used == ([threads] if threads > 1 else [])
    assert images.shape == (12, 3, 16, 16)
