"""The site: it is built without a complaint, loads nothing from elsewhere, and the commands of its pages exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hjepa.cli import app
from hjepa.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Those that stand in indented blocks, without what stands before `hjepa`, comments, and words to be filled in."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^    (?!.*\.\.\.)(?:\S*/|\S+ .*-m )?hjepa (\w.*)$", text, re.MULTILINE)
    return [re.sub(r"\s(#|>) .*", "", command) for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = get_command(app)
    for command in commands(page):
        name, *words = shlex.split(command)
        context = known.commands[name].make_context(name, list(words))  # type: ignore[attr-defined]
        if name not in ("train", "check") or context.params["help_config" if name == "train" else "as_json"]:
            continue
        words = list(context.params["settings"] or [])
        config = words.pop(0) if words and "=" not in words[0] else None
        # The defaults and every recipe stand; what is put on top must be accepted.
        load_config(config, words)


def test_the_pages_hold_commands_to_look_at() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50


def test_the_site_is_built_and_asks_no_other_host(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= 18
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>", text), page
    assert "Encode images" in (tmp_path / "api.html").read_text()  # a docstring


def test_every_picture_is_shown_and_small() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"pictures/{picture.name}" in text
        assert 0 < picture.stat().st_size < 200_000
