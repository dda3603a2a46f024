"""Draws one image of the sample data: a shape under a bad camera, and the mask of the shape.

Each shows one main object (an arrow, a gear, a spiral, ...) in any color, texture, size, position
and rotation, on a textured background, between scraps of clutter, some of them in front. The class
lies in the *shape* alone: color, place and area have the same distribution in every class.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

Points = np.ndarray  # (N, 2) float: the corners (x, y) of a polygon, y pointing down
Plane = np.ndarray  # (size, size) float32 in 0..1: one number a pixel
Canvas = np.ndarray  # (size, size, 3) float32, about 0..1: an RGB picture in the making


class Region(NamedTuple):
    """A polygon of a shape; the parts are drawn in order, and ink 0 cuts a hole."""

    points: Points
    ink: int = 1


# ---------------------------------------------------------------------------------- geometry


def _circle(radius: float, x: float = 0.0, y: float = 0.0, corners: int = 40) -> Points:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _polar(radius: np.ndarray) -> Points:
    """Polygon whose corners lie at the given distances, at even angles, around the center."""
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _bar(x0: float, y0: float, x1: float, y1: float, width: float) -> Points:
    return _ribbon(np.array([[x0, y0], [x1, y1]]), width)


def _ribbon(path: Points, width: float | np.ndarray) -> Points:
    """Polygon around a path (N, 2): the path shifted half a width to its left and right."""
    along = np.gradient(path, axis=0)
    normal = along[:, ::-1] * [-1, 1] / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    half = normal * np.reshape(width, (-1, 1)) / 2
    return np.concatenate([path + half, (path - half)[::-1]])


def _densify(points: Points, pieces: int = 6) -> Points:
    """Cut every edge into pieces, so that a warp can bend it."""
    step = np.arange(pieces)[:, None] / pieces
    edges = np.roll(points, -1, axis=0) - points
    return (points[:, None] + step * edges[:, None]).reshape(-1, 2)


# ------------------------------------------- the classes: shapes of radius about 1 around (0, 0)


def _arrow(rng: Generator) -> list[Region]:
    neck, wing, shaft = rng.uniform(-0.1, 0.35), rng.uniform(0.55, 0.85), rng.uniform(0.15, 0.28)
    upper = [(1.0, 0.0), (neck, wing), (neck, shaft), (-1.0, shaft)]
    return [Region(np.array([*upper, *((x, -y) for x, y in reversed(upper[1:]))]))]


def _crescent(rng: Generator) -> list[Region]:
    bite = rng.uniform(0.75, 0.9)
    return [
        Region(_circle(1.0)),
        Region(_circle(bite, x=1.15 - bite + rng.uniform(0.0, 0.25)), ink=0),
    ]


def _cross(rng: Generator) -> list[Region]:
    width, beam = rng.uniform(0.35, 0.6), rng.uniform(-0.3, 0.3)
    return [Region(_bar(-1, 0, 1, 0, width)), Region(_bar(beam, -1, beam, 1, width))]


def _flower(rng: Generator) -> list[Region]:
    petals, depth = rng.integers(4, 8), rng.uniform(0.18, 0.32)
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    outline = Region(_polar(1 - depth * (1 - np.abs(np.sin(angle * petals / 2))) * 2))
    return [outline, Region(_circle(rng.uniform(0.12, 0.25)), ink=0)]


def _gear(rng: Generator) -> list[Region]:
    teeth, root = rng.integers(7, 12), rng.uniform(0.7, 0.8)
    rim = np.tile([1.0, 1.0, root, root], teeth)
    return [Region(_polar(rim)), Region(_circle(rng.uniform(0.2, 0.42)), ink=0)]


def _heart(rng: Generator) -> list[Region]:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    dip = rng.uniform(4.0, 6.5)
    y = -(13 * np.cos(t) - dip * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [Region(np.stack([16 * np.sin(t) ** 3, y], axis=1) / 16)]


def _ladder(rng: Generator) -> list[Region]:
    half, width, rungs = rng.uniform(0.4, 0.55), rng.uniform(0.18, 0.26), rng.integers(3, 6)
    rails = [Region(_bar(side, -1.1, side, 1.1, width)) for side in (-half, half)]
    return rails + [Region(_bar(-half, y, half, y, width)) for y in np.linspace(-0.85, 0.85, rungs)]


def _ring(rng: Generator) -> list[Region]:
    hole, shift = rng.uniform(0.5, 0.75), rng.uniform(0.0, 0.12)
    return [Region(_circle(1.0)), Region(_circle(hole, x=shift), ink=0)]


def _spiral(rng: Generator) -> list[Region]:
    turns, hand = rng.uniform(1.7, 2.3), rng.choice([-1, 1])
    along = np.linspace(0.1, 1, 60)
    angle = hand * along * turns * 2 * np.pi
    path = along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return [Region(_ribbon(path, rng.uniform(0.2, 0.27)))]


def _star(rng: Generator) -> list[Region]:
    return [Region(_polar(np.tile([1.0, rng.uniform(0.35, 0.5)], rng.integers(4, 8))))]


_DRAWERS: tuple[Callable[[Generator], list[Region]], ...] = (
    *(_arrow, _crescent, _cross, _flower, _gear, _heart, _ladder, _ring, _spiral, _star),
)
SHAPES = {drawer.__name__.strip("_"): drawer for drawer in _DRAWERS}
CLASSES = tuple(SHAPES)  # in the alphabet's order, as image-folder readers number them

# ------------------------------------------------------------- planes: masks and textures


def _fill(parts: Iterable[Region], size: int, oversample: int = 3) -> Plane:
    """How much of each pixel the parts cover; their corners are in pictures' widths, 0..1."""
    image = Image.new("L", (size * oversample, size * oversample))
    draw = ImageDraw.Draw(image)
    for points, ink in parts:
        draw.polygon((points * image.width).ravel().tolist(), fill=255 * ink)
    return np.asarray(image.reduce(oversample), np.float32) / 255


def _warp(parts: list[Region], rng: Generator) -> list[Region]:
    """The shape bent, squeezed, sheared and turned at random, about its old size."""
    waves = [(k, rng.uniform(-0.07, 0.07), rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3)]
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1.0, rng.uniform(-0.25, 0.25)], [0.0, rng.uniform(0.7, 1.0)]])

    def bend(points: Points) -> Points:
        angle = np.arctan2(points[:, 1], points[:, 0])
        swell = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in waves)
        return (points * np.reshape(swell, (-1, 1))) @ linear.T

    return [Region(bend(_densify(points)), ink) for points, ink in parts]


def _object(name: str, rng: Generator, size: int) -> Plane:
    """The object's coverage: a shape of the class, of random area and place.

    A first drawing measures the shape's area and center, so that the second can be given an area
    and a center that tell nothing about the class.
    """
    parts = _warp(SHAPES[name](rng), rng)
    # one unit is a third of the trial's width; fine pixels, as polygons come out half a pixel fat
    trial = _fill([Region(points / 3 + 0.5, ink) for points, ink in parts], 128, oversample=1)
    rows, columns = np.nonzero(trial)
    center = ((np.array([columns.mean(), rows.mean()]) + 0.5) / 128 - 0.5) * 3
    scale = np.sqrt(rng.uniform(*_LOOK.area) / trial.mean()) / 3
    place = rng.uniform(0.4, 0.6, 2)
    return _fill([Region((points - center) * scale + place, ink) for points, ink in parts], size)


def _scrap(rng: Generator, size: int, length: float) -> Plane:
    """A piece of clutter that belongs to no class: a bent stroke, a blob or a chip."""
    kind, place = rng.integers(3), rng.uniform(0, 1, 2)
    if kind == 0:
        start, turn = rng.uniform(0, 2 * np.pi, 2)
        angle = start + np.linspace(0, turn - np.pi, 12)
        steps = np.stack([np.cos(angle), np.sin(angle)], axis=1) / 12
        points = _ribbon(np.cumsum(steps, axis=0) * 2, rng.uniform(0.1, 0.3))
    elif kind == 1:
        points = _polar(rng.uniform(0.35, 0.5) * (1 + rng.uniform(-0.15, 0.15, 12)))
    else:
        points = _polar(rng.uniform(0.3, 0.8, rng.integers(3, 5)))
    return _fill([Region(points * length + place)], size, oversample=2)


def _clouds(rng: Generator, size: int, cells: int) -> Plane:
    """Smooth noise in 0..1 with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.random((cells + 1, cells + 1), np.float32))
    fine = coarse.resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(fine), 0, 1)


def _texture(rng: Generator, size: int) -> Plane:
    """A pattern in 0..1: flat, a gradient, stripes, dots or clouds, at any angle."""
    kind, turn, period = rng.integers(5), rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.25)
    if kind == 0:
        return np.zeros((size, size), np.float32)
    if kind == 1:
        return _clouds(rng, size, int(rng.integers(3, 16)))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    if kind == 2:
        return np.clip(u + 0.5, 0, 1)
    waves = np.sin(2 * np.pi * u / period)
    if kind == 4:
        waves = waves * np.sin(2 * np.pi * v / period)
    return waves / 2 + 0.5


# --------------------------------------------------------------------- the picture


@dataclass(frozen=True)
class _Look:
    """How strong the nuisances are: (least, most), drawn afresh for every image.

    They were tuned by measurement. Stronger ones, above all textures and camera faults that differ
    between images, give contrastive learning an easier mark than the shape, and a short
    pre-training then learns to tell noise from noise.
    """

    area: tuple[float, float] = (0.14, 0.27)  # the object's share of the picture
    contrast: tuple[float, float] = (0.3, 0.5)  # brightness of the object against the ground
    scraps_behind: tuple[int, int] = (0, 3)
    scraps_before: tuple[int, int] = (0, 1)
    noise: tuple[float, float] = (0.015, 0.025)  # standard deviation
    blur: tuple[float, float] = (0.4, 0.6)  # radius in pixels of a 64-pixel picture
    chroma: float = 0.12  # largest distance of a color from gray
    texture: float = 0.06  # largest brightness step in a texture
    light: float = 0.4  # largest slope of the light across the picture


_LOOK = _Look()


def _color(rng: Generator, brightness: float) -> np.ndarray:
    """An RGB color (3,) of the brightness given and of any hue."""
    tint = rng.uniform(-1, 1, 3)
    return (brightness + _LOOK.chroma * (tint - tint.mean())).astype(np.float32)


def _surface(rng: Generator, size: int, brightness: float) -> Canvas:
    """A textured sheet in two related colors."""
    first = _color(rng, brightness)
    second = _color(rng, brightness + rng.uniform(-1, 1) * _LOOK.texture)
    return first + _texture(rng, size)[..., None] * (second - first)


def _over(canvas: Canvas, cover: Plane, paint: np.ndarray) -> Canvas:
    return canvas + cover[..., None] * (paint - canvas)


def _camera(canvas: Canvas, rng: Generator) -> Image.Image:
    """What a poor camera makes of the scene: uneven light, dark corners, blur and noise."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    slope_x, slope_y = rng.uniform(-_LOOK.light, _LOOK.light, 2)
    light = 1 + slope_x * x + slope_y * y - rng.uniform(0, 2 * _LOOK.light) * (x**2 + y**2)
    image = Image.fromarray(np.uint8(np.clip(canvas * light[..., None], 0, 1) * 255))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*_LOOK.blur) * size / 64))
    grain = rng.standard_normal(canvas.shape, np.float32) * rng.uniform(*_LOOK.noise) * 255
    return Image.fromarray(np.uint8(np.clip(np.asarray(image) + grain, 0, 255)))


def draw(name: str, rng: Generator, size: int = 64) -> tuple[Image.Image, np.ndarray]:
    """Draw one picture of a class.

    Args:
        name: Class, one of ``CLASSES``.
        rng: The source of everything that is random in it.
        size: Width and height in pixels.

    Returns:
        The picture (RGB, size x size), and the pixels where the object is seen, (size, size) bool.
    """
    ground = rng.uniform(0.2, 0.8)
    contrast = rng.uniform(*_LOOK.contrast) * rng.choice([-1, 1])
    if not 0.05 < ground + contrast < 0.95:
        contrast = -contrast
    canvas = _surface(rng, size, ground)
    for _ in range(rng.integers(*_LOOK.scraps_behind, endpoint=True)):
        brightness = ground + rng.uniform(-1, 1) * abs(contrast)
        canvas = _over(canvas, _scrap(rng, size, rng.uniform(0.08, 0.3)), _color(rng, brightness))

    shape = _object(name, rng, size)
    canvas = _over(canvas, shape, _surface(rng, size, ground + contrast))
    seen = shape
    for _ in range(rng.integers(*_LOOK.scraps_before, endpoint=True)):
        scrap = _scrap(rng, size, rng.uniform(0.08, 0.2))
        brightness = ground + rng.uniform(-1, 1) * abs(contrast)
        canvas = _over(canvas, scrap, _color(rng, brightness))
        seen = seen * (1 - scrap)
    return _camera(canvas, rng), seen > 0.5


# Share of red, green and blue in each band of ``to_bands``; gain and offset of its values.
_MIXTURE = np.array(
    [[0, 0.1, 0.9], [0.1, 0.8, 0.1], [0.9, 0.1, 0], [0.6, 0, 0.4], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]
)
_GAIN = np.array([2500, 3000, 3500, 5000, 8000, 400])
_OFFSET = np.array([200, 150, 100, 300, 500, 0])

NODATA = -9999  # value of pixels without data


def to_bands(image: Image.Image, rng: Generator) -> np.ndarray:
    """Turn a picture into one of six bands, as of a satellite: each has units of its own.

    Noise is added to each band. A fifth of the pictures lie at the edge of a scene: beyond it the
    bands hold ``NODATA``.

    Args:
        image: RGB.
        rng: The source of everything that is random.

    Returns:
        ``(H, W, 6)`` int16.
    """
    mixed = np.asarray(image) / 255 @ _MIXTURE.T
    mixed += rng.standard_normal(mixed.shape) * 0.01
    bands = np.rint(_OFFSET + _GAIN * mixed).astype(np.int16)
    if rng.random() < 0.2:
        bands[:, : rng.integers(2, 2 + image.width // 8)] = NODATA
    return bands
