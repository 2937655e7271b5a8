"""The page of a run: its figures are those of the record, and what is missing is left out and said."""

import fcntl
import json
import re
import shlex
import shutil
import sys
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hjepa import checkpoint
from hjepa.cli import main
from hjepa.config import load_config
from hjepa.console import Console
from hjepa.errors import ConfigError, StorageError
from hjepa.report import write_after_run, write_report
from hjepa.report.features import colours_of, likeness, nearest
from hjepa.report.plot import MAX_POINTS, Chart, Line, Scale, lay_out, number, spread, thin
from hjepa.report.records import read_run
from hjepa.train import train

LEVELS = ("loss.type=sigreg", "data.num_views=2")


def run_of(folder: Path, *overrides: str) -> Path:
    train(load_config(None, (*SMALL, f"experiment.output_dir={folder}", *overrides)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two levels, an image level, two evaluations, and its page."""
    return run_of(
        tmp_path_factory.mktemp("report") / "run", *LEVELS, "evaluation.eval_frequency=2", "logging.use_report=true"
    )


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def page_of(*runs: Path) -> str:
    return write_report(runs, runs[0].parent / "page.html").read_text()


def text_of(page: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def hjepa(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """A command line, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["hjepa", *words])
    with pytest.raises(SystemExit) as ending:
        main()
    return int(ending.value.code or 0)


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def chart(page: str, title: str) -> dict[str, object]:
    """What a chart's curves hold."""
    figure = next(part for part in page.split('<figure class="chart"')[1:] if f"<h3>{title}</h3>" in part)
    found: dict[str, object] = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])
    return found


def test_a_finished_run_leaves_one_page_that_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert len(page.encode()) < 5e6
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert "default-src 'none'" in page
    assert all(alt for alt in re.findall(r'<img src="[^"]*" alt="([^"]*)"', page))
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img src="[^"]*" alt="[^"]+"', page))
    assert titles(page) == [
        "What the encoder is worth",
        "How it went",
        "What it was shown",
        "What it makes of images",
        "Nearest neighbours",
        "Settings",
        "Where it ran",
        "What to do next",
    ]


def test_figures_are_those_of_the_record(finished: Path) -> None:
    page, lines = (finished / "report.html").read_text(), records(finished)
    steps, probes = [x for x in lines if "loss" in x], [x for x in lines if "eval/knn" in x]
    text, last = text_of(page), probes[-1]
    gap = last["eval/knn"] - last["eval/knn_pixels"]
    assert "finished: 32 steps" in text
    assert "Healthy: no sign" in text
    assert f"k-NN accuracy {last['eval/knn']:.1f} % at step 32" in text
    assert f"{abs(gap):.1f} points {'above' if gap >= 0 else 'below'} raw pixels" in text
    for name, title in (
        ("loss", "Loss"),
        ("rankme", "RankMe"),
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
    ):
        line = chart(page, title)["lines"][0]
        assert line["x"] == [values["step"] for values in steps]
        assert line["y"] == pytest.approx([values[name] for values in steps], rel=1e-4)
    by_level = chart(page, "Loss by level")["lines"]
    for level, line in enumerate(by_level):
        assert line["y"] == pytest.approx([values[f"loss/level{level}"] for values in steps], rel=1e-4)
    knn = chart(page, "k-NN accuracy")["lines"]
    for line, suffix in zip(knn, ("", "_online", "_pixels", "_random"), strict=True):
        assert line["y"] == pytest.approx([values[f"eval/knn{suffix}"] for values in probes], rel=1e-4)
    environment = json.loads((finished / "environment.jsonl").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] in torch.__version__
    assert environment["device"] in text


def test_the_same_run_gives_the_same_page_up_to_the_date(finished: Path, tmp_path: Path) -> None:
    def dateless() -> str:
        page = write_report([finished], tmp_path / "again.html").read_text()
        return re.sub(r"Written [-\d]+ [:\d]+", "", page)

    assert dateless() == dateless()


def test_masks_are_those_of_the_first_step(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    seen = {int(n) for n in re.findall(r"sample \d: (\d+) of 64 patches are visible", page)}
    (count,) = seen
    covered = [part.count("h1v1h-1z") for part in re.findall(r'class="hidden" d="([^"]*)"', page)]
    assert covered == [64 - count] * 8  # four samples, two views
    fine, coarse = (set(re.findall(rf"sample \d: (\d+) cells of level {level}", page)) for level in (0, 1))
    assert max(map(int, coarse)) <= max(map(int, fine)) / 4


def test_the_settings_that_differ_stand_first(finished: Path) -> None:
    page = (finished / "report.html").read_text().replace("<wbr>", "")
    changed, rest = page.partition("<details>")[0], page.partition("<details>")[2]
    assert "<code>model.embed_dim</code>" in changed
    assert "<code>training.lr</code>" in rest
    assert "<code>training.lr</code>" not in changed


VARIANTS = {
    "one level": (("model.num_hierarchies=1",), "level 0", "level 1"),
    "no prediction": (
        (*LEVELS, "loss.hierarchy_weights=[0,0]", "masking.num_masks=0", "model.use_target_encoder=false"),
        "SIGReg: shape",
        "Explained variance",
    ),
    "no target encoder": ((*LEVELS, "model.use_target_encoder=false"), "The encoder after step 2", "Momentum"),
    "an average": (
        (*LEVELS, "model.use_target_encoder=false", "model.use_weight_average=true"),
        "The average of the encoder's weights after step 2",
        "The target encoder after",
    ),
    "local crops": ((*LEVELS, "data.multicrop.num_local_crops=3"), "crop 3", "crop 4"),
    "rotary": (("model.rope.use_rope=true",), "Final tokens", "Missing"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_that_a_run_lacks_are_left_out(name: str, tmp_path: Path) -> None:
    overrides, there, absent = VARIANTS[name]
    run = run_of(tmp_path / "run", *overrides, "training.max_steps=2", "evaluation.eval_frequency=0")
    page = page_of(run)
    text = text_of(page)
    assert there in text
    assert absent not in text
    assert "was not measured (evaluation.eval_frequency=0)" in text
    assert "finished: 2 steps" in text  # max_steps
    assert "Too early to tell" in text
    assert titles(page)[0] == "How it went"
    assert "Nearest neighbours" in titles(page)


def test_a_damaged_record_is_read_as_far_as_it_goes(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    again = {**first, "loss": 123.0}
    spoilt = [*lines, json.dumps(again), json.dumps({**first, "step": 33, "loss": None}), "[]", '{"step": 34, "lo']
    (copy / "metrics.jsonl").write_text("\n".join(spoilt))
    record = read_run(copy)
    assert record.unreadable == 2
    assert record.steps[first["step"]]["loss"] == 123.0
    assert record.steps[33]["loss"] is None
    page = page_of(copy)
    loss = chart(page, "Loss")["lines"][0]
    assert loss["y"][0] == 123.0
    assert loss["y"][-1] is None
    assert "2 line(s) of metrics.jsonl could not be read" in text_of(page)


def test_a_run_without_checkpoint_or_record_still_has_a_page(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    (copy / "environment.jsonl").unlink()
    text = text_of(page_of(copy))
    assert "No step has been recorded." in text
    assert "no checkpoint has been saved yet" in text
    assert "What it was shown" in text
    assert "did not write down what it ran on" in text
    assert "--resume" in text


def test_a_stopped_run_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "a run", "training.max_steps=3", "evaluation.eval_frequency=0")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_steps: 3", "max_steps: null"))
    text = text_of(page_of(run))
    assert "stopped at step 3 of 32" in text
    assert f"hjepa train '{run}/config.yaml' --resume" in text
    moved = run.rename(tmp_path / "moved to")
    (command,) = re.findall(r"<code>(hjepa train .* --resume)</code>", unescape(page_of(moved)))
    assert hjepa(monkeypatch, *shlex.split(command)[1:]) == 0
    capsys.readouterr()
    assert hjepa(monkeypatch, "report", str(moved)) == 0
    assert capsys.readouterr().out == f"Report: {moved / 'report.html'}\n"
    text = text_of((moved / "report.html").read_text())
    assert "finished: 32 steps" in text
    assert "As of the last of 2 starts" in text
    assert chart(page_of(moved), "Loss")["lines"][0]["x"] == list(range(1, 33))
    assert hjepa(monkeypatch, "report", str(tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_goes_on_is_said_to(copy: Path) -> None:
    with (copy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = text_of(page_of(copy))
    assert "still running: step 32" in text
    assert "--resume" not in text
    assert "still running" not in text_of(page_of(copy))


def test_images_that_are_gone_leave_the_curves(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 256, (80, 96, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / kind / f"{i}.png")
    settings = [text for text in SMALL if not text.startswith("data.datasets")]
    data = f"data.datasets=[{{name: imagefolder, path: {tmp_path / 'images'}}}]"
    run = tmp_path / "run"
    train(load_config(None, (*settings, data, f"experiment.output_dir={run}", "training.max_steps=2")))
    assert "Nearest neighbours" in titles(page_of(run))
    shutil.rmtree(tmp_path / "images")
    page = page_of(run)
    assert "Pictures that are missing" in titles(page)
    assert "the images cannot be read: " in text_of(page)
    assert "<img " not in page
    assert chart(page, "Loss")["lines"][0]["x"] == [1, 2]


def test_a_checkpoint_that_does_not_belong_to_the_config_is_not_drawn(copy: Path) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("num_hierarchies: 2", "num_hierarchies: 1"))
    text = text_of(page_of(copy))
    assert "config.yaml is not what the checkpoint was trained with: model.num_hierarchies" in text
    for path in checkpoint.find(copy / "checkpoints"):
        (path / checkpoint.WEIGHTS).write_bytes(b"")
    assert "no intact checkpoint" in text_of(page_of(copy))


def test_an_encoder_that_is_not_finite_is_not_drawn(copy: Path) -> None:
    saved, _ = checkpoint.load_newest(copy / "checkpoints")
    assert saved is not None
    shutil.rmtree(copy / "checkpoints")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in saved.weights.items()}
    checkpoint.save(copy / "checkpoints", saved.step, broken, saved.trainer, saved.config)
    page = page_of(copy)
    assert "the encoder's features are not finite" in text_of(page)
    assert "What it makes of images" not in titles(page)
    assert "What it was shown" in titles(page)


def test_text_is_text_and_never_a_part_of_the_page(copy: Path) -> None:
    odd = copy.rename(copy.parent / "<b>&'run")
    config = (odd / "config.yaml").read_text()
    (odd / "config.yaml").write_text(config.replace("tags: []", "tags: ['</script><script>alert(1)</script>']"))
    lines = (odd / "metrics.jsonl").read_text()
    first = json.loads(lines.splitlines()[0])
    (odd / "metrics.jsonl").write_text(lines + json.dumps({**first, "loss/</script><i>": 1.0}) + "\n")
    page = page_of(odd)
    assert "<b>&'run" not in page
    assert "alert(1)</script>" not in page
    assert "</script><i>" not in page
    assert "<b>&'run" in text_of(page)


def test_runs_side_by_side(finished: Path, tmp_path: Path) -> None:
    other = run_of(
        tmp_path / "run", "model.num_hierarchies=1", "training.lr=1e-3", "training.max_steps=4", "evaluation.knn.k=3"
    )
    page = page_of(finished, other)
    text = text_of(page.replace("<wbr>", ""))
    steps = [[x for x in records(run) if "loss" in x] for run in (finished, other)]
    lines = chart(page, "Loss")["lines"]
    assert [line["x"] for line in lines] == [[x["step"] for x in run] for run in steps]
    assert [line["y"][-1] for line in lines] == pytest.approx([run[-1]["loss"] for run in steps], rel=1e-4)
    assert len(chart(page, "Loss of level 1")["lines"]) == 1
    knn = [[x for x in records(run) if "eval/knn" in x][-1]["eval/knn"] for run in (finished, other)]
    assert f"k-NN, % {knn[0]:.1f} {knn[1]:.1f}" in text
    assert f"last loss {number(steps[0][-1]['loss'])} {number(steps[1][-1]['loss'])}" in text
    assert "training.lr 0.0005 0.001" in text
    assert "data.image_size" not in text
    names = re.findall(r'<th scope="col"><i class="key c\d"></i>(.*?)</th>', page)
    assert names == ["/".join(run.parts[-2:]) for run in (finished, other)]


def test_what_cannot_be_reported_is_one_line(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="the same run twice"):
        write_report([finished, finished / ".." / finished.name])
    with pytest.raises(ConfigError, match="9 runs are more than the 8"):
        write_report([tmp_path / str(i) for i in range(9)])
    with pytest.raises(StorageError, match="cannot be written"):
        write_report([finished], tmp_path / "absent" / "page.html")


def test_a_report_that_fails_never_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    run = run_of(tmp_path / "run", "training.max_steps=1", "logging.use_report=true")
    assert checkpoint.find(run / "checkpoints")
    assert "no report was written" in capsys.readouterr().err
    write_after_run(tmp_path / "nowhere", Console())
    assert "no run here" in capsys.readouterr().err


def test_a_thinned_curve_keeps_its_peaks_and_ends() -> None:
    values = np.sin(np.arange(20_000) / 50)
    values[12_345], values[777] = 9.0, -9.0
    points = [(i, float(v)) for i, v in enumerate(values)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert set(kept) <= set(points)
    assert {points[0], points[-1], (12_345, 9.0), (777, -9.0)} <= set(kept)
    assert thin([(i, None) for i in range(3000)])[0] == (0, None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_never_cover_one_another(places: list[float]) -> None:
    moved = spread(places, 0.1)
    order = sorted(moved)
    assert all(0 - 1e-9 <= place <= 1 + 1e-9 for place in moved)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(order))
    assert [moved.index(m) for m in order] == sorted(range(len(places)), key=lambda i: (places[i], i))


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5))
def test_ticks_are_round_and_inside(low: float, length: float) -> None:
    ticks = Scale(low, low + length).ticks(4)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in ticks)


def test_a_curve_of_one_value_and_one_without_any() -> None:
    drawn = lay_out(Chart("x", (Line("a", [(5, 0.9)]), Line("b", [(1, None)]))))
    assert drawn is not None
    assert [line["name"] for line in drawn["lines"]] == ["a"]
    assert lay_out(Chart("x", (Line("b", [(1, None)]),))) is None
    logarithmic = lay_out(Chart("x", (Line("", [(1, 1e-6), (2, 1.0)]),), may_be_log=True))
    assert logarithmic is not None
    assert logarithmic["log"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.3456, "12.35"), (3452.0, "3452"), (1e-6, "1.00e-6"), (None, "-"), (-0.25, "-0.2500")],
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_colours_follow_the_features() -> None:
    maps = torch.zeros(2, 4, 4, 6)
    maps[0, :2], maps[1, 1:3] = torch.arange(6.0), torch.arange(6.0)
    colours, share = colours_of(maps)
    assert share == pytest.approx(1)
    assert colours[0, 0, 0].tolist() == colours[1, 1, 0].tolist() != colours[0, 3, 0].tolist()
    turned, _ = colours_of(maps @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0])
    first = turned[..., 0].astype(int)
    assert (
        np.isin(abs(first - colours[..., 0]), (0, 1)).all() or np.isin(abs(255 - first - colours[..., 0]), (0, 1)).all()
    )


def test_likeness_and_neighbours_are_cosines_without_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 4, generator=generator) + 10
    centred = (tokens - tokens.mean(dim=(0, 1))).numpy()
    mean = centred.mean(1)
    wanted = (
        np.einsum("nkd,nd->nk", centred, mean) / np.linalg.norm(centred, axis=2) / np.linalg.norm(mean, axis=1)[:, None]
    )
    assert likeness(tokens).numpy() == pytest.approx(wanted, abs=1e-4)
    bank = torch.randn(20, 4, generator=generator) + 10
    values, indices = nearest(bank[[3, 7]], bank, 2)
    assert indices[:, 0].tolist() == [3, 7]
    assert values[:, 0].tolist() == pytest.approx([1, 1])
