"""Loader processes: whatever starts them, and what is said when one dies, hangs or cannot read."""

import os
import re
import signal
import socket
import sys
import threading
import time
from functools import partial
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from layouts import refused
from PIL import Image

from hjepa.build import grid_of
from hjepa.config import load_config
from hjepa.data import workers
from hjepa.data.loader import Batch, Batches
from hjepa.data.sources import cache, open_training
from hjepa.data.workers import Loader, watched
from hjepa.masks import BlockMasks


def photos(root: Path, count: int = 40) -> Path:
    root.mkdir()
    for i in range(count):
        Image.effect_noise((40 + i, 50), 60).convert("RGB").save(root / f"{i:02d}.jpg")
    return root


def plan(root: Path, *overrides: str) -> Batches:
    settings = (f"data={root}", "data.image_size=32", "model.patch_size=4", "data.batch_size=8")
    config = load_config(None, (*settings, *overrides))
    masks = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    return Batches(config.data, cache(open_training(config.data, 0), config.data.cache_gb), masks, 0)


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.bad == b.bad
        assert torch.equal(a.positions, b.positions)
        flat = [[*x.images, *x.masks, *(p for view in x.views for p in view)] for x in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize(("method", "memory"), [("fork", 0), ("fork", 1), ("spawn", 1), ("forkserver", 0)])
def test_every_way_to_start_a_process_gives_the_same_batches(tmp_path: Path, method: str, memory: int) -> None:
    root = photos(tmp_path / "photos")
    (root / "07.jpg").write_bytes(b"")
    settings = ("data.max_bad_fraction=0.1", f"data.cache_gb={memory}")
    batches = plan(root, *settings, "data.num_workers=2")
    loader = Loader(batches, 0, 5, False)
    loader.multiprocessing_context = method
    ours = list(loader)
    assert_equal(ours, list(Loader(plan(root, *settings), 0, 5, False)))
    # Found in another process (or while decoding), known in this one.
    assert [Path(bad.path).name for bad in batches.found()] == ["07.jpg"]
    assert sum(len(batch.bad) for batch in ours) == (0 if memory else 1)


def test_too_many_bad_files_are_told_as_by_one_process(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    for i in range(6):
        (root / f"{i:02d}.jpg").write_bytes(b"")
    for count in (0, 2):
        batches = plan(root, "data.cache_gb=0", "data.max_bad_fraction=0.1", f"data.num_workers={count}")
        message = refused(partial(list, Loader(batches, 0, 5, False)), "of 40 files cannot be read")
        assert "Traceback" not in message
        assert len(batches.found()) >= 5


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is shared by its name")
def test_a_loader_is_silent_when_the_main_process_hangs_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it does where it ends at the very moment at which it fetches a batch."""
    met, connected = [], resource_sharer._resource_sharer.get_connection

    def hang_up_first(ident: tuple[str, int]) -> Connection:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(ident[0])
        met.append(ident)
        return connected(ident)

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", hang_up_first)
    root = photos(tmp_path / "photos")
    loader = Loader(plan(root, "data.cache_gb=0", "data.num_workers=1"), 0, 5, False)
    loader.multiprocessing_context = "fork"
    assert len(list(loader)) == 5
    assert met
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_killed_process_is_one_clear_error(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_GLANCE", 0.5)
    loader = Loader(plan(photos(tmp_path / "photos"), "data.num_workers=2", "data.cache_gb=0"), 0, 1000, False)
    loader.multiprocessing_context = method
    before = set(torch.multiprocessing.active_children())
    batches = iter(loader)

    def kill_and_go_on() -> None:
        with watched():
            next(batches)
            (victim, *_) = set(torch.multiprocessing.active_children()) - before
            os.kill(victim.pid, signal.SIGKILL)  # type: ignore[arg-type]
            for _ in range(900):
                next(batches)

    started = time.monotonic()
    refused(kill_and_go_on, "a loader process died", "--resume", "data.num_workers")
    assert time.monotonic() - started < 20


def test_a_process_that_dies_while_something_else_is_done(tmp_path: Path) -> None:
    loader = Loader(plan(photos(tmp_path / "photos"), "data.num_workers=1", "data.cache_gb=0"), 0, 1000, False)
    before = set(torch.multiprocessing.active_children())
    batches = iter(loader)

    def kill_and_wait() -> None:
        with watched():
            next(batches)
            (victim,) = set(torch.multiprocessing.active_children()) - before
            os.kill(victim.pid, signal.SIGKILL)  # type: ignore[arg-type]
            time.sleep(10)

    message = refused(kill_and_wait, "a loader process died")
    assert re.search(r"pid \d+\) is killed by signal: Killed", message)


def test_errors_that_are_none_of_a_loader_process_go_through() -> None:
    with pytest.raises(RuntimeError, match="something else"), watched():
        raise RuntimeError("something else")


def test_a_hung_process_is_given_up_and_its_file_named(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    batches = plan(root, "data.num_workers=2", "data.cache_gb=0", "data.timeout=1")
    (root / "11.jpg").unlink()
    os.mkfifo(root / "11.jpg")  # opening it waits for a writer that never comes
    started = time.monotonic()
    said = ("in 1 s (data.timeout)", f"still reading {root / '11.jpg'}", "--resume")
    refused(lambda: list(Loader(batches, 0, 5, False)), *said)
    assert time.monotonic() - started < 60  # and not for ever


def test_a_slow_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than torch waits between two looks at its processes: no batch is lost or doubled."""
    monkeypatch.setattr(workers, "_GLANCE", 0.2)
    expected = list(Loader(plan(photos(tmp_path / "photos")), 0, 20, False))
    batches = plan(tmp_path / "photos", "data.num_workers=1", "data.cache_gb=0", "data.timeout=30")
    before = set(torch.multiprocessing.active_children())
    loader = iter(Loader(batches, 0, 20, False))
    ours = [next(loader)]
    (slow,) = set(torch.multiprocessing.active_children()) - before
    os.kill(slow.pid, signal.SIGSTOP)  # type: ignore[arg-type]
    threading.Timer(1.5, os.kill, (slow.pid, signal.SIGCONT)).start()
    started = time.monotonic()
    ours += loader
    assert time.monotonic() - started > 1
    assert_equal(ours, expected)
