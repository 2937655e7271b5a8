"""docs/tutorial.md, done as it stands there, on real photos."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from imagenette import CLASSES, unpack_photos

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"^    (hjepa .*)$", PAGE, re.MULTILINE)
SHORTER = re.findall(r"`(training\.max_steps=\d+)`", PAGE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_500_photos_and_20_labels_to_a_classifier_in_five_commands(tmp_path: Path) -> None:
    found = unpack_photos(tmp_path / "photos", 130)
    for label, paths in found.items():
        (tmp_path / "labelled" / label).mkdir(parents=True)
        (tmp_path / "new").mkdir(exist_ok=True)
        for path in paths[:5]:
            shutil.copy(path, tmp_path / "labelled" / label)
        for path in paths[125:]:
            path.rename(tmp_path / "new" / path.name)
    assert len(list((tmp_path / "photos").iterdir())) == 500
    shutil.copytree(ROOT / "configs", tmp_path / "configs")

    assert len(COMMANDS) == 5
    (shorter,) = set(SHORTER)
    said = []
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        words += [shorter] * (words[0] in ("check", "train"))
        done = subprocess.run(
            [sys.executable, "-m", "hjepa", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)

    assert "500 images" in said[0]
    assert "Verdict:" in said[1]
    for row in ("trained encoder", "raw pixels", "untrained encoder", "always the most frequent class"):
        assert re.search(rf"^{row} +\d+\.\d %", said[2], re.MULTILINE), said[2]
    predicted = read(tmp_path / "predictions.csv")
    assert len(predicted) == 500
    assert {row["predicted"] for row in predicted} <= set(CLASSES.values())
    assert Counter(row["label"] for row in predicted if row["label"]) == dict.fromkeys(CLASSES.values(), 5)
    assert sorted(row["file"] for row in read(tmp_path / "new.csv")) == sorted(
        p.name for p in (tmp_path / "new").iterdir()
    )
    for left in re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE):
        assert (tmp_path / left).exists(), left


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
