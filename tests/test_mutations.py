"""Five hundred ways to damage a checkpoint: each is refused with a word, or what is loaded is what was saved."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hjepa import checkpoint
from hjepa.checkpoint import MANIFEST, TRAINER, WEIGHTS, Saved
from hjepa.config import load_config
from hjepa.errors import StorageError
from hjepa.train import train

FILES = (WEIGHTS, TRAINER, MANIFEST)
Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a real run, of its first and its second step."""
    from test_golden import TINY

    folder = tmp_path_factory.mktemp("original")
    settings = ("training.max_steps=2", "checkpoint.save_frequency_steps=1", "evaluation.eval_frequency=0")
    train(load_config(None, (*TINY, *settings, f"experiment.output_dir={folder}")))
    return folder / "checkpoints"


def newest(folder: Path) -> Path:
    return folder / "step-00000002"


def edit(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_a_bit(folder: Path, draw: random.Random) -> None:
    def flip(data: bytearray) -> bytearray:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return data

    edit(newest(folder) / draw.choice(FILES), flip)


def overwrite(folder: Path, draw: random.Random) -> None:
    def blot(data: bytearray) -> bytearray:
        start, length = draw.randrange(len(data)), draw.choice([1, 16, 512])
        fill = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
        return data[:start] + fill[: len(data) - start] + data[start + length :]

    edit(newest(folder) / draw.choice(FILES), blot)


def cut(folder: Path, draw: random.Random) -> None:
    edit(newest(folder) / draw.choice(FILES), lambda data: data[: draw.randrange(len(data))])


def insert(folder: Path, draw: random.Random) -> None:
    at = draw.random()
    edit(
        newest(folder) / draw.choice(FILES), lambda d: d[: int(at * len(d))] + draw.randbytes(8) + d[int(at * len(d)) :]
    )


def append(folder: Path, draw: random.Random) -> None:
    edit(newest(folder) / draw.choice(FILES), lambda data: data + draw.randbytes(draw.choice([1, 64])))


def swap(folder: Path, draw: random.Random) -> None:
    a, b = draw.sample([step / name for step in folder.iterdir() for name in FILES], 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def remove(folder: Path, draw: random.Random) -> None:
    file = newest(folder) / draw.choice(FILES)
    file.unlink()
    if draw.random() < 0.3:
        file.mkdir()


def rename(folder: Path, draw: random.Random) -> None:
    a, b = draw.sample(FILES, 2)
    (newest(folder) / a).rename(newest(folder) / draw.choice([b, f"{a}.tmp"]))


def rename_the_folder(folder: Path, draw: random.Random) -> None:
    old = draw.choice(sorted(folder.iterdir()))
    old.rename(folder / f"step-{draw.choice([0, 3, 7, 99_999_999]):08d}")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and entry of a document, at any depth."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def edit_the_manifest(folder: Path, draw: random.Random) -> None:
    path = newest(folder) / MANIFEST
    manifest = json.loads(path.read_text())
    *above, last = draw.choice(list(places(manifest)))
    here = manifest
    for key in above:
        here = here[key]
    kind = draw.randrange(3)
    if kind == 0:
        del here[last]
    elif kind == 1:
        others = [None, True, -1, 3, 1e400, "", "../../x", "/etc/passwd", [], {}, [[1]], "x" * 1000]
        here[last] = draw.choice([value for value in others if value != here[last]])
    elif isinstance(here, dict):
        here[f"{last}x"] = here.pop(last)
    else:
        here.append(here[last])
    path.write_text(json.dumps(manifest))


def add_an_entry(folder: Path, draw: random.Random) -> None:
    path = newest(folder) / MANIFEST
    manifest = json.loads(path.read_text())
    where = draw.choice([manifest, manifest["files"], manifest["config"], manifest["config"]["training"]])
    where[draw.choice(["../../x", "extra", "training.lr", ""])] = draw.choice([0, None, {"bytes": 0, "sha256": ""}])
    path.write_text(json.dumps(manifest))


MUTATIONS: tuple[Mutation, ...] = (
    flip_a_bit, overwrite, cut, insert, append, swap, remove, rename, rename_the_folder, edit_the_manifest,
    edit_the_manifest, add_an_entry,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_is_what_was_saved(original: Path, tmp_path: Path, count: int) -> None:
    before = {path.name: checkpoint.load(path) for path in checkpoint.find(original)}
    assert sorted(before) == ["step-00000001", "step-00000002"]
    draw, folder = random.Random(0), tmp_path / "checkpoints"
    refused = passed_over = 0
    for number in range(count):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        mutation(folder, draw)
        for path in folder.iterdir():
            try:
                saved: Saved | None = checkpoint.load(path)
            except StorageError as error:
                saved, said = None, str(error)
                refused += 1
            if saved is None:
                assert str(path) in said
            else:
                assert path.name in before, mutation.__name__
                assert same(vars(saved), vars(before[path.name])), (number, mutation.__name__)
        said = ""
        # What --resume does: never a restart, whatever is left.
        try:
            saved, warnings = checkpoint.load_newest(folder)
        except StorageError as error:
            saved, warnings, said = None, [], str(error)
        if saved is None:
            assert "no intact checkpoint" in said, mutation.__name__
        else:
            assert same(vars(saved), vars(before[f"step-{saved.step:08d}"])), (number, mutation.__name__)
            # Silence means the newest, unless it is there under an older number.
            assert warnings or saved.step == 2 or mutation is rename_the_folder, mutation.__name__
            passed_over += bool(warnings)
    # Nearly all of it is damage that must be found; the rest says nothing, such as a space in the manifest.
    assert refused > 0.9 * count
    assert passed_over > 0.8 * count
