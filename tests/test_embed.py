"""`hjepa embed` and `hjepa search`: what is in the file, what a kill leaves, what is refused."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import make_photos
from PIL import Image
from safetensors import safe_open

import hjepa
from hjepa.cli import main
from hjepa.errors import ConfigError, DataError, FolderInUseError, StorageError
from hjepa.use.embed import Request, embed
from hjepa.use.features import SUFFIXES, FeatureFile
from hjepa.use.search import nearest, search

Say = Callable[..., tuple[int, str]]

FOUR = ["a.jpg", "b.png", "deep/c.webp", "deep/d.bmp"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """A command in this process, as starting one takes seconds: its exit code, and what it said or was refused with."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["hjepa", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == (ended.value.code != 0), err
        return int(ended.value.code or 0), out + "".join(lines)

    return run


def read(path: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Names and features, with the libraries of the format alone."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        return table["file"].to_pylist(), np.array(table["features"].to_pylist(), np.float32)
    if path.suffix == ".npy":
        return json.loads(Path(f"{path}.json").read_text())["files"], np.load(path)
    with safe_open(path, "numpy") as file:
        return json.loads(file.get_tensor("files").tobytes()), file.get_tensor("features")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("request_", "rows"),
    [
        (Request(), lambda features: features.pooled),
        (Request(tokens=True), lambda features: features.tokens),
        (Request(level=1), lambda features: features.levels[1].mean((1, 2))),
        (Request(level=0, tokens=True, online=True), lambda features: features.levels[0].flatten(1, 2)),
    ],
)
def test_the_file_holds_what_the_encoder_says(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    suffix: str,
    request_: Request,
    rows: Callable[..., torch.Tensor],
) -> None:
    output = tmp_path / f"features{suffix}"
    assert embed(finished, photos, output, request_, batch_size=3, device="cpu") == 4
    names, features = read(output)
    assert names == FOUR
    expected = rows(hjepa.load(finished, online=request_.online)([photos / name for name in names])).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    file = FeatureFile(output)
    assert file.files == FOUR
    np.testing.assert_array_equal(np.concatenate(list(file.blocks())), features)
    assert Path(file.header.checkpoint).samefile(finished / "checkpoints" / "step-00000003")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_unreadable_files_are_named_and_left_out(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "b.png").write_bytes(b"no image")
    (photos / "deep" / "e.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    assert embed(finished, photos, tmp_path / "f.npy", Request(), device="cpu") == 3
    out, err = capsys.readouterr()
    assert "warning: 2 of 5 image file(s) cannot be read and are left out: " in err
    assert str(photos / "b.png") in err
    assert "f.npy: 3 images, 32 float32 each" in out
    names, features = read(tmp_path / "f.npy")
    assert names == ["a.jpg", "deep/c.webp", "deep/d.bmp"]
    np.testing.assert_allclose(features, hjepa.load(finished)([photos / name for name in names]).pooled, atol=1e-5)
    listed = [json.loads(line) for line in (tmp_path / "f.npy.bad_images.jsonl").read_text().splitlines()]
    assert {line["file"] for line in listed} == {str(photos / "b.png"), str(photos / "deep" / "e.jpg")}
    for path in photos.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 5 files can be read"):
        embed(finished, photos, tmp_path / "g.npy", Request())


def test_a_killed_embed_goes_on_and_gives_the_same_file(finished: Path, tmp_path: Path, say: Say) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(800):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:04d}.bmp")
    # Image by image, so that a part takes long enough to be in the middle of it.
    words = [
        "embed",
        str(finished),
        str(folder),
        "--level",
        "0",
        "--tokens",
        "--device",
        "cpu",
        "--batch-size",
        "1",
        "-o",
    ]
    parts = tmp_path / ".killed.npy.parts"
    process = subprocess.Popen([sys.executable, "-m", "hjepa", *words, "killed.npy"], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.safetensors"))) < 1 and time.monotonic() < deadline:
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not (tmp_path / "killed.npy").exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert len(before) >= 1

    _, line = say(*[word for word in words if word != "--tokens"], "killed.npy")
    assert "made with other arguments (shape: [64, 96], now [96])" in line
    assert {path: path.stat().st_mtime_ns for path in before} == before

    status, said = say(*words, "killed.npy")
    assert status == 0
    assert f"Resuming: {len(before)} of 4 parts" in said
    assert not parts.exists()
    embed(finished, folder, tmp_path / "whole.npy", Request(level=0, tokens=True), device="cpu")
    assert read(tmp_path / "killed.npy")[0] == read(tmp_path / "whole.npy")[0]
    np.testing.assert_allclose(read(tmp_path / "killed.npy")[1], read(tmp_path / "whole.npy")[1], atol=1e-5)


def test_a_finished_file_is_not_made_again_nor_overwritten(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "f.safetensors"
    embed(finished, photos, output, Request(), device="cpu")
    before = output.stat().st_mtime_ns
    capsys.readouterr()
    assert embed(finished, photos, output, Request(), device="cpu") == 4
    assert "Nothing left to do" in capsys.readouterr().out
    for request_, folder, words in (
        (Request(online=True), photos, "online: False, now True"),
        (Request(level=1), photos, "kind: pooled, now level1"),
        (Request(), photos / "deep", "images: .*, now "),
    ):
        with pytest.raises(ConfigError, match=f"made with other arguments .*{words}"):
            embed(finished, folder, output, request_, device="cpu")
    with pytest.raises(ConfigError, match="step: 3, now 2"):
        embed(finished / "checkpoints" / "step-00000002", photos, output, Request(), device="cpu")
    np.save(tmp_path / "mine.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"mine\.npy: is there already and was not made by hjepa embed"):
        embed(finished, photos, tmp_path / "mine.npy", Request(), device="cpu")
    (photos / "a.jpg").unlink()
    with pytest.raises(ConfigError, match="other files in the folder"):
        embed(finished, photos, output, Request(), device="cpu")
    assert output.stat().st_mtime_ns == before


def test_a_source_of_the_config_by_name(finished: Path, tmp_path: Path, say: Say) -> None:
    status, _ = say("embed", str(finished), "data.datasets=[{name: shapes, length: 40}]", "-o", "f.parquet")
    assert status == 0
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "label", "features"]
    assert table["file"][3].as_py() == "image 3 of shapes"
    status, _ = say("embed", str(finished), "--data", "shapes", "data.datasets.0.length=40", "-o", "g.npy")
    assert status == 0
    np.testing.assert_allclose(np.load(tmp_path / "g.npy"), table["features"].to_pylist(), atol=1e-6)
    assert json.loads((tmp_path / "g.npy.json").read_text())["labels"] == table["label"].to_pylist()


def test_mistakes_are_one_line(finished: Path, photos: Path, tmp_path: Path, say: Say) -> None:
    for words, code, text in (
        ((str(finished), "photos", "-o", "f.csv"), 2, "features are kept as .parquet, .npy, .safetensors"),
        ((str(finished), "photos", "--level", "2"), 2, "--level 2: the run has the levels 0 to 1"),
        ((str(finished), "absent"), 3, "is missing; expected a folder of images"),
        (("absent", "photos"), 2, "absent: no such folder; give the folder of a run"),
        ((str(finished), "photos", "--data", "shapes"), 2, "a folder stands alone; leave out --data"),
        (
            (str(finished), "model.depth=2"),
            2,
            "free to choose data.datasets, data.data_path, data.download and no other",
        ),
        ((str(finished), "data.image_size=32"), 2, "free to choose data.datasets, data.data_path, data.download"),
        ((str(finished), "data=photos"), 2, "free to choose data.datasets, data.data_path, data.download"),
        ((str(finished), "--data", "imagnet"), 2, "data.datasets[0].name"),
        ((str(finished), "photos", "-o", "no/where/f.npy", "--device", "tpu"), 2, "tpu was asked for"),
    ):
        status, line = say("embed", *words)
        assert status == code
        assert text in line
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        embed(finished, photos, tmp_path / "file" / "f.npy", Request(), device="cpu")


def test_without_pyarrow_the_line_says_what_to_install(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    assert say("embed", str(finished), str(photos), "-o", "f.parquet") == (
        2,
        "error: f.parquet: pyarrow is not installed; pip install 'hjepa[parquet]', or choose .npy or .safetensors",
    )


def test_two_processes_do_not_write_one_file(finished: Path, photos: Path, tmp_path: Path) -> None:
    import fcntl

    parts = tmp_path / ".f.npy.parts"
    parts.mkdir()
    with (parts / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match="another process embeds"):
            embed(finished, photos, tmp_path / "f.npy", Request(), device="cpu")
    assert embed(finished, photos, tmp_path / "f.npy", Request(), device="cpu") == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_finds_itself_and_the_rest_by_cosine(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    suffix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / f"f{suffix}"
    embed(finished, photos, output, Request(level=1), device="cpu")
    found = search(output, photos / "deep" / "c.webp", k=3, picture=tmp_path / "out.png")
    assert found[0].file == "deep/c.webp"
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    rows = torch.from_numpy(read(output)[1])
    expected = torch.nn.functional.cosine_similarity(rows[2:3], rows).topk(3)
    assert [FOUR.index(neighbour.file) for neighbour in found] == expected.indices.tolist()
    assert [neighbour.similarity for neighbour in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert "deep/c.webp  1.0000" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").width > 100


def test_nearest_is_the_best_of_all_blocks() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(100, 5)).astype(np.float32)
    query = rng.normal(size=5).astype(np.float32)
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    found = nearest([rows[:7], rows[7:90], rows[90:]], query, 8)
    assert [row for row, _ in found] == np.argsort(-cosines)[:8].tolist()
    np.testing.assert_allclose([value for _, value in found], np.sort(cosines)[::-1][:8], rtol=1e-5)
    assert len(nearest([rows[:3]], query, 8)) == 3


def test_a_search_refuses_another_encoder(finished: Path, photos: Path, tmp_path: Path, say: Say) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(finished / "checkpoints" / "step-00000003", mine)
    embed(mine, photos, tmp_path / "f.npy", Request(), device="cpu")
    for file in (finished / "checkpoints" / "step-00000002").iterdir():
        shutil.copy(file, mine)
    with pytest.raises(StorageError, match="has changed"):
        search(tmp_path / "f.npy", photos / "a.jpg")
    shutil.rmtree(mine)
    status, line = say("search", str(tmp_path / "f.npy"), str(photos / "a.jpg"))
    assert status == 5
    assert f"the checkpoint that made it is gone ({mine})" in line
    embed(finished, photos, tmp_path / "t.npy", Request(tokens=True), device="cpu")
    with pytest.raises(ConfigError, match="holds tokens"):
        search(tmp_path / "t.npy", photos / "a.jpg")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    for wrong, words in (("x.parquet", "not a file of features"), ("y.npy", "no such file"), ("z.npy", "no such file")):
        np.save(tmp_path / "z.npy", np.zeros(3))  # its names are missing
        with pytest.raises(DataError, match=words):
            search(tmp_path / wrong, photos / "a.jpg")
    embed(finished, photos, tmp_path / "g.npy", Request(), device="cpu")
    with pytest.raises(ConfigError, match="choose a suffix"):
        search(tmp_path / "g.npy", photos / "a.jpg", picture=tmp_path / "out.mp3")
    embed(finished, None, tmp_path / "drawn.npy", Request(), ["data.datasets.0.length=10"], device="cpu")
    with pytest.raises(ConfigError, match="not made of a folder of images"):
        search(tmp_path / "drawn.npy", photos / "a.jpg", picture=tmp_path / "out.png")
    with pytest.raises(DataError, match=r"no\.jpg"):
        search(tmp_path / "g.npy", photos / "no.jpg")
