"""The index of a folder: it is the plain walk, whatever happens to the folder or to the index in between."""

import hashlib
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import refused

from hjepa.data import indexfile, walk
from hjepa.data.files import ClassFolderSource, FolderSource, has_test
from hjepa.data.index import Paths, identity_of, open_index
from hjepa.data.indexfile import Tables
from hjepa.data.source import Source

TICK = 0.02  # seconds, more than a step of a file system's clock here


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the indices, empty."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "hjepa" / "index"


@pytest.fixture
def fine_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders count as settled at once; tests wait a tick instead of two seconds."""
    monkeypatch.setattr(walk, "_TICK_NS", 0)


def plain(folder: Path) -> list[str]:
    """What an index stands for, in four lines."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if not path.name.startswith("."):
            found += plain(path) if path.is_dir() else [str(path)] * path.name.lower().endswith(walk.EXTENSIONS)
    return found


def opened(root: Path) -> list[str]:
    return list(Paths(open_index(root, root)))


def remember(root: Path, cache: Path) -> Path:
    """Open a folder whose clock has moved on; the file that its index lies in."""
    time.sleep(TICK)
    before = set(cache.glob("*"))
    assert opened(root) == plain(root)
    (file,) = set(cache.glob("*")) - before
    time.sleep(TICK)
    return file


def photos(root: Path) -> Path:
    for name in ("b/2.JPG", "b/1.png", "a/deep/er/3.webp", "a.jpg", "c.bmp", "a/deep.gif", "notes.txt", ".x/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    return root


# As before there was an index


COUNTS = {"one": 1, "two": 2, "Nine": 9, "ten": 10, "eleven": 11, "many": 103, "\u00e9t\u00e9": 25}


def layout(root: Path) -> None:
    for number, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            where = root / name / ("", "deep", "deep/er", "x.jpg")[(i * 7 + number) % 4]
            where.mkdir(parents=True, exist_ok=True)
            (where / f"{i * 7919 % 1000}{('.jpg', '.PNG', '.txt', '.webp')[i % 4]}").touch()


def digest(source: Source, root: Path) -> str:
    lines = [os.fsencode(os.path.relpath(path, root)) for path in source.paths]  # type: ignore[attr-defined]
    labels = b"" if source.labels is None else source.labels.tobytes()
    return hashlib.sha256(b"\n".join(lines) + labels).hexdigest()[:16]


@pytest.mark.usefixtures("fine_clock")
def test_order_labels_and_held_out_files_are_those_of_the_lists_that_were_before(tmp_path: Path, cache: Path) -> None:
    flat, parts = tmp_path / "flat", tmp_path / "parts"
    for root in (flat, parts / "train", parts / "val"):
        layout(root)
    time.sleep(TICK)
    for remembered in (0, 4):  # a folder has two indices: of all of it, and of its classes
        assert len(list(cache.glob("*"))) == remembered
        # Written down from the code that walked at every start.
        assert digest(FolderSource(flat, 8), flat) == "44fba455fa79ba31"
        assert digest(ClassFolderSource(flat, 8), flat) == "5a5ca8e29d01f064"
        assert digest(ClassFolderSource(flat, 8, "val"), flat) == "94fa135c7d96dffa"
        assert digest(ClassFolderSource(parts, 8), parts) == "f329c3b5b19430fa"
        assert digest(ClassFolderSource(parts, 8, "val"), parts) == "3b281b2c6d168ece"
    assert has_test(flat)


def test_files_beside_class_folders_are_of_no_class(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "0.png", "z.png", "aa.png", "c.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    source = ClassFolderSource(tmp_path, 8)
    assert [Path(path).parent.name for path in source.paths] == source.classes == ["a", "b"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]


SEGMENTS = st.text(st.sampled_from("aB.\u00e9\u20ac\U0001f600\udcff\n -"), min_size=1, max_size=3)
TREES = st.lists(
    st.tuples(st.lists(SEGMENTS, max_size=3), SEGMENTS, st.sampled_from([".jpg", ".PNG", ".txt", ""])), max_size=12
)


@pytest.mark.usefixtures("fine_clock")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree_is_the_plain_walk_and_any_path_is_found_in_it(
    tree: list[tuple[list[str], str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folders, name, suffix in tree:
        try:
            root.joinpath(*folders).mkdir(parents=True, exist_ok=True)
            root.joinpath(*folders, name + suffix).touch()
        except OSError:  # "." and "..", a file where a folder should be, a name that this file system refuses
            continue
    expected = plain(root)
    time.sleep(TICK)
    for _ in range(2):
        paths = Paths(open_index(root, root))
        assert list(paths) == expected
        assert paths[1:-1] == expected[1:-1]
        assert [paths.index(path) for path in expected] == list(range(len(expected)))
        with pytest.raises(ValueError, match="not in the list"):
            paths.index(str(root / "gone.jpg"))
    every_other = Paths(open_index(root, root), np.arange(0, len(expected), 2))
    assert list(every_other) == expected[::2]
    assert [every_other.index(path) for path in expected[::2]] == list(range(len(every_other)))


def test_a_tree_deeper_than_python_calls_itself(tmp_path: Path) -> None:
    made = [tmp_path / "d"]
    while len(made) < sys.getrecursionlimit() + 50:
        made.append(made[-1] / "d")
    for folder in made:
        folder.mkdir()
    last = made[-1] / "x.png"
    last.touch()
    try:
        assert opened(tmp_path) == [str(last)]
    finally:
        last.unlink()
        for folder in reversed(made):
            folder.rmdir()


# What happens to the folder


def swap(root: Path) -> None:
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (root / old).rename(root / new)


def exchange_for_a_copy(root: Path) -> None:
    """Every folder keeps the time of its last change, and one lacks a file."""
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    (copy / "b/1.png").unlink()
    for old in (root, *root.rglob("*")):
        new = copy / old.relative_to(root)
        if old.is_dir():
            os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    root.rename(root.with_name("old"))
    copy.rename(root)


def put_back_the_time(root: Path) -> None:
    before = (root / "b").stat().st_mtime_ns
    (root / "b/9.png").touch()
    os.utime(root / "b", ns=(before, before))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is added": lambda root: (root / "a/deep/er/4.png").touch(),
    "a file is removed": lambda root: (root / "b/1.png").unlink(),
    "a file is renamed": lambda root: (root / "b/1.png").rename(root / "b/3.png"),
    "a file moves": lambda root: (root / "b/1.png").rename(root / "empty/1.png"),
    "a file becomes a folder": lambda root: ((root / "c.bmp").unlink(), (root / "c.bmp").mkdir()),
    "a folder is added": lambda root: shutil.copytree(root / "b", root / "a/b"),
    "a folder is removed": lambda root: shutil.rmtree(root / "a"),
    "a folder is renamed": lambda root: (root / "a/deep").rename(root / "a/z"),
    "a folder is hidden": lambda root: (root / "a/deep").rename(root / "a/.deep"),
    "two folders change places": swap,
    "a copy takes its place": exchange_for_a_copy,
    "a folder is touched": lambda root: os.utime(root / "b"),
    "a time is put back": put_back_the_time,
}


@pytest.mark.usefixtures("fine_clock")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_in_a_folder_is_seen_and_remembered_anew(
    tmp_path: Path, cache: Path, change: Callable[[Path], object]
) -> None:
    root = photos(tmp_path / "photos")
    file = remember(root, cache)
    before = file.stat().st_ino
    change(root)
    time.sleep(TICK)
    assert opened(root) == plain(root)
    assert list(cache.iterdir()) == [file]
    assert file.stat().st_ino != before
    assert opened(root) == plain(root)


@pytest.mark.usefixtures("fine_clock")
def test_what_is_in_a_file_is_not_of_the_index(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    file = remember(root, cache)
    before = file.stat().st_ino
    (root / "b/1.png").write_bytes(b"new")
    assert opened(root) == plain(root)
    assert file.stat().st_ino == before  # not written anew


def test_a_folder_that_changed_a_moment_ago_is_not_believed(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    assert opened(root) == plain(root)
    assert list(cache.glob("*")) == []
    time.sleep(2.05)
    (root / "b/9.png").touch()
    assert opened(root) == plain(root)
    assert list(cache.glob("*")) == []
    time.sleep(2.05)
    assert opened(root) == plain(root)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("fine_clock")
def test_a_folder_with_links_is_walked_each_time(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    remember(root, cache)
    outside = tmp_path / "outside.png"
    outside.touch()
    (root / "b/link.png").symlink_to("1.png")
    (root / "b/out.png").symlink_to(outside)
    time.sleep(TICK)
    for cached in cache.iterdir():
        cached.unlink()
    source = FolderSource(root, 8)
    assert [Path(path).name for path in source.paths].count("link.png") == 1
    assert [Path(path).name for path in source.left_out] == ["out.png"]
    assert list(cache.iterdir()) == []
    (root / "b/1.png").unlink()
    assert "link.png" not in [Path(path).name for path in FolderSource(root, 8).paths]


@pytest.mark.usefixtures("fine_clock")
def test_names_that_are_no_text_survive(tmp_path: Path, cache: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "1.png").touch()
    remember(tmp_path, cache)
    assert opened(tmp_path) == [str(tmp_path / name), str(folder / "1.png")]
    assert all(Path(path).exists() for path in opened(tmp_path))


# What happens to the index


def damages(file: Path, others: Sequence[bytes]) -> Iterator[None]:
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        yield
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        yield
    for text in (*others, whole + b"\0", bytes(len(whole)), pickle.dumps("no pickle is opened")):
        file.write_bytes(text)
        yield
    file.unlink()
    file.mkdir()
    yield
    file.rmdir()
    file.symlink_to("nowhere")
    yield


@pytest.mark.usefixtures("fine_clock")
def test_an_index_that_is_cut_changed_or_foreign_costs_a_walk(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    other = remember(photos(tmp_path / "other"), cache)
    file = remember(root, cache)
    expected, count = plain(root), 0
    open_index(root, root, classes=True)
    (classes,) = set(cache.iterdir()) - {file, other}
    for _ in damages(file, [other.read_bytes(), classes.read_bytes()]):
        assert opened(root) == expected
        count += 1
    assert count > 200
    assert set(cache.iterdir()) == {file, other, classes}  # nothing half written is left


@pytest.mark.usefixtures("fine_clock")
def test_an_index_of_another_user_is_not_believed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remember(photos(tmp_path / "photos"), cache)
    before = file.stat().st_ino
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    opened(tmp_path / "photos")
    assert file.stat().st_ino != before


def forged(root: Path, cache: Path, names: bytes) -> Path:
    """An index with these names that passes for the folder's."""
    file = remember(root, cache)
    folder, state = bytearray(b"\0"), [walk.state_of(str(root))]
    assert indexfile.place(identity_of(root)) == str(file)
    indexfile.save(str(file), identity_of(root), Tables.of(bytearray(names), folder, [0], state))
    return file


@pytest.mark.usefixtures("fine_clock")
def test_a_forged_index_leads_nowhere(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "0.png").touch()
    bad = ("../secret.png", "/etc/passwd", "a/../../secret.png", "a/..", "..", "")
    file = forged(root, cache, b"".join(os.fsencode(name) + b"\0" for name in ("gone.png", *bad, "..png")))
    paths = Paths(open_index(root, root))
    assert (paths[0], paths[-1]) == (str(root / "gone.png"), str(root / "..png"))
    for i in range(1, len(bad) + 1):
        refused(lambda i=i: paths[i], "which is not in it", str(file))  # type: ignore[misc]


@pytest.mark.usefixtures("fine_clock")
def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos")
    time.sleep(TICK)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk: a write ends in the middle
    try:
        assert opened(root) == plain(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert opened(root) == plain(root)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be passed over, says its specification
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    assert opened(root) == plain(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


OPEN_AGAIN_AND_AGAIN = """
import hashlib, os, sys
from pathlib import Path
from hjepa.data import walk
from hjepa.data.index import Paths, open_index
walk._TICK_NS = 0
root, cache = Path(sys.argv[1]), Path(sys.argv[2])
for turn in range(60):
    if turn % 3 == 0:
        for file in cache.glob("*"):
            file.unlink(missing_ok=True)
    print(hashlib.sha256(os.fsencode("".join(Paths(open_index(root, root))))).hexdigest())
"""


def test_processes_at_once_do_each_other_no_harm(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    for i in range(300):
        (root / f"b/{i:03d}.png").touch()
    time.sleep(TICK)
    command = [sys.executable, "-c", OPEN_AGAIN_AND_AGAIN, str(root), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    expected = hashlib.sha256(os.fsencode("".join(plain(root)))).hexdigest()
    assert said == [[expected] * 60] * 3


@pytest.mark.usefixtures("fine_clock")
def test_what_nobody_opens_is_swept_out_and_what_is_used_stays(tmp_path: Path, cache: Path) -> None:
    used = remember(photos(tmp_path / "used"), cache)
    unused = remember(photos(tmp_path / "unused"), cache)
    half = cache / "tmphalf"  # of a process that was killed
    half.touch()
    long_ago = time.time() - 100 * 86400
    for file in (used, unused, half):
        os.utime(file, (long_ago, long_ago))
    opened(tmp_path / "used")
    new = remember(photos(tmp_path / "new"), cache)
    assert set(cache.iterdir()) == {used, new}


@pytest.mark.usefixtures("fine_clock")
def test_an_index_travels_to_a_loader_process_as_its_place(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos")
    file = remember(root, cache)
    parcel = pickle.dumps(Paths(open_index(root, root)))
    assert len(parcel) < 1000
    assert list(pickle.loads(parcel)) == plain(root)
    # Names that are on no disk travel themselves.
    linked = photos(tmp_path / "linked")
    (linked / "link.png").symlink_to("c.bmp")
    assert list(pickle.loads(pickle.dumps(Paths(open_index(linked, linked))))) == plain(linked)
    # Another computer that shares the cache wrote its own there.
    file.write_bytes(remember(photos(tmp_path / "other"), cache).read_bytes())
    assert list(pickle.loads(parcel)) == plain(root)
    file.unlink()
    assert list(pickle.loads(parcel)) == plain(root)
    # Never the numbers of one list with the names of another.
    (root / "0.png").touch()
    refused(lambda: pickle.loads(parcel), str(root), "changed")


@pytest.mark.usefixtures("fine_clock")
def test_opening_takes_no_memory_for_each_name(tmp_path: Path, cache: Path) -> None:
    root, count = tmp_path / "photos", 200_000
    root.mkdir()
    (root / "0.png").touch()
    forged(root, cache, b"".join(b"%08d.png\0" % i for i in range(count)))
    open_index(root, root)
    tracemalloc.start()
    try:
        source = FolderSource(root, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert Path(source.paths[count - 1]).name == f"{count - 1:08d}.png"
    # A list of them takes 100 bytes each; what is known of their sizes comes with their pixels.
    assert peak - source._true_sizes.nbytes < 10 * count
