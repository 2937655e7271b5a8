"""Runs over images that cannot be read, and over loader processes that die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.errors import DataError
from hjepa.evaluate import evaluate_run
from hjepa.preflight import check
from hjepa.train import train

COUNT = 64
Configure = Callable[..., Config]


def photos(root: Path, count: int = COUNT) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((64 + i, 64), 60).convert("RGB").save(root / f"{i:02d}.jpg")
    return root


@pytest.fixture
def settings(small: tuple[str, ...], tmp_path: Path) -> list[str]:
    """A run on 64 photos, 8 steps an epoch, read from the files at every step."""
    photos(tmp_path / "photos")
    rest = [text for text in small if not text.startswith("data.datasets")]
    return [
        f"data.datasets=[{{name: folder, path: {tmp_path / 'photos'}}}]",
        *rest,
        "data.cache_gb=0",
        "data.max_bad_fraction=0.05",
    ]


@pytest.fixture
def configure(settings: list[str], tmp_path: Path) -> Configure:
    def make(*overrides: str, folder: str = "run") -> Config:
        return load_config(None, (*settings, f"experiment.output_dir={tmp_path / folder}", *overrides))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(folder / "checkpoints")[0] / checkpoint.WEIGHTS)


def assert_equal(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def listed(folder: Path) -> dict[str, int]:
    """Step at which each file was written down, by name."""
    return {Path(str(line["file"])).name: int(line["step"]) for line in lines(folder / "bad_images.jsonl")}


def counts(folder: Path) -> list[float]:
    return [line.get("bad_images", 0) for line in lines(folder / "metrics.jsonl")]


def test_a_run_goes_on_without_what_it_cannot_read_and_says_so(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "photos" / "17.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    for folder, extra in {
        "plain": (),
        "workers": ("data.num_workers=2",),
        "memory": ("data.cache_gb=1",),
    }.items():
        train(configure("training.epochs=2", *extra, folder=folder))
        said = capsys.readouterr()
        first, last = (line for line in said.err.splitlines() if "image file(s)" in line)
        assert first.startswith("warning: 1 image file(s) cannot be read, others take their place: ")
        assert f"{bad} (" in first
        for line in (first, last):
            assert str(tmp_path / folder / "bad_images.jsonl") in line
        (line,) = lines(tmp_path / folder / "bad_images.jsonl")
        assert line["file"] == str(bad)
        assert line["reason"]
        assert "bad_images.jsonl" in {path.name for path in (tmp_path / folder).iterdir()}
    assert_equal(tmp_path / "plain", tmp_path / "workers")
    assert_equal(tmp_path / "plain", tmp_path / "memory")
    (step,) = listed(tmp_path / "plain").values()
    assert 1 <= step <= 8
    assert counts(tmp_path / "plain") == counts(tmp_path / "workers") == [0] * (step - 1) + [1] * (17 - step)
    assert counts(tmp_path / "memory") == [1] * 16
    # Not a run of its own: the same photos without a bad one train differently.
    bad.write_bytes((tmp_path / "photos" / "16.jpg").read_bytes())
    train(configure("training.epochs=2", folder="sound"))
    assert not (tmp_path / "sound" / "bad_images.jsonl").exists()
    assert "bad_images" not in lines(tmp_path / "sound" / "metrics.jsonl")[-1]
    assert "image file(s)" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_lists_counts_and_replaces_as_one_run_does(configure: Configure, tmp_path: Path, workers: int) -> None:
    for i in (5, 20, 41):
        (tmp_path / "photos" / f"{i:02d}.jpg").write_bytes(b"")
    extra = (f"data.num_workers={workers}", "training.epochs=2", "checkpoint.save_frequency_steps=4")
    train(configure(*extra, "training.max_steps=12", folder="whole"))
    train(configure(*extra, "training.max_steps=6", folder="parts"))
    for path in checkpoint.find(tmp_path / "parts" / "checkpoints")[:1]:  # killed after step 6, saved after step 4
        assert path.name == "step-00000006"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(configure(*extra, "training.max_steps=12", folder="parts"), resume=True)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    assert listed(tmp_path / "whole") == listed(tmp_path / "parts")
    assert len(listed(tmp_path / "whole")) == 3
    assert counts(tmp_path / "whole") == counts(tmp_path / "parts")


def test_too_many_stop_the_run_with_their_names_until_they_are_mended(
    settings: list[str], configure: Configure, tmp_path: Path
) -> None:
    names = [f"{i:02d}.jpg" for i in range(0, COUNT, 5)]
    kept = {name: (tmp_path / "photos" / name).read_bytes() for name in names}
    train(configure("training.epochs=2", "training.max_steps=2"))
    for name in names:
        (tmp_path / "photos" / name).write_text("<html>")
    # Met one by one: by the command itself, for its exit code.
    words = [*settings, f"experiment.output_dir={tmp_path / 'run'}", "training.epochs=2", "--resume"]
    command = [sys.executable, "-m", "hjepa", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    found = listed(tmp_path / "run")
    assert f"{len(found)} of 64 files cannot be read, more than data.max_bad_fraction=0.05" in error
    assert "Traceback" not in done.stderr
    assert 4 <= len(found) < 13
    # Met all at once, before the first step.
    with pytest.raises(DataError, match="13 of 64 files cannot be read"):
        train(configure("training.epochs=2", "data.cache_gb=1"), resume=True)
    assert listed(tmp_path / "run").keys() == set(names)
    # The list is not held against a run whose files were mended.
    for name, content in kept.items():
        (tmp_path / "photos" / name).write_bytes(content)
    train(configure("training.epochs=2"), resume=True)
    assert not (tmp_path / "run" / "bad_images.jsonl").exists()
    train(configure("training.epochs=2", folder="sound"))
    assert_equal(tmp_path / "run", tmp_path / "sound")


def test_what_was_bad_before_counts_after_resuming(configure: Configure, tmp_path: Path) -> None:
    """A run that is stopped often does not forgive files each time."""
    for i in (5, 20, 41):
        (tmp_path / "photos" / f"{i:02d}.jpg").write_bytes(b"")
    train(configure("training.epochs=2", "training.max_steps=8"))
    assert len(listed(tmp_path / "run")) == 3
    for path in checkpoint.find(tmp_path / "run" / "checkpoints"):
        assert path.name == "step-00000008"
    with pytest.raises(DataError, match=r"3 of 64 files cannot be read, more than data\.max_bad_fraction=0\.04"):
        train(configure("training.epochs=2", "data.max_bad_fraction=0.04"), resume=True)
    (tmp_path / "photos" / "05.jpg").write_bytes((tmp_path / "photos" / "06.jpg").read_bytes())
    train(configure("training.epochs=2", "data.max_bad_fraction=0.04"), resume=True)
    assert set(listed(tmp_path / "run")) == {"20.jpg", "41.jpg"}
    assert counts(tmp_path / "run")[-1] == 2


def test_links_that_lead_out_are_told(configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = photos(tmp_path / "outside", 2)
    (tmp_path / "photos" / "zz").symlink_to(outside)
    train(configure("training.max_steps=1"))
    said = capsys.readouterr()
    assert "folder: 64 images" in said.out
    assert f"1 link(s) that lead out of the folder were left out, the first {tmp_path / 'photos' / 'zz'}" in said.err
    report = check(configure(folder="other"), seconds=0.1)
    assert any(item.verdict == "warning" and "1 link(s) that lead out" in item.text for item in report.items)


def test_check_warns_of_what_a_run_bears_and_refuses_what_it_does_not(configure: Configure, tmp_path: Path) -> None:
    for bad, code, verdict in ((3, 0, "warning"), (4, 3, "error")):
        for i in range(bad):
            (tmp_path / "photos" / f"{i:02d}.jpg").write_bytes(b"")
        report = check(configure(), all_images=True, seconds=0.1)
        assert report.exit_code == code
        (item,) = (item for item in report.items if "cannot be read" in item.text)
        assert item.verdict == verdict
        assert f"of all decoded, {bad} cannot be read" in item.text


def test_probes_go_on_without_what_they_cannot_read(
    small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 20), ("val", 8)):
        for name in ("a", "b"):
            photos(tmp_path / "data" / part / name, count)
    bad = tmp_path / "data" / "val" / "b" / "03.jpg"
    bad.write_bytes(b"")
    overrides = [f"data.datasets=[{{name: imagefolder, path: {tmp_path / 'data'}}}]", "data.max_bad_fraction=0.1"]
    overrides += ["training.max_steps=2", f"experiment.output_dir={tmp_path / 'run'}"]
    results = train(load_config(None, (*small, *overrides)))
    assert {"eval/knn", "eval/knn_pixels", "eval/knn_random"} <= results.keys()
    assert listed(tmp_path / "run") == {"03.jpg": 2}
    assert str(bad) in capsys.readouterr().err
    assert evaluate_run(tmp_path / "run", []) == results
    assert str(bad) in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 16 files cannot be read"):
        evaluate_run(tmp_path / "run", ["data.max_bad_fraction=0.05"])


def test_two_processes_share_one_list_and_stop_together(settings: list[str], tmp_path: Path) -> None:
    for i in (5, 20, 41):
        (tmp_path / "photos" / f"{i:02d}.jpg").write_bytes(b"")

    def run(folder: str, *extra: str) -> subprocess.CompletedProcess[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hjepa", "train"]
        words = [*settings, f"experiment.output_dir={tmp_path / folder}", "training.epochs=2", *extra]
        command = [sys.executable, *launch, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    done = run("two", "training.max_steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(listed(tmp_path / "two")) == {"05.jpg", "20.jpg", "41.jpg"}
    assert counts(tmp_path / "two")[-1] == 3
    # Neither process alone has found more than it may.
    done = run("stopped", "data.max_bad_fraction=0.04")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "files cannot be read" in line]
    assert errors
    assert all("3 of 64 files cannot be read" in line for line in errors)
    assert set(listed(tmp_path / "stopped")) == {"05.jpg", "20.jpg", "41.jpg"}


def children(pid: int) -> list[int]:
    """Processes that this one started (Linux, macOS)."""
    listing = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(child) for child, parent in map(str.split, listing.splitlines()) if int(parent) == pid]


def test_a_killed_loader_process_costs_nothing_but_the_steps_since_the_save(
    settings: list[str], configure: Configure, tmp_path: Path
) -> None:
    extra = ["training.epochs=6", "data.num_workers=2", "evaluation.eval_frequency=0", "checkpoint.save_frequency=1"]
    words = [*settings, *extra, f"experiment.output_dir={tmp_path / 'cut'}"]
    command = [sys.executable, "-m", "hjepa", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not checkpoint.find(tmp_path / "cut" / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.02)
        loaders = children(process.pid)
        assert loaders
        os.kill(loaders[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "a loader process died" in line
    assert "Traceback" not in errors
    train(configure(*extra, folder="cut"), resume=True)
    train(configure(*extra, folder="whole"))
    assert_equal(tmp_path / "cut", tmp_path / "whole")
