"""Which arithmetic a device is given, and what it cannot do."""

import re
from collections.abc import Callable

import pytest
import torch

from hjepa.config import load_config
from hjepa.device import KINDS, autocasts, precision
from hjepa.errors import ConfigError
from hjepa.fabric import device_checks


def says(answer: object) -> Callable[..., object]:
    return lambda *_, **__: answer


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_a_processor_computes_in_bfloat16_where_it_has_fast_units_for_it(
    units: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", says(units), raising=False)
    assert autocasts("cpu", "auto") is expected
    assert precision(KINDS["cpu"], "auto") == ("bf16-mixed" if expected else "32-true")
    assert not autocasts("mps", "auto")
    for kind in KINDS:
        assert autocasts(kind, True)
        assert not autocasts(kind, False)


def test_a_torch_that_cannot_say_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision(KINDS["cpu"], "auto") == "32-true"


def test_a_gpu_without_bfloat16_is_refused_only_when_told_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision(KINDS["cuda"], "auto") == "32-true"
    with pytest.raises(ConfigError, match=r"this GPU has no bfloat16; set training\.use_amp=auto"):
        precision(KINDS["cuda"], True)


@pytest.mark.parametrize(
    ("kind", "local", "words", "refused"),
    [
        ("mps", 2, (), "device: mps takes one process"),
        ("cuda", 10_000, (), r"device: 10000 processes and \d+ GPU\(s\); lower --nproc-per-node"),
        (
            "mps",
            1,
            ("training.use_gradient_checkpointing=true", "model.drop_path_rate=0.1"),
            "on mps .* drops other paths",
        ),
        ("mps", 1, ("training.use_compile=true",), r"training\.use_compile: not on mps; set it to false"),
        ("cpu", 1, ("training.use_compile=true",), None),
        ("mps", 1, ("training.use_gradient_checkpointing=true",), None),
        ("mps", 1, ("training.use_gradient_checkpointing=predictor", "model.drop_path_rate=0.1"), None),
        ("cpu", 2, ("training.use_gradient_checkpointing=true", "model.drop_path_rate=0.1"), None),
    ],
)
def test_what_a_kind_of_device_cannot_do_is_refused_by_name(
    kind: str, local: int, words: tuple[str, ...], refused: str | None
) -> None:
    said = device_checks(load_config(None, words), kind, local, 1)
    assert re.search(refused, said) if refused else said == ""
