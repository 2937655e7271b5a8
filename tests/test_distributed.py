"""Two processes on gloo against one with the same global batch."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hjepa import checkpoint

WORKER = Path(__file__).parent / "distributed_worker.py"


def start(processes: int, out: Path, settings: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launch, str(WORKER), str(out), *settings, f"experiment.output_dir={out / 'run'}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(processes: int, out: Path, settings: tuple[str, ...]) -> list[dict[str, object]]:
    done = start(processes, out, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(("loss.type=smoothl1",), marks=pytest.mark.slow),
        ("loss.type=sigreg", "data.num_views=2"),
        pytest.param(("loss.type=combined",), marks=pytest.mark.slow),
        pytest.param(("loss.type=sigreg", "data.multicrop.num_local_crops=2"), marks=pytest.mark.slow),
        pytest.param(("loss.type=sigreg", "model.use_target_encoder=false"), marks=pytest.mark.slow),
        pytest.param(
            ("loss.type=sigreg", "data.num_views=2", "loss.hierarchy_weights=[0,0]", "masking.num_masks=0"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("loss.type=sigreg", "data.num_views=2", "loss.predict_every=2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "smoothl1",
        "sigreg",
        "combined",
        "local crops",
        "no target encoder",
        "image level alone",
        "every other image",
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, small: tuple[str, ...], extra: tuple[str, ...]) -> None:
    # eps: or Adam makes a whole step of what is rounding in a gradient of zero.
    settings = (*small, *extra, "training.max_steps=5", "training.eps=1e-3", "training.clip_grad=0.1")
    settings += ("evaluation.eval_frequency=0",)
    (one,) = run(1, tmp_path / "one", settings)
    first, second = run(2, tmp_path / "two", settings)
    assert first["weights"].keys() == one["weights"].keys()  # type: ignore[attr-defined]
    for name, weight in one["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(first["weights"][name], second["weights"][name]), name  # type: ignore[index]
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=5e-5, msg=name)  # type: ignore[index]
    seen = [set(part["positions"]) for part in (first, second)]  # type: ignore[call-overload]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(one["positions"])  # type: ignore[call-overload]
    assert len(one["positions"]) == 40  # type: ignore[arg-type]


@pytest.mark.slow
def test_muon_keeps_processes_equal(tmp_path: Path, small: tuple[str, ...]) -> None:
    """One process and two differ by more than rounding: directions without gradient move as far as any other."""
    settings = (*small, "training.optimizer=muon", "training.max_steps=4", "evaluation.eval_frequency=0")
    first, second = run(2, tmp_path / "two", settings)
    assert first["step"] == 4
    for name, weight in first["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(weight, second["weights"][name]), name  # type: ignore[index]


def test_what_is_not_finite_on_one_process_is_skipped_by_all(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "training.max_steps=4", "evaluation.eval_frequency=0", "poison=2")
    first, second = run(2, tmp_path / "two", settings)
    assert int(first["bad_steps"]) == int(second["bad_steps"]) == 1  # type: ignore[call-overload]
    for name, weight in first["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(weight, second["weights"][name]), name  # type: ignore[index]
        assert torch.isfinite(weight).all()


def test_the_process_with_the_least_memory_decides_for_all(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "data.batch_size=auto", "data.global_batch_size=16", "fits=4")
    first, second = run(2, tmp_path / "two", (*settings, "training.max_steps=2", "evaluation.eval_frequency=0"))
    assert first["batch"] == second["batch"] == (16, 2)  # 8 images of each process in parts of 4
    assert sorted([*first["positions"], *second["positions"]]) == list(range(32))  # type: ignore[misc]
    for name, weight in first["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(weight, second["weights"][name]), name  # type: ignore[index]


@pytest.mark.slow
def test_machines_without_a_common_folder_do_not_go_on_from_different_steps(
    tmp_path: Path, small: tuple[str, ...]
) -> None:
    settings = (*small, "evaluation.eval_frequency=0", "training.max_steps=2", "resume=1")
    run(2, tmp_path / "two", settings)
    done = start(2, tmp_path / "two", (*settings, "training.max_steps=4", "elsewhere=1"))
    assert done.returncode != 0
    assert "experiment.output_dir: not all processes find the same checkpoint" in done.stderr


@pytest.mark.slow
def test_processes_end_together_within_their_time(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "training.epochs=null", "training.max_time=15s", "evaluation.eval_frequency=0")
    first, second = run(2, tmp_path / "two", settings)
    assert first["total"] == second["total"]
    assert first["step"] == second["step"] > 3  # type: ignore[operator]
    for name, weight in first["weights"].items():  # type: ignore[attr-defined]
        assert torch.equal(weight, second["weights"][name]), name  # type: ignore[index]


@pytest.mark.slow
def test_one_process_two_and_one_see_the_same_images(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "training.eps=1e-3", "training.clip_grad=0.1", "evaluation.eval_frequency=0", "resume=1")
    (whole,) = run(1, tmp_path / "whole", (*settings, "training.max_steps=12"))
    seen: list[int] = []
    for processes, steps in ((1, 4), (2, 9), (1, 12)):
        legs = run(processes, tmp_path / "legs", (*settings, f"training.max_steps={steps}"))
        seen += sorted(position for leg in legs for position in leg["positions"])  # type: ignore[attr-defined]
    assert seen == sorted(whole["positions"]) == list(range(96))  # type: ignore[call-overload]
    for name, weight in whole["weights"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(legs[0]["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=name)  # type: ignore[index]


@pytest.mark.slow
def test_processes_that_are_asked_to_stop_do_so_after_the_same_step(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, "training.epochs=200", "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hjepa"]
    process = subprocess.Popen([*launch, "train", *settings], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on, and kills after 30 s
    asked = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert "stopped by SIGTERM after a save" in errors
    saved, warnings = checkpoint.load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert not warnings
    assert saved.step == json.loads(metrics.read_text().splitlines()[-1])["step"] < 1600
