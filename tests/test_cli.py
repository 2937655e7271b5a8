"""The command line as real processes: what is printed, and the exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from hjepa import checkpoint, load_config

ROOT = Path(__file__).parents[1]


def hjepa(*words: str, cwd: Path, script: bool = False) -> subprocess.CompletedProcess[str]:
    program = [str(ROOT / "scripts" / "train.py")] if script else ["-m", "hjepa"]
    return subprocess.run(
        [sys.executable, *program, *words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What ended the run; warnings may stand beside it, and nothing else."""
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), done.stderr
    return [line for line in lines if line.startswith("error: ")]


def test_help_is_there_without_torch(tmp_path: Path) -> None:
    done = hjepa("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "train" in done.stdout
    assert "eval" in done.stdout
    code = "import sys, hjepa.cli, hjepa.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_settings_are_listed_with_their_meaning(tmp_path: Path) -> None:
    done = hjepa("train", "--help-config", "masking", cwd=tmp_path)
    assert done.returncode == 0
    assert "masking.num_masks" in done.stdout
    assert "training.lr" not in done.stdout
    assert hjepa("train", "--help-config", "maskings", cwd=tmp_path).returncode == 2


def test_mistakes_are_lines_with_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("training:\n  learning_rate: 1e-4\n  epochs: 10.5\nmodel:\n  num_hierarchy: 2\n")
    done = hjepa("train", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: bad.yaml: ") for line in lines)
    assert "error: bad.yaml: training.epochs (line 3): input should be a valid integer, got 10.5" in lines
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there_is_named_and_nothing_falls_back(tmp_path: Path) -> None:
    import torch

    if torch.backends.mps.is_available():
        absent = "cuda"
    else:
        absent = "mps"
    done = hjepa("train", f"device={absent}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: device: {absent} was asked for and this machine has none; use device=auto")


def test_missing_images_are_one_line_with_code_3(tmp_path: Path, small: tuple[str, ...]) -> None:
    rest = [text for text in small if not text.startswith("data.datasets")]
    done = hjepa("train", "data.datasets=[{name: cifar10}]", "data.download=false", *rest, cwd=tmp_path)
    assert done.returncode == 3
    (line,) = errors(done)
    for word in ("cifar10", "data.download", "path"):
        assert word in line
    (tmp_path / "photos").mkdir()
    done = hjepa("train", "data=photos", cwd=tmp_path)
    assert done.returncode == 3
    assert len(errors(done)) == 1


def test_a_folder_of_images_alone_is_trained_by_the_shipped_recipe(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.effect_noise((80, 60), 60).convert("RGB").save(tmp_path / "photos" / f"{i}.jpg")
    small = (
        "data.image_size=96",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "training.max_steps=2",
        "device=cpu",
    )
    done = hjepa("train", "data=./photos", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "Loading config... none given: configs/folder.yaml, for a night"
    left, recipe = load_config(tmp_path / "runs/folder/config.yaml"), load_config(ROOT / "configs/folder.yaml")
    assert (left.loss, left.masking, left.checkpoint) == (recipe.loss, recipe.masking, recipe.checkpoint)
    assert left.training.optimizer == recipe.training.optimizer
    assert left.training.max_time == recipe.training.max_time


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user who may not write")
def test_a_folder_that_cannot_be_written_is_code_5(tmp_path: Path, small: tuple[str, ...]) -> None:
    code = (
        # What is imported late is imported before: a clone in a private folder cannot be read by another user.
        "import os, sys; import hjepa.train; from hjepa.cli import app, main; from typer.testing import CliRunner; "
        "CliRunner().invoke(app, ['train', '--help']); os.setuid(65534); "
        f"sys.argv = ['hjepa', 'train', *{list(small)!r}, 'experiment.output_dir={tmp_path}/runs/x']; main()"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 5, done.stderr
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize("script", [False, True], ids=["hjepa", "scripts/train.py"])
def test_both_ways_in_train(tmp_path: Path, small: tuple[str, ...], script: bool) -> None:
    words = ("--config", "c.yaml", *small, "training.max_steps=2", "evaluation.eval_frequency=0")
    (tmp_path / "c.yaml").write_text("experiment: {name: mine}\n")
    done = hjepa(*(words if script else ("train", *words)), cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["Loading config...", "Creating model..."]
    assert done.stdout.splitlines()[-1] == "Run: runs/mine"
    assert checkpoint.find(tmp_path / "runs" / "mine" / "checkpoints")


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "checkpoint.save_frequency_steps=3", "evaluation.eval_frequency=0")
    assert hjepa("train", *settings, "experiment.name=whole", cwd=tmp_path).returncode == 0
    words = [sys.executable, "-m", "hjepa", "train", *settings, "experiment.name=killed", "--resume"]
    folder = tmp_path / "runs" / "killed" / "checkpoints"
    for kill in range(3):
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
        before = len(list(folder.glob("step-*")))
        deadline = time.monotonic() + 120
        newest = max((p.name for p in folder.glob("step-*")), default="")
        while time.monotonic() < deadline and process.poll() is None:
            if max((p.name for p in folder.glob("step-*")), default="") != newest:
                break
            time.sleep(0.002)
        assert before <= len(list(folder.glob("step-*"))) or kill
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    finals = [
        (tmp_path / "runs" / name / "checkpoints" / "step-00000032" / checkpoint.WEIGHTS).read_bytes()
        for name in ("whole", "killed")
    ]
    assert finals[0] == finals[1]


def test_eval_prints_the_table(tmp_path: Path, small: tuple[str, ...]) -> None:
    assert hjepa("train", *small, "training.max_steps=1", cwd=tmp_path).returncode == 0
    done = hjepa("eval", "runs/hjepa", "evaluation.knn.k=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained encoder" in done.stdout
    assert "eval/knn_random = " in done.stdout
    assert hjepa("eval", "runs/none", cwd=tmp_path).returncode == 2
