import pytest

from hjepa.config import load_config
from hjepa.config.checks import process_checks


def wrong(processes: int, *overrides: str) -> str | None:
    config = load_config(None, overrides)
    return process_checks(config.data, config.training, processes)


def test_a_batch_has_to_divide_into_processes_and_parts() -> None:
    assert wrong(1) is wrong(2) is wrong(64) is None
    assert wrong(2, "training.accumulation_steps=4") is None
    assert wrong(3) == (
        "data.batch_size: 64 does not divide into 3 process(es) x training.accumulation_steps=1; use 66"
    )
    told = wrong(3, "training.accumulation_steps=4")
    assert told is not None
    assert told.endswith("use 72")


@pytest.mark.parametrize(("processes", "parts", "batch"), [(3, 1, 64), (3, 4, 64), (5, 2, 2), (7, 8, 8)])
def test_what_is_offered_divides(processes: int, parts: int, batch: int) -> None:
    settings = (f"training.accumulation_steps={parts}", f"data.batch_size={batch}")
    told = wrong(processes, *settings)
    assert told is not None
    assert wrong(processes, settings[0], f"data.batch_size={told.rpartition(' ')[2]}") is None


def test_auto_is_settled_later() -> None:
    assert wrong(3, "data.batch_size=auto") is None
