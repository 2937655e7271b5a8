"""Real photos for the tests that want them: those that lie beside the project, or none."""

import os
import tarfile
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("HJEPA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
ARCHIVE = SHARED / "imagenette2-160.tar"
CLASSES = {"n01440764": "tench", "n02102040": "springer", "n02979186": "cassette", "n03000684": "chainsaw"}


def unpack_photos(folder: Path, per_class: int) -> dict[str, list[Path]]:
    """The first photos by name of four classes, in one folder; skips the test where the archive is not there.

    Returns:
        paths by class.
    """
    if not ARCHIVE.is_file():
        pytest.skip(f"no real photos here: {ARCHIVE} is not there")
    folder.mkdir(parents=True)
    found: dict[str, list[Path]] = {name: [] for name in CLASSES.values()}
    with tarfile.open(ARCHIVE) as archive:
        names = {member.name: member for member in archive if member.isfile() and member.name.startswith("train/")}
        for name in sorted(names):
            _, part, file = name.split("/")
            label = CLASSES.get(part)
            if label is None or len(found[label]) == per_class:
                continue
            content = archive.extractfile(names[name])
            assert content is not None
            (folder / file).write_bytes(content.read())
            found[label].append(folder / file)
    return found
