"""Pictures made of formulas: a labelled image set that needs no download.

Every image is painted back to front: a textured background, a few small distractors, four objects of one outline,
and a few more distractors over them. The class is that outline and nothing else: colours, textures, places, sizes,
tilts and background are drawn without looking at it. A nearest neighbour in pixel space therefore learns little. An
encoder learns much that keeps what crops and recolourings of one image have in common, or that says from the objects
it sees what a hidden one must look like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa import rng
from hjepa.data.source import Bool, Int64, Source, UInt8

Plane = NDArray[np.floating[Any]]  # float32 everywhere; numpy's own types cannot promise it

SIDE = 64
_CHUNK = 64  # images painted at once: the planes of one chunk stay in the processor's cache
_TURN = 2 * math.pi


# The ten outlines. Each takes coordinates x (right) and y (up), [n, SIDE, SIDE] in units of the object's radius,
# and returns the signed distance to the outline: negative inside. All are about as large, and the mirror image of
# each is one of its own class: a flip leaves the label alone.


def _both(a: Plane, b: Plane) -> Plane:
    """The part that two figures share."""
    return np.asarray(np.maximum(a, b))


def _either(a: Plane, b: Plane) -> Plane:
    """Two figures as one."""
    return np.asarray(np.minimum(a, b))


def _circle(x: Plane, y: Plane, radius: float) -> Plane:
    return np.asarray(np.hypot(x, y) - radius)


def _box(x: Plane, y: Plane, half: float) -> Plane:
    return _both(np.abs(x), np.abs(y)) - half


def _nearest(x: Plane, spacing: float, last: float) -> Plane:
    """How far `x` is, with its sign, from the nearest of last * spacing, (last - 1) * spacing, ..., and minus those."""
    return np.asarray(x - spacing * (np.clip(np.rint(x / spacing + last), 0, 2 * last) - last))


def _fold(x: Plane, y: Plane, arms: int) -> tuple[Plane, Plane]:
    """Lay all arms of a figure over each other, halved: how far a point is along the arm and beside it."""
    half = math.pi / arms
    angle = np.abs((np.arctan2(x, y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.sin(angle)


def _disc(x: Plane, y: Plane) -> Plane:
    return _circle(x, y, 0.85)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _both(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return _both(_either(x, y) - 0.25, _both(x, y) - 0.95)


def _star(x: Plane, y: Plane) -> Plane:
    # Half an arm has one straight edge, from its tip to the notch between two arms.
    tip, notch = 1.05, 0.42
    edge_x, edge_y = tip - notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    along, beside = _fold(x, y, 5)
    return ((along - tip) * edge_y + beside * edge_x) / math.hypot(edge_x, edge_y)


def _fan(x: Plane, y: Plane) -> Plane:
    along, beside = _fold(x, y, 8)
    half = math.pi / 16
    return _both(beside * math.cos(half) - along * math.sin(half), _circle(x, y, 1.0))


def _target(x: Plane, y: Plane) -> Plane:
    return np.abs(_nearest(np.asarray(np.hypot(x, y)) - 0.61, 0.5, 0.5)) - 0.12


def _bars(x: Plane, y: Plane) -> Plane:
    return _both(np.abs(_nearest(y, 0.5, 1.5)) - 0.13, np.abs(x) - 0.85)


def _chevrons(x: Plane, y: Plane) -> Plane:
    # Bars, bent upwards in the middle.
    bent = np.abs(_nearest(y + 0.8 * np.abs(x) - 0.35, 0.52, 1.0)) * 0.78
    return _both(bent - 0.12, np.abs(x) - 0.85)


def _lattice(x: Plane, y: Plane) -> Plane:
    lines = np.abs(_either(np.abs(_nearest(x, 0.8, 1.0)), np.abs(_nearest(y, 0.8, 1.0))))
    return _both(lines - 0.11, _box(x, y, 0.91))


def _dots(x: Plane, y: Plane) -> Plane:
    return _circle(_nearest(x, 0.68, 1.0), _nearest(y, 0.68, 1.0), 0.23)


OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "fan": _fan,
    "target": _target,
    "bars": _bars,
    "chevrons": _chevrons,
    "lattice": _lattice,
    "dots": _dots,
}
CLASSES = tuple(OUTLINES)


class Layer(NamedTuple):
    """One coat of paint: where it lies, `[n, 1, 64, 64]` in [0, 1], and its colour, `[n, 3, 64 or 1, 64 or 1]`."""

    coverage: Plane
    colour: Plane
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
        """`[n]` indices -> `[n, 64, 64]` bool, where an object is seen: not behind a distractor."""
        out = np.empty((len(indices), SIDE, SIDE), np.bool_)
        for part in self._parts(indices):
            seen = np.zeros((len(indices[part]), 1, SIDE, SIDE), np.float32)
            for layer in self._layers(indices[part]):
                seen += layer.coverage * (layer.is_object - seen)
            out[part] = seen[:, 0] > 0.5
        return out

    # what an image is made of

    def _labels(self, indices: Int64) -> Int64:
        """`[n]` class of each image. Every ten images hold all ten classes, shuffled: always balanced."""
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

    def _lightness(self, indices: Int64) -> tuple[Plane, Plane]:
        """Mean lightness of background and objects, `[n]` each: far enough apart for the objects to stand out."""
        place, gap = self._draw("lightness", indices, 2)
        gap = 0.3 + 0.3 * gap
        dark = 0.12 + (0.76 - gap) * place
        # Objects are always lighter than their ground. Drawing that too makes a small network much slower to learn
        # (supervised, one large object: 35 % after 8 300 images against 72 % after 9 500).
        return dark, dark + gap

    def _object_coverage(self, indices: Int64) -> Plane:
        """`[n, 1, SIDE, SIDE]` share of each pixel that the objects fill: four of one outline, each in its own pose."""
        labels = self._labels(indices)
        coverage = np.zeros((len(indices), SIDE, SIDE), np.float32)
        for number in range(4):
            right, down, radius, tilt, aspect = self._draw(f"pose{number}", indices, 5)
            radius = SIDE * (0.15 + 0.06 * radius)
            # One in each quarter, as far off its middle as it goes without leaving the image.
            roam = SIDE / 2 - 1.4 * radius
            centre_x = SIDE * (0.25 + 0.5 * (number % 2)) + roam * (right - 0.5)
            centre_y = SIDE * (0.25 + 0.5 * (number // 2)) + roam * (down - 0.5)
            stretch = np.exp2(0.4 * (aspect - 0.5))
            x, y = _coordinates(centre_x, centre_y, (tilt - 0.5) * _TURN / 6, radius * stretch, radius / stretch)
            distance = np.empty_like(x)
            for label, outline in enumerate(OUTLINES.values()):
                rows = np.flatnonzero(labels == label)
                distance[rows] = outline(x[rows], -y[rows])
            np.maximum(coverage, _fill(distance * radius[:, None, None]), out=coverage)
        return coverage[:, None]

    def _distractor(self, number: int, indices: Int64) -> Layer:
        """A small blob or bar of one colour, anywhere. The last two of the four are missing half the time."""
        right, down, length, width, tilt, lightness, hue, missing = self._draw(f"distractor{number}", indices, 8)
        length, width = 2.5 + 4 * length, 1.5 + 1.5 * width
        x, y = _coordinates(SIDE * right, SIDE * down, tilt * _TURN, length, width)
        distance = (np.hypot(x, y) - 1) * width[:, None, None]
        if number >= 2:
            distance += np.where(missing < 0.5, np.float32(SIDE), 0)[:, None, None]
        return Layer(_fill(distance)[:, None], _colour(0.1 + 0.8 * lightness, hue, 0.2), False)

    def _textured(self, what: str, indices: Int64, lightness: Plane) -> Plane:
        """`[n, 3, SIDE, SIDE]` paint: two related colours, mixed by a pattern drawn for each image."""
        hue, twist, contrast, saturation, kind, tilt, phase_x, phase_y, pitch = self._draw(what, indices, 9)
        contrast = 0.08 * (contrast - 0.5)
        saturation = 0.1 + 0.2 * saturation
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

    # small tools

    def _draw(self, what: str, indices: Int64, count: int) -> Plane:
        """`[count, n]` float32 in [0, 1): the numbers that settle one property of each image."""
        return rng.uniform(self.seed, f"shapes/{self.split}/{what}", indices, count).T.astype(np.float32)

    def _parts(self, indices: Int64) -> Iterator[slice]:
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < len(self))
        for start in range(0, len(indices), _CHUNK):
            yield slice(start, start + _CHUNK)


def _coordinates(centre_x: Plane, centre_y: Plane, tilt: Plane, unit_x: Plane, unit_y: Plane) -> tuple[Plane, Plane]:
    """Pixels as seen from a figure, shifted, turned by `tilt`, in its own units: `[n]` each -> two `[n, 64, 64]`."""
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5
    right = (pixel - centre_x[:, None])[:, None, :]
    down = (pixel - centre_y[:, None])[:, :, None]
    cos, sin = np.cos(tilt)[:, None, None], np.sin(tilt)[:, None, None]
    unit_x, unit_y = unit_x[:, None, None], unit_y[:, None, None]
    # Each term is a row or a column; only their sum is a full plane.
    return right * (cos / unit_x) + down * (sin / unit_x), down * (cos / unit_y) - right * (sin / unit_y)


def _fill(distance: Plane) -> Plane:
    """Signed distance in pixels -> share of the pixel inside, so that edges are smooth."""
    return np.asarray(np.clip(0.5 - distance, 0, 1))


def _colour(lightness: Plane, hue: Plane, saturation: Plane | float) -> Plane:
    """`[n]` each -> `[n, 3, 1, 1]` RGB. The three cosines add up to zero: a hue does not change the mean."""
    thirds = np.arange(3, dtype=np.float32) / 3
    chroma = np.cos(_TURN * (hue[:, None] + thirds)) * np.reshape(saturation, (-1, 1))
    return np.asarray((lightness[:, None] + chroma)[:, :, None, None])


# The patterns: coordinates in periods, turned at random -> the share of the first colour, in [0, 1].


def _gradient(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.clip(0.5 + 0.2 * x, 0, 1))


def _grating(x: Plane, y: Plane) -> Plane:
    return np.asarray(0.5 + 0.5 * np.sin(_TURN * x))


def _checks(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.clip(0.5 + 3 * np.sin(_TURN * x) * np.sin(_TURN * y), 0, 1))


def _clouds(x: Plane, y: Plane) -> Plane:
    # Waves bent by other waves: as irregular as value noise on this scale, and cheaper.
    return np.asarray(0.5 + 0.5 * np.sin(4 * x + 2 * np.sin(2.3 * y)) * np.sin(3 * y + 2 * np.sin(1.7 * x)))


_PATTERNS = (_gradient, _grating, _checks, _clouds)
