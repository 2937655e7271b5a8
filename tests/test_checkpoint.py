import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hjepa import checkpoint
from hjepa.errors import ConfigError, StorageError
from hjepa.writer import Writer

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
TRAINER = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "progress": {"step": 3}}


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, WEIGHTS, TRAINER, {"seed": 1})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = checkpoint.load(save(tmp_path, 3))
    assert saved.step == 3
    assert saved.config == {"seed": 1}
    assert saved.trainer == TRAINER
    assert all(torch.equal(saved.weights[k], WEIGHTS[k]) for k in WEIGHTS)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_pruning_keeps_the_newest_and_sweeps_what_was_interrupted(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / ".step-00000101.tmp").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.TRAINER, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone"])
def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        file.write_bytes({"cut": bytes(data[: len(data) // 2]), "empty": b"", "flip": bytes(data)}[damage])
    saved, warnings = checkpoint.load_newest(tmp_path)
    assert saved is not None
    if saved.step == 2:  # a flipped bit in a part of the manifest that says nothing
        assert (name, damage) == (checkpoint.MANIFEST, "flip")
    else:
        assert saved.step == 1
        assert len(warnings) == 1 or (name, damage) == (checkpoint.MANIFEST, "gone")


def test_a_full_disk_leaves_earlier_checkpoints_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    script = f"""
import resource, signal, torch
from pathlib import Path
from hjepa import checkpoint
from hjepa.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for weights, trainer in (({{"a": torch.zeros(10**6)}}, {{}}), ({{"a": torch.zeros(3)}}, {{"x": torch.zeros(10**6)}})):
    try:
        checkpoint.save(Path({str(tmp_path)!r}), 2, weights, trainer, {{}})
    except StorageError as error:
        assert "earlier checkpoints are intact" in str(error), error
        assert error.exit_code == 5
    else:
        raise SystemExit("not refused")
"""
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load_newest(tmp_path)[0].step == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_refused_system_call_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        with pytest.raises(StorageError, match="No space left"):
            save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_change_no_weight_may_change() -> None:
    before = {"training": {"lr": 1.0, "max_steps": 3}, "data": {"datasets": [{"name": "a", "path": "x"}]}}
    after = {"training": {"lr": 1.0, "max_steps": 9}, "data": {"datasets": [{"name": "a", "path": "y"}]}}
    assert checkpoint.changes(before, after) == []
    after["data"]["datasets"][0]["name"] = "b"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"data\.datasets\[0\]\.name: the run has 'a', the config says 'b'"):
        checkpoint.changes(before, after)


def test_what_may_change_is_accepted_by_name_and_the_rest_never() -> None:
    before = {"training": {"lr": 1.0, "optimizer": "adamw"}, "data": {"batch_size": 8}, "model": {"depth": 2}}
    after = {"training": {"lr": 2.0, "optimizer": "adamw"}, "data": {"batch_size": 4}, "model": {"depth": 2}}
    with pytest.raises(
        ConfigError, match=r"training\.lr: the run has 1\.0, .*; --accept training\.lr goes on"
    ) as refused:
        checkpoint.changes(before, after, ["data.batch_size"])
    assert "data.batch_size" not in str(refused.value)
    assert checkpoint.changes(before, after, ["training.lr", "data.batch_size"]) == ["data.batch_size", "training.lr"]
    for key, words in (("model.depth", "under another one"), ("training.optimizer", "under another"), ("x", "no such")):
        with pytest.raises(ConfigError, match=f"--accept {key}: .*{words}"):
            checkpoint.changes(before, before, [key])


def test_the_best_is_set_apart_and_outlives_what_is_pruned(tmp_path: Path) -> None:
    assert checkpoint.best_value(tmp_path, "knn") is None
    best = checkpoint.keep_best(save(tmp_path, 1), "knn", 50.0)
    assert best.name == "best-00000001"
    for step in (2, 3, 4):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.load(best).step == 1
    assert checkpoint.best_value(tmp_path, "knn") == 50.0
    assert checkpoint.best_value(tmp_path, "loss") is None
    checkpoint.keep_best(tmp_path / "step-00000004", "knn", 60.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-00000004", "step-00000003", "step-00000004"]
    assert checkpoint.load_newest(tmp_path)[0].step == 4  # type: ignore[union-attr]


def test_a_write_in_the_background_keeps_what_it_was_handed(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    writer = Writer(tmp_path, 2)
    for step in (1, 2, 3):
        writer.submit(step, weights, TRAINER, {})
        for value in weights.values():
            value += 1  # as the next step does
    writer.wait()
    writer.close()
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000003", "step-00000002"]
    assert torch.equal(checkpoint.load(tmp_path / "step-00000003").weights["a"], WEIGHTS["a"] + 2)


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    tied = torch.ones(3)
    writer = Writer(tmp_path, 2)
    writer.submit(1, {"a": tied, "b": tied, "c": torch.ones(4, 2).T}, {}, {})
    writer.wait()
    writer.close()
    assert set(checkpoint.load(tmp_path / "step-00000001").weights) == {"a", "b", "c"}


def test_a_failed_write_in_the_background_is_told_at_the_next_call(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "checkpoints", 2)
    writer.submit(1, WEIGHTS, TRAINER, {})
    writer.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    writer.submit(2, WEIGHTS, TRAINER, {})
    writer.close()
    with pytest.raises(StorageError, match="could not be written"):
        writer.check()
    assert checkpoint.load_newest(tmp_path / "moved")[0].step == 1  # type: ignore[union-attr]
