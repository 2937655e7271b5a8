"""`hjepa classify`: what is learned from labels in each form, what is written, what is refused."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import hjepa
from hjepa.classify import classify
from hjepa.cli import main
from hjepa.data.shapes import Shapes
from hjepa.errors import ConfigError, StorageError
from hjepa.use.classifier import load_classifier

Say = Callable[..., tuple[int, str]]

CLASSES = ("dark", "light")


def make_images(folder: Path) -> Path:
    """`photos/`: 24 pictures of the built-in source, half of them darkened; `labelled/`: copies of 8 in two classes."""
    pictures = Shapes(24, seed=3).images(np.arange(24)).transpose(0, 2, 3, 1)
    (folder / "photos" / "deep").mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        light = number % 2
        path = folder / "photos" / ("deep" if number % 3 else "") / f"{number:02d}.png"
        Image.fromarray(pixels // 2 + 127 * light).resize((50 + number, 60)).save(path)
        if number < 8:
            (folder / "labelled" / CLASSES[light]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "labelled" / CLASSES[light] / f"copy{number}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path)


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """A command in this process: its exit code, and what it said or was refused with."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["hjepa", "classify", *words, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_a_folder_of_labels_to_predictions_a_page_and_a_classifier(
    finished: Path, images: Path, tmp_path: Path, say: Say
) -> None:
    status, said = say(str(finished), "labelled", "photos")
    assert status == 0, said
    assert "Labelled: 8 images of 2 classes (4 dark, 4 light)" in said
    for name in ("trained encoder", "raw pixels", "untrained encoder", "always the most frequent class    50.0 %"):
        assert name in said
    classifier = load_classifier(tmp_path / "classifier.safetensors")
    assert classifier.accuracies["encoder"].mean > 80  # dark and light are easy
    assert f"{classifier.accuracies['pixels'].mean:.1f} %" in said

    rows = table(tmp_path / "predictions.csv")
    files = sorted(str(path.relative_to(images / "photos")) for path in (images / "photos").rglob("*.png"))
    assert sorted(row["file"] for row in rows) == files
    # Anybody's arithmetic on the file's tensors gives what the table says of images without a label.
    with safe_open(tmp_path / "classifier.safetensors", "pt") as file:
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        assert json.loads(file.metadata()["hjepa"])["classes"] == list(CLASSES)
    pooled = hjepa.load(finished)([images / "photos" / row["file"] for row in rows]).pooled
    expected = (pooled @ weight + bias).softmax(dim=1)
    fresh = [number for number, row in enumerate(rows) if not row["label"]]
    assert len(fresh) == 16
    for number in fresh:
        assert rows[number]["predicted"] == CLASSES[int(expected[number].argmax())]
        assert float(rows[number]["probability"]) == pytest.approx(float(expected[number].max()), abs=1e-3)
    right = [row["predicted"] == CLASSES[int(Path(row["file"]).stem) % 2] for row in rows]
    assert np.mean(right) > 0.8

    page = (tmp_path / "predictions.html").read_text()
    assert page.count("<img ") >= 24
    assert "http" not in page.replace("http-equiv", "")


def test_a_labelled_image_is_named_by_classifiers_that_were_not_shown_it(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    # A copy of a dark image that somebody called light: those that saw the others contradict.
    odd = images / "labelled" / "dark" / "copy0.png"
    odd.rename(images / "labelled" / "light" / "copy0.png")
    classify(finished, images / "labelled", images / "photos", tmp_path / "p.csv", device="cpu")
    rows = {Path(row["file"]).stem: row for row in table(tmp_path / "p.csv")}
    assert rows["00"]["label"] == "light"
    assert rows["00"]["predicted"] == "dark"
    assert [rows[f"{n:02d}"]["label"] for n in range(1, 10)] == [*(CLASSES[n % 2] for n in range(1, 8)), "", ""]
    assert "1 of 8 labelled images are named otherwise" in (tmp_path / "p.html").read_text()


def test_a_classifier_names_new_images_as_when_it_was_fitted(
    finished: Path, images: Path, tmp_path: Path, say: Say
) -> None:
    assert say(str(finished), "labelled", "photos")[0] == 0
    before = {row["file"]: row for row in table(tmp_path / "predictions.csv")}
    stamp = (tmp_path / "classifier.safetensors").stat().st_mtime_ns
    status, said = say(str(finished), "classifier.safetensors", "photos/deep", "-o", "new.csv", "--batch-size", "5")
    assert status == 0
    assert "trained encoder" in said  # what it was worth when it was fitted
    assert (tmp_path / "classifier.safetensors").stat().st_mtime_ns == stamp
    for row in table(tmp_path / "new.csv"):
        assert row["label"] == ""
        old = before[f"deep/{row['file']}"]
        if not old["label"]:
            assert row["predicted"] == old["predicted"]
            assert float(row["probability"]) == pytest.approx(float(old["probability"]), abs=1e-3)


@pytest.mark.parametrize("form", ["beside", "in the folder", "tsv", "semicolons", "spreadsheet"])
def test_a_table_says_the_same_as_folders(finished: Path, images: Path, tmp_path: Path, form: str) -> None:
    first = classify(finished, images / "labelled", None, tmp_path / "a.csv", device="cpu")
    paths = sorted((images / "labelled").rglob("*.png"))
    lines = [(str(path.relative_to(images)), path.parent.name) for path in paths]
    file = tmp_path / "labels.csv"
    if form == "beside":
        text = "file,label\n" + "".join(f"{name},{label}\n" for name, label in lines)
    elif form == "in the folder":
        file = tmp_path / "elsewhere" / "labels.csv"
        file.parent.mkdir()
        text = "label,file\n" + "".join(f"{label},{name}\n" for name, label in lines)
    elif form == "tsv":
        file = tmp_path / "labels.tsv"
        text = "file\tlabel\n" + "".join(f"{name}\t{label}\n" for name, label in lines)
    elif form == "semicolons":
        text = "\ufeffFile;Label;remark\r\n" + "".join(f"{name};{label};no, none\r\n" for name, label in lines)
    else:  # what is not labelled yet, and a name with a comma
        odd = images / 'labelled/one, "odd".png'
        shutil.copy(paths[0], odd)
        lines = [(odd.relative_to(images).as_posix(), lines[0][1]), *lines[1:]]
        text = "file,predicted,probability,label\nphotos/00.png,dark,0.5,\n"
        text += "".join('"{}",dark,0.5,{}\n'.format(name.replace('"', '""'), label) for name, label in lines)
    file.write_text(text, encoding="utf-8")
    second = classify(finished, file, images if form == "in the folder" else None, tmp_path / "b.csv", device="cpu")
    assert second.classes == first.classes
    torch.testing.assert_close(second.linear.weight, first.linear.weight, atol=1e-6, rtol=1e-4)


def test_the_tables_own_labels_can_be_filled_in_and_learned_from(finished: Path, images: Path, say: Say) -> None:
    assert say(str(finished), "labelled", "photos", "-o", "first.csv")[0] == 0
    rows = table(images / "first.csv")
    for row in rows[:12]:
        row["label"] = CLASSES[int(Path(row["file"]).stem) % 2]
    with (images / "first.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    labelled = sum(bool(row["label"]) for row in rows)
    assert labelled > 12
    status, said = say(str(finished), "first.csv", "photos", "-o", "second.csv")
    assert status == 0
    assert f"Labelled: {labelled} images" in said
    assert sum(bool(row["label"]) for row in table(images / "second.csv")) == labelled


def test_nobodys_table_and_nobodys_labels_are_written_over(finished: Path, images: Path, say: Say) -> None:
    output = images / "predictions.csv"
    output.write_text("name,price\nphotos/00.png,3\n")
    status, said = say(str(finished), "labelled", "photos")
    assert status == 2
    assert "is there already and was not made by hjepa classify" in said
    output.unlink()
    assert say(str(finished), "labelled", "photos")[0] == 0
    assert say(str(finished), "labelled", "photos")[0] == 0  # its own are replaced
    rows = output.read_text().splitlines()
    (fresh,) = (number for number, row in enumerate(rows) if row.startswith("18.png"))
    output.write_text("\n".join([*rows[:fresh], f"{rows[fresh]}dark", *rows[fresh + 1 :]]))
    before = output.read_bytes()
    status, said = say(str(finished), "labelled", "photos")
    assert status == 0
    assert "had 1 label(s) that were not given here; it is kept as predictions.csv.old" in said
    assert (images / "predictions.csv.old").read_bytes() == before
    assert table(output)[0].keys() == {"file", "predicted", "probability", "label"}


def test_without_a_folder_the_labelled_images_are_told_of(finished: Path, images: Path, tmp_path: Path) -> None:
    classify(finished, images / "labelled", None, tmp_path / "own.csv", device="cpu")
    rows = table(tmp_path / "own.csv")
    assert [row["file"].split("/")[0] for row in rows] == [row["label"] for row in rows] == ["dark"] * 4 + ["light"] * 4


def test_images_that_cannot_be_read_or_are_copies_are_left_out(
    finished: Path, images: Path, tmp_path: Path, say: Say
) -> None:
    (images / "photos" / "bad.png").write_bytes(b"no image")
    (images / "labelled" / "dark" / "bad.jpg").write_bytes(b"nor this")
    shutil.copy(images / "labelled" / "dark" / "copy0.png", images / "labelled" / "dark" / "again.png")
    status, said = say(str(finished), "labelled", "photos")
    assert status == 0
    assert "Labelled: 8 images" in said
    assert "1 labelled image(s) cannot be read and are left out: " in said
    assert f"1 of 25 image file(s) cannot be read and are left out: {images / 'photos' / 'bad.png'}" in said
    assert "bad.png" not in (tmp_path / "predictions.csv").read_text()


def test_a_class_of_one_image_is_learned_and_the_accuracy_says_what_it_is_of(
    finished: Path, images: Path, say: Say
) -> None:
    (images / "labelled" / "other").mkdir()
    shutil.copy(images / "photos" / "09.png", images / "labelled" / "other")
    status, said = say(str(finished), "labelled")
    assert status == 0
    assert "warning: " in said
    assert "one image of other: it cannot be left out and its class be known" in said
    assert "9 images of 3 classes (4 dark, 4 light, 1 other)" in said
    assert len(table(images / "predictions.csv")) == 8


def test_mistakes_are_one_line(finished: Path, images: Path, say: Say) -> None:
    run = str(finished)
    for name in CLASSES:
        (images / "singles" / name).mkdir(parents=True)
        shutil.copy(next((images / "labelled" / name).iterdir()), images / "singles" / name)
    (images / "alone").mkdir()
    shutil.copytree(images / "labelled" / "dark", images / "alone" / "dark")
    shutil.copytree(images / "alone", images / "hollow")
    (images / "hollow" / "light").mkdir()
    shutil.copytree(images / "labelled", images / "double")
    shutil.copy(images / "double" / "dark" / "copy0.png", images / "double" / "light")
    (images / "divided" / "train" / "dark").mkdir(parents=True)
    (images / "none.csv").write_text("file,label\nphotos/00.png,dark\nphotos/absent.png,light\n")
    (images / "head.csv").write_text("name,class\nphotos/00.png,dark\n")
    (images / "empty.csv").write_text("file,label\nphotos/00.png,\n")
    (images / "x.safetensors").write_bytes(b"nothing")
    for words, code, text in (
        (("absent",), 3, "absent: missing; expected a folder with one subfolder of images per class, or a table"),
        (("photos/00.png",), 3, "photos/00.png: not a folder with one subfolder"),
        (("alone",), 3, "all labelled images are of the class dark; a classifier needs two"),
        (("singles",), 3, "2 classes, of which fewer than two have two images; cross-validation leaves one out"),
        (("hollow",), 3, "hollow/light: no images (looked for"),
        (("divided",), 3, "divided: is divided into train/; name one of them"),
        (("labelled/dark",), 3, "labelled/dark: no subfolders; images with labels lie in one subfolder per class"),
        (("double",), 3, "are the same image, labelled dark and light; keep one"),
        (("none.csv", "photos"), 3, "none.csv, line 3: no file photos/absent.png in "),
        (("head.csv",), 3, "head.csv, line 1: no column file and no column label; it must name file,label"),
        (("empty.csv",), 3, "empty.csv: no row has a label"),
        (("x.safetensors", "photos"), 3, "x.safetensors: not a classifier made by hjepa classify"),
        (("y.safetensors", "photos"), 3, "y.safetensors: no such file; hjepa classify RUN LABELLED makes it"),
        (("labelled", "nowhere"), 3, "is missing; expected a folder of images"),
        (("labelled", "photos", "-o", "p.xlsx"), 2, "p.xlsx: predictions are a table; choose a name that ends in .csv"),
        (("labelled", "photos", "-o", "no/where.csv"), 2, "there is no folder no to write it to"),
        (("none.csv", "photos", "-o", "none.csv"), 2, "none.csv: holds the labels; choose another name"),
    ):
        status, said = say(run, *words)
        assert status == code, said
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        assert text in lines[0]
    assert not (images / "classifier.safetensors").exists()


def test_a_classifier_refuses_other_weights_than_its_own(finished: Path, images: Path, tmp_path: Path) -> None:
    classify(finished, images / "labelled", None, tmp_path / "p.csv", device="cpu")
    mine, photos, output = tmp_path / "classifier.safetensors", images / "photos", tmp_path / "q.csv"
    earlier = finished / "checkpoints" / "step-00000002"
    with pytest.raises(StorageError, match=r"made with other weights than these \(step 3 of .*; here step 2 of "):
        classify(earlier, mine, photos, output, device="cpu")
    shutil.copytree(finished / "checkpoints" / "step-00000003", tmp_path / "moved")  # the same ones elsewhere
    classify(tmp_path / "moved", mine, photos, output, device="cpu")
    with pytest.raises(ConfigError, match="is a classifier; name the folder"):
        classify(finished, mine, None, output, device="cpu")


def test_the_online_encoder_is_another(finished: Path, images: Path, tmp_path: Path, say: Say) -> None:
    assert say(str(finished), "labelled", "--online")[0] == 0
    online = load_classifier(tmp_path / "classifier.safetensors")
    assert online.origin.online
    slow = classify(finished, images / "labelled", None, tmp_path / "slow.csv", device="cpu")
    assert not torch.allclose(online.linear.weight, slow.linear.weight)
    status, said = say(str(finished), "classifier.safetensors", "photos", "--online")
    assert status == 2
    assert "was fitted to the averaged encoder" in said
    assert say(str(finished), "labelled", "--online")[0] == 0
    assert say(str(finished), "classifier.safetensors", "photos")[0] == 0  # it knows its own


def test_what_is_untrained_is_the_run_before_its_first_step(finished: Path) -> None:
    from hjepa.build import create_hjepa_from_config
    from hjepa.use.frozen import untrained_of
    from hjepa.weights import find_weights

    saved = find_weights(finished, print)
    state = torch.random.get_rng_state()
    fresh = untrained_of(saved).backbone.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    start = create_hjepa_from_config(finished / "config.yaml").context_encoder.backbone.state_dict()
    assert all(torch.equal(fresh[name], start[name]) for name in start)
