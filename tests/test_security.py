"""Nothing that is read is executed, and nothing is read or written outside of where it belongs."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import errors, hjepa

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.config.migrate import migrate
from hjepa.errors import ConfigError, DataError, StorageError
from hjepa.evaluate import evaluate_run
from hjepa.train import train

TAGS = (
    "!!python/object/apply:os.mkdir [{canary}]",
    "!!python/object/new:os.mkdir [{canary}]",
    "!!python/name:os.system",
    "!!python/module:os",
)


class Canary:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))  # it sings where it is let
    assert path.is_dir()
    path.rmdir()
    return path


@pytest.fixture
def run(tmp_path: Path, small: tuple[str, ...]) -> Path:
    """A run of one step, which the command line takes from `tmp_path`."""
    path = tmp_path / "runs" / "hjepa"
    settings = ("training.max_steps=1", "evaluation.eval_frequency=0", f"experiment.output_dir={path}")
    train(load_config(None, (*small, *settings)))
    return path


def test_a_pickle_in_a_checkpoint_is_refused_and_does_nothing(
    run: Path, tmp_path: Path, canary: Path, small: tuple[str, ...]
) -> None:
    folder = run / "checkpoints"
    good = checkpoint.load(folder / "step-00000001")
    (folder / "step-00000001").rename(tmp_path / "elsewhere")
    trainer = good.trainer | {"optimizers": Canary(canary)}
    checkpoint.save(folder, 1, good.weights, trainer, good.config)  # every checksum is right
    with pytest.raises(StorageError, match="step-00000001: not readable"):
        evaluate_run(run, [])
    done = hjepa("train", *small, "training.max_steps=3", "--resume", cwd=tmp_path)
    assert done.returncode == 5
    assert errors(done)[0].endswith("no intact checkpoint")
    assert "step-00000001: not readable" in done.stderr
    assert not canary.exists()


def test_a_pickle_in_the_place_of_weights_is_refused_and_does_nothing(tmp_path: Path, canary: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.zeros(2)}, {}, {})
    for name in (checkpoint.WEIGHTS, checkpoint.TRAINER, checkpoint.MANIFEST):
        (path / name).write_bytes(pickle.dumps(Canary(canary)))
        with pytest.raises(StorageError):
            checkpoint.load(path)
    assert not canary.exists()


@pytest.mark.parametrize("tag", TAGS, ids=["apply", "new", "name", "module"])
def test_a_tag_in_a_config_is_refused_and_does_nothing(tmp_path: Path, canary: Path, tag: str) -> None:
    value = tag.format(canary=canary)
    file = tmp_path / "c.yaml"
    file.write_text(f"experiment:\n  name: {value}\n")
    for read in (
        lambda: load_config(file),
        lambda: load_config(None, [f"experiment.name={value}"]),
        lambda: migrate(file),
    ):
        with pytest.raises(ConfigError):
            read()
    done = hjepa("train", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "c.yaml, line 2: could not determine a constructor for the tag" in errors(done)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]
    yaml.unsafe_load(TAGS[0].format(canary=canary))
    assert canary.is_dir()  # it sings where it is let


def test_a_tag_in_the_config_of_a_run_is_refused_and_does_nothing(run: Path, canary: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"device: {TAGS[0].format(canary=canary)}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        evaluate_run(run, [])
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../x", "..", "/x", "a/b", "a\\b", ".hidden", "a\0b", "-x", "~", ""])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"experiment": {"name": name}}))
    with pytest.raises(ConfigError, match=r"experiment\.name"):
        load_config(tmp_path / "c.yaml")


def test_a_name_that_is_a_path_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = hjepa("train", "experiment.name=../../x", cwd=tmp_path / "in")
    assert done.returncode == 2
    assert "experiment.name: string should match pattern" in errors(done)[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


@pytest.mark.parametrize("outside", ["../../secret", "/etc/hostname", "../step-00000001/model.safetensors"])
def test_a_manifest_names_no_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: str) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    with monkeypatch.context() as patch:  # a writer of another mind, whose checksums are all right
        patch.setattr(checkpoint, "WEIGHTS", outside)
        patch.setattr(checkpoint, "save_file", lambda *_: None)
        patch.setattr(checkpoint, "_describe", lambda _: {"bytes": 1, "sha256": ""})
        patch.setattr(checkpoint, "_flush", lambda _: None)
        path = checkpoint.save(tmp_path / "run" / "checkpoints", 1, {}, {}, {})
    assert outside in (path / checkpoint.MANIFEST).read_text()
    with pytest.raises(StorageError, match=r"not readable|model\.safetensors"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "setting",
    [
        "model.encoder_type=os.system",
        "model.encoder_type=hf-hub:somebody/model",
        "model.encoder_type=local-dir:/tmp/model",
        "model.encoder_type=../../model.py",
        "data.datasets=[{name: os.system}]",
        "loss.type=builtins.eval",
        "training.optimizer=torch.optim.SGD",
        "device=os:system",
        "model._target_=os.system",
    ],
)
def test_a_config_names_no_code(setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [setting])
    assert setting.partition("=")[0] in str(refused.value)


def test_a_file_that_doubles_itself_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    done = hjepa("train", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "aliases" in errors(done)[0]


def on_cifar(small: tuple[str, ...], folder: Path) -> Config:
    rest = [text for text in small if not text.startswith("data.datasets")]
    place = (f"data.data_path={folder}", f"experiment.output_dir={folder.parent / 'run'}", "data.download=false")
    return load_config(None, (*rest, "data.datasets=[{name: cifar10}]", *place))


def climbing(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../escaped", "cifar-10-batches-py/../../escaped"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"here"))


def no_archive(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize("make", [climbing, no_archive])
def test_an_archive_that_is_not_the_official_one_is_not_opened(
    tmp_path: Path, small: tuple[str, ...], make: Callable[[Path], None]
) -> None:
    place = tmp_path / "in" / "data"
    place.mkdir(parents=True)
    make(place / "cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="is not the official archive"):
        train(on_cifar(small, place))
    assert not list(tmp_path.rglob("escaped"))
    assert [path.name for path in place.iterdir()] == ["cifar-10-python.tar.gz"]


def test_a_pickle_among_the_images_is_refused_and_does_nothing(
    tmp_path: Path, canary: Path, small: tuple[str, ...]
) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(DataError, match="differ from the official ones"):
        train(on_cifar(small, folder.parent))
    assert not canary.exists()
