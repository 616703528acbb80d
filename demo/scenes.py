"""Write a small data set of procedural aerial scenes as PNG files, for the demo and the tests.

    python demo/scenes.py --output_dir demo/data

Nothing is downloaded.  `train/CLASS` and `val/CLASS` hold single images; `locations/CLASS_0000` holds one
place at several dates: what stands there stays, while season, sun, haze and a few details change.
`--segmentation` adds images with a class for each pixel, `--changes` pairs of dates with what was built.  The
classes differ in structure (rows, grids, curves, crowns) but share their colours and exposures, so that
colour statistics alone say little about the class.
"""

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.nn import functional as F

SUPERSAMPLING = 2
# Families of colours that all classes share: green, olive, brown, tan, grey, snow, red earth, straw, ...
LAND = np.array(
    [[92, 116, 62], [122, 126, 74], [146, 116, 84], [188, 168, 124], [134, 130, 120]]
    + [[206, 208, 206], [164, 106, 78], [198, 178, 104], [66, 88, 58]]
)
WATER = np.array([[56, 86, 108], [36, 50, 58], [72, 98, 80], [132, 112, 82], [112, 132, 132]])
ROOFS = np.array([[172, 96, 76], [122, 122, 126], [204, 200, 192], [84, 82, 82], [104, 122, 144]])
ROADS = np.array([[124, 122, 122], [84, 82, 82], [170, 162, 150], [150, 128, 106]])

# Classes of pixels.  Without another one given, what is drawn is ground where it has no height, a building
# from this height on (scene units), and paved between.
KINDS = GROUND, TREES, WATERS, PAVED, BUILDING = "ground", "trees", "water", "paved", "building"
BUILT = 0.015

Box = tuple[float, float, float, float]  # left, top, width, depth


def generator_for(*key: str | int) -> torch.Generator:
    """Make a generator that depends on the key only, and so not on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def uniforms(generator: torch.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    """Draw an array of numbers."""
    return low + (high - low) * torch.rand(shape, generator=generator).numpy()


def choice(generator: torch.Generator, rows: np.ndarray) -> np.ndarray:
    """Draw one of the rows of an array."""
    return rows[torch.randint(len(rows), (), generator=generator).item()]


def mix_colours(generator: torch.Generator, family: np.ndarray, count: int) -> np.ndarray:
    """Draw colours (count, 3) from a family, each varied in brightness and hue."""
    colours = np.float32([choice(generator, family) for _ in range(count)])
    return colours * uniforms(generator, 0.8, 1.2, count, 1) + uniforms(generator, -8, 8, count, 3)


def rgb(colour: np.ndarray) -> tuple[int, ...]:
    """Make a colour that Pillow takes."""
    return tuple(min(255, max(0, int(value))) for value in colour.tolist())


def fractal_noise(generator: torch.Generator, size: int) -> np.ndarray:
    """Sum smooth noise over doubling frequencies, standardised."""
    noise, amplitude = torch.zeros(1, 1, 3, 3), 1.0
    while noise.shape[-1] < size:
        noise += amplitude * torch.randn(noise.shape, generator=generator)
        noise = F.interpolate(noise, scale_factor=2, mode="bilinear")
        amplitude *= 0.5
    noise = noise[0, 0, :size, :size].numpy()
    return (noise - noise.mean()) / noise.std()


class Canvas:
    """Layers of colours, heights and classes of pixels, drawn on in scene coordinates.

    The origin is the image centre and the image is about one unit wide.  Layouts fill [-1, 1] x [-1, 1],
    which covers the image under every rotation and zoom.  Heights cast the shadows; the terrain shows only
    where the height is 0, so that roads, roofs and water stay smooth.
    """

    def __init__(self, size: int, structure: torch.Generator, look: torch.Generator) -> None:
        """Draw the rotation, the zoom, the colours and the ground."""
        self.size, self.look = SUPERSAMPLING * size, look
        self.scale, angle = self.size * uniform(structure, 0.72, 1.44), uniform(structure, 0, 2 * math.pi)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        # What is built keeps its colours from one date to the next; land, trees and water do not.
        self.roofs, self.roads = mix_colours(structure, ROOFS, 5), mix_colours(structure, ROADS, 2)
        self.land, self.water = mix_colours(look, LAND, 5), mix_colours(look, WATER, 1)[0]
        self.crown = mix_colours(look, LAND, 1)[0] * 0.8
        self.terrain, self.relief = fractal_noise(structure, self.size), uniform(structure, 0.003, 0.008)
        blend = np.clip(0.2 + 0.2 * self.terrain, 0, 0.6)[..., None]
        ground = (1 - blend) * self.land[0] + blend * self.land[1]
        self.colours = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        self.heights = Image.new("F", self.colours.size)
        self.kinds = Image.new("L", self.colours.size)
        self.draw_colour, self.draw_height = ImageDraw.Draw(self.colours), ImageDraw.Draw(self.heights)
        self.draw_kind = ImageDraw.Draw(self.kinds)

    def kept(self) -> bool:
        """Tell whether a detail is there at this date; most are."""
        return uniform(self.look, 0, 1) > 0.06

    def fill(self, draw: str, shape: list, colour: np.ndarray, height: float, kind: str | None,
             **shape_args: object) -> None:
        """Draw a shape (pixels) on all layers, heights in pixels too."""
        kind = kind or (BUILDING if height >= BUILT * self.scale else PAVED if height else GROUND)
        values = rgb(colour), height, KINDS.index(kind)
        for layer, value in zip((self.draw_colour, self.draw_height, self.draw_kind), values, strict=True):
            getattr(layer, draw)(shape, fill=value, **shape_args)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Turn scene coordinates, numbers or arrays, into pixels."""
        x, y, middle = x * self.scale, y * self.scale, self.size / 2
        return x * self.cos - y * self.sin + middle, x * self.sin + y * self.cos + middle

    def polygon(self, points: Iterable, colour: np.ndarray, height: float = 0.001,
                kind: str | None = None) -> None:
        """Fill a polygon."""
        corners = [self.pixel(x, y) for x, y in points]
        if all(max(axis) > 0 and min(axis) < self.size for axis in zip(*corners, strict=True)):
            self.fill("polygon", corners, colour, height * self.scale, kind)

    def box(self, box: Box, colour: np.ndarray, height: float = 0.001, kind: str | None = None) -> None:
        """Fill a rectangle."""
        left, top, width, depth = box
        if math.hypot(left, top) < self.size / self.scale + width + depth:  # otherwise surely out of sight
            right, bottom = left + width, top + depth
            self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, height, kind)

    def house(self, box: Box, colour: np.ndarray, height: float = 0.025) -> None:
        """Draw a building with a pitched roof, one side of it brighter."""
        left, top, width, depth = box
        if self.kept():
            self.box((left, top, width, depth / 2), colour * 0.8, height)
            self.box((left, top + depth / 2, width, depth / 2), colour * 1.1, height)

    def strip(self, points: Iterable, width: float, colour: np.ndarray, height: float = 0.001,
              kind: str | None = None) -> None:
        """Draw a road, a river or another band along a curve."""
        corners, thickness = [self.pixel(x, y) for x, y in points], max(1, round(width * self.scale))
        self.fill("line", corners, colour, height * self.scale, kind, width=thickness, joint="curve")

    def trees(self, generator: torch.Generator, points: np.ndarray, radii: np.ndarray) -> None:
        """Draw domed crowns, each in its own tone."""
        tones = uniforms(generator, 0.75, 1.25, len(points))
        crowns = np.column_stack([*self.pixel(*points.T), radii * self.scale, tones])
        seen = (np.abs(crowns[:, :2] - self.size / 2) < self.size / 2 + crowns[:, 2:3]).all(axis=1)
        seen &= uniforms(self.look, 0, 1, len(points)) > 0.03  # a few are felled from one date to another
        for x, y, radius, tone in crowns[seen].tolist():
            self.draw_colour.circle((x, y), radius, fill=rgb(self.crown * tone))
            for part, height in ((1, 0.5), (0.75, 1), (0.45, 1.3)):
                self.draw_height.circle((x, y), part * radius, fill=height * radius)
            self.draw_kind.circle((x, y), radius, fill=KINDS.index(TREES))

    def scatter_trees(self, generator: torch.Generator, least: int, most: int) -> None:
        """Draw single trees anywhere."""
        points = uniforms(generator, -1, 1, int(uniform(generator, least, most)), 2)
        self.trees(generator, points, uniforms(generator, 0.012, 0.035, len(points)))


def split(generator: torch.Generator, box: Box, smallest: float) -> list[Box]:
    """Cut a box again and again into smaller ones."""
    left, top, width, depth = box
    if max(width, depth) < smallest * uniform(generator, 1, 2):
        return [box]
    cut = uniform(generator, 0.3, 0.7)
    if width > depth:
        halves = (left, top, width * cut, depth), (left + width * cut, top, width * (1 - cut), depth)
    else:
        halves = (left, top, width, depth * cut), (left, top + depth * cut, width, depth * (1 - cut))
    return [part for half in halves for part in split(generator, half, smallest)]


def curve(generator: torch.Generator, wiggle: float) -> np.ndarray:
    """Make a winding curve (50, 2) from left to right that passes near the origin."""
    x, y = np.linspace(-1.2, 1.2, 50), uniform(generator, -0.2, 0.2)
    for frequency in (3, 6, 11):
        phase = uniform(generator, 0, 2 * math.pi)
        y = y + wiggle / frequency * (np.sin(frequency * x + phase) - math.sin(phase))
    return np.column_stack([x, y])


def field_parcels(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw fields with furrows, divided by tracks."""
    track = uniform(generator, 0.004, 0.02)
    for left, top, width, depth in split(generator, (-1, -1, 2, 2), uniform(generator, 0.2, 0.4)):
        crop = choice(generator, canvas.land) if canvas.kept() else choice(canvas.look, LAND)
        crop, furrow = crop * uniform(generator, 0.8, 1.2), uniform(generator, 0.75, 1)
        width, depth, step = width - track, depth - track, uniform(generator, 0.025, 0.06)
        canvas.box((left, top, width, depth), crop, 0)
        for offset in np.arange(0, min(width, depth) - step / 2, step).tolist():
            along, across = (left, top + offset, width, step / 2), (left + offset, top, step / 2, depth)
            canvas.box(along if width > depth else across, crop * furrow, 0)
    canvas.scatter_trees(generator, 0, 40)


def orchard(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw blocks of trees planted in rows."""
    for left, top, width, depth in split(generator, (-1, -1, 2, 2), uniform(generator, 0.5, 1)):
        canvas.box((left, top, width, depth), choice(generator, canvas.land[:3]), 0)
        row, column = uniforms(generator, 0.06, 0.12, 2).tolist()
        x, y = np.meshgrid(np.arange(0.06, width - 0.03, column), np.arange(0.06, depth - 0.03, row))
        points = np.column_stack([left + x.ravel(), top + y.ravel()])
        radii = uniforms(generator, 0.32, 0.45, len(points)) * min(row, column)
        canvas.trees(generator, points + uniforms(generator, -0.005, 0.005, *points.shape), radii)


def river(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw a meandering river with banks, among meadows and trees."""
    for left, top, width, depth in uniforms(generator, 0, 1, 6, 4).tolist():
        meadow = (2 * left - 1, 2 * top - 1, 0.2 + width / 3, 0.2 + depth / 3)
        canvas.box(meadow, choice(generator, canvas.land), 0)
    canvas.scatter_trees(generator, 20, 300)
    course, width = curve(generator, uniform(generator, 0.5, 1)), uniform(generator, 0.07, 0.16)
    canvas.strip(course, width + uniform(generator, 0.02, 0.07), choice(generator, canvas.land), 0)
    canvas.strip(course, width, canvas.water, kind=WATERS)


def road_grid(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw wide roads around large blocks with a few buildings."""
    block, road = uniform(generator, 0.3, 0.45), uniform(generator, 0.045, 0.07)
    corners = np.arange(-1, 1, block).tolist()
    for left, top in ((left, top) for left in corners for top in corners):
        canvas.box((left, top, block, block), choice(generator, canvas.land), 0)
        for x, y, width, depth in (uniforms(generator, 0.15, 0.4, 2, 4) * block).tolist():
            canvas.house((left + 2 * x, top + 2 * y, width, depth), choice(generator, canvas.roofs))
    canvas.scatter_trees(generator, 30, 200)
    for width, asphalt in ((road, canvas.roads[0]), (road / 10, canvas.roads[0] * 1.5)):
        for corner in corners:
            canvas.strip([(-1, corner), (1, corner)], width, asphalt)
            canvas.strip([(corner, -1), (corner, 1)], width, asphalt)


def dense_housing(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw rows of small houses along narrow streets."""
    depth, garden = uniform(generator, 0.055, 0.08), uniform(generator, 0.02, 0.06)
    gap = uniform(generator, 0.005, 0.035)
    canvas.scatter_trees(generator, 50, 400)
    for street in np.arange(-1, 1, 2 * depth + garden + 0.05).tolist():
        canvas.box((-1, street, 2, 0.03), canvas.roads[0])
        for top in (street + 0.04, street + 0.04 + depth + garden):
            widths = uniforms(generator, 0.8, 1.4, int(2 / depth)) * depth
            for width, right in zip(widths.tolist(), np.cumsum(widths + gap).tolist(), strict=True):
                canvas.house((right - width - 1, top, width, depth), choice(generator, canvas.roofs))
    for left in uniforms(generator, -1, 1, 3).tolist():
        canvas.box((left, -1, 0.035, 2), canvas.roads[0])


def industry(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw large ribbed roofs on yards with lorries."""
    road = uniform(generator, 0.04, 0.08)
    for left, top, width, depth in split(generator, (-1, -1, 2, 2), uniform(generator, 0.35, 0.6)):
        canvas.box((left, top, width - road, depth - road), choice(generator, canvas.roads))
        roof, roof_depth = choice(generator, canvas.roofs), depth - 3 * road
        canvas.box((left + road / 2, top + road / 2, width - 2 * road, roof_depth), roof, 0.05)
        for rib in np.arange(0.03, width - 2 * road, uniform(generator, 0.04, 0.1)).tolist():
            canvas.box((left + road / 2 + rib, top + road / 2, 0.01, roof_depth), roof * 0.8, 0.05)
        for x in np.arange(left + 0.02, left + width - road, 0.05).tolist():
            if uniform(canvas.look, 0, 1) < 0.4:  # lorries come and go
                canvas.box((x, top + depth - 2 * road, 0.018, 0.05), choice(canvas.look, ROOFS), 0.01)


def forest(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw crowns close together, with clearings and a winding track."""
    step = uniform(generator, 0.045, 0.09)
    points = np.mgrid[-1:1:step, -1:1:step].reshape(2, -1).T
    points = points + uniforms(generator, -0.5, 0.5, *points.shape) * step
    track = curve(generator, 0.4)
    clear = np.abs(points[:, 1] - np.interp(points[:, 0], *track.T)) < uniform(generator, -0.06, 0.06)
    for centre in uniforms(generator, -1, 1, 3, 2):
        clear |= np.linalg.norm(points - centre, axis=1) < uniform(generator, 0, 0.3)
    canvas.trees(generator, points[~clear], uniforms(generator, 0.4, 0.8, (~clear).sum()) * step)


def bare_ground(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw eroded ground or dunes with shrubs and vehicle tracks."""
    if uniform(generator, 0, 1) < 0.5:
        canvas.terrain, canvas.relief = 1.5 * np.abs(canvas.terrain), uniform(generator, 0.01, 0.025)
    else:
        y, x = np.mgrid[: canvas.size, : canvas.size].astype(np.float32)
        phase = (x * canvas.cos + y * canvas.sin) / canvas.scale * uniform(generator, 30, 70)
        canvas.terrain = canvas.terrain + np.sin(phase + 2 * canvas.terrain)
    for track in (curve(generator, 0.5), curve(generator, 0.5)[:, ::-1]):
        canvas.strip(track, 0.008, choice(generator, canvas.land), 0)
    canvas.scatter_trees(generator, 0, 30)


def coast(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw a shore with a beach, lines of surf and whitecaps."""
    canvas.scatter_trees(generator, 20, 300)
    for left, top in uniforms(generator, -1, 1, 10, 2).tolist():
        canvas.house((left, top, 0.08, 0.06), choice(generator, canvas.roofs))
    shore = curve(generator, uniform(generator, 0.2, 0.7))
    canvas.strip(shore, uniform(generator, 0.06, 0.2), choice(generator, canvas.land), 0)
    canvas.polygon([*shore.tolist(), (1.2, 2), (-1.2, 2)], canvas.water, kind=WATERS)
    waves = uniforms(canvas.look, -1, 1, 250, 2)
    for left, top in waves[waves[:, 1] > np.interp(waves[:, 0], *shore.T) + 0.03].tolist():
        canvas.box((left, top, 0.04, 0.006), canvas.water * 1.2, kind=WATERS)
    for distance in uniforms(canvas.look, 0, 0.12, 3).tolist():
        canvas.strip(shore + (0, distance), 0.015, canvas.water + 60 - 300 * distance, kind=WATERS)


def airstrip(canvas: Canvas, generator: torch.Generator) -> None:
    """Draw a marked runway with a taxiway, hangars and aircraft."""
    end, middle = uniform(generator, -1, -0.2), uniform(generator, -0.2, 0.1)
    width, apart = uniform(generator, 0.08, 0.13), uniform(generator, 0.16, 0.25)
    asphalt, paint, taxiway = canvas.roads[0], canvas.roads[0] + 90, middle + apart
    canvas.scatter_trees(generator, 0, 60)
    canvas.box((end, middle - width / 2, 2, width), asphalt)
    canvas.box((end, taxiway, 2, width / 3), asphalt)
    for left in (end, end + 0.6, end + 1.2):
        canvas.box((left, middle, width / 3, apart), asphalt)
        canvas.box((left + 0.1, taxiway, 0.3, 0.15), asphalt)
        canvas.house((left + 0.12, taxiway + 0.15, 0.1, 0.1), choice(generator, canvas.roofs), 0.04)
        x, y = left + uniform(canvas.look, 0.12, 0.34), taxiway + 0.075  # where the aircraft stands today
        canvas.box((x - 0.04, y - 0.006, 0.08, 0.012), paint, 0.01)
        wings = [(x + 0.02, y), (x - 0.02, y - 0.045), (x - 0.005, y), (x - 0.02, y + 0.045)]
        canvas.polygon(wings, paint, 0.01)
    for dash in np.arange(end + 0.12, end + 2, 0.08).tolist():
        canvas.box((dash, middle - width / 30, 0.045, width / 15), paint)
    for bar in range(8):
        canvas.box((end + 0.02, middle + width * (bar / 9 - 0.41), 0.07, width / 18), paint)


LAYOUTS = {
    layout.__name__: layout
    for layout in (field_parcels, orchard, river, road_grid, dense_housing)
    + (industry, forest, bare_ground, coast, airstrip)
}
CLASSES = tuple(LAYOUTS)


def sunlight(heights: np.ndarray, look: torch.Generator) -> np.ndarray:
    """Compute the light on a height map: slopes facing the sun are bright, what lies behind is in shadow."""
    angle, steepness = uniform(look, 0, 2 * math.pi), uniform(look, 0.5, 1.2)
    east, south, size, reach = math.cos(angle), math.sin(angle), len(heights), len(heights) // 12
    smooth = F.avg_pool2d(torch.from_numpy(heights)[None], 3, stride=1, padding=1, count_include_pad=False)
    slope_south, slope_east = np.gradient(smooth[0].numpy())
    light = 1 - 0.3 * np.clip(slope_east * east + slope_south * south, -1.5, 1.5)
    padded, shadow = np.pad(heights, reach, mode="edge"), np.zeros(heights.shape, dtype=bool)
    for distance in range(1, reach + 1):
        x, y = reach + round(distance * east), reach + round(distance * south)
        shadow |= padded[y : y + size, x : x + size] > heights + distance * steepness
    return np.where(shadow, 0.5 * light, light)


def expose(image: np.ndarray, look: torch.Generator) -> np.ndarray:
    """Stretch the contrast to a random target, tint the image and add the noise of the sensor.

    Image products are often stretched scene by scene; here it also keeps brightness from telling classes.
    """
    grey = image.mean(axis=2, keepdims=True)
    stretched = (grey - grey.mean()) / (grey.std() + 1) * uniform(look, 22, 55) + uniform(look, 90, 160)
    image = (stretched + uniform(look, 0.4, 1.4) * (image - grey)) * uniforms(look, 0.94, 1.06, 3)
    image = image + uniform(look, 1, 6) * torch.randn(image.shape, generator=look).numpy()
    return image.round().clip(0, 255).astype(np.uint8)


def photograph(canvas: Canvas) -> np.ndarray:
    """Turn a canvas into an image with light, blur, haze and noise."""
    look, heights = canvas.look, np.array(canvas.heights)
    terrain = np.where(heights == 0, canvas.terrain, 0)
    light = sunlight(heights + canvas.relief * canvas.size * terrain, look)
    light *= 1 + uniform(look, 0.02, 0.1) * terrain
    image = (np.array(canvas.colours) * light[..., None]).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(image).reduce(SUPERSAMPLING)
    image = np.array(image.filter(ImageFilter.GaussianBlur(uniform(look, 0, 0.7))), dtype=np.float32)
    haze = uniform(look, 0, 0.2) * np.clip(1 + fractal_noise(look, len(image)), 0, 3)[..., None]
    return expose(image + haze * (200 - image), look)


def draw_scene(name: str, structure: torch.Generator, look: torch.Generator, size: int = 96) -> np.ndarray:
    """Draw a scene of class `name` as an RGB image (size, size, 3) of type uint8.

    `structure` decides what stands where, `look` how it appears at one date: two looks at the same structure
    are two dates of one place.
    """
    canvas = Canvas(size, structure, look)
    LAYOUTS[name](canvas, structure)
    return photograph(canvas)


def draw_kinds(name: str, key: tuple, date: int, size: int,
               houses: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw a place of class `name` at a date: its image (size, size, 3) and its pixels' classes (size, size).

    Up to `houses` are built at this date alone.
    """
    structure, built = generator_for(*key), generator_for(*key, date, "built")
    canvas = Canvas(size, structure, generator_for(*key, date))
    LAYOUTS[name](canvas, structure)
    for _ in range(int(uniform(built, 0, houses + 1))):
        (left, top), (width, depth) = uniforms(built, -0.5, 0.5, 2), uniforms(built, 0.08, 0.2, 2)
        canvas.house((left, top, width, depth), choice(built, canvas.roofs))
    return photograph(canvas), np.array(canvas.kinds)[::SUPERSAMPLING, ::SUPERSAMPLING]


def write_pixels(output_dir: Path, count: int, size: int, seed: int, dates: bool) -> None:
    """Write images/ and masks/, or with `dates` A/, B/ and label/; four in five to train/, one to val/."""
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}_", dir=output_dir.parent) as temporary:
        root = Path(temporary) / output_dir.name
        for index in range(count):
            name, key = CLASSES[index % len(CLASSES)], (seed, output_dir.name, index)
            part = root / ("val" if index // len(CLASSES) % 5 == 4 else "train")
            if dates:
                (before, old), (after, new) = (draw_kinds(name, key, date, size, 3 + 5 * date)
                                               for date in (0, 1))
                changed = (old == KINDS.index(BUILDING)) != (new == KINDS.index(BUILDING))
                layers = {"A": before, "B": after, "label": np.uint8(255 * changed)}
            else:
                layers = dict(zip(("images", "masks"), draw_kinds(name, key, 0, size), strict=True))
            for folder, pixels in layers.items():
                (part / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(part / folder / f"{index:04d}.png")
        if not dates:
            (root / "classes.txt").write_text("".join(f"{kind} {i}\n" for i, kind in enumerate(KINDS)))
        root.rename(output_dir)


def list_images(settings: Mapping[str, int]) -> Iterator[tuple[str, str, tuple, tuple]]:
    """List every image: its path, its class and the keys of its structure and its look."""
    for part in ("train", "val"):
        for name in CLASSES:
            for index in range(settings[f"{part}_per_class"]):
                key = (settings["seed"], part, name, index)
                yield f"{part}/{name}/{name}_{index:04d}.png", name, key, (*key, "look")
    for location in range(settings["locations"]):
        name, index = CLASSES[location % len(CLASSES)], location // len(CLASSES)
        key = (settings["seed"], "locations", name, index)
        for date in range(settings["dates"]):
            year, month = divmod(2018 * 12 + 3 + 5 * date, 12)
            yield f"locations/{name}_{index:04d}/{year}-{month + 1:02d}.png", name, key, (*key, date)


def write_dataset(output_dir: Path, settings: Mapping[str, int]) -> None:
    """Write the whole data set to a folder that must not exist yet."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Written next to its place and renamed at the end: an interrupted run leaves no half-filled data set.
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}_", dir=output_dir.parent) as temporary:
        root = Path(temporary) / output_dir.name
        for path, name, structure, look in list_images(settings):
            scene = draw_scene(name, generator_for(*structure), generator_for(*look), settings["image_size"])
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene).save(root / path)
        (root / "scenes.json").write_text(json.dumps(settings))
        root.rename(output_dir)


# Length and width, as shares of the image's side, and family of colours.
OBJECTS = {"car": (0.1, 0.055, ROOFS), "house": (0.17, 0.12, ROOFS), "plane": (0.2, 0.17, ROADS),
           "ship": (0.22, 0.06, ROOFS)}
PLANE = [(1, 0), (0.8, 0.1), (0.3, 0.1), (-0.2, 1), (-0.4, 1), (-0.2, 0.1), (-0.8, 0.1), (-1, 0.4)]


def draw_objects(size: int, structure: torch.Generator, look: torch.Generator) -> tuple[np.ndarray, list]:
    """Draw cars, houses and planes on land, or ships on water, at any angle and none over another.

    Returns the image (size, size, 3), and for each object its four corners (pixels) and its class.
    """
    canvas, objects, taken = Canvas(size, structure, look), [], []
    at_sea = uniform(structure, 0, 1) < 0.25
    if at_sea:
        canvas.box((-2, -2, 4, 4), canvas.water)
    else:
        canvas.strip(curve(structure, 0.5), 0.08, canvas.roads[0], 0)
        canvas.scatter_trees(structure, 0, 60)
    for _ in range(30):
        name = "ship" if at_sea else list(OBJECTS)[torch.randint(3, (), generator=structure).item()]
        length, width, colours = OBJECTS[name]
        length, width = uniforms(structure, 0.8, 1.2, 2) * (length, width) * canvas.size / 2  # half of each
        reach = math.hypot(length, width)
        centre = uniforms(structure, reach, canvas.size - reach, 2)
        angle = uniform(structure, 0, 2 * math.pi)
        colour = choice(structure, colours) * uniform(look, 0.9, 1.3)
        if any(np.linalg.norm(centre - other) < reach + far for other, far in taken):
            continue
        taken.append((centre, reach))
        axes = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

        def fill(points: list, shade: float, place: tuple = (centre, (length, width), axes, colour)) -> None:
            (x, y), half, turn, tone = place
            corners = [tuple(corner) for corner in (np.array(points) * half @ turn + (x, y)).tolist()]
            canvas.draw_colour.polygon(corners, fill=rgb(tone * shade))
            canvas.draw_height.polygon(corners, fill=0.1 * half[1])

        if name == "plane":
            fill([*PLANE, *((x, -y) for x, y in PLANE[::-1])], 1.3)
        elif name == "ship":
            fill([(-1, -1), (0.5, -1), (1, 0), (0.5, 1), (-1, 1)], 1)
            fill([(-0.7, -0.6), (-0.2, -0.6), (-0.2, 0.6), (-0.7, 0.6)], 1.4)
        else:
            fill([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.8)
            fill([(-1, 0), (1, 0), (1, 1), (-1, 1)] if name == "house" else
                 [(-0.5, -0.8), (0.3, -0.8), (0.3, 0.8), (-0.5, 0.8)], 1.1)
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (length, width) @ axes + centre + 0.5
        objects.append((corners / SUPERSAMPLING, name))
    return photograph(canvas), objects


def write_detection(output_dir: Path, count: int, size: int, seed: int) -> None:
    """Write a detection set, four images in five to train/: images/ and DOTA's labels in labelTxt/."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}_", dir=output_dir.parent) as temporary:
        root = Path(temporary) / output_dir.name
        for index in range(count):
            part = root / ("val" if index % 5 == 4 else "train")
            key = (seed, "detection", index)
            image, objects = draw_objects(size, generator_for(*key), generator_for(*key, "look"))
            for folder in ("images", "labelTxt"):
                (part / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(part / f"images/{index:04d}.png")
            lines = [" ".join([*(f"{x:.1f}" for x in box.ravel()), f"{name} 0\n"]) for box, name in objects]
            (part / f"labelTxt/{index:04d}.txt").write_text("".join(lines))
        root.rename(output_dir)


def main() -> None:
    """Write the data set that the command line asks for, unless it is there already."""
    parser = argparse.ArgumentParser("scenes", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", default="demo/data", type=Path, help="Folder to write the images to.")
    parser.add_argument("--train_per_class", default=200, type=int, help="Training images per class.")
    parser.add_argument("--val_per_class", default=50, type=int, help="Validation images per class.")
    parser.add_argument("--locations", default=40, type=int, help="Places seen at several dates, in total.")
    parser.add_argument("--dates", default=3, type=int, help="Dates of each place.")
    parser.add_argument("--image_size", default=96, type=int, help="Width and height of the images (pixels).")
    parser.add_argument("--seed", default=0, type=int, help="Random seed.")
    others = {"segmentation": "Images with a class for each pixel", "changes": "Pairs with a mask of changes",
              "detection": "Images of twice the side with boxes around objects"}
    for name, what in others.items():
        parser.add_argument(f"--{name}", default=0, type=int, help=f"{what}, in {name}/; at least 50.")
    settings = vars(parser.parse_args())
    output_dir, others = settings.pop("output_dir").resolve(), {name: settings.pop(name) for name in others}
    for name, count in others.items():
        if count and count < 50:
            parser.error(f"--{name} must be at least 50, not {count}")
    minima = {"train_per_class": 1, "val_per_class": 1, "locations": 0, "dates": 1, "image_size": 32}
    for name, minimum in minima.items():
        if settings[name] < minimum:
            parser.error(f"--{name} must be at least {minimum}, not {settings[name]}")
    torch.set_num_threads(1)  # the arrays are too small to be shared out
    try:
        if not output_dir.exists():
            write_dataset(output_dir, settings)
            print(f"Wrote {output_dir}")
        elif json.loads((output_dir / "scenes.json").read_text()) == settings:
            print(f"{output_dir} is already there with these settings")
        else:
            parser.error(f"{output_dir} was written with other settings")
        for name, count in others.items():
            if count and not (output_dir / name).exists():
                size, seed = settings["image_size"], settings["seed"]
                if name == "detection":
                    write_detection(output_dir / name, count, 2 * size, seed)
                else:
                    write_pixels(output_dir / name, count, size, seed, name == "changes")
                print(f"Wrote {output_dir / name}")
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"cannot use {output_dir}: {error}")


if __name__ == "__main__":
    main()
