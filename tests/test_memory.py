"""How many images fit: by a meter that is known, and by the true one in processes of their own."""

import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hjepa.build import create_hjepa_from_config
from hjepa.config import Config, load_config
from hjepa.device import free_memory
from hjepa.errors import ConfigError
from hjepa.fabric import open_fabric
from hjepa.memory import largest_batch, settle_batch_size, synthetic_batch

MB = 10**6
PER_IMAGE = 40 * MB
CPU = torch.device("cpu")


@pytest.fixture
def auto(small: tuple[str, ...]) -> tuple[str, ...]:
    return (*small, "data.batch_size=auto", "data.global_batch_size=64")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine on which every image takes 40 MB; tells which sizes were tried."""
    tried: list[int] = []

    def counted(config: Config, size: int, device: torch.device) -> object:
        tried.append(size)
        return synthetic_batch(config, size, device)

    monkeypatch.setattr("hjepa.memory.synthetic_batch", counted)
    monkeypatch.setattr("hjepa.memory.resident_memory", lambda: 100 * MB)
    monkeypatch.setattr("hjepa.memory.peak_memory", lambda device: 100 * MB + tried[-1] * PER_IMAGE)
    return tried


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("hjepa.memory.free_memory", lambda device: size)


def settled(overrides: tuple[str, ...], saved: Config | None = None) -> Config:
    config = load_config(None, overrides)
    fabric, _ = open_fabric(config)
    dumped = None if saved is None else saved.model_dump(mode="json")
    return settle_batch_size(config, create_hjepa_from_config(config), fabric, dumped)


@pytest.mark.skipif(sys.platform != "linux", reason="addresses are counted from /proc")
def test_a_limit_of_the_shell_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (taken + 300 * MB, resource.RLIM_INFINITY))
    assert 200 * MB < free_memory(CPU) <= 300 * MB
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert free_memory(CPU) > 300 * MB


@pytest.mark.parametrize(
    ("images", "parts"),
    # 0.7 of what is free is used; of the divisors of 64 the largest that fits is taken.
    [(1000, 1), (100, 1), (80, 2), (45, 4), (20, 8), (3, 32), (2, 64)],
)
def test_a_small_memory_takes_several_parts(
    auto: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch, images: int, parts: int
) -> None:
    free(monkeypatch, images * PER_IMAGE)
    config = settled(auto)
    assert (config.data.batch_size, config.training.accumulation_steps) == (64, parts)
    assert config.data.global_batch_size is None
    assert max(machine) <= min(16, max(2, images))  # memory is not filled to find out


def test_the_default_is_256_images(small: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)
    config = settled((*small, "data.batch_size=auto"))
    assert (config.data.batch_size, config.training.accumulation_steps) == (256, 1)


def test_statistics_of_a_batch_need_two_images_at_a_time(
    auto: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 2 * PER_IMAGE)  # one image fits
    assert settled(auto).training.accumulation_steps == 64
    with pytest.raises(ConfigError, match=r"data\.batch_size: 2 image\(s\) do not fit"):
        settled((*auto, "loss.type=sigreg"))


@pytest.mark.parametrize("size", [0, MB, PER_IMAGE // 2])
def test_what_does_not_fit_is_refused_with_a_remedy(
    auto: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    free(monkeypatch, size)
    with pytest.raises(
        ConfigError, match=r"do not fit .* set training.use_gradient_checkpointing=true or choose a smaller model"
    ):
        settled(auto)


@pytest.mark.parametrize("fits", [0, 2, 8])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_a_device_that_refuses_memory_ends_the_search(
    auto: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, fits: int, error: RuntimeError
) -> None:
    def refused(config: Config, size: int, device: torch.device) -> object:
        if size > fits:
            raise error
        return synthetic_batch(config, size, device)

    monkeypatch.setattr("hjepa.memory.synthetic_batch", refused)
    monkeypatch.setattr("hjepa.memory.resident_memory", lambda: 100 * MB)
    monkeypatch.setattr("hjepa.memory.peak_memory", lambda device: 101 * MB)
    free(monkeypatch, 10**12)
    if fits:
        assert settled(auto).training.accumulation_steps == 64 // fits
    else:
        with pytest.raises(ConfigError, match="do not fit"):
            settled(auto)


def test_a_fault_that_is_not_about_memory_is_not_hidden(auto: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, size: int, device: torch.device) -> object:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("hjepa.memory.synthetic_batch", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        settled(auto)


def test_gradients_are_not_taken_for_the_cost_of_an_image(
    auto: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def counted(config: Config, size: int, device: torch.device) -> object:
        tried.append(size)
        return synthetic_batch(config, size, device)

    monkeypatch.setattr("hjepa.memory.synthetic_batch", counted)
    monkeypatch.setattr("hjepa.memory.resident_memory", lambda: 0)
    monkeypatch.setattr("hjepa.memory.peak_memory", lambda device: 400 * MB + tried[-1] * PER_IMAGE)
    free(monkeypatch, 5000 * MB)  # 0.7 of it less the gradients is room for 77 images
    assert settled(auto).training.accumulation_steps == 1


def test_no_memory_is_no_room_even_where_a_step_shows_no_growth(
    auto: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the process gave back stays with its allocator, so that a small step takes nothing new.
    monkeypatch.setattr("hjepa.memory.resident_memory", lambda: 100 * MB)
    monkeypatch.setattr("hjepa.memory.peak_memory", lambda device: 100 * MB)
    free(monkeypatch, 0)
    with pytest.raises(ConfigError, match="do not fit"):
        settled(auto)


def test_a_run_that_is_continued_keeps_its_numbers(
    auto: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 20 * PER_IMAGE)
    before = settled(auto)
    free(monkeypatch, 10**12)
    tried = len(machine)
    assert settled(auto, before) == before
    assert len(machine) == tried


def test_a_trial_leaves_the_model_as_it_was(auto: tuple[str, ...]) -> None:
    config = load_config(None, (*auto, "loss.type=combined"))
    model = create_hjepa_from_config(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert largest_batch(config, model, CPU, 8, nullcontext) > 0
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_batch_of_a_trial_is_what_training_sees(small: tuple[str, ...]) -> None:
    extra = ("loss.type=sigreg", "data.num_views=2", "data.multicrop.num_local_crops=3")
    images, masks, crops = synthetic_batch(load_config(None, (*small, *extra)), 5, CPU)
    assert images.shape == (2, 5, 3, 64, 64)
    assert masks.context.shape[0] == masks.targets.shape[0] == 10
    assert crops is not None
    assert crops.shape == (3, 5, 3, 24, 24)
    assert synthetic_batch(load_config(None, small), 5, CPU)[2] is None


# The true meter: what is found for a budget, and what that many images then take in a fresh process.
TRIAL = """
import os, sys
from contextlib import nullcontext
import torch
torch.set_num_threads(1)
from hjepa import memory
from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.objective import Objective
config = load_config(None, sys.argv[1:])
model = create_hjepa_from_config(config).train()
memory.free_memory = lambda device: int(BUDGET / memory.SHARE["cpu"])
reader, writer = os.pipe()
if os.fork():
    found = memory.largest_batch(config, model, torch.device("cpu"), 512, nullcontext)
    os.write(writer, str(found).encode())
    os.wait()
else:
    def resident(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    found = int(os.read(reader, 20))
    before = resident("VmRSS")
    losses = Objective(config.loss, 2, model.taps)(model(*memory.synthetic_batch(config, found, "cpu")), 0)
    losses.total.backward()
    print(found, resident("VmHWM") - before)
"""

PARENT = """
import subprocess, sys
ballast = bytearray(SIZE)
ballast[::4096] = bytes([1]) * len(ballast[::4096])
del ballast
subprocess.run([sys.executable, "-c", *sys.argv[1:]], check=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize("held", [pytest.param(1, marks=pytest.mark.slow), 10**9], ids=["small parent", "large parent"])
def test_what_is_found_fits_and_is_not_far_below(auto: tuple[str, ...], held: int) -> None:
    budget = 300 * MB
    words = [TRIAL.replace("BUDGET", str(budget)), *auto, "data.image_size=128", "model.embed_dim=64", "model.depth=6"]
    command = [sys.executable, "-c", PARENT.replace("SIZE", str(held)), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, taken = map(int, done.stdout.split())
    assert 0.6 * budget < taken < 1.25 * budget, (found, taken / MB)


@pytest.mark.parametrize("cached", [0, 10_000 * MB])
def test_what_the_allocator_of_mps_keeps_is_neither_taken_nor_needed(
    auto: tuple[str, ...], machine: list[int], monkeypatch: pytest.MonkeyPatch, cached: int
) -> None:
    # What an M1 would say: memory comes by the gibibyte and stays with the allocator until that is emptied.
    gibibyte, kept = 2**30, [cached]

    def peak(device: torch.device) -> int:
        kept[0] = max(kept[0], -(-tried[-1] * PER_IMAGE // gibibyte) * gibibyte if tried else 0)
        return kept[0]

    def on_the_cpu(config: Config, size: int, device: torch.device) -> object:
        tried.append(size)
        return synthetic_batch(config, size, CPU)

    tried: list[int] = []
    monkeypatch.setattr("hjepa.memory.synthetic_batch", on_the_cpu)
    monkeypatch.setattr("hjepa.memory.peak_memory", peak)
    monkeypatch.setattr("hjepa.memory.forget_peak", lambda device: kept.__setitem__(0, 0))
    free(monkeypatch, 0)
    monkeypatch.setattr("hjepa.memory.free_memory", lambda device: 20 * gibibyte - kept[0])
    config = load_config(None, auto)
    found = largest_batch(config, create_hjepa_from_config(config), torch.device("mps"), 1000, nullcontext)
    # Eight tenths of 20 GiB at 40 MB an image are 429; what comes by the gibibyte costs some of them.
    assert 340 <= found <= 429
    assert found in tried
