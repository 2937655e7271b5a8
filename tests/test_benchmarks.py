"""Every program of `benchmarks/`, on so little that its figures mean nothing: what it prints is still its table."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINTED = """\
model: {encoder_type: vit, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
data: {datasets: [{name: shapes, length: 64}], image_size: 64, batch_size: 16}
training: {epochs: 2}
evaluation: {max_train: 64, max_test: 32}
device: cpu
"""
# Program, its words, the first column of the tables that it prints.
PROGRAMS = {
    "step": (["--sizes", "Ti", "--images", "32", "--batch", "2", "--rounds", "1"], ["model"]),
    "costs": (
        [
            "--size",
            "Ti",
            "--image",
            "128",
            "--batch",
            "2",
            "--rounds",
            "1",
            "--only",
            "Muon",
            "of the predictor",
            "8 im",
        ],
        ["setting", "blocks computed twice, 64 images", "growth"],
    ),
    "input": (["--rounds", "1", "--seconds", "0.1"], ["part", "input"]),
    "start": (
        ["--files", "1000", "--sizes", "1000", "10000", "--rounds", "1"],
        ["command", "images", "images of an epoch"],
    ),
    "growth": (["--images", "100", "--steps", "3", "--rounds", "1"], ["images", "steps so far"]),
    "processes": (
        [
            "--size",
            "Ti",
            "--image",
            "32",
            "--patch",
            "4",
            "--batch",
            "2",
            "--rounds",
            "1",
            "--set",
            "data.num_workers=0",
        ],
        ["processes"],
    ),
    "evaluation": (["--rows", "2000", "--width", "8", "--queries", "50", "--rounds", "1"], ["probe"]),
    "checkpointing": (["recipe.yaml"], ["what"]),
}


def module(name: str) -> ModuleType:
    """A file of `benchmarks/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_new_tables_replace_old_ones_and_nothing_else() -> None:
    put = module("bench").put
    text = "# Performance\n\n## A step\n\nWords.\n\n<!-- step -->\nold\n<!-- end of step -->\n\nMore words.\n"
    once = put(text, "step", "new")
    assert once == text.replace("old", "new")
    assert put(once, "step", "new") == once
    # A part that the document lacks is put at its end, where the next call finds it.
    twice = put(once, "input", "table")
    assert twice.startswith(once)
    assert twice.endswith("## Input\n\n<!-- input -->\ntable\n<!-- end of input -->\n")
    assert put(twice, "input", "table") == twice


def test_every_part_of_make_bench_is_tried_and_has_its_place() -> None:
    parts = module("bench").PARTS
    assert {Path(program).stem for program, *_ in parts.values()} == set(PROGRAMS)
    document = (ROOT / "docs" / "performance.md").read_text()
    for part in parts:
        assert document.count(f"<!-- {part} -->") == document.count(f"<!-- end of {part} -->") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_prints_its_tables(program: str, tmp_path: Path) -> None:
    words, heads = PROGRAMS[program]
    (tmp_path / "recipe.yaml").write_text(CHECKPOINTED)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in done.stdout.split("\n\n") if block.startswith("| ")]
    found = {lines[0].split("|")[1].strip(): lines[2:] for lines in blocks}
    assert list(found) == heads
    for lines in found.values():
        assert lines
        assert all(re.search(r"\| [\d,.]+", line) for line in lines)
        assert not re.search(r"\b(nan|inf)\b", " ".join(lines))
