"""The ladder of `benchmarks/`, climbed in steps too few to learn anything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARMS = ("A0", "A1", "A2", "A2c", "A3", "A3c", "A4", "A4v", "A5", "A5c", "A5h")
RECIPE = """\
model: {encoder_type: vit, patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2, num_hierarchies: 2,
        predictor: {depth: 1, embed_dim: 16}, projector: {depth: 1, hidden_dim: 16, output_dim: 8}}
data: {datasets: [{name: shapes, length: 32}], image_size: 64, batch_size: 16, num_views: 2}
masking: {num_masks: 1, context_scale: [0.62, 0.62]}
loss: {type: sigreg, hierarchy_weights: [1, 0.5], predict_every: 2}
evaluation: {max_train: 64, max_test: 32}
logging: {log_frequency: 1, use_tensorboard: false, use_report: false}
device: cpu
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_arm_trains_once_and_stands_in_table_and_plot(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "ladder"
    out.mkdir()
    # As timed: three steps for each arm, two for the one that is slow.
    (out / "seconds.json").write_text(json.dumps(dict.fromkeys(ARMS, 0.2) | {"A5c": 0.3}))
    words = [
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--minutes",
        "0.01",
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--curve",
        "1",
    ]

    def climb() -> str:
        script = ROOT / "benchmarks" / "ladder.py"
        command = [sys.executable, str(script), *words, "--arms", *ARMS, "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout[done.stdout.index("| arm |") :]

    table = climb()
    results = {arm: json.loads((out / f"{arm}-1" / "result.json").read_text()) for arm in ARMS}
    assert [results[arm]["steps"] for arm in ARMS] == [2 if arm == "A5c" else 3 for arm in ARMS]
    assert re.findall(r"^\| (A\w+) ", table, re.MULTILINE) == list(ARMS)
    assert (out / "ladder.md").read_text() == table
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("ladder.png", "curve.png"))
    # Two steps an epoch: all but the slow arm are probed once before their end.
    probed = {arm: (out / f"{arm}-1" / "metrics.jsonl").read_text().count('"eval/knn":') for arm in ARMS}
    assert probed == dict.fromkeys(ARMS, 2) | {"A5c": 1}

    # A control differs from its arm in what it controls for, and in nothing else that costs.
    losses = {arm: (out / f"{arm}-1" / "metrics.jsonl").read_text() for arm in ARMS}
    assert "loss/pooled" in losses["A3c"]
    assert all("loss/pooled" not in losses[arm] for arm in ARMS if arm != "A3c")
    assert results["A2c"]["gflops"] == results["A2"]["gflops"] > results["A1"]["gflops"]
    assert results["A4"]["gflops"] < results["A4v"]["gflops"]
    assert results["A5h"]["gflops"] < min(results["A5"]["gflops"], results["A5c"]["gflops"])

    written = (out / "A1-1" / "result.json").stat().st_mtime_ns
    assert climb() == table
    assert (out / "A1-1" / "result.json").stat().st_mtime_ns == written
