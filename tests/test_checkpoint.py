import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hjepa import checkpoint
from hjepa.errors import ConfigError, StorageError

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
    checkpoint.refuse_changes(before, after)
    after["data"]["datasets"][0]["name"] = "b"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"data\.datasets\[0\]\.name: the run has 'a', the config says 'b'"):
        checkpoint.refuse_changes(before, after)
