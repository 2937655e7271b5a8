"""Damaged files: small real images of every format, with bytes flipped, swapped, cut out, doubled and cut off."""

import io
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from hjepa.data.decode import decode, true_size
from hjepa.data.files import FileSource
from hjepa.errors import DataError

SIDE = 16


def originals() -> dict[str, bytes]:
    """One file of each format and of the ways in which it is commonly written, by suffix."""
    y, x = np.mgrid[:40, :52]
    rgb = Image.fromarray(np.stack([5 * x, 6 * y, 127 + 40 * np.sin(x * y / 50)], -1).astype(np.uint8))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray((4 * x).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((1000 * x).astype(np.uint16))
    ways: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("jpg", rgb, "JPEG", {"exif": exif}),
        ("progressive.jpg", rgb, "JPEG", {"progressive": True, "quality": 90}),
        ("cmyk.jpg", rgb.convert("CMYK"), "JPEG", {}),
        ("mpo.jpg", rgb, "MPO", {"save_all": True, "append_images": [rgb]}),
        ("png", rgb, "PNG", {"exif": exif}),
        ("palette.png", rgb.convert("P"), "PNG", {"transparency": 3}),
        ("16.png", deep, "PNG", {}),
        ("apng.png", rgb, "PNG", {"save_all": True, "append_images": [alpha.convert("RGB")]}),
        ("webp", alpha, "WEBP", {"lossless": True, "exif": exif}),
        ("lossy.webp", rgb, "WEBP", {}),
        ("gif", rgb.convert("P"), "GIF", {"save_all": True, "append_images": [rgb.convert("P").rotate(180)]}),
        ("bmp", rgb, "BMP", {}),
        ("tif", rgb, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        ("raw.tif", alpha, "TIFF", {}),
        ("jpeg.tif", rgb, "TIFF", {"compression": "jpeg"}),
        ("g4.tif", rgb.convert("1"), "TIFF", {"compression": "group4"}),
        ("float.tif", Image.fromarray(x.astype(np.float32)), "TIFF", {}),
        ("ppm", rgb, "PPM", {}),
        ("pgm", rgb.convert("L"), "PPM", {}),
    ]
    written = {}
    for suffix, image, kind, options in ways:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        written[suffix] = buffer.getvalue()
    return written


def mutate(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One or two kinds of damage; half of it in the first bytes, where the structure lies."""
    data = bytearray(content)

    def place() -> int:
        reach = min(len(data), 200) if rng.random() < 0.5 else len(data)
        return int(rng.integers(max(reach, 1)))

    for kind in rng.choice(7, size=rng.integers(1, 3)):
        at, length = place(), int(rng.integers(1, 40))
        match kind:
            case 0:  # bits flipped
                for _ in range(rng.integers(1, 5)):
                    if data:
                        data[place()] ^= 1 << int(rng.integers(8))
            case 1:  # bytes overwritten
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 2:  # cut off
                del data[at:]
            case 3:  # cut out
                del data[at : at + length]
            case 4:  # two pieces swapped
                to = place()
                data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
            case 5:  # a number made extreme
                data[at : at + 4] = struct.pack(">I", int(rng.choice([0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF0000, 0x10000])))
            case 6:  # the rest of another file
                data[at:] = others[int(rng.integers(len(others)))][at:]
    return bytes(data)


def survey(folder: Path, count: int) -> dict[str, int]:
    """Read `count` damaged files by every way there is; how many could be read, and the slowest in milliseconds."""
    rng = np.random.default_rng(20240229)
    files = originals()
    names, contents = list(files), list(files.values())
    read, slowest = 0, 0.0
    paths: list[str] = []
    told: list[str] = []
    for i in range(count):
        which = i % len(names)
        path = folder / f"{i:04d}.{names[which]}"
        path.write_bytes(mutate(contents[which], contents, rng))
        paths.append(str(path))
        started = time.monotonic()
        try:
            pixels, size = decode(path, SIDE)
            assert pixels.shape == (3, SIDE, SIDE)
            assert pixels.dtype == np.uint8
            assert min(size) >= 1
            assert true_size(path) == size
            read += 1
        except DataError as error:
            told.append(str(error))
        slowest = max(slowest, time.monotonic() - started)
    assert all(str(folder) in text and "\n" not in text for text in told)
    # Together, as training reads them: those that cannot be read are replaced by those that can.
    source = FileSource("damaged", paths, SIDE, max_bad=1.0)
    together = source.read(np.arange(count))
    assert together.images.shape == (count, 3, SIDE, SIDE)
    assert len(source.bad_files.found) == count - read
    assert not {source.paths[i] for i in together.indices} & source.bad_files.found.keys()
    return {"read": read, "refused": count - read, "slowest_ms": round(1000 * slowest)}


def test_every_original_is_read(tmp_path: Path) -> None:
    for name, content in originals().items():
        path = tmp_path / f"x.{name}"
        path.write_bytes(content)
        assert decode(path, SIDE)[0].std() > 10, name


def test_two_thousand_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own, which a crash of a C library would end."""
    count = 2000
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(count)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # libtiff prints on its own; nothing of Python's may be among it.
    assert not any(word in done.stderr for word in ("Traceback", "Warning", "Exception"))
    found = json.loads(done.stdout)
    assert found["read"] + found["refused"] == count
    assert found["read"] > count // 10
    assert found["refused"] > count // 10
    assert found["slowest_ms"] < 5000


if __name__ == "__main__":
    print(json.dumps(survey(Path(sys.argv[1]), int(sys.argv[2]))))
