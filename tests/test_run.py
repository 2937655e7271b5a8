import pytest
import torch

from hjepa.config import load_config
from hjepa.console import Console
from hjepa.errors import ConfigError
from hjepa.fabric import open_fabric
from hjepa.run import Progress, build


def test_a_batch_that_does_not_divide_into_the_processes_is_refused_before_any_is_started(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"data\.batch_size: 8 does not divide into 3 process\(es\) .* use 9"):
        open_fabric(load_config(None, small))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    fabric, kind = open_fabric(load_config(None, small))
    assert (fabric.world_size, fabric.device.type, kind.name) == (1, "cpu", "cpu")


def test_progress_is_restored_as_it_was_and_is_another_object() -> None:
    before = Progress.start(torch.device("cpu"))
    before.step, before.total, before.seconds = 3, 40, 1.5
    before.bad_steps += 2
    after = Progress.restore(vars(before), torch.device("cpu"))
    assert vars(after) == vars(before)
    after.bad_steps += 1
    after.step += 1
    assert (int(before.bad_steps), before.step) == (2, 3)


@pytest.mark.parametrize(
    ("use_amp", "units", "told"),
    [
        ("true", {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ("true", {"avx2": True}, True),
        ("true", {"amx_bf16": True}, False),
        ("auto", {"avx2": True}, False),
        ("false", {"avx2": True}, False),
    ],
)
def test_a_processor_that_is_slow_in_bfloat16_says_so_when_told_to_use_it(
    small: tuple[str, ...],
    use_amp: str,
    units: dict[str, object],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    config = load_config(None, [*small, f"training.use_amp={use_amp}"])
    fabric, kind = open_fabric(config)
    with Console() as console:
        build(config, fabric, kind, console)
    warned = "training.use_amp: this processor is slower in bfloat16 than in float32" in capsys.readouterr().err
    assert warned is told
