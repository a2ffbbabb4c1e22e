"""Draw the captioned pictures of ``builtin:shapes``, and recognize the attributes of a picture.

1. A picture shows one shape. Its caption names size, colour, shape, position and background.
2. Position, size, angle and both shades vary a little from picture to picture, by a hash of the combination and the
   picture's seed. Only sums, products, quotients and square roots are used, in float64, whose rounding IEEE 754 fixes,
   so that a picture is the same on every machine.
3. A picture is ``background + coverage * (colour - background)``; coverage is the share of a pixel inside the shape.
4. ``builtin:shapes-new`` has other shapes in other colours, for continual training.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# Radius of the disc as a share of the picture's side, far enough apart that the jitter (7 %) never mixes them up.
SIZES = {"small": 0.125, "large": 0.2}
POSITIONS = {
    "centre": (0.5, 0.5),
    "upper left": (0.3, 0.3),
    "upper right": (0.7, 0.3),
    "lower left": (0.3, 0.7),
    "lower right": (0.7, 0.7),
}  # (x, y) of the middle, shares of the side
# RGB, at least SHADE away from 0 and 255.
BACKGROUNDS = {"white": (240, 240, 240), "grey": (128, 128, 128), "black": (16, 16, 16), "beige": (230, 212, 172)}
_COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "cyan": (40, 205, 225),
    "blue": (40, 70, 220),
    "purple": (130, 40, 180),
    "pink": (240, 130, 190),
}
_NEW_COLOURS = {
    "brown": (140, 90, 40),
    "maroon": (130, 20, 50),
    "olive": (125, 130, 20),
    "lime": (160, 235, 50),
    "teal": (20, 120, 130),
    "navy": (20, 25, 115),
    "lavender": (190, 165, 240),
    "magenta": (225, 30, 200),
}
COLOURS = _COLOURS | _NEW_COLOURS
FAMILIES = {
    "builtin:shapes": (("circle", "square", "triangle"), tuple(_COLOURS)),
    "builtin:shapes-new": (("star", "cross", "ring"), tuple(_NEW_COLOURS)),
}
PICTURES = 9  # per seen combination, by default: 864 * 9 = 7,776 for training, 864 new ones for validation
SHIFT, SCALE, TURN, SHADE = 0.025, 0.07, 0.12, 10  # largest jitter: share of the side, of the size, radians, of 255
_CHUNK = 32  # pictures recognized at a time


class Shape(NamedTuple):
    """The five attributes of a picture, in the words of its caption."""

    size: str
    colour: str
    shape: str
    position: str
    background: str


class _Jitter(NamedTuple):
    """How one picture differs from its combination; ``turn`` is the tangent of half the angle."""

    shift: tuple[float, float]
    scale: float
    turn: float
    shades: tuple[int, int]


def combinations(family: str = "builtin:shapes") -> list[Shape]:
    """Return all 960 combinations of a family, in a fixed order."""
    shapes, colours = FAMILIES[family]
    return [Shape(*values) for values in itertools.product(SIZES, colours, shapes, POSITIONS, BACKGROUNDS)]


def held_out(family: str = "builtin:shapes") -> list[Shape]:
    """Return the 96 combinations that training never shows, in the order of ``combinations``.

    One of the ten (size, position) pairs of each (colour, shape, background) is held out. Every value of every
    attribute, and every such triple, is seen in nine tenths of its combinations.
    """
    shapes, colours = FAMILIES[family]
    sizes, positions, backgrounds = list(SIZES), list(POSITIONS), list(BACKGROUNDS)

    def is_held_out(of: Shape) -> bool:
        cell = colours.index(of.colour) + 3 * shapes.index(of.shape) + 7 * backgrounds.index(of.background)
        return sizes.index(of.size) == cell % 2 and positions.index(of.position) == cell % 5

    return [shape for shape in combinations(family) if is_held_out(shape)]


def caption(shape: Shape) -> str:
    """Return a caption such as ``"a small red circle in the upper left on a white background"``."""
    return f"a {shape.size} {shape.colour} {shape.shape} in the {shape.position} on a {shape.background} background"


def picture_seed(seed: int, split: str, number: int) -> int:
    """Return the 63-bit seed for ``draw`` of picture ``number`` of a combination in a split such as ``"train"``."""
    return _bits(f"{seed}\0{split}\0{number}", 1)[0] >> 1


def draw(shape: Shape, variant_seed: int, size: int = 64) -> Pixels:
    """Draw a picture of a combination.

    Args:
        shape: Combination to draw.
        variant_seed: Seed of the variation; the same seed varies different combinations differently.
        size: Side in pixels.

    Returns:
        RGB, shape (size, size, 3).
    """
    jitter = _jitter(shape, variant_seed)
    colour = np.array(COLOURS[shape.colour], dtype=np.float64) + jitter.shades[0]
    background = np.array(BACKGROUNDS[shape.background], dtype=np.float64) + jitter.shades[1]
    coverage = _coverage(shape, jitter, size)
    return np.floor(background + coverage[..., None] * (colour - background) + 0.5).astype(np.uint8)


class Judge:
    """Recognize the attributes of pictures by the nearest rendering (L2), independently of any model.

    The distance to a rendering depends on the picture only through sums over pixels of picture times coverage.
    Comparing all pairs of colour and background, rendered in their middle shades, therefore costs as much as one.

    Args:
        size: Side of the pictures in pixels.
        renderings: Coverages to compare per combination of size, shape and position of a family (30 combinations).
        families: Families that the pictures may belong to.
    """

    def __init__(self, size: int = 64, renderings: int = 19, families: Sequence[str] = ("builtin:shapes",)) -> None:
        self.size = size
        drawable = [shape for family in families for shape in combinations(family)]
        outlines = sorted({(shape.size, shape.shape, shape.position) for shape in drawable})
        pairs = sorted({(shape.colour, shape.background) for shape in drawable})
        self._outlines = [outline for outline in outlines for _ in range(renderings)]
        self._pairs = pairs
        coverage = []
        for extent, kind, position in outlines:
            outline = Shape(extent, "", kind, position, "")
            for number in range(renderings):
                jitter = _jitter(outline, picture_seed(0, "judge", number))
                coverage.append(_coverage(outline, jitter, size).ravel())
        self._coverage = np.array(coverage, dtype=np.float32)  # (outlines, pixels)
        colours = np.array([COLOURS[colour] for colour, _ in pairs], dtype=np.float32)
        self._backgrounds = np.array([BACKGROUNDS[background] for _, background in pairs], dtype=np.float32)
        self._contrasts = colours - self._backgrounds  # (pairs, 3)

    def read(self, images: Pixels) -> list[Shape]:
        """Return the attributes of each picture.

        Args:
            images: RGB, shape (n, size, size, 3).

        Raises:
            ValueError: The pictures have another shape or type.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"images are {images.dtype} of shape {images.shape}, expected uint8 (n, {self.size}, {self.size}, 3)"
            )
        found = []
        for begin in range(0, len(images), _CHUNK):
            distances = self._distances(images[begin : begin + _CHUNK])
            for nearest in distances.reshape(len(distances), -1).argmin(1).tolist():
                outline, pair = divmod(nearest, len(self._pairs))
                (size, shape, position), (colour, background) = self._outlines[outline], self._pairs[pair]
                found.append(Shape(size, colour, shape, position, background))
        return found

    def _distances(self, images: Pixels) -> NDArray[np.float32]:
        """Return |x - (b + m d)|^2 - |x|^2, (n, outlines, pairs), for coverage m, background b, contrast d = c - b."""
        x = images.reshape(len(images), -1, 3).astype(np.float32)  # (n, pixels, 3)
        m, b, d = self._coverage, self._backgrounds, self._contrasts
        of_background = x.shape[1] * (b * b).sum(1) - 2 * x.sum(1) @ b.T  # (n, pairs)
        products = np.tensordot(m, x, axes=(1, 1)).swapaxes(0, 1)  # (n, outlines, 3)
        distances: NDArray[np.float32] = of_background[:, None] - 2 * products @ d.T
        distances += 2 * m.sum(1)[:, None] * (b * d).sum(1) + (m * m).sum(1)[:, None] * (d * d).sum(1)
        return distances


def _bits(text: str, number: int) -> list[int]:
    digest = hashlib.blake2b(text.encode(), digest_size=8 * number).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


def _jitter(shape: Shape, variant_seed: int) -> _Jitter:
    draws = _bits("\0".join((*shape, str(variant_seed))), 6)
    x, y, scale, turn = (2 * ((value >> 11) / 2**53) - 1 for value in draws[:4])  # uniform in [-1, 1)
    of_colour, of_background = (value % (2 * SHADE + 1) - SHADE for value in draws[4:])
    return _Jitter((SHIFT * x, SHIFT * y), 1 + SCALE * scale, TURN * turn / 2, (of_colour, of_background))


def _coverage(shape: Shape, jitter: _Jitter, size: int) -> Floats:
    """Return the share of each pixel that the shape covers, (size, size), from its distance to the outline."""
    middle_x, middle_y = (at + by for at, by in zip(POSITIONS[shape.position], jitter.shift, strict=True))
    radius = SIZES[shape.size] * jitter.scale * size
    centres = np.arange(size) + 0.5
    x, y = centres - middle_x * size, (centres - middle_y * size)[:, None]
    # Rotation without sine and cosine, which differ in the last bit between machines.
    turn = jitter.turn
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    distance = _OUTLINES[shape.shape](cosine * x + sine * y, cosine * y - sine * x, radius)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return np.sqrt(x * x + y * y) - radius


def _square(x: Floats, y: Floats, radius: float) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius  # the disc's area


def _triangle(x: Floats, y: Floats, radius: float) -> Floats:
    half_planes = np.maximum(y, 0.8660254037844386 * np.abs(x) - 0.5 * y)
    return half_planes - 0.6 * radius  # 0.6 of the disc's area, or its tips would leave the picture


def _star(x: Floats, y: Floats, radius: float) -> Floats:
    """Return the distance to a pentagram: the points inside at least four of its pentagon's five half-planes."""
    y = -y  # a tip points up
    side, rise, foot, fall = 0.9510565162951535, 0.30901699437494745, 0.5877852522924731, -0.8090169943749475
    planes = np.stack([y + 0 * x, side * x + rise * y, rise * y - side * x, foot * x + fall * y, fall * y - foot * x])
    fourth: Floats = np.partition(planes, 3, axis=0)[3]
    return fourth - 0.4 * radius


def _cross(x: Floats, y: Floats, radius: float) -> Floats:
    x, y = np.abs(x), np.abs(y)
    arm, width = 1.1 * radius, 0.36 * radius
    return np.minimum(np.maximum(x - arm, y - width), np.maximum(x - width, y - arm))


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    return np.abs(np.sqrt(x * x + y * y) - 0.8 * radius) - 0.3 * radius


_OUTLINES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
