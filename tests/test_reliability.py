"""Faults that are really done to a run: kills, signals, full disks, numbers that are none; docs/reliability.md."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.config.sections import Logging
from hjepa.data.loader import Batch
from hjepa.diagnosis import Spikes
from hjepa.errors import ConfigError, DivergedError, FolderInUseError, StoppedError, StorageError
from hjepa.objective import Losses, Objective
from hjepa.runfolder import RunFolder
from hjepa.signals import StopSignals
from hjepa.train import train

HERE = Path(__file__).parent
QUIET = ("evaluation.eval_frequency=0", "checkpoint.save_frequency=0")

Configure = Callable[..., Config]


@pytest.fixture
def configure(small: tuple[str, ...], tmp_path: Path) -> Configure:
    def make(*overrides: str, folder: str = "run") -> Config:
        return load_config(None, (*small, *QUIET, f"experiment.output_dir={tmp_path / folder}", *overrides))

    return make


def newest(folder: Path) -> checkpoint.Saved:
    saved, warnings = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    assert not warnings
    return saved


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a: checkpoint.Saved, b: checkpoint.Saved) -> None:
    assert a.step == b.step
    assert a.weights.keys() == b.weights.keys()
    for name in a.weights:
        assert torch.equal(a.weights[name], b.weights[name]), name


# Kills


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        (12, 0),
        pytest.param(13, 2, marks=pytest.mark.slow),
        pytest.param(100, 0, marks=pytest.mark.slow),
        pytest.param(100, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_is_not(
    tmp_path: Path, small: tuple[str, ...], kills: int, workers: int
) -> None:
    settings = (*small, "evaluation.eval_frequency=0", "checkpoint.save_frequency_steps=3", "loss.type=sigreg")
    settings += ("training.epochs=20", f"data.num_workers={workers}", "model.drop_path_rate=0.1")
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "kill_worker.py"),
            "run",
            str(tmp_path),
            str(kills),
            str(kills + workers),
            *settings,
        ],
        capture_output=True,
        text=True,
        timeout=40 * kills + 120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(done.stdout.splitlines()[-1])
    assert len(steps) == kills
    gained = [after > before for before, after in zip([0, *steps], steps, strict=False)]
    assert sum(gained) >= kills // 8, steps


def test_a_save_that_is_killed_at_any_system_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_worker.py"), "save", str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30


@pytest.mark.parametrize("steps", [(8, 16), (5, 11)], ids=["at the edges of epochs", "within"])
def test_three_legs_are_one(configure: Configure, tmp_path: Path, steps: tuple[int, int]) -> None:
    train(configure(folder="whole"))
    for last in (*steps, None):
        cut = () if last is None else (f"training.max_steps={last}",)
        train(configure(*cut, folder="legs"), resume=True)
    assert_equal(newest(tmp_path / "whole"), newest(tmp_path / "legs"))


def test_a_run_goes_on_with_another_number_of_workers(configure: Configure, tmp_path: Path) -> None:
    train(configure(folder="whole"))
    for workers, last in ((2, 10), (0, 20), (1, 32)):
        train(configure(f"data.num_workers={workers}", f"training.max_steps={last}", folder="legs"), resume=True)
    assert_equal(newest(tmp_path / "whole"), newest(tmp_path / "legs"))


def test_what_a_killed_run_leaves_behind_holds_no_lock(tmp_path: Path) -> None:
    """A loader process that was forked from the run notices only after seconds that it is alone."""
    script = f"""
import os, time
from pathlib import Path
from hjepa.config.sections import Logging
from hjepa.runfolder import RunFolder
folder = RunFolder(Path({str(tmp_path / "run")!r}), "run", Logging(use_tensorboard=False))
if os.fork() == 0:
    print("forked", flush=True)
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "forked\n"
    with pytest.raises(FolderInUseError):
        RunFolder(tmp_path / "run", "second", Logging(use_tensorboard=False))
    process.kill()
    process.wait()
    RunFolder(tmp_path / "run", "second", Logging(use_tensorboard=False)).close()
    os.killpg(process.pid, signal.SIGKILL)


# Signals


def start(folder: Path, settings: Sequence[str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hjepa", "train", *settings, f"experiment.output_dir={folder}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(records_so_far(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def records_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        (signal.SIGTERM, 143, 0),
        pytest.param(signal.SIGUSR1, 143, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow),
        (signal.SIGINT, 130, 2),
        pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_later(
    tmp_path: Path, small: tuple[str, ...], number: int, code: int, workers: int
) -> None:
    settings = (*small, *QUIET, "training.epochs=60", f"data.num_workers={workers}")
    process = start(tmp_path / "parts", settings)
    wait_for_lines(tmp_path / "parts", 4, process)
    # To all of its processes, as a terminal's Ctrl-C and a cluster's scheduler send it.
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    name = signal.Signals(number).name
    assert errors.splitlines()[-1] == f"error: stopped by {name} after a save; --resume goes on"
    assert "Traceback" not in errors
    saved = newest(tmp_path / "parts")
    assert 4 <= saved.step == records(tmp_path / "parts")[-1]["step"] < 480
    for folder in ("parts", "whole"):
        resumed = load_config(None, [*settings, f"experiment.output_dir={tmp_path / folder}", "data.num_workers=0"])
        resumed = resumed.model_copy(
            update={"training": resumed.training.model_copy(update={"max_steps": saved.step + 5})}
        )
        train(resumed, resume=True)
    assert_equal(newest(tmp_path / "parts"), newest(tmp_path / "whole"))


def test_a_second_ctrl_c_stops_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_saved_already_is_left_at_once() -> None:
    with StopSignals() as stop:
        with pytest.raises(StoppedError, match="SIGTERM") as stopped, stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.exit_code == 143
        with pytest.raises(StoppedError), stop.at_once():
            pytest.fail("begun after the signal")


def test_a_run_stopped_while_it_is_probed_is_saved_and_probed_later(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hjepa.train

    settings = ("evaluation.eval_frequency=1", "evaluation.linear=false", "training.epochs=2")
    expected = train(configure(*settings, folder="whole"))
    probe, count = hjepa.train.probe, []

    def asked_in_the_middle(*args: object) -> dict[str, float]:
        count.append(1)
        if len(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return probe(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hjepa.train, "probe", asked_in_the_middle)
    with pytest.raises(StoppedError):
        train(configure(*settings, folder="parts"))
    assert newest(tmp_path / "parts").step == 8
    assert train(configure(*settings, folder="parts"), resume=True) == expected


# Numbers


def poison(monkeypatch: pytest.MonkeyPatch, first: int, last: int, batch: int = 8) -> None:
    """Images of the steps [first, last) of the run (from 0) are not finite."""
    render = Batch.render

    def poisoned(self: Batch, views: object) -> torch.Tensor:
        images = render(self, views)  # type: ignore[arg-type]
        return images * float("nan") if first * batch <= int(self.positions.min()) < last * batch else images

    monkeypatch.setattr(Batch, "render", poisoned)


def test_what_was_in_a_step_that_is_left_out_is_written_down(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3, 5)
    train(configure("training.max_steps=10", "logging.log_frequency=4"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5]
    assert all(len(line["samples"]) == 8 for line in lines)
    assert len(set(lines[0]["samples"])) == 8
    assert all("shapes" in sample for sample in lines[0]["samples"])


ROLLBACK = ("training.on_divergence=rollback", "training.max_bad_steps=3", "checkpoint.save_frequency_steps=4")


def test_a_run_that_diverged_goes_back_and_leaves_the_batches_out(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 10, 16)
    train(configure(*ROLLBACK))
    # Steps 11 to 13 are bad: back to the weights of step 8, on after 13; then 14 to 16: back to those of 13.
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollbacks.jsonl").read_text().splitlines()]
    assert [(line["from"], line["to"]) for line in lines] == [(13, 8), (16, 13)]
    assert [line["step"] for line in records(tmp_path / "run")] == [*range(1, 13), 14, 15, *range(17, 33)]
    saved = newest(tmp_path / "run")
    assert saved.step == 32
    assert saved.trainer["progress"]["rollbacks"] == 2
    assert int(saved.trainer["progress"]["bad_in_a_row"]) == 0
    assert all(torch.isfinite(weight).all() for weight in saved.weights.values())
    assert "Back to the weights of step 8, going on after step 13 (rollback 1 of 3)" in capsys.readouterr().err

    # A run that is cut after that and resumed is the same run.
    train(configure(*ROLLBACK, "training.max_steps=18", folder="parts"))
    train(configure(*ROLLBACK, folder="parts"), resume=True)
    assert_equal(saved, newest(tmp_path / "parts"))


def test_a_run_that_keeps_diverging_stops(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 10, 32)
    with pytest.raises(DivergedError, match="not finite in 3 steps in a row") as stopped:
        train(configure(*ROLLBACK))
    assert stopped.value.exit_code == 4
    assert newest(tmp_path / "run").trainer["progress"]["rollbacks"] == 3


def test_a_run_that_diverges_before_its_first_save_stops(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 0, 9)
    with pytest.raises(DivergedError):
        train(configure(*ROLLBACK))


def test_a_loss_that_leaves_for_good_is_rolled_back(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = Objective.__call__, []

    def spiked(self: Objective, output: object, seed: int) -> Losses:
        losses = compute(self, output, seed)  # type: ignore[arg-type]
        calls.append(1)
        return Losses(losses.total * 50, losses.terms) if len(calls) > 24 and len(calls) <= 27 else losses

    monkeypatch.setattr(Objective, "__call__", spiked)
    train(configure("training.on_divergence=rollback", "checkpoint.save_frequency_steps=5"))
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "rollbacks.jsonl").read_text().splitlines())
    assert (line["from"], line["to"]) == (27, 20)
    assert "above 3 times its recent median since step 24" in line["why"]
    assert newest(tmp_path / "run").step == 32


def test_a_spike_is_what_stays_above_what_was_usual() -> None:
    spikes = Spikes()
    assert [spikes.read(step, 1.0 + step % 3) for step in range(30)] == [None] * 30
    assert [spikes.read(step, value) for step, value in ((30, 50.0), (31, 50.0), (32, 1.0), (33, 50.0))] == [None] * 4
    assert [spikes.read(step, 50.0) for step in (34, 35)] == [None, 32]
    assert Spikes().read(0, float("nan")) is None
    slowly = Spikes()
    assert [slowly.read(step, 1.05**step) for step in range(200)] == [None] * 200


# The best one


@pytest.mark.parametrize("metric", ["loss", "knn", "linear"])
def test_the_best_checkpoint_is_kept_apart(configure: Configure, tmp_path: Path, metric: str) -> None:
    train(configure(f"checkpoint.metric={metric}", "evaluation.eval_frequency=1", "training.epochs=6"))
    (best,) = (tmp_path / "run" / "checkpoints").glob("best-*")
    lines = records(tmp_path / "run")
    if metric == "loss":
        steps = [line for line in lines if "loss" in line]
        by_step = {last: -sum(line["loss"] for line in steps[last - 8 : last]) for last in range(8, 49, 8)}
    else:
        by_step = {int(line["step"]): line[f"eval/{metric}"] for line in lines if f"eval/{metric}" in line}
    assert len(by_step) == 6
    assert checkpoint.load(best).step == max(by_step, key=lambda step: by_step[step])
    assert len(checkpoint.find(tmp_path / "run" / "checkpoints")) <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("checkpoint.metric=knn",), "evaluation.eval_frequency"),
        (("checkpoint.metric=linear", "evaluation.linear=false", "evaluation.eval_frequency=1"), "use knn"),
        (
            ("checkpoint.metric=knn", "evaluation.eval_frequency=1", "data.datasets=[{name: folder, path: x}]"),
            "no labels",
        ),
        (("checkpoint.metric=accuracy",), "knn"),
    ],
)
def test_a_metric_that_is_never_measured_is_refused(
    configure: Configure, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.metric") as refused:
        configure(*settings)
    assert message in str(refused.value)


# Changes that were accepted


def test_a_run_goes_on_with_another_learning_rate_and_more_epochs_when_told_to(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure("training.max_steps=12"))
    changed = configure("training.lr=1e-3", "training.epochs=6", "training.weight_decay=0.1")
    with pytest.raises(ConfigError, match=r"--accept training\.epochs goes on with it"):
        train(changed, resume=True, accept=["training.lr", "training.weight_decay"])
    train(changed, resume=True, accept=["training.lr", "training.epochs", "training.weight_decay"])
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 49))
    assert max(line["lr"] for line in lines[:12]) < 5.1e-4 < lines[12]["lr"] <= 1e-3
    assert lines[-1]["lr"] == pytest.approx(1e-6)
    groups = newest(tmp_path / "run").trainer["optimizers"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert "goes on under other settings than it had: training.epochs, training.lr" in capsys.readouterr().err


def test_a_run_goes_on_with_a_smaller_batch_where_it_was_in_its_epochs(configure: Configure, tmp_path: Path) -> None:
    train(configure("training.max_steps=12"))  # one epoch of 8 steps and half of another
    smaller = configure("data.batch_size=4")
    with pytest.raises(ConfigError, match=r"--accept data\.batch_size"):
        train(smaller, resume=True)
    train(smaller, resume=True, accept=["data.batch_size"])
    assert [line["step"] for line in records(tmp_path / "run")] == [*range(1, 13), *range(25, 65)]
    with pytest.raises(ConfigError, match="with a smaller batch than its 4, no larger one"):
        train(configure("data.batch_size=8"), resume=True, accept=["data.batch_size"])


# Storage


def test_a_full_disk_stops_the_run_with_5_and_leaves_what_was_saved(tmp_path: Path, small: tuple[str, ...]) -> None:
    settings = (*small, *QUIET, "checkpoint.save_frequency_steps=5", f"experiment.output_dir={tmp_path / 'run'}")
    train(load_config(None, (*settings, "training.max_steps=5")))

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-m", "hjepa", "train", *settings, "--resume"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=fill,  # no threads here, and no other way to a limit
        check=False,
    )
    assert done.returncode == 5, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "step-00000010: could not be written" in last
    assert "earlier checkpoints are intact" in last
    assert newest(tmp_path / "run").step == 5
    train(load_config(None, settings), resume=True)
    train(load_config(None, (*settings[:-1], f"experiment.output_dir={tmp_path / 'whole'}")))
    assert_equal(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_a_disk_without_room_is_found_before_the_first_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(StorageError, match=r"checkpoints will take .* GB and 0\.0001 GB are free"):
        train(configure())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("place", ["/proc/hjepa", "a file/run"])
def test_a_place_that_cannot_be_written_is_found_before_anything_is_loaded(
    configure: Configure, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    (tmp_path / "a file").write_text("")
    config = configure(f"experiment.output_dir={tmp_path / place}")
    with pytest.raises(StorageError, match="cannot be written") as refused:
        train(config)
    assert refused.value.exit_code == 5
    assert "Creating model" not in capsys.readouterr().out


def test_a_logger_that_dies_stops_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def dies(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the event file went away")

    monkeypatch.setattr(SummaryWriter, "add_scalar", dies)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # cannot be opened either
    train(configure("logging.use_tensorboard=true"))
    errors = capsys.readouterr().err
    assert errors.count("TensorBoard could not be written (the event file went away)") == 1
    assert errors.count("metrics.jsonl could not be written") == 1
    train(configure(folder="whole"))
    assert_equal(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_a_clock_that_jumps_changes_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(folder="whole"))
    now = iter(range(10**9, 0, -(10**5)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(now)))
        for last in (9, 20, 32):
            train(configure(f"training.max_steps={last}", "training.max_time=1h", folder="jumps"), resume=True)
    assert_equal(newest(tmp_path / "whole"), newest(tmp_path / "jumps"))
    assert 0 < newest(tmp_path / "jumps").trainer["progress"]["seconds"] < 600


def test_what_interrupted_saves_left_is_swept_out_at_the_start(configure: Configure, tmp_path: Path) -> None:
    stale = tmp_path / "run" / "checkpoints" / ".step-00000003.tmp"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    train(configure("training.max_steps=2"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
