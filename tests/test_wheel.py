"""What an installation holds: every module, the recipes behind their link, the report's templates."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hjepa.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked; built in a copy, since setuptools leaves folders behind."""
    tmp = tmp_path_factory.mktemp("wheel")
    tree = tmp / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("hjepa", "configs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", tmp, tree], check=True, capture_output=True)
    (wheel,) = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp / "site")
    return tmp / "site"


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts and path.parts[0] != "recipes"}


def test_a_wheel_holds_what_the_tree_holds(installed: Path) -> None:
    assert files(installed / "hjepa") == files(ROOT / "hjepa")
    recipes = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.yaml")}
    assert {path.name: path.read_bytes() for path in (installed / "hjepa" / "recipes").iterdir()} == recipes


def test_an_installation_knows_the_recipe_for_photos(installed: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "hjepa", "train", "data=./photos", "training.epochs=many"],
        cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.stdout.startswith("Loading config... none given: configs/folder.yaml")
    assert said.returncode == 2
    assert "training.epochs" in said.stderr
    assert load_config(installed / "hjepa" / "recipes" / "folder.yaml") == load_config(ROOT / "configs" / "folder.yaml")
