import pickle
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
from layouts import config, everything, md5, refused, write_cifar, write_stl10
from torchvision import datasets

from hjepa.config.data import Data, Dataset
from hjepa.data import archives
from hjepa.data.sources import open_probe, open_source, open_training

# CIFAR and STL-10


def test_a_loader_process_that_is_not_forked_gets_no_copy_of_the_images() -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 3, 64, 64), np.uint8).transpose(0, 1, 3, 2)
    source = archives.ArraySource("stl10", array)
    sent = bytes(ForkingPickler.dumps(source))
    assert len(sent) < 5_000
    assert (pickle.loads(sent).images(np.arange(50)) == array).all()
    assert (source.images(np.array([3])) == array[3]).all()


@pytest.mark.parametrize(("name", "classes", "batches"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, batches: int) -> None:
    images = write_cifar(tmp_path, name, monkeypatch)
    dataset, data = config(name, tmp_path)
    bank, test = open_probe(dataset, data, seed=0)
    assert (everything(bank) == images["train"]).all()
    assert (everything(test) == images["test"]).all()
    assert bank.labels.tolist() == [0, 1, 2, classes - 1] * batches
    assert (bank.name, bank.num_classes, bank.size, len(test)) == (name, classes, (32, 32), 4)
    assert bank.true_sizes(np.arange(2)).tolist() == [[32, 32], [32, 32]]
    # The unpacked folder may be named itself.
    inner = next(tmp_path.iterdir())
    assert len(open_source(*config(name, inner), seed=0, split="test")) == 4


def test_a_pickle_of_another_checksum_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    with open(tmp_path / "cifar-10-batches-py/data_batch_3", "ab") as file:
        file.write(b"x")
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("opened"))
    refused(lambda: open_training(config("cifar10", tmp_path)[1], 0), "cifar-10-batches-py", "damaged", "delete")


def test_stl10(tmp_path: Path) -> None:
    images = write_stl10(tmp_path)
    dataset, data = config("stl10", tmp_path)
    whole = open_training(data, seed=0)[0]
    assert (everything(whole) == np.concatenate([images["train"], images["unlabeled"]])).all()
    assert everything(whole).flags.c_contiguous
    assert whole.labels.tolist() == [9, 0, 1, -1, -1, -1, -1]
    assert (whole.num_classes, whole.size) == (10, (96, 96))
    bank, test = open_probe(dataset, data, seed=0)
    assert (everything(bank) == images["train"]).all()
    assert bank.labels.tolist() == [9, 0, 1]
    assert (everything(test) == images["test"]).all()
    assert open_source(dataset, data, 0, "unlabeled").labels.tolist() == [-1] * 4


def test_damaged_stl10(tmp_path: Path) -> None:
    write_stl10(tmp_path)
    folder = tmp_path / "stl10_binary"
    read = lambda: open_training(config("stl10", tmp_path)[1], 0)  # noqa: E731
    (folder / "train_y.bin").write_bytes(b"\1")
    refused(read, "train_y.bin", "one label for each of 3 images")
    (folder / "unlabeled_X.bin").write_bytes(b"\0" * 100)
    refused(lambda: archives.stl10(tmp_path, "unlabeled", False), "unlabeled_X.bin", "whole images")
    (folder / "train_X.bin").unlink()
    refused(read, "train_X.bin is missing")


# Getting them


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_and_not_to_be_downloaded(tmp_path: Path, name: str) -> None:
    root = tmp_path / "none"
    official = archives._OFFICIAL[name]
    refused(
        lambda: open_training(config(name, root)[1], 0),
        f"{name}: neither {official.base_folder}/ nor {official.filename} is in {root}",
        official.url,
        "data.download is false",
        "data.datasets[i].path",
        "data.data_path",
    )
    assert not root.exists()


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str, root: str, filename: str, checksum: str) -> None:
        Path(root, filename).write_bytes(b"half of it")
        raise URLError("no route\nto host")

    monkeypatch.setattr(archives, "download_url", no_network)
    dataset = Dataset(name="cifar10")
    data = Data(datasets=(dataset,), data_path=str(tmp_path))
    refused(lambda: open_source(dataset, data, 0), "the download failed", "no route to host", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that passes for the official one of STL-10."""
    write_stl10(tmp_path / "made")
    path = tmp_path / datasets.STL10.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "made/stl10_binary", "stl10_binary")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", md5(path))
    return path


@pytest.fixture
def served(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same archive, offered by a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=archive.parent)) as server:
        monkeypatch.setattr(datasets.STL10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield archive
        server.shutdown()


def test_download(tmp_path: Path, served: Path) -> None:
    assert len(archives.stl10(tmp_path / "data", "train", download=True)) == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["stl10_binary"]


def test_download_of_another_checksum(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.STL10, "tgz_md5", "0" * 32)
    refused(lambda: archives.stl10(tmp_path / "data", "train", download=True), "the download failed", "its MD5 is not")
    assert not list((tmp_path / "data").iterdir())


class Broken(SimpleHTTPRequestHandler):
    """Announces the whole file, sends a part of it, and closes the connection or stays silent."""

    ways: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        way = self.ways.pop(0)
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if way == "whole" else content[: len(content) // 2])
        self.wfile.flush()
        if way == "silent":
            time.sleep(3)
        elif way == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("way", ["closed", "reset", "silent"])
def test_a_download_that_breaks_off_is_never_used_and_the_next_is_whole(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(archives, "_TIMEOUT", 0.5)
    # torchvision asks twice: the first time only to see whether it is sent on elsewhere.
    monkeypatch.setattr(Broken, "ways", ["whole", way, "whole", "whole"])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Broken, directory=served.parent)) as server:
        monkeypatch.setattr(datasets.STL10, "url", f"http://127.0.0.1:{server.server_port}/{served.name}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        refused(lambda: archives.stl10(tmp_path / "data", "train", download=True), "the download failed (")
        assert not list((tmp_path / "data").iterdir())
        assert len(archives.stl10(tmp_path / "data", "train", download=True)) == 3
        server.shutdown()


def test_a_killed_download_leaves_nothing_that_is_taken_for_data(tmp_path: Path, served: Path) -> None:
    script = f"""
import os, signal
from torchvision import datasets
from hjepa.data import archives
datasets.STL10.url, datasets.STL10.tgz_md5 = {datasets.STL10.url!r}, {md5(served)!r}
extract = archives.extract_archive
def killed(source, target):
    extract(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
archives.extract_archive = killed
archives.stl10({str(tmp_path / "data")!r}, "train", download=True)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "data").iterdir()
    assert left.name.startswith(".stl10_binary.partial-")
    assert len(archives.stl10(tmp_path / "data", "train", download=True)) == 3
    assert (tmp_path / "data" / "stl10_binary").is_dir()


def test_download_that_another_process_finishes_first(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = archives.extract_archive

    def extract_late(source: str, target: str) -> None:
        extract(source, str(tmp_path / "data"))
        extract(source, target)

    monkeypatch.setattr(archives, "extract_archive", extract_late)
    assert len(archives.stl10(tmp_path / "data", "train", download=True)) == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["stl10_binary"]


def test_archive_that_lies_there_is_unpacked_without_a_download(tmp_path: Path, archive: Path) -> None:
    assert len(archives.stl10(tmp_path, "test", download=False)) == 2
    assert archive.exists()


def test_archive_of_another_checksum_is_refused(tmp_path: Path, archive: Path) -> None:
    archive.write_bytes(b"something else")
    for download in (False, True):
        refused(lambda d=download: archives.stl10(tmp_path, "test", d), "not the official archive", "delete")
    assert not (tmp_path / "stl10_binary").exists()


def test_stale_downloads_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path)
    staging = tmp_path / ".stl10_binary.partial-abc"
    staging.mkdir()
    archives.stl10(tmp_path, "test", download=False)
    assert staging.exists()  # perhaps another process is at it
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86400)
    archives.stl10(tmp_path, "test", download=False)
    assert not staging.exists()
