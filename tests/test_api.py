"""The encoder in the user's own program: `hjepa.load`, what it takes and what it gives."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import make_photos
from PIL import Image

import hjepa
from hjepa import checkpoint
from hjepa.data.files import FolderSource
from hjepa.errors import ConfigError, DataError, StorageError


def test_tokens_their_mean_and_the_levels(finished: Path) -> None:
    encoder = hjepa.load(finished)
    assert (encoder.embed_dim, encoder.grid.height, encoder.grid.width, encoder.image_size) == (32, 8, 8, 64)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder(torch.randn(5, 3, 64, 64))
    assert features.tokens.shape == (5, 64, 32)
    assert torch.equal(features.pooled, features.tokens.mean(1))
    assert [tuple(level.shape) for level in features.levels] == [(5, 8, 8, 96), (5, 4, 4, 64)]


def test_it_is_what_the_probes_of_the_run_look_at(finished: Path) -> None:
    saved = checkpoint.load(finished / "checkpoints" / "step-00000003")
    model = hjepa.create_hjepa_from_config(finished / "config.yaml")
    model.load_state_dict(saved.weights)
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    for online in (False, True):
        of_run, of_api = model.embed(images, online), hjepa.load(finished, online=online)(images)
        torch.testing.assert_close(of_api.pooled, of_run["last"], rtol=0, atol=0)
        for level, features in enumerate(of_api.levels):
            torch.testing.assert_close(features.mean((1, 2)), of_run[f"level{level}"], rtol=0, atol=1e-6)
    slow, fast = hjepa.load(finished)(images).pooled, hjepa.load(finished, online=True)(images).pooled
    assert not torch.allclose(slow, fast, atol=1e-4)


def test_files_pil_images_and_pixels_are_prepared_as_the_run_prepares_them(finished: Path, tmp_path: Path) -> None:
    paths = make_photos(tmp_path)
    encoder = hjepa.load(finished)
    source = FolderSource(tmp_path, encoder.preprocess.side)
    read = source.read(np.arange(4))
    squares = encoder.preprocess.squares(torch.from_numpy(read.images), read.true_sizes)
    of_paths = encoder(paths)
    torch.testing.assert_close(of_paths.pooled, encoder(squares).pooled, rtol=0, atol=1e-6)
    opened = [Image.open(path) for path in paths]
    sizes = [image.size for image in opened]
    torch.testing.assert_close(encoder(opened).pooled, of_paths.pooled, rtol=0, atol=0.02)
    assert [image.size for image in opened] == sizes
    torch.testing.assert_close(encoder(str(paths[1])).pooled, of_paths.pooled[1:2], rtol=0, atol=1e-6)

    # A centred square of the right size is left as it is: normalised, and nothing else.
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.preprocess.mean, encoder.preprocess.std))
    by_hand = (pixels[..., 16:80] / 255 - mean) / std
    torch.testing.assert_close(encoder.preprocess(pixels), by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(pixels).pooled, encoder(by_hand).pooled, rtol=0, atol=1e-5)


def test_it_computes_in_the_precision_it_is_given(finished: Path) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    encoder = hjepa.load(finished)
    exact = encoder(pixels).pooled
    for images in (pixels, encoder.preprocess(pixels)):
        rough = hjepa.load(finished).bfloat16()(images).pooled
        assert rough.dtype == torch.bfloat16
        assert torch.cosine_similarity(rough.float(), exact).min() > 0.99


def test_an_image_that_lies_on_its_side_is_turned_upright(finished: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels).resize((60, 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
    encoder = hjepa.load(finished)
    expected = encoder(upright).pooled
    on_its_side = (encoder(upright.rotate(90, expand=True)).pooled - expected).abs().max()
    for image in (tmp_path / "side.png", Image.open(tmp_path / "side.png")):
        assert (encoder(image).pooled - expected).abs().max() < on_its_side / 5  # it is squeezed before it is turned


def test_what_is_no_image_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    encoder = hjepa.load(finished)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for wrong, words in (
        (torch.zeros(2, 3, 16, 16), r"normalised ones are \[B, 3, 64, 64\], got float32 \[2, 3, 16, 16\]"),
        (torch.zeros(3, 32, 32), r"normalised ones are .* got float32 \[3, 32, 32\]"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"expected a uint8 tensor \[B, 3, H, W\], got uint8 \[2, 32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), r"got int64"),
        ([], "none were given"),
        ([3.5], "number 0 is a float"),
        ([tmp_path / "broken.jpg"], "broken.jpg: empty, or not one of JPEG"),
        (str(tmp_path / "absent.jpg"), "absent.jpg: No such file"),
    ):
        with pytest.raises(DataError, match=words) as refused:
            encoder(wrong)
        assert "\n" not in str(refused.value)


def test_a_checkpoint_goes_where_it_is_carried(finished: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    step = finished / "checkpoints" / "step-00000002"
    wanted = hjepa.load(step)
    assert wanted.origin.step == 2
    moved = tmp_path / "my encoder"
    moved.mkdir()
    for name in (checkpoint.WEIGHTS, checkpoint.MANIFEST):  # the trainer's state is not needed
        shutil.copy(step / name, moved)
    carried = hjepa.load(moved)
    assert carried.origin.sha256 == wanted.origin.sha256
    assert torch.equal(carried(images).pooled, wanted(images).pooled)
    with pytest.raises(StorageError):
        checkpoint.load(moved)  # a run does not go on from there


def test_damage_is_told_and_the_one_before_is_taken(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    newest = copy / "checkpoints" / "step-00000003"
    weights = (newest / checkpoint.WEIGHTS).read_bytes()
    (newest / checkpoint.WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.warns(UserWarning, match="does not match its checksum; trying the one before"):
        assert hjepa.load(copy).origin.step == 2
    with pytest.raises(StorageError, match="does not match its checksum"):
        hjepa.load(newest)
    manifest = copy / "checkpoints" / "step-00000002" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 1'))
    with pytest.raises(StorageError, match="no intact checkpoint"):
        hjepa.load(copy)
    for nothing, words in ((tmp_path / "absent", "no such folder"), (tmp_path, "no checkpoint here")):
        with pytest.raises(ConfigError, match=words):
            hjepa.load(nothing)


def test_nobody_elses_random_numbers_are_used(finished: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    hjepa.load(finished)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("options", [{}, {"level": 1}, {"online": True, "batch_size": 3}])
def test_the_embedder_stands_in_a_pipeline(finished: Path, tmp_path: Path, options: dict[str, object]) -> None:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    paths = [str(path) for path in make_photos(tmp_path)]
    embedder = hjepa.HJEPAEmbedder(finished, device="cpu", **options)  # type: ignore[arg-type]
    assert clone(embedder).get_params() == embedder.get_params()
    for early in (lambda: embedder.transform(paths), embedder.get_feature_names_out):
        with pytest.raises(ConfigError, match="call fit first"):
            early()
    rows = embedder.fit(paths).transform(paths)
    assert rows.shape == (4, 64 if "level" in options else 32)
    assert rows.dtype == np.float32
    assert len(embedder.get_feature_names_out()) == rows.shape[1]
    np.testing.assert_allclose(embedder.fit_transform(np.array(paths)), rows, atol=1e-6)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(embedder)).transform(paths), embedder.transform(paths))
    embedder.device = "cuda" if torch.backends.mps.is_available() else "mps"  # as read on a machine that has no such
    with pytest.raises(ConfigError, match=r"was asked for and this machine has none"):
        pickle.loads(pickle.dumps(embedder))
    embedder.device = "cpu"
    assert embedder.transform([]).shape == (0, rows.shape[1])
    pipeline = make_pipeline(embedder, StandardScaler(), LogisticRegression())
    assert pipeline.fit(paths, [0, 1, 0, 1]).score(paths, [0, 1, 0, 1]) == 1.0
    search = GridSearchCV(pipeline, {"hjepaembedder__level": [None, 0]}, cv=2)
    assert search.fit(paths, [0, 1, 0, 1]).best_params_.keys() == {"hjepaembedder__level"}


def test_the_embedder_refuses_what_it_cannot_do(finished: Path) -> None:
    for options, words in (
        ({"level": 2}, "has the levels 0 to 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"run": "absent"}, "no such folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            hjepa.HJEPAEmbedder(**{"run": finished, **options}).fit()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter 'depth'"):
        hjepa.HJEPAEmbedder().set_params(depth=3)


def test_train_and_evaluate_by_name(tmp_path: Path, small: tuple[str, ...]) -> None:
    sections = hjepa.load_config(None, small).model_dump(mode="json")
    sections["experiment"]["output_dir"] = str(tmp_path / "run")
    sections["training"]["max_steps"] = 1
    trained = hjepa.train(sections)
    again = hjepa.evaluate(tmp_path / "run")
    assert again["eval/knn"] == trained["eval/knn"]
    with pytest.raises(ConfigError, match="config: trainin: unknown key; did you mean training"):
        hjepa.train({"trainin": {}})
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        hjepa.train(tmp_path / "absent.yaml")


def test_the_functions_are_modules_that_can_be_called() -> None:
    import hjepa.evaluate as evaluate
    import hjepa.train as train

    assert (hjepa.train, hjepa.evaluate) == (train, evaluate)
    assert callable(train)
    assert callable(evaluate)
    assert callable(train.fit)


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import hjepa, hjepa.cli", {"torch", "sklearn", "timm", "numpy"}),
        pytest.param("import hjepa; hjepa.HJEPAEmbedder, hjepa.load, hjepa.train", {"sklearn"}, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_imported_before_it_is_needed(program: str, absent: set[str]) -> None:
    program = f"{program}; import sys; sys.exit(len({absent} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
