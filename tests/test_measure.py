"""What a run costs: counts against counting, and a trial that leaves no trace."""

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hjepa.config import load_config
from hjepa.console import Console
from hjepa.fabric import open_fabric
from hjepa.measure import MARGIN, Measured, measure_run, occasions, restored, time_steps
from hjepa.run import Run, build
from hjepa.step import Taken, take_step
from hjepa.train import is_due

QUIET = Measured(
    **dict.fromkeys((field.name for field in fields(Measured)), 0)
    | {"seconds_per_step": 0.5, "seconds_of_evaluation": 3.0, "seconds_of_baselines": 7.0, "seconds_of_save": 2.0}
)


@pytest.fixture
def run(small: tuple[str, ...], tmp_path: Path) -> Run:
    config = load_config(None, (*small, f"experiment.output_dir={tmp_path}", "evaluation.linear=false"))
    return build(config, *open_fabric(config), Console(enabled=False))


def test_what_only_the_first_step_takes_is_no_part_of_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def slow_at_first(*args: Any) -> Taken:
        nonlocal calls
        calls += 1
        time.sleep(2.0 * (calls == 1))
        return take_step(*args)

    monkeypatch.setattr("hjepa.measure.take_step", slow_at_first)
    with restored(run):
        times = time_steps(run, 0.1)
    assert calls >= 5
    assert times.first > 1.0
    assert times.usual < 1.0


@pytest.mark.parametrize("total", [1, 7, 8, 20, 33, 64])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 0), (0, 0), (0, 5), (1, 8), (1, 7), (2, 3), (1, 9)])
def test_saves_and_evaluations_are_counted_as_they_happen(total: int, epochs: int, steps: int) -> None:
    settings = (f"checkpoint.save_frequency={epochs}", f"checkpoint.save_frequency_steps={steps}")
    config = load_config(None, (*settings, "evaluation.eval_frequency=2"))
    saved = {step for step in range(1, total + 1) if is_due(step, 8 * epochs, steps)} | {total}
    evaluated = {step for step in range(1, total + 1) if is_due(step, 16)} | {total}
    assert occasions(config, total, 8) == (len(evaluated), len(saved))


@pytest.mark.parametrize("seconds", [30.0, 61.0, 400.0])
def test_as_many_steps_as_fit_and_not_one_more(run: Run, seconds: float) -> None:
    steps = QUIET.steps_within(seconds, run)
    assert QUIET.seconds_of(steps, run) <= MARGIN * seconds < QUIET.seconds_of(steps + 1, run)
    # 8 steps and a save in an epoch; the last evaluation and the baselines.
    assert QUIET.seconds_of(16, run) == pytest.approx(16 * 0.5 + 2 * 2.0 + 3.0 + 7.0)


def test_no_time_at_all_is_one_step(run: Run) -> None:
    assert QUIET.steps_within(0.0, run) == QUIET.steps_within(-5.0, run) == 1


def test_a_trial_leaves_no_trace(run: Run) -> None:
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with restored(run):
        found = measure_run(run, 0.1)
        assert not torch.equal(run.model.predictor.queries, before["predictor.queries"])  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(optimizer.state_dict()["state"] == {} for optimizer in run.optimizers)
    assert (run.progress.step, run.progress.total, int(run.progress.bad_steps)) == (0, 0, 0)
    assert 0 < found.seconds_per_step < 5
    assert found.seconds_of_evaluation > 0 < found.seconds_of_baselines
    assert found.bytes_of_save > sum(4 * value.numel() for value in before.values())


def test_a_trial_that_fails_leaves_no_trace_either(run: Run) -> None:
    before = run.model.predictor.queries.detach().clone()  # type: ignore[union-attr]

    def broken() -> None:
        with restored(run), torch.no_grad():
            run.model.predictor.queries.add_(1)  # type: ignore[union-attr]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        broken()
    assert torch.equal(run.model.predictor.queries, before)  # type: ignore[union-attr]


def test_the_page_and_the_pictures_are_part_of_what_a_run_takes(small: tuple[str, ...], tmp_path: Path) -> None:
    def measured(*overrides: str) -> tuple[Run, Measured]:
        settings = (*small, f"experiment.output_dir={tmp_path}", "evaluation.linear=false", *overrides)
        run = build(load_config(None, settings), *open_fabric(load_config(None, settings)), Console(enabled=False))
        with restored(run):
            return run, measure_run(run, 0.1)

    _, without = measured()
    assert without.seconds_of_report == without.seconds_of_pictures == 0
    run, both = measured("logging.use_report=true", "logging.use_pictures=true", "logging.use_tensorboard=true")
    assert 0 < both.seconds_of_pictures < both.seconds_of_report < 60
    assert both.seconds_at_end > both.seconds_of_evaluation + both.seconds_of_report
    # An evaluation every 10 epochs of 8 steps, and the last.
    plain = replace(both, seconds_of_report=0.0, seconds_of_pictures=0.0)
    more = both.seconds_of(200, run) - plain.seconds_of(200, run)
    assert more == pytest.approx(both.seconds_of_report + 3 * both.seconds_of_pictures)
