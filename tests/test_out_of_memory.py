"""A device that refuses memory in the middle of a run: no half step, a word that helps, and the run goes on."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.console import Console
from hjepa.data.loader import Batch
from hjepa.errors import ConfigError, MemoryFullError
from hjepa.fabric import open_fabric
from hjepa.memory import settings_that_fit
from hjepa.optim import Muon, Schedules
from hjepa.run import Run, build
from hjepa.step import take_step
from hjepa.train import train

WORKER = Path(__file__).parent / "short_of_memory.py"
REFUSALS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.92 GB, max allowed: 18.13 GB)."),
    MemoryError(),
)


def assemble(small: tuple[str, ...], *extra: str) -> Run:
    config = load_config(None, (*small, "evaluation.eval_frequency=0", *extra))
    run = build(config, *open_fabric(config), Console(enabled=False))
    run.schedules = Schedules(config.training, config.model.ema, run.batches.steps_per_epoch)
    run.model.train()
    return run


def state(run: Run) -> list[torch.Tensor]:
    """Weights with the target's, and moments."""
    moments = [entry for o in run.optimizers for s in o.state_dict()["state"].values() for entry in s.values()]
    return [value.clone() for value in (*run.model.state_dict().values(), *moments)]


def step(run: Run, number: int) -> None:
    assert run.schedules is not None
    parts = run.batches.parts
    take_step(run, run.schedules, number, iter([run.batches[number * parts + part] for part in range(parts)]))


@pytest.mark.parametrize("refusal", REFUSALS, ids=["cuda", "linux", "windows", "cublas", "mps", "python"])
def test_a_step_that_runs_out_of_memory_moves_nothing(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    run = assemble(small, "training.accumulation_steps=2")
    step(run, 0)
    before, render, seen = state(run), Batch.render, []

    def refuse(self: Batch, views: object) -> torch.Tensor:
        seen.append(self)
        if len(seen) == 2:  # after the first part's backward pass
            raise refusal
        return render(self, views)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "render", refuse)
        with pytest.raises(MemoryFullError, match=r"4 image\(s\) at a time do not fit on cpu in step 2 .*; nothing"):
            step(run, 1)
    assert all(map(torch.equal, state(run), before))
    assert all(p.grad is None for p in run.model.parameters())
    assert not run.moving

    undisturbed = assemble(small, "training.accumulation_steps=2")
    for other in (run, undisturbed):
        for number in range(1 if other is run else 0, 3):
            step(other, number)
    assert all(map(torch.equal, state(run), state(undisturbed)))


def test_half_a_step_is_never_written(small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = assemble(small, "training.optimizer=muon")
    step(run, 0)
    before = state(run)

    def refuse(self: Muon) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run.optimizers[1].optimizer, "step", refuse.__get__(run.optimizers[1].optimizer))
    with pytest.raises(MemoryFullError):
        step(run, 1)
    assert not all(map(torch.equal, state(run), before))  # AdamW had moved its part
    with pytest.raises(AssertionError, match="half a step is never written"):
        run.state()


def test_another_fault_stays_what_it_is(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(self: Batch, views: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Batch, "render", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(load_config(None, (*small, "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path}")))


def advice(monkeypatch: pytest.MonkeyPatch, fits: int, settings: tuple[str, ...], automatic: bool = False) -> str:
    config = load_config(None, settings)
    fabric, kind = open_fabric(config)
    run = build(config, fabric, kind, Console(enabled=False))
    monkeypatch.setattr("hjepa.memory.largest_batch", lambda config, model, device, most, autocast: min(fits, most))
    return settings_that_fit(run.config, run.model, fabric, automatic)


@pytest.mark.parametrize(
    ("fits", "extra", "said"),
    [
        (7, (), "4 fit: continue with --resume training.accumulation_steps=2"),
        (1, (), "1 fit: continue with --resume training.accumulation_steps=8"),
        (3, ("training.accumulation_steps=2",), "2 fit: continue with --resume training.accumulation_steps=4"),
        (0, (), "recomputing takes less: continue with --resume training.use_gradient_checkpointing=true"),
        (4, ("loss.type=sigreg",), "recomputing takes less: continue with --resume "),
        (
            4,
            ("loss.type=sigreg", "training.use_gradient_checkpointing=true"),
            "4 fit, and loss.type=sigreg compares the images of a part: continue as another run with --resume "
            "--accept training.accumulation_steps training.accumulation_steps=2",
        ),
        (1, ("loss.type=combined", "training.use_gradient_checkpointing=true"), "no smaller part does either"),
        (0, ("training.use_gradient_checkpointing=true",), "no smaller part does either"),
    ],
)
def test_what_fits_is_named(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, fits: int, extra: tuple[str, ...], said: str
) -> None:
    assert advice(monkeypatch, fits, (*small, *extra)).startswith(said)


@pytest.mark.parametrize("kind", ["fixed", "auto"])
def test_what_is_named_is_accepted_and_continues_the_run(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ours = (*small, "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path / 'run'}", "training.max_steps=1")
    if kind == "auto":
        ours = (*ours, "data.batch_size=auto", "data.global_batch_size=8")

    def configured(*words: str) -> Config:
        return load_config(None, (*ours, *words))

    train(configured())
    render = Batch.render
    monkeypatch.setattr(Batch, "render", lambda self, views: (_ for _ in ()).throw(deepcopy(REFUSALS[0])))
    with pytest.raises(MemoryFullError) as full:
        train(configured("training.max_steps=3"), resume=True)
    monkeypatch.setattr(Batch, "render", render)
    words = str(full.value).partition("--resume ")[2].split()
    assert words[-1] == "training.accumulation_steps=2"
    train(configured("training.max_steps=3", *words), resume=True)
    assert checkpoint.find(tmp_path / "run" / "checkpoints")[0].name == "step-00000003"


def test_parts_of_a_batch_that_is_compared_as_a_whole_make_another_run(small: tuple[str, ...], tmp_path: Path) -> None:
    ours = (*small, "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path / 'run'}", "training.max_steps=1")
    train(load_config(None, (*ours, "loss.type=sigreg")))
    with pytest.raises(ConfigError, match=r"training\.accumulation_steps: the run has 1, the config says 2"):
        train(load_config(None, (*ours, "loss.type=sigreg", "training.accumulation_steps=2")), resume=True)
    parts = ("loss.type=sigreg", "training.accumulation_steps=2", "training.max_steps=2")
    train(load_config(None, (*ours, *parts)), resume=True, accept=["training.accumulation_steps"])
    with pytest.raises(ConfigError, match=r"the run has 2, the config says 1"):
        train(load_config(None, (*ours, "loss.type=sigreg")), resume=True)


def test_blocks_that_are_computed_twice_make_the_same_run(small: tuple[str, ...], tmp_path: Path) -> None:
    ours = (*small, "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path / 'run'}", "training.max_steps=1")
    train(load_config(None, (*ours, "loss.type=sigreg")))
    again = ("loss.type=sigreg", "training.use_gradient_checkpointing=true", "training.max_steps=2")
    train(load_config(None, (*ours, *again)), resume=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to a limit on its memory")
def test_a_limit_that_the_kernel_enforces_ends_the_run_and_the_named_settings_fit_it(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (*small, "data.datasets=[{name: shapes, length: 1024}]", "data.batch_size=256", "model.embed_dim=128")
    settings += ("training.max_steps=4", "checkpoint.save_frequency_steps=2", "evaluation.eval_frequency=0")
    # Large blocks go back to the kernel at once, and a thread has no reserve of its own: every step has to ask anew.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}

    def confined(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(WORKER), words[0], "train", *settings, *words[1:]]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    folder = tmp_path / "runs" / "hjepa" / "checkpoints"
    first = confined("after-save")
    assert first.returncode == 6, first.stderr
    (line,) = (line for line in first.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: memory: 256 image(s) at a time do not fit on cpu in step 3 (")
    assert "Traceback" not in first.stderr
    assert [path.name for path in checkpoint.find(folder)] == ["step-00000002"]
    before = checkpoint.load(folder / "step-00000002")
    assert before.step == 2

    (limit,) = re.findall(r"limit=\d+", first.stdout)
    words = line.partition("--resume ")[2].split()
    assert words
    assert confined(limit, "--resume").returncode == 6  # the same batch does not fit now either
    second = confined(limit, "--resume", *words)
    assert second.returncode == 0, second.stderr
    assert [path.name for path in checkpoint.find(folder)] == ["step-00000004", "step-00000002"]


def test_memory_that_ends_beside_a_step_is_told_as_well(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise MemoryError("Unable to allocate 2.00 GiB")

    monkeypatch.setattr("hjepa.train.probe", refuse)
    ours = (*small, f"experiment.output_dir={tmp_path / 'run'}", "training.max_steps=2")
    with pytest.raises(MemoryFullError, match=r"evaluation\.max_train") as full:
        train(load_config(None, ours))
    assert full.value.exit_code == 6
    monkeypatch.undo()
    smaller = ("data.cache_gb=1", "evaluation.max_train=24", "evaluation.batch_size=8")
    assert train(load_config(None, (*ours, *smaller)), resume=True)
