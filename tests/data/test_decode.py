import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hjepa.data.decode import decode, true_size
from hjepa.errors import DataError

# Four corners that no flip or rotation leaves in place.
CORNERS = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((8, 8), np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def flat(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (8, 8), value)


def palette(**info: object) -> Image.Image:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", flat("RGB", (10, 20, 30)), (10, 20, 30)),
        ("rgb.bmp", flat("RGB", (10, 20, 30)), (10, 20, 30)),
        ("rgb.ppm", flat("RGB", (10, 20, 30)), (10, 20, 30)),
        ("rgb.webp", flat("RGB", (200, 200, 200)), (200, 200, 200)),
        ("rgb.tif", flat("RGB", (10, 20, 30)), (10, 20, 30)),
        ("l.pgm", flat("L", 77), (77, 77, 77)),
        ("l.jpg", flat("L", 77), (77, 77, 77)),
        ("1.tif", flat("1", 1), (255, 255, 255)),
        ("a PNG in disguise.jpg", flat("RGB", (10, 20, 30)), (10, 20, 30)),
        ("l.png", flat("L", 77), (77, 77, 77)),
        ("1.png", flat("1", 1), (255, 255, 255)),
        ("p.png", palette(), (200, 100, 50)),
        ("p.gif", palette(), (200, 100, 50)),
        ("la.png", flat("LA", (0, 51)), (102, 102, 102)),  # 0.2 * 0 + 0.8 * 128
        ("rgba.png", flat("RGBA", (255, 0, 128, 0)), (128, 128, 128)),
        ("half.png", flat("RGBA", (200, 100, 0, 51)), (142, 122, 102)),  # 0.2 of it, 0.8 * 128
        ("rgba.tif", flat("RGBA", (200, 100, 0, 51)), (142, 122, 102)),
        ("la.tif", flat("LA", (0, 51)), (102, 102, 102)),
        ("rgba.webp", flat("RGBA", (255, 0, 128, 0)), (128, 128, 128)),
        ("opaque.png", flat("RGBA", (255, 0, 128, 255)), (255, 0, 128)),
        ("cmyk.tif", flat("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
        ("cmyk.jpg", flat("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        ("16.png", Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100, 100, 100)),
        ("16.tif", Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
        ("16.pgm", Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), (100, 100, 100)),
        ("dark16.png", Image.fromarray(np.full((8, 8), 257, np.uint16)), (1, 1, 1)),
        ("flat.tif", Image.fromarray(np.full((8, 8), 7.5, np.float32)), (0, 0, 0)),
        ("nan.tif", Image.fromarray(np.full((8, 8), np.nan, np.float32)), (0, 0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_rgb(tmp_path: Path, name: str, image: Image.Image, expected: tuple[int, int, int]) -> None:
    options = {"format": "PNG"} if "disguise" in name else {}
    pixels, size = decode(save(image, tmp_path / name, **options), 4)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 4, 4)
    assert pixels.flags.c_contiguous
    assert size == (8, 8)
    assert (pixels == np.reshape(expected, (3, 1, 1))).all()


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_lies_on_grey(tmp_path: Path, mode: str) -> None:
    image = {"P": palette(), "RGB": flat("RGB", (1, 2, 3)), "L": flat("L", 9)}[mode]
    key = {"P": 1, "RGB": (1, 2, 3), "L": 9}[mode]
    pixels, _ = decode(save(image, tmp_path / "x.png", transparency=key), 4)
    assert (pixels == 128).all()


def test_float_and_wide_integers_span_the_whole_range(tmp_path: Path) -> None:
    ramp = np.linspace(-3.0, 5.0, 256, dtype=np.float32)[None].repeat(256, axis=0)
    ramp_with_hole = ramp.copy()
    ramp_with_hole[0, 0] = np.nan
    wide = np.linspace(-(2**30), 2**30, 256).astype(np.int32)[None].repeat(256, axis=0)
    for values in (ramp, ramp_with_hole, wide):
        pixels, _ = decode(save(Image.fromarray(values), tmp_path / "x.tif"), 256)
        np.testing.assert_allclose(pixels[:, 5], np.broadcast_to(np.arange(256), (3, 256)), atol=1)


def test_16_bit_png_is_not_clipped(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(256, axis=0)
    pixels, _ = decode(save(Image.fromarray(values), tmp_path / "x.png"), 256)
    assert (pixels == np.arange(256)).all()


def test_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [flat("RGB", (255, 0, 0)), flat("RGB", (0, 255, 0))]
    for name in ("x.gif", "x.webp"):
        path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode(path, 4)[0][:, 0, 0] == (255, 0, 0)).all()


def test_a_camera_file_of_several_pictures_is_its_first(tmp_path: Path) -> None:
    frames = [flat("RGB", (255, 0, 0)), flat("RGB", (0, 255, 0))]
    path = save(frames[0], tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert decode(path, 4)[0][:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    frames = [flat("RGB", (255, 0, 0)), flat("RGB", (0, 255, 0))]
    path = save(frames[0], tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    assert decode(path, 4)[0][:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    # Stored so that a viewer that honours the tag shows `upright`, wider than high.
    upright = CORNERS.repeat(2, axis=1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    path = save(image, tmp_path / f"x.{suffix}", exif=exif, **quality)

    assert true_size(path) == (16, 32)
    pixels, size = decode(path, 16)
    assert size == (16, 32)
    np.testing.assert_allclose(pixels[0, 2::11, 2::11], CORNERS[2::11, 2::11], atol=8)


def test_big_jpegs_are_decoded_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:1021, :1403]
    ramps = np.stack([x * 255 // 1403, y * 255 // 1021, 0 * x + 128], axis=-1).astype(np.uint8)
    path = save(Image.fromarray(ramps), tmp_path / "x.jpg", quality=95)
    pixels, size = decode(path, 100)
    assert size == (1021, 1403)

    drafts = []
    monkeypatch.setattr(Image.Image, "draft", lambda self, mode, size: drafts.append(size))
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", Image.Image.draft)
    whole, _ = decode(path, 100)
    assert drafts == [(100, 100)]
    np.testing.assert_allclose(pixels.astype(int), whole.astype(int), atol=2)


def test_squeezing_is_antialiased(tmp_path: Path) -> None:
    # A checkerboard of single pixels averages to grey; picking pixels would leave black or white.
    board = (np.indices((64, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, size = decode(save(Image.fromarray(board), tmp_path / "x.png"), 16)
    assert size == (64, 256)
    np.testing.assert_allclose(pixels, 127.5, atol=6)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_500, 60_000])  # past our limit, past Pillow's
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for read in (lambda: decode(path, 8), lambda: true_size(path)):
        with pytest.raises(DataError, match=r"bomb\.png: .* pixels") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_a_data_error_that_names_the_file(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(CORNERS).save(whole, "PNG")
    eps = io.BytesIO()
    flat("RGB", 0).save(eps, "EPS")
    contents = {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "cut.png": whole.getvalue()[:60],
        "format.png": eps.getvalue(),  # a format that Pillow knows and that is not on the list
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "missing.png"]:
        with pytest.raises(DataError, match=name) as caught:
            decode(tmp_path / name, 8)
        assert caught.value.exit_code == 3
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["jpeg", "png", "gif", "tiff", "webp", "bmp", "ppm"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.floats(0.2, 1),
)
def test_damaged_files_never_raise_anything_else(
    tmp_path: Path, suffix: str, edits: list[tuple[float, int]], keep: float
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(CORNERS).convert("RGB").save(buffer, suffix)
    content = bytearray(buffer.getvalue())
    for where, value in edits:
        content[int(where * min(len(content), 200))] = value
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content[: int(keep * len(content)) + 1])
    try:
        pixels, _ = decode(path, 8)
        assert pixels.shape == (3, 8, 8)
    except DataError:
        pass
