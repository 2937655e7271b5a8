"""Runs through the public surface: what is written, and that stopping and going on changes nothing."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.config.sections import Logging
from hjepa.data.loader import Batch
from hjepa.errors import ConfigError, DataError, DivergedError, FolderInUseError, StorageError
from hjepa.evaluate import evaluate_run, probe
from hjepa.measure import Measured, measure_run
from hjepa.run import Run
from hjepa.runfolder import RunFolder
from hjepa.train import train

Configure = Callable[..., Config]


@pytest.fixture
def configure(small: tuple[str, ...], tmp_path: Path) -> Configure:
    def make(*overrides: str, folder: str = "run") -> Config:
        return load_config(None, (*small, f"experiment.output_dir={tmp_path / folder}", *overrides))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(folder / "checkpoints")[0] / checkpoint.WEIGHTS)


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_equal_moments(a: checkpoint.Saved, b: checkpoint.Saved) -> None:
    for first, second in zip(a.trainer["optimizers"], b.trainer["optimizers"], strict=True):
        for mine, yours in zip(first["state"].values(), second["state"].values(), strict=True):
            assert all(torch.equal(mine[key], yours[key]) for key in mine)


def test_a_run_leaves_what_it_promises(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = train(
        configure("evaluation.eval_frequency=2", "loss.type=sigreg", "data.num_views=2", "logging.use_tensorboard=true")
    )
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == configure(
        "evaluation.eval_frequency=2", "loss.type=sigreg", "data.num_views=2", "logging.use_tensorboard=true"
    )
    assert list((folder / "tensorboard").iterdir())
    assert [p.name for p in checkpoint.find(folder / "checkpoints")] == ["step-00000032", "step-00000024"]

    lines = records(folder)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/knn" in line]
    assert [line["step"] for line in steps] == list(range(1, 33))
    assert [line["epoch"] for line in steps] == [1 + step // 8 for step in range(32)]
    assert [line["step"] for line in evaluations] == [16, 32]
    expected = {"loss", "loss/level0", "loss/level0/tap1", "loss/level1", "loss/level1/tap3", "loss/sigreg/sigreg"}
    expected |= {"loss/sigreg/invariance", "lr", "momentum", "grad_norm", "std/level0", "std/level1", "rankme"}
    assert expected | {"images_per_second", "memory_gb"} <= steps[0].keys()
    probes = {f"eval/{kind}{which}" for kind in ("knn", "linear") for which in ("", "_online", "_pixels", "_random")}
    assert probes | {"eval/knn_level0", "eval/knn_level1", "eval/linear_tap2"} <= evaluations[-1].keys()
    assert results == {k: v for k, v in evaluations[-1].items() if k.startswith("eval/")}

    out = capsys.readouterr().out
    shown = ["Creating model...", "Model created: HJEPA with ", "Loading datasets...", "shapes: 64 images"]
    shown += ["Starting training...", "Epoch 1/4: loss=", "Epoch 4/4: loss=", "trained encoder", "raw pixels"]
    shown += ["untrained encoder", f"Run: {folder}"]
    at = [out.index(text) for text in shown]
    assert at == sorted(at)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "extra",
    [
        ("model.drop_path_rate=0.2", "loss.type=sigreg"),
        ("training.accumulation_steps=2", "loss.type=combined"),
        ("model.drop_path_rate=0.2", "model.use_target_encoder=false", "loss.type=sigreg"),
        ("loss.hierarchy_weights=[0,0]", "masking.num_masks=0", "loss.type=sigreg", "data.num_views=2"),
        ("loss.type=sigreg", "data.multicrop.num_local_crops=2", "data.augmentation.solarization=0.3"),
    ],
    ids=["sigreg", "combined", "no target encoder", "image level alone", "local crops"],
)
def test_twenty_steps_are_ten_and_ten(
    configure: Configure, tmp_path: Path, workers: int, extra: tuple[str, ...]
) -> None:
    extra = (*extra, f"data.num_workers={workers}", "evaluation.eval_frequency=0")
    train(configure(*extra, "training.max_steps=20", folder="whole"))
    train(configure(*extra, "training.max_steps=10", folder="parts"))
    train(configure(*extra, "training.max_steps=20", folder="parts"), resume=True)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (checkpoint.load_newest(tmp_path / name / "checkpoints")[0] for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert_equal_moments(whole, parts)
    timing = {"images_per_second", "memory_gb"}
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_resume_redoes_what_was_not_saved(configure: Configure, tmp_path: Path) -> None:
    extra = ("evaluation.eval_frequency=0", "checkpoint.save_frequency=0", "checkpoint.save_frequency_steps=6")
    train(configure(*extra, "training.max_steps=20", folder="whole"))
    train(configure(*extra, "training.max_steps=15", folder="cut"))
    for path in checkpoint.find(tmp_path / "cut" / "checkpoints")[:1]:
        assert path.name == "step-00000015"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(configure(*extra, "training.max_steps=20", folder="cut"), resume=True)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [line["step"] for line in records(tmp_path / "cut")] == list(range(1, 21))


def test_a_folder_with_a_run_is_refused_and_an_empty_one_resumes_from_nothing(configure: Configure) -> None:
    config = configure("training.max_steps=2", "evaluation.eval_frequency=0")
    train(config, resume=True)
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        train(config)


def test_a_run_is_not_continued_under_other_settings(configure: Configure) -> None:
    train(configure("training.max_steps=2", "evaluation.eval_frequency=0"))
    with pytest.raises(ConfigError, match=r"training\.lr: the run has 0\.0005, the config says 0\.001") as refused:
        train(configure("training.max_steps=4", "training.lr=1e-3", "model.depth=4"), resume=True)
    assert "model.depth: the run has 3, the config says 4" in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("evaluation.eval_frequency=0", "checkpoint.save_frequency=0", "checkpoint.save_frequency_steps=5")
    train(configure(*extra, "training.max_steps=10"))
    newest, older = checkpoint.find(tmp_path / "run" / "checkpoints")
    file = newest / checkpoint.WEIGHTS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert checkpoint.load_newest(newest.parent)[0].step == 5  # type: ignore[union-attr]
    train(configure(*extra, "training.max_steps=6"), resume=True)
    assert "does not match its checksum" in capsys.readouterr().err
    for path in checkpoint.find(older.parent):
        (path / checkpoint.TRAINER).write_bytes(b"")
    with pytest.raises(StorageError, match="no intact checkpoint"):
        train(configure(*extra, "training.max_steps=12"), resume=True)


def test_two_runs_do_not_share_a_folder(configure: Configure, tmp_path: Path) -> None:
    holder = RunFolder(tmp_path / "run", "holder", Logging(use_tensorboard=False))
    with pytest.raises(FolderInUseError) as refused:
        train(configure("training.max_steps=1"))
    assert refused.value.exit_code == 75
    holder.close()
    train(configure("training.max_steps=1", "evaluation.eval_frequency=0"))


def test_accumulating_gives_the_step_of_the_whole_batch(configure: Configure, tmp_path: Path) -> None:
    extra = ("evaluation.eval_frequency=0", "training.max_steps=4")
    train(configure(*extra, folder="whole"))
    train(configure(*extra, "training.accumulation_steps=4", folder="parts"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_step_that_is_not_finite_touches_nothing(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("evaluation.eval_frequency=0", "checkpoint.save_frequency_steps=1", "checkpoint.keep_last_k=9")
    render = Batch.render

    def poisoned(self: Batch, views: object) -> torch.Tensor:
        images = render(self, views)  # type: ignore[arg-type]
        return images * float("nan") if 16 <= int(self.positions.min()) < 32 else images  # steps 2 and 3

    monkeypatch.setattr(Batch, "render", poisoned)
    train(configure(*extra, "training.max_steps=6"))
    states = {p.name: checkpoint.load(p) for p in checkpoint.find(tmp_path / "run" / "checkpoints")}
    assert_equal(states["step-00000002"].weights, states["step-00000004"].weights)
    assert not torch.equal(*(states[f"step-0000000{i}"].weights["predictor.queries"] for i in (4, 5)))
    assert all(torch.isfinite(w).all() for w in states["step-00000006"].weights.values())
    assert int(states["step-00000006"].trainer["progress"]["bad_steps"]) == 2
    assert int(states["step-00000006"].trainer["progress"]["bad_in_a_row"]) == 0
    assert records(tmp_path / "run")[-1]["bad_steps"] == 2


def test_too_many_such_steps_in_a_row_stop_the_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Batch.render
    monkeypatch.setattr(Batch, "render", lambda self, views: render(self, views) * float("inf"))
    with pytest.raises(DivergedError, match="not finite in 3 steps in a row") as stopped:
        train(configure("training.max_bad_steps=3"))
    assert stopped.value.exit_code == 4
    assert not checkpoint.find(tmp_path / "run" / "checkpoints")


def test_a_folder_of_images_needs_no_labels(
    small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for i in range(12):
        place = tmp_path / "photos" / f"album{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + 3 * i, 50), 60).convert("RGB").save(place / f"{i}.jpg")
    rest = [text for text in small if not text.startswith("data.datasets")]
    overrides = (f"data={tmp_path / 'photos'}", *rest, f"experiment.output_dir={tmp_path / 'run'}")
    assert train(load_config(None, (*overrides, "training.epochs=2"))) == {}
    out = capsys.readouterr().out
    assert "folder: 12 images" in out
    assert "k-NN skipped: no source has labels" in out
    with pytest.raises(DataError, match="k-NN skipped"):
        evaluate_run(tmp_path / "run", [])


def test_without_a_target_encoder_nothing_of_it_is_saved_logged_or_probed(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = train(configure("model.use_target_encoder=false", "training.max_steps=3"))
    assert not any("target" in name for name in weights(tmp_path / "run"))
    assert not any("momentum" in line for line in records(tmp_path / "run"))
    assert {"eval/knn", "eval/knn_pixels", "eval/knn_random", "eval/linear"} <= results.keys()
    assert not any(name.endswith("_online") for name in results)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "without averaging" in line)
    assert "%" not in row
    assert evaluate_run(tmp_path / "run", []) == results


def test_the_image_level_alone_trains_without_a_predictor(configure: Configure, tmp_path: Path) -> None:
    alone = ("loss.hierarchy_weights=[0,0]", "masking.num_masks=0", "loss.type=sigreg", "data.num_views=2")
    results = train(configure(*alone, "training.max_steps=24"))
    lines = [line for line in records(tmp_path / "run") if "loss" in line]
    assert {name for name in lines[0] if name.startswith("loss/")} == {"loss/sigreg/invariance", "loss/sigreg/sigreg"}
    assert sum(line["loss"] for line in lines[-4:]) < sum(line["loss"] for line in lines[:4])
    assert all(line[key] is not None for line in lines for key in ("std/level0", "std/level1", "rankme"))
    assert not any(name.startswith("predictor") for name in weights(tmp_path / "run"))
    assert {"eval/knn", "eval/knn_online", "eval/knn_level1"} <= results.keys()


# Time


def measured(monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> None:
    """Let the machine be measured in a tenth of a second and take so long for a step."""

    def quick(run: Run) -> Measured:
        return replace(measure_run(run, 0.1), seconds_per_step=seconds_per_step)

    monkeypatch.setattr("hjepa.train.measure_run", quick)


def test_a_run_ends_within_its_time_with_its_schedule_at_its_end(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_room(run: Run) -> Measured:
        found = measure_run(run, 1.0)
        # Tests run side by side: the machine may be a quarter as fast a moment later.
        return replace(found, seconds_per_step=4 * found.seconds_per_step)

    monkeypatch.setattr("hjepa.train.measure_run", with_room)
    started = time.monotonic()
    train(
        configure("training.epochs=null", "training.max_time=18s", "evaluation.max_train=16", "evaluation.max_test=8")
    )
    assert 3 < time.monotonic() - started < 18.5
    steps = [line for line in records(tmp_path / "run") if "loss" in line]
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0]
    assert saved is not None
    assert saved.step == steps[-1]["step"] == saved.trainer["progress"]["total"]
    assert steps[-1]["lr"] == pytest.approx(1e-6)
    assert max(line["lr"] for line in steps) == pytest.approx(5e-4, rel=0.01)
    assert saved.trainer["progress"]["seconds"] < 18
    out = capsys.readouterr()
    assert f"Planned: {saved.step} steps (" in out.out
    assert ", within 18s" in out.out
    assert "used up" not in out.err


def test_the_rate_in_the_record_is_that_of_steps_also_after_an_evaluation(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_probe(*given: Any) -> dict[str, float]:
        time.sleep(3)
        return probe(*given)

    monkeypatch.setattr("hjepa.train.probe", long_probe)
    train(configure("training.epochs=3", "evaluation.eval_frequency=1", "logging.log_frequency=3"))
    lines = [line for line in records(tmp_path / "run") if "images_per_second" in line]
    probed = [line["step"] for line in records(tmp_path / "run") if "eval/knn" in line]
    assert probed == [8, 16, 24]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert min(line["images_per_second"] for line in lines) > 3 * 8 / 3  # three steps and a probe take longer


def test_measuring_leaves_no_trace_where_the_time_is_enough(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, 0.1)
    extra = ("training.epochs=1", "evaluation.eval_frequency=0", "model.drop_path_rate=0.2")
    train(configure(*extra, folder="plain"))
    train(configure(*extra, "training.max_time=1h", folder="timed"))
    assert_equal(weights(tmp_path / "plain"), weights(tmp_path / "timed"))
    plain, timed = (checkpoint.load_newest(tmp_path / name / "checkpoints")[0] for name in ("plain", "timed"))
    assert plain is not None
    assert timed is not None
    assert_equal_moments(plain, timed)
    assert {p.name for p in (tmp_path / "timed").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    assert "training.epochs=null takes them" in capsys.readouterr().out


def test_epochs_that_would_take_longer_are_fewer_steps(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, 100)
    extra = ("evaluation.eval_frequency=0", "training.warmup_epochs=1", "model.ema.momentum=0.5")
    train(configure(*extra, "training.max_time=20m"))  # 0.97 * 1200 s: 11 steps of 32
    lines = records(tmp_path / "run")
    assert len(lines) == 11
    assert lines[-1]["lr"] == pytest.approx(1e-6)
    warmup = 8 * 11 / 32
    assert [line["lr"] for line in lines[:3]] == pytest.approx([5e-4 * (i + 1) / (warmup + 1) for i in range(3)])
    assert lines[0]["momentum"] == 0.5
    assert lines[-1]["momentum"] == pytest.approx(0.9)
    out = capsys.readouterr().out
    assert "Planned: 11 steps (1.4 epochs) at 100 s" in out
    assert "All of training.epochs=4 would take 0.89h" in out


def test_the_page_has_its_time_within_the_runs(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(run: Run) -> Measured:
        return replace(measure_run(run, 0.1), seconds_per_step=100, seconds_of_report=600.0)

    monkeypatch.setattr("hjepa.train.measure_run", slow)
    extra = ("evaluation.eval_frequency=0", "logging.use_report=true", "model.ema.momentum=0.5")
    train(configure(*extra, "training.max_time=20m"))  # 0.97 * 1200 s: 5 steps, where there were 11 without the page
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0]
    assert saved is not None
    assert saved.step == 5
    assert saved.trainer["progress"]["reserve"] > 600
    assert (tmp_path / "run" / "report.html").exists()


def test_a_warmup_longer_than_the_time_is_refused_with_one_that_fits(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 100)
    extra = ("training.epochs=null", "training.max_time=20m", "evaluation.eval_frequency=0")
    with pytest.raises(ConfigError, match=r"warmup_epochs: 10 leaves nothing of the 1\.38 epochs .* use 0\.14"):
        train(configure(*extra, "training.warmup_epochs=10"))
    train(configure(*extra, "training.warmup_epochs=0.14"), resume=True)


def test_a_continued_run_keeps_the_number_of_steps_that_was_planned(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("training.epochs=null", "training.max_time=30m", "evaluation.eval_frequency=0")
    measured(monkeypatch, 100)
    train(configure(*extra, folder="whole"))
    train(configure(*extra, "training.max_steps=7", folder="parts"))
    assert checkpoint.find(tmp_path / "parts" / "checkpoints")[0].name == "step-00000007"
    measured(monkeypatch, 1)
    capsys.readouterr()
    train(configure(*extra, folder="parts"), resume=True)
    assert "Planned" not in capsys.readouterr().out
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for folder in ("whole", "parts"):
        saved = checkpoint.load_newest(tmp_path / folder / "checkpoints")[0]
        assert saved is not None
        assert saved.step == saved.trainer["progress"]["total"] == 17  # 0.97 * 1800 s
        assert records(tmp_path / folder)[-1]["lr"] == pytest.approx(1e-6)


def test_time_that_is_used_up_ends_the_run_with_a_word_and_a_checkpoint(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(run: Run) -> float:
        """A clock that steps alone move, however long the machine takes for anything else."""
        _, first = starts.setdefault(id(run), (run, run.progress.step))
        return run.progress.seconds + 0.25 * (run.progress.step - first)

    starts: dict[int, tuple[Run, int]] = {}
    monkeypatch.setattr(Run, "seconds", property(seconds))
    measured(monkeypatch, 1e-4)
    extra = ("training.epochs=null", "evaluation.eval_frequency=0")
    train(configure(*extra, "training.max_time=2s"))
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0]
    assert saved is not None
    reserve = saved.trainer["progress"]["reserve"]
    assert saved.step == max(0, int((2 - reserve) / 0.25)) + 1 < saved.trainer["progress"]["total"]
    assert saved.trainer["progress"]["seconds"] == 0.25 * saved.step
    assert records(tmp_path / "run")[-1]["step"] == saved.step
    found = capsys.readouterr()
    assert f"training.max_time=2s is used up after step {saved.step} of " in found.err
    assert f"Run: {tmp_path / 'run'}" in found.out
    # The time of all processes counts: what is continued is still over it, and with more of it goes on.
    train(configure(*extra, "training.max_time=2s"), resume=True)
    assert "is used up" in capsys.readouterr().err
    assert len(records(tmp_path / "run")) == saved.step + 1
    train(configure(*extra, "training.max_time=1h", f"training.max_steps={saved.step + 3}"), resume=True)
    assert "is used up" not in capsys.readouterr().err
    assert len(records(tmp_path / "run")) == saved.step + 3


# A batch as large as fits


def test_an_automatic_batch_is_written_down_as_numbers_and_trains_as_they_do(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hjepa.memory.largest_batch", lambda *args: 5)  # 4 is the largest that divides 16
    extra = ("evaluation.eval_frequency=0", "loss.type=combined")
    auto = ("data.batch_size=auto", "data.global_batch_size=16")
    train(configure(*extra, *auto, "training.max_steps=5", folder="auto"))
    assert "Batch: 16 images a step, computed in 4 part(s)" in capsys.readouterr().out
    written = load_config(tmp_path / "auto" / "config.yaml")
    assert (written.data.batch_size, written.training.accumulation_steps) == (16, 4)
    assert written.data.global_batch_size is None
    numbers = ("data.batch_size=16", "training.accumulation_steps=4")
    train(configure(*extra, *numbers, "training.max_steps=5", folder="numbers"))
    assert_equal(weights(tmp_path / "auto"), weights(tmp_path / "numbers"))

    # The numbers stay, whatever the machine says now; the folder's own config continues the run as well.
    monkeypatch.setattr("hjepa.memory.largest_batch", lambda *args: 16)
    train(configure(*extra, *auto, "training.max_steps=7", folder="auto"), resume=True)
    written = load_config(tmp_path / "auto" / "config.yaml", ("training.max_steps=9",))
    assert (written.data.batch_size, written.training.accumulation_steps) == (16, 4)
    train(written, resume=True)
    train(configure(*extra, *numbers, "training.max_steps=9", folder="numbers"), resume=True)
    assert_equal(weights(tmp_path / "auto"), weights(tmp_path / "numbers"))


def test_evaluating_a_run_again_gives_its_figures(configure: Configure, tmp_path: Path) -> None:
    results = train(configure("training.max_steps=3", "evaluation.linear=false"))
    assert evaluate_run(tmp_path / "run", []) == results
    assert evaluate_run(tmp_path / "run", ["evaluation.knn.k=1"]) != results
    with pytest.raises(ConfigError, match="an evaluation changes"):
        evaluate_run(tmp_path / "run", ["model.depth=2"])
    with pytest.raises(ConfigError, match="no checkpoint here"):
        evaluate_run(tmp_path / "nothing", [])
    written = tmp_path / "run" / "config.yaml"
    written.write_text(written.read_text().replace("depth: 3", "depth: 4"))
    with pytest.raises(ConfigError, match=r"config\.yaml: model\.depth: not what the checkpoint was trained with"):
        evaluate_run(tmp_path / "run", [])


def test_never_evaluating_means_never(configure: Configure, tmp_path: Path) -> None:
    assert train(configure("training.max_steps=2", "evaluation.eval_frequency=0")) == {}
    assert not any("eval/knn" in line for line in records(tmp_path / "run"))


def test_gradient_checkpointing_trains_to_the_same_weights(configure: Configure, tmp_path: Path) -> None:
    for enabled in ("false", "true"):
        extra = (f"training.use_gradient_checkpointing={enabled}", "evaluation.eval_frequency=0")
        train(configure(*extra, "model.drop_path_rate=0.2", "training.max_steps=3", folder=enabled))
    assert_equal(weights(tmp_path / "false"), weights(tmp_path / "true"))


def test_amp_is_bfloat16_and_changes_little(configure: Configure, tmp_path: Path) -> None:
    for enabled in ("false", "true"):
        extra = (f"training.use_amp={enabled}", "evaluation.eval_frequency=0", "training.max_steps=2")
        train(configure(*extra, folder=enabled))
    a, b = (records(tmp_path / enabled)[0]["loss"] for enabled in ("false", "true"))
    assert a != b
    assert a == pytest.approx(b, rel=0.02)
