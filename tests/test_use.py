"""docs/use.md, done as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos
from PIL import Image

from hjepa.cli import main
from hjepa.config import load_config
from hjepa.train import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "use.md").read_text()
COMMANDS = re.findall(r"^    (hjepa .*)$", PAGE, re.MULTILINE)
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_command_and_program_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(tmp_path / "more")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "a.jpg").rename(tmp_path / "photos" / "one.jpg")
    (tmp_path / "more" / "b.png").rename(tmp_path / "photos" / "deep" / "two.png")
    noise = np.random.default_rng(0)
    lines = ["file,label"]
    for number in range(6):
        label = ("this", "that")[number % 2]
        path = tmp_path / "labelled" / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        lines.append(f"{path.relative_to(tmp_path)},{label}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    first, *rest = COMMANDS
    assert first.split()[:2] == ["hjepa", "train"]
    recipe, *words = first.split()[2:]
    shorter = ("training.max_steps=2", "evaluation.max_train=64", "evaluation.max_test=32", "data.cache_gb=0")
    train(load_config(ROOT / recipe, (*words, *shorter, "data.datasets.0.length=200", "device=cpu")))
    assert len(rest) >= 15
    for command in rest:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, command
        output = re.search(r"(?:-o|--picture) (\S+)", command)
        assert output is None or Path(output[1]).exists(), command

    assert len(PROGRAMS) == 2
    for program in PROGRAMS:
        names: dict[str, object] = {}
        exec(program, names)
        if "features" in names:
            assert names["features"].pooled.shape == (2, 128)  # type: ignore[attr-defined]
