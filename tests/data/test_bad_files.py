"""Files that cannot be read: named, counted, replaced by others that do not depend on what was read before."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import config, refused
from PIL import Image

from hjepa.config.data import Augmentation
from hjepa.data.decode import decode
from hjepa.data.files import ClassFolderSource, FolderSource
from hjepa.data.sources import CachedSource, open_probe
from hjepa.data.views import plain_views
from hjepa.evaluation.features import collect, pixel_features

COUNT = 40


def photos(root: Path, count: int = COUNT) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20 + i, 30), (6 * i, 6 * i, 6 * i)).save(root / f"{i:02d}.png")
    return root


def truncate(path: Path) -> None:
    Image.effect_noise((64, 64), 60).save(path)
    path.write_bytes(path.read_bytes()[:2000])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "another format": lambda path: path.write_bytes(b"%PDF-1.7\n" + bytes(1000)),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_bad_file_is_named_and_another_takes_its_place(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    source = FolderSource(photos(tmp_path / "photos"), 8, max_bad=0.1)
    whole = source.images(np.arange(COUNT))
    path = tmp_path / "photos" / "07.png"
    damage(path)
    read = source.read(np.arange(COUNT))
    assert list(read.bad) == list(source.bad_files.found) == [str(path)]
    (reason,) = read.bad.values()
    assert reason
    assert str(path) not in reason
    assert np.flatnonzero(read.indices != np.arange(COUNT)).tolist() == [7]
    assert (read.images == whole[read.indices]).all()
    assert (read.true_sizes == np.stack([np.full(COUNT, 30), 20 + read.indices], 1)).all()
    refused(lambda: source.images(np.array([7])), "07.png", reason)


def test_a_wrong_extension_is_no_fault(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    source = FolderSource(tmp_path, 4)
    assert source.read(np.arange(1)).images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert source.bad_files.found == {}


def test_the_substitute_depends_on_nothing_that_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos")
    for i in range(0, COUNT, 2):  # half of all, so that many substitutes are bad as well
        (root / f"{i:02d}.png").write_bytes(b"")

    def fresh() -> FolderSource:
        return FolderSource(root, 8, max_bad=0.5)

    together = fresh().read(np.arange(COUNT)).indices
    one_by_one = [fresh().read(np.array([i])).indices[0] for i in range(COUNT)]
    assert together.tolist() == one_by_one
    source = fresh()
    order = np.random.default_rng(0).permutation(COUNT)
    assert source.read(order).indices.tolist() == together[order].tolist()
    assert source.read(order[::-1]).indices.tolist() == together[order[::-1]].tolist()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert fresh().read(np.arange(COUNT)).indices.tolist() == together.tolist()
    cached = CachedSource(fresh())
    assert cached.read(order).indices.tolist() == together[order].tolist()
    # Not one image in the place of all of them.
    assert len(set(together[::2].tolist())) > 8
    assert (together % 2 == 1).all()


def test_more_than_may_be_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 100)
    for i in (3, 50):
        (root / f"{i:02d}.png").write_bytes(b"")
    FolderSource(root, 8, max_bad=0.02).read(np.arange(100))
    source = FolderSource(root, 8, max_bad=0.01)
    said = ("2 of 100 files cannot be read", "data.max_bad_fraction=0.01", "03.png (empty, or not one of", "mend or")
    refused(lambda: source.read(np.arange(100)), *said)
    assert len(source.bad_files.found) == 2
    # One after the other, as loader processes meet them.
    source = FolderSource(root, 8, max_bad=0.01)
    assert source.read(np.arange(10)).indices[3] != 3
    assert source.read(np.arange(10)).indices[3] != 3  # met again, counted once
    refused(lambda: source.read(np.array([50])), "2 of 100")
    refused(lambda: CachedSource(FolderSource(root, 8, max_bad=0.01)), "2 of 100")


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 5)
    for path in root.iterdir():
        path.write_bytes(b"")
    refused(lambda: FolderSource(root, 8, max_bad=1.0).read(np.array([2])), "none of 5 files can be read")


def test_what_is_no_fault_of_the_file_is_not_held_against_it(tmp_path: Path) -> None:
    import resource

    source = FolderSource(photos(tmp_path / "photos", 3), 8, max_bad=1.0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        refused(lambda: source.read(np.arange(1)), "00.png", "ulimit -n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert source.bad_files.found == {}


def test_a_probe_sees_the_substitute_with_its_own_label(tmp_path: Path) -> None:
    """Brightness is the label: an image under another's label would be seen at once."""
    for label in range(4):
        for i in range(10):
            path = tmp_path / f"class{label}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (50 + 40 * label,) * 3).save(path)
    for label in range(4):
        (tmp_path / f"class{label}" / "0.png").write_bytes(b"")
    for source in open_probe(*config("imagefolder", tmp_path, max_bad_fraction=0.5), seed=0) or ():
        assert source.labels is not None
        views = plain_views(Augmentation(mean=(0, 0, 0), std=(1, 1, 1)), 8)
        indices = np.arange(len(source))
        embed = lambda images: {"last": pixel_features(images)}  # noqa: E731
        features, labels = collect(embed, source, indices, views, 7, torch.device("cpu"))
        assert torch.equal((features["last"][:, 0] * 255).round().long(), 50 + 40 * labels)
        assert len(labels) == len(source)
    bank = ClassFolderSource(tmp_path, 8, max_bad=0.5)
    assert (bank.labels[bank.read(np.arange(len(bank))).indices] != bank.labels).any()  # type: ignore[index]


# Links


def test_links_that_lead_out_are_left_out_and_counted(tmp_path: Path) -> None:
    root, outside = photos(tmp_path / "photos", 3), photos(tmp_path / "outside", 3)
    (root / "file.png").symlink_to(outside / "00.png")
    (root / "folder").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "inside.png").symlink_to("00.png")
    (root / "loop").symlink_to(".")
    (root / "circle.png").symlink_to("circle.png")
    (root / "nothing.png").symlink_to("gone.png")
    source = FolderSource(root, 8)
    assert [Path(path).name for path in source.paths] == ["00.png", "01.png", "02.png", "inside.png"]
    assert [Path(path).name for path in source.left_out] == ["file.png", "folder", "up"]
    # The folder itself may be a link.
    (tmp_path / "link").symlink_to(root)
    assert len(FolderSource(tmp_path / "link", 8)) == 4


def test_class_folders_that_lead_out_are_left_out_and_parts_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photos(tmp_path / "data" / "train" / name, 3)
        photos(tmp_path / "data" / "val" / name, 1)
    outside = photos(tmp_path / "outside" / "c", 3).parent
    (tmp_path / "data" / "train" / "c").symlink_to(outside / "c")
    (tmp_path / "data" / "train" / "a" / "x.png").symlink_to(outside / "c" / "00.png")
    (tmp_path / "data" / "train" / "loop").symlink_to("..")
    source = ClassFolderSource(tmp_path / "data", 8)
    assert [Path(path).name for path in source.left_out] == ["c", "x.png"]
    assert len(ClassFolderSource(tmp_path / "data", 8, "val")) == 2
    (tmp_path / "data" / "test").symlink_to(outside)
    refused(lambda: ClassFolderSource(tmp_path / "data", 8), "data/test is a link that leads out of", "name the folder")


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path) -> None:
    """400 megapixels in 50 kB; decoding them takes a second and 400 MB."""
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 60_000
    started = time.process_time()
    refused(lambda: decode(path, 8), "huge.png", "400000000 pixels")
    assert time.process_time() - started < 0.1
