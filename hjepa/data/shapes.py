"""Pictures made of formulas: a labelled image set that needs no download.

Every image is painted back to front: a textured background, a few small distractors, one large object, and a
few more distractors over it. The class is the outline of the object and nothing else: colours, textures, place,
size, tilt and background are drawn without looking at it. A nearest neighbour in pixel space therefore learns
little, and an encoder that keeps what crops and recolourings of one image have in common learns much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa import rng
from hjepa.data.source import Float32, Int64, Source, UInt8

Bool = NDArray[np.bool_]

SIDE = 64
_CHUNK = 64  # images painted at once: the planes of one chunk stay in the processor's cache
_TURN = np.float32(2 * np.pi)


# ---------------------------------------------------------------------------------------------------------------
# The ten outlines. Each takes coordinates `x` (right) and `y` (up), `[n, SIDE, SIDE]` float32 in units of the
# object's radius, and returns the signed distance to the outline: negative inside. All are about as large and
# symmetric left to right (the crescent's mirror image is a crescent), so that a flip leaves the class alone.
# ---------------------------------------------------------------------------------------------------------------


def _disc(x: Float32, y: Float32) -> Float32:
    return np.hypot(x, y) - 0.85


def _ring(x: Float32, y: Float32) -> Float32:
    return np.abs(np.hypot(x, y) - 0.72) - 0.22


def _square(x: Float32, y: Float32) -> Float32:
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Float32, y: Float32) -> Float32:
    return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5


def _star(x: Float32, y: Float32) -> Float32:
    # Fold the plane into half of one arm; what is left of the star is one straight edge, from tip to notch.
    tip, notch, half_arm = 1.05, 0.42, np.float32(np.pi / 5)
    angle = np.abs((np.arctan2(x, y) + half_arm) % (2 * half_arm) - half_arm)
    radius = np.hypot(x, y)
    edge_x, edge_y = tip - notch * np.cos(half_arm), notch * np.sin(half_arm)
    across, along = radius * np.sin(angle), radius * np.cos(angle) - tip
    return (along * edge_y + across * edge_x) / np.hypot(edge_x, edge_y)


def _cross(x: Float32, y: Float32) -> Float32:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.27, np.maximum(x, y) - 0.95)


def _crescent(x: Float32, y: Float32) -> Float32:
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y))


def _heart(x: Float32, y: Float32) -> Float32:
    # A square on its corner with a half disc on each of its two upper sides.
    half, x, y = 0.5, np.abs(x), y + 0.1
    square = (x + np.abs(y)) * np.sqrt(0.5, dtype=np.float32) - half
    shift = half * np.sqrt(0.5, dtype=np.float32)
    return np.minimum(square, np.hypot(x - shift, y - shift) - half)


def _hourglass(x: Float32, y: Float32) -> Float32:
    x, y = np.abs(x), np.abs(y)
    return np.maximum((x - 0.9 * y) * 0.74 - 0.06, y - 0.85)


def _bars(x: Float32, y: Float32) -> Float32:
    # Three level bars: the distance to the nearest of the centre lines y = -0.65, 0, 0.65.
    row = np.abs(y - 0.65 * np.clip(np.rint(y / 0.65), -1, 1))
    return np.maximum(row - 0.18, np.abs(x) - 0.8)


OUTLINES: dict[str, Callable[[Float32, Float32], Float32]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "hourglass": _hourglass,
    "bars": _bars,
}
CLASSES = tuple(OUTLINES)


class Layer(NamedTuple):
    """One coat of paint: where it lies, `[n, 1, SIDE, SIDE]` in [0, 1], and its colour, `[n, 3, SIDE|1, SIDE|1]`."""

    coverage: Float32
    colour: Float32
    is_object: bool


class Shapes(Source):
    """Procedural 64 x 64 images of ten shapes; image `i` is a function of (seed, split, i) alone.

    Nothing is stored but the labels: any length costs the same, and a longer set begins with the shorter one.

    Args:
        length: number of images.
        seed: names the set; sets of different seeds share nothing.
        split: "train", "test", ...: splits of one seed are independent draws from one distribution.
    """

    num_classes = len(CLASSES)
    size = (SIDE, SIDE)

    def __init__(self, length: int, seed: int, split: str = "train"):
        assert length >= 0, f"{length=}"
        self.name = "shapes"
        self.length, self.seed, self.split = length, seed, split
        self.labels = self._labels(np.arange(length))

    def __len__(self) -> int:
        return self.length

    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, 64, 64]` uint8 RGB."""
        out = np.empty((len(indices), 3, SIDE, SIDE), np.uint8)
        for part in self._parts(indices):
            canvas = np.zeros((len(indices[part]), 3, SIDE, SIDE), np.float32)
            for layer in self._layers(indices[part]):
                canvas += layer.coverage * (layer.colour - canvas)
            out[part] = np.clip(canvas, 0, 1, out=canvas) * 255 + 0.5
        return out

    def masks(self, indices: Int64) -> Bool:
        """`[n]` indices -> `[n, 64, 64]` bool, the pixels where the object is seen (not hidden by a distractor)."""
        out = np.empty((len(indices), SIDE, SIDE), np.bool_)
        for part in self._parts(indices):
            seen = np.zeros((len(indices[part]), 1, SIDE, SIDE), np.float32)
            for layer in self._layers(indices[part]):
                seen += layer.coverage * (layer.is_object - seen)
            out[part] = seen[:, 0] > 0.5
        return out

    # -- what an image is made of -----------------------------------------------------------------------------

    def _labels(self, indices: Int64) -> Int64:
        """`[n]` class of each image. Each ten images in a row hold all ten classes, shuffled: always balanced."""
        decade, place = np.divmod(indices, self.num_classes)
        return rng.permute(self.seed, f"shapes/{self.split}/label", decade, place, self.num_classes)

    def _layers(self, indices: Int64) -> Iterator[Layer]:
        """The coats of paint of `[n]` images, back to front."""
        ground, paint = self._lightness(indices)
        everywhere = np.ones((1, 1, 1, 1), np.float32)
        yield Layer(everywhere, self._textured("background", indices, ground), False)
        yield self._distractor(0, indices)
        yield self._distractor(1, indices)
        yield Layer(self._object_coverage(indices), self._textured("object", indices, paint), True)
        yield self._distractor(2, indices)
        yield self._distractor(3, indices)

    def _lightness(self, indices: Int64) -> tuple[Float32, Float32]:
        """Mean lightness of background and object, `[n]` each: at least 0.4 apart, so the object stands out."""
        place, gap, swap = self._draw("lightness", indices, 3)
        gap = 0.4 + 0.2 * gap
        dark = 0.12 + (0.76 - gap) * place
        light = dark + gap
        return np.where(swap < 0.5, dark, light), np.where(swap < 0.5, light, dark)

    def _object_coverage(self, indices: Int64) -> Float32:
        """`[n, 1, SIDE, SIDE]` share of each pixel that the object fills, by class, pose and size."""
        right, down, radius, tilt, aspect = self._draw("pose", indices, 5)
        centre_x, centre_y = SIDE * (0.5 + 0.24 * (right - 0.5)), SIDE * (0.5 + 0.24 * (down - 0.5))
        radius = SIDE * (0.32 + 0.12 * radius)
        stretch = np.exp2(0.4 * (aspect - 0.5))
        x, y = _coordinates(centre_x, centre_y, (tilt - 0.5) * _TURN / 9, radius * stretch, radius / stretch)
        distance = np.empty_like(x)
        labels = self._labels(indices)
        for label, outline in enumerate(OUTLINES.values()):
            rows = np.flatnonzero(labels == label)
            distance[rows] = outline(x[rows], -y[rows])
        return _fill(distance * radius[:, None, None])[:, None]

    def _distractor(self, number: int, indices: Int64) -> Layer:
        """A small blob or bar of one colour, anywhere. The last two of the four are missing half the time."""
        right, down, length, width, tilt, lightness, hue, missing = self._draw(
            f"distractor{number}", indices, 8
        )
        length, width = 2.5 + 4 * length, 1.5 + 1.5 * width
        x, y = _coordinates(SIDE * right, SIDE * down, tilt * _TURN, length, width)
        distance = (np.hypot(x, y) - 1) * width[:, None, None]
        if number >= 2:
            distance += np.where(missing < 0.5, np.float32(SIDE), 0)[:, None, None]
        return Layer(_fill(distance)[:, None], _colour(0.1 + 0.8 * lightness, hue, 0.2), False)

    def _textured(self, what: str, indices: Int64, lightness: Float32) -> Float32:
        """`[n, 3, SIDE, SIDE]` paint: two related colours, mixed by a pattern drawn for each image."""
        hue, twist, contrast, saturation, kind, tilt, phase_x, phase_y, pitch = self._draw(what, indices, 9)
        contrast = 0.14 * (contrast - 0.5)
        saturation = 0.05 + 0.15 * saturation
        one = _colour(lightness + contrast, hue, saturation)
        other = _colour(lightness - contrast, hue + 0.2 * (twist - 0.5), saturation)
        period = SIDE / (2 + 6 * pitch)
        x, y = _coordinates(phase_x * SIDE, phase_y * SIDE, tilt * _TURN, period, period)
        pattern = np.empty_like(x)
        kind = (kind * len(_PATTERNS)).astype(np.int64)
        for number, draw in enumerate(_PATTERNS):
            rows = np.flatnonzero(kind == number)
            pattern[rows] = draw(x[rows], y[rows])
        return other + pattern[:, None] * (one - other)

    # -- small tools ------------------------------------------------------------------------------------------

    def _draw(self, what: str, indices: Int64, count: int) -> Float32:
        """`[count, n]` float32 in [0, 1): the numbers that settle one property of each image."""
        return rng.uniform(self.seed, f"shapes/{self.split}/{what}", indices, count).T.astype(np.float32)

    def _parts(self, indices: Int64) -> Iterator[slice]:
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < len(self))
        for start in range(0, len(indices), _CHUNK):
            yield slice(start, start + _CHUNK)


def _coordinates(
    centre_x: Float32, centre_y: Float32, tilt: Float32, unit_x: Float32, unit_y: Float32
) -> tuple[Float32, Float32]:
    """Pixel centres as seen from a figure: shifted, turned by `tilt`, in its own units. `[n]` -> `[n, SIDE, SIDE]` x 2."""
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5
    right = (pixel - centre_x[:, None])[:, None, :]
    down = (pixel - centre_y[:, None])[:, :, None]
    cos, sin = np.cos(tilt)[:, None, None], np.sin(tilt)[:, None, None]
    unit_x, unit_y = unit_x[:, None, None], unit_y[:, None, None]
    # Each term is a row or a column; only their sum is a full plane.
    return right * (cos / unit_x) + down * (sin / unit_x), down * (cos / unit_y) - right * (sin / unit_y)


def _fill(distance: Float32) -> Float32:
    """Signed distance in pixels -> share of the pixel inside, so that edges are smooth."""
    return np.clip(0.5 - distance, 0, 1)


def _colour(lightness: Float32, hue: Float32, saturation: Float32 | float) -> Float32:
    """`[n]` each -> `[n, 3, 1, 1]` RGB. The three cosines add up to zero: a hue does not change the mean."""
    thirds = np.arange(3, dtype=np.float32) / 3
    chroma = np.cos(_TURN * (hue[:, None] + thirds)) * np.reshape(saturation, (-1, 1))
    return (lightness[:, None] + chroma)[:, :, None, None]


def _gradient(x: Float32, y: Float32) -> Float32:
    return np.clip(0.5 + 0.2 * x, 0, 1)


def _grating(x: Float32, y: Float32) -> Float32:
    return 0.5 + 0.5 * np.sin(_TURN * x)


def _checks(x: Float32, y: Float32) -> Float32:
    return np.clip(0.5 + 3 * np.sin(_TURN * x) * np.sin(_TURN * y), 0, 1)


def _clouds(x: Float32, y: Float32) -> Float32:
    # Waves bent by other waves: as irregular as value noise on this scale, and cheaper.
    return 0.5 + 0.5 * np.sin(4 * x + 2 * np.sin(2.3 * y)) * np.sin(3 * y + 2 * np.sin(1.7 * x))


_PATTERNS = (_gradient, _grating, _checks, _clouds)
