"""`hjepa eval` as a whole: which rows, which figures, on which data, and every refusal in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hjepa.assess.assess import assess
from hjepa.assess.gather import Tokens
from hjepa.assess.outcome import Outcome
from hjepa.assess.request import FEATURES, NEIGHBOURS, PROBES, Request, numbers, words
from hjepa.cli import main
from hjepa.config import load_config
from hjepa.errors import ConfigError, DataError, StorageError, UserError
from hjepa.evaluate import evaluate_run
from hjepa.train import train


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders that are not divided: thirty images of each of three colours."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 200)), ("green", (40, 190, 60)), ("red", (200, 50, 50))):
        (folder / name).mkdir()
        for number in range(30):
            pixels = np.clip(np.asarray(colour) + generator.integers(-30, 30, (20, 26, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:02d}.png")
    return folder


def names(outcome: Outcome) -> set[str]:
    return {name.removeprefix("eval/") for name in outcome.values}


def test_the_runs_own_figures_come_out_again_and_more(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the same images, in the same arithmetic: what the run says of itself, to the digit."""
    own = evaluate_run(finished)
    capsys.readouterr()
    outcome = assess(Request(finished, overrides=("evaluation.dense=false",)))
    repeated = {n: v for n, v in own.items() if not n.endswith(("tap1", "tap2", "tap3")) and "patch" not in n}
    assert len(repeated) == 12
    assert {name: outcome.values[name] for name in repeated} == pytest.approx(repeated, abs=1e-9)
    shown = capsys.readouterr().out
    for row in ("trained encoder", "without averaging (online)", "raw pixels", "untrained encoder"):
        assert row in shown
    assert f"eval/knn_random = {own['eval/knn_random']:.2f}" in shown
    assert f"Run: {finished}" in shown
    bank = 48
    wanted = {"knn", "linear", "nmi", "rankme", *(f"knn@{k}" for k in NEIGHBOURS if k <= bank)}
    for row in ("", "_level0", "_level1", "_online", "_online_level1", "_pixels", "_random", "_random_level0"):
        assert {f"{name}{row}" for name in wanted} <= names(outcome)
    assert not any(name.startswith(("patch", "miou")) for name in names(outcome))
    assert any("few-shot with 10 per class left out: " in note for note in outcome.notes)
    assert "few-shot with 10 per class left out" in shown


def test_patches_of_shapes(finished: Path) -> None:
    outcome = assess(Request(finished, probes=("dense",), features=("last",)))
    own = {name: value for name, value in evaluate_run(finished).items() if "patch" in name}
    assert len(own) == 8
    assert {name: outcome.values[name] for name in own} == pytest.approx(own, abs=1e-9)
    for row in ("", "_online", "_pixels", "_random"):
        assert {f"miou{row}", f"patch_accuracy{row}"} <= names(outcome)
    assert not any(name.startswith(("knn", "linear")) for name in names(outcome))


def test_any_labelled_folder_and_any_checkpoint(finished: Path, photos: Path, tmp_path: Path) -> None:
    """A copied checkpoint on images that the run never saw; the file holds every figure and its baselines."""
    shutil.copytree(finished / "checkpoints" / "step-00000002", tmp_path / "copy")
    (tmp_path / "copy" / "trainer.pt").unlink()
    out = tmp_path / "figures.json"
    request = Request(
        tmp_path / "copy",
        data=(str(photos),),
        probes=("knn", "few-shot", "clusters"),
        features=("last",),
        encoder="online",
        neighbours=(3, 7),
        json=out,
    )
    outcome = assess(request)
    rows = ("_online", "_pixels", "_random")
    figures = ("knn", "knn@3", "knn@7", "shot1", "shot5", "shot10", "nmi")
    assert names(outcome) == {f"{figure}{row}" for figure in figures for row in rows}
    written = json.loads(out.read_text())
    assert written["step"] == 2
    assert written["images"] == {"train": 48, "test": 9}
    assert written["data"] == [{"name": "imagefolder", "path": str(photos)}]
    assert {"date", "sha256", "environment", "settings", "checkpoint"} <= written.keys()
    assert set(written["figures"]) == names(outcome)
    entry = written["figures"]["shot5_online"]
    assert entry["value"] == outcome.values["eval/shot5_online"]
    assert entry["baselines"] == {
        "pixels": outcome.values["eval/shot5_pixels"],
        "random": outcome.values["eval/shot5_random"],
    }
    assert entry["std"] >= 0
    assert outcome.values["eval/knn_pixels"] == 100  # colours are told apart by anything
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_folder_with_train_alone_holds_out_a_tenth(finished: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data" / "train")
    outcome = assess(Request(finished, data=(str(tmp_path / "data"),), probes=("knn",), features=("last",)))
    assert outcome.about["images"]["test"] == 9
    assert outcome.notes == [
        f"{tmp_path / 'data'}: has no val/ or test/; a tenth of each class of train/ is held out to ask"
    ]


def test_probes_that_are_trained(finished: Path, photos: Path) -> None:
    """One epoch of each: every row that can have it has it, and it says what it chose."""
    request = Request(
        finished,
        data=(str(photos),),
        probes=("sgd", "attentive", "finetune", "logistic"),
        features=("last", "levels"),
        encoder="target",
        epochs=2,
    )
    outcome = assess(request)
    for name in ("sgd", "attentive", "logistic"):
        assert {f"{name}{row}" for row in ("", "_level0", "_level1", "_pixels", "_random")} <= names(outcome)
    assert {"finetune", "finetune_random"} <= names(outcome)
    assert "finetune_pixels" not in names(outcome)
    tuned = outcome.rows["", "last"]["finetune"]
    assert set(tuned.chosen) == {"lr", "layer_decay", "epochs"}
    assert outcome.rows["", "last"]["sgd"].chosen["epochs"] == 2
    assert outcome.values["eval/logistic_pixels"] == 100


def test_the_feature_pyramid_is_a_neck(small: tuple[str, ...], finished: Path, tmp_path: Path) -> None:
    settings = ("model.fpn.use_fpn=true", "model.fpn.feature_dim=12", "training.max_steps=1")
    off = ("evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path / 'run'}")
    train(load_config(None, (*small, *settings, *off)))
    quick = ("knn", "rankme")
    outcome = assess(Request(tmp_path / "run", probes=quick, features=("fpn", "taps"), encoder="target"))
    assert {"knn_fpn", "knn_random_fpn", "knn_level0"} <= names(outcome)
    assert not {"knn", "knn_level1"} & names(outcome)
    assert outcome.values["eval/rankme_fpn"] <= 12
    patches = assess(Request(tmp_path / "run", probes=("dense",), features=("fpn",), encoder="target"))
    assert {"miou_fpn", "patch_where_fpn", "miou_random_fpn", "miou_pixels"} <= names(patches)
    with pytest.raises(ConfigError, match=r"--features fpn: the run has no feature pyramid \(model.fpn.use_fpn\)"):
        assess(Request(finished, features=("fpn",)))
    every = assess(Request(finished, probes=("knn",), features=words("all", "--features", FEATURES), encoder="target"))
    assert {"knn", "knn_level0", "knn_level1"} <= names(every)
    assert not any("fpn" in name for name in names(every))


def test_masks_are_asked_of_patches_alone(finished: Path, tmp_path: Path) -> None:
    for number in range(10):
        classes = np.zeros((64, 64), np.uint8)
        classes[:, :32] = 1 + number % 2
        for name, pixels in (("images", np.repeat((90 * classes)[..., None], 3, axis=2)), ("masks", classes)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    outcome = assess(Request(finished, data=(str(tmp_path / "images"),), masks=tmp_path / "masks"))
    rows = ("", "_level0", "_online", "_online_level0", "_pixels", "_random", "_random_level0")
    assert names(outcome) == {f"{figure}{row}" for figure in ("miou", "patch_accuracy") for row in rows}
    assert outcome.values["eval/miou_pixels"] > 90
    assert outcome.about["classes"] == 3


def test_a_run_without_an_average_has_one_encoder(small: tuple[str, ...], tmp_path: Path) -> None:
    settings = ("model.use_target_encoder=false", "training.max_steps=1", "evaluation.eval_frequency=0")
    train(load_config(None, (*small, *settings, f"experiment.output_dir={tmp_path / 'run'}")))
    for encoder in ("target", "online", "both"):
        outcome = assess(Request(tmp_path / "run", probes=("knn",), features=("last",), encoder=encoder))
        assert {"knn", "knn_pixels", "knn_random"} <= names(outcome)
        assert "knn_online" not in names(outcome)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": ("knn", "liner")}, "--probes liner: there is no such choice; did you mean linear?"),
        ({"probes": ("x",)}, f"--probes x: there is no such choice; choose from {', '.join(PROBES)}"),
        ({"features": ("lst",)}, "--features lst: there is no such choice; did you mean last?"),
        ({"encoder": "teacher"}, "--encoder teacher: there is no such choice"),
        ({"overrides": ("photos",)}, "'photos': an override has the form key=value; every folder needs a --data"),
        ({"overrides": ("model.depth=2",)}, "an evaluation changes evaluation.*, data.* and device only"),
        ({"overrides": ("data.datasets=[{name: shapes}]",), "data": ("x",)}, "--data names the images already"),
        ({"masks": Path("m")}, "--masks m: belong to one folder of images; name it with --data"),
        ({"masks": Path("m"), "data": ("x",), "probes": ("dense", "knn")}, "only dense looks"),
        ({"epochs": 3}, "--epochs: none of the probes asked for is trained (sgd, attentive, finetune are)"),
        ({"probes": ("linear",), "neighbours": (1,)}, "--k: k-NN is not among the probes asked for"),
        ({"json": Path("/absent/x.json")}, "--json /absent/x.json: no such folder /absent"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(options: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError) as caught:
        Request(Path("absent"), **options)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_words_of_the_command_line() -> None:
    assert words("knn, linear,knn", "--probes", PROBES) == ("knn", "linear")
    assert words("all", "--probes", PROBES) == PROBES
    assert numbers("20,1,20", "--k") == (1, 20)
    with pytest.raises(ConfigError, match="--probes: names none"):
        words(" ,", "--probes", PROBES)
    for text in ("0", "a", "1,,2", "-3"):
        with pytest.raises(ConfigError, match=f"--k {text}: .* is no number of neighbours"):
            numbers(text, "--k")


def test_what_cannot_be_probed_is_one_line(finished: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "class").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    for file in sorted((photos / "red").iterdir())[:4]:
        shutil.copy(file, tmp_path / "one" / "class")
        shutil.copy(file, tmp_path / "flat")
    folder = f"data.datasets=[{{name: folder, path: {tmp_path / 'flat'}}}]"
    cases: list[tuple[dict, type[UserError], str]] = [  # type: ignore[type-arg]
        ({"data": (str(tmp_path / "one"),)}, DataError, "all images are of one class; two or more are needed"),
        ({"data": (str(tmp_path / "flat"),)}, DataError, "no class folders in"),
        ({"data": (str(tmp_path / "absent"),)}, DataError, "is missing; expected a folder of images"),
        ({"overrides": (folder,)}, DataError, "no labels, or no image to ask"),
        ({"data": (str(photos),), "probes": ("dense",)}, ConfigError, "none of the sources has masks"),
        ({"neighbours": (49,)}, ConfigError, "--k 49: there are only 48 training images"),
    ]
    for options, kind, said in cases:
        with pytest.raises(kind) as caught:
            assess(Request(finished, **options))
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="no such folder"):
        assess(Request(tmp_path / "absent"))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(StorageError, match=r"--json .*x\.json: cannot be written"):
        Outcome({"step": 1}).write(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_command(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hjepa(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hjepa", "eval", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    out = tmp_path / "x.json"
    options = ("--probes", "knn,clusters", "--features", "taps", "--encoder", "target", "--k", "3", "--json", str(out))
    assert hjepa(str(finished), "evaluation.knn.k=5", "--data", str(photos), *options) == 0
    shown = capsys.readouterr().out
    for text in ("trained encoder, level 0 (taps)", "raw pixels", "untrained encoder, level 0 (taps)", "k=3", "NMI"):
        assert text in shown
    assert "eval/knn_level0 = " in shown
    assert f"Figures: {out}" in shown
    assert json.loads(out.read_text())["settings"]["evaluation"]["knn"]["k"] == 5
    assert hjepa(str(finished), "--probes", "knn,foo") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --probes foo: there is no such choice")
    assert len(error.splitlines()) == 1


def test_what_does_not_fit_into_memory_is_halved_or_computed_again(
    finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(
        finished,
        data=(str(photos),),
        probes=("linear", "attentive"),
        features=("last",),
        encoder="target",
        epochs=1,
        overrides=("data.cache_gb=0",),
    )
    whole = assess(request).values
    monkeypatch.setattr("hjepa.assess.gather.HALF_ABOVE", 0)
    monkeypatch.setattr("hjepa.assess.gather.TOKENS_UP_TO", 0)
    asked: list[int] = []
    compute = Tokens._compute
    monkeypatch.setattr(Tokens, "_compute", lambda self, rows: asked.append(len(rows)) or compute(self, rows))
    again = assess(request).values
    assert sum(asked) > 3 * (38 + 48)  # both trainings of three rows
    assert again.keys() == whole.keys()
    for name, value in whole.items():
        assert again[name] == pytest.approx(value, abs=100 / 9 + 1e-6)  # one of nine images may tip over
