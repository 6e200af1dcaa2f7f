"""Sketches: how true their lines are, beside those of peers; how fast a network's tiles are, beside a plain loop."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from factory.files import write_atomic
from factory.models import find_model
from factory.picture import encode_png
from factory.sketch import engine, hed, sheet, tone
from factory.sketch.engine import SketchConfig, fitted, new_converter, sketch
from factory.sketch.generator import SketchGenerator
from factory.toon import draw, random_pose, random_scene
from tests.bench.art import FOLDER, scene
from tests.bench.harness import Comparison, compare
from trainer.micro import measure

COUNT = 24  # drawings
SIZES = ((640, 360), (1280, 720), (1920, 1080))
TOLERANCE = 0.0075  # of the picture's diagonal, as BSDS scores edges
TILINGS = {"micro": (2, 1024), "hed": (1, 512)}  # the scene so many times enlarged, in tiles of so many pixels
CROP = 360  # pixels

Convert = Callable[[np.ndarray], np.ndarray]


def truth() -> Iterator[str]:
    """Yield the table: mean F-scores of ink against exact line layers, each side at its best level.

    Ink within the tolerance of true ink is a hit, and true ink within it of ink is found: BSDS pairs pixels off, which
    thick lines would lose by; here thickness costs nothing, so the narrow tolerance stands beside it.
    """
    torch.set_num_threads(2)
    pairs = {size: [_drawing(f"truth/{size}/{i}", size) for i in range(COUNT // len(SIZES))] for size in SIZES}
    dark = [((image * 0.18).astype(np.uint8), lines) for image, lines in pairs[SIZES[1]]]
    yield "| converter | within 1 px | within 0.75 % of the diagonal | in the dark, within 1 px |"
    yield "|---|---|---|---|"
    for name, converter in _converters().items():
        convert = _once(converter)
        exact = [np.mean(measure.sketch_scores(convert, drawn, reach=1)) for drawn in pairs.values()]
        near = [
            np.mean(measure.sketch_scores(convert, drawn, reach=round(TOLERANCE * np.hypot(*size))))
            for size, drawn in pairs.items()
        ]
        shaded = np.mean(measure.sketch_scores(convert, dark, reach=1))
        yield f"| {name} | {np.mean(exact):.3f} | {np.mean(near):.3f} | {shaded:.3f} |"
    for path in _sheets():
        yield f"\n1:1 crops by each converter: {path}"


def _sheets() -> Iterator[Path]:
    """Write the same crops of real art, by day and in the dark, at their own size and enlarged; yield the files."""
    day = scene("concert1")
    frames = {"concert": day, "dark": (day * 0.18).astype(np.uint8)}
    for name, frame in frames.items():
        for size in (None, 4800):
            config = SketchConfig(converter="micro", size=size)
            configs = sheet.variants(config)
            height, width = fitted(frame, config)[1]
            places = [
                sheet.busiest(frame, config, CROP),
                *((t, t + CROP, x, x + CROP) for t, x in _places(height, width)),
            ]
            picture = sheet.sheet([sheet.crops(frame, box, configs) for box in places])
            path = FOLDER / f"sheet-{name}-{size or 'as-it-is'}.png"
            write_atomic(path, encode_png(np.ascontiguousarray(picture[..., ::-1])))
            yield path


def _places(height: int, width: int) -> list[tuple[int, int]]:
    """Return the corners of two more crops of a picture."""
    return [(height * 2 // 5, width * 2 // 5), (height // 6, width * 3 // 5)]


def _drawing(seed: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = random.Random(seed)
    setting = random_scene(rng)
    drawing = draw(setting, size, [random_pose(rng) for _ in setting.figures])
    return drawing.image, drawing.lines


def _converters() -> dict[str, Convert]:
    ours: dict[str, Convert] = {
        name: functools.partial(sketch, config=SketchConfig(converter=name)) for name in ("micro", "hed", "xdog")
    }
    micro = functools.partial(sketch, config=SketchConfig(converter="micro"))
    plain = hed.HED.from_pretrained(find_model("animesketch/hed"))
    return ours | {
        "micro, without brightening": functools.partial(
            sketch, config=SketchConfig(converter="micro", brighten_below=0)
        ),
        "micro, squeezed to 512 x 512": functools.partial(_squeezed, micro),
        "HED's edges as they are": lambda image: tone.level(_grey(1 - _whole(plain.edges, image)))[0],
        "Canny": lambda image: 255 - cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 100, 200),
        "OpenCV's pencilSketch": lambda image: cv2.pencilSketch(np.ascontiguousarray(image[..., ::-1]))[0],
    }


def _once(convert: Convert) -> Convert:
    """Return `convert`, which converts each picture once."""
    made: dict[int, np.ndarray] = {}

    def kept(image: np.ndarray) -> np.ndarray:
        if id(image) not in made:
            made[id(image)] = convert(image)
        return made[id(image)]

    return kept


def _whole(edges: Convert, image: np.ndarray) -> np.ndarray:
    """Return a network's edges of a whole picture, its sides made multiples of 16."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="reflect")
    return edges(padded[None])[0, :height, :width]


def _squeezed(convert: Convert, image: np.ndarray) -> np.ndarray:
    """As Anime2Sketch does: the picture squeezed to a square, and its lines brought back."""
    small = cv2.resize(image, (512, 512), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(convert(small), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def _grey(lines: np.ndarray) -> np.ndarray:
    return np.rint(255 * lines).clip(0, 255).astype(np.uint8)


def tiling(folder: Path) -> list[Comparison]:
    """Return the comparisons: megapixels per second of the engine, and of a plain loop over the same tiles.

    The loop is what one writes first: the same network in eager mode, the same tiles and halo, cut from the enlarged
    picture, put back without their halo.
    """
    torch.set_num_threads(2)
    image = scene("concert1")
    found = []
    for name, (times, tile) in TILINGS.items():
        size = (image.shape[0] * times, image.shape[1] * times)
        converter = new_converter(SketchConfig(converter=name), short_side=min(size))

        def ours(converter: engine.Converter = converter, size: engine.Size = size, tile: int = tile) -> int:
            engine.run_tiles(image, converter, size=size, tile=tile)
            return size[0] * size[1]

        loop = functools.partial(_loop, image, _plain(name), size, tile, converter.halo)
        what = f"{name}, {size[1]} x {size[0]} in tiles of {tile} / a plain loop"
        comparison = compare(what, "pixels/s", ours, loop, rounds=3)
        found.append(comparison)
    return found


def _loop(image: np.ndarray, network: Convert, size: engine.Size, tile: int, halo: int) -> int:
    large = image if size == image.shape[:2] else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LANCZOS4)
    rest = (-size[0] % tile, -size[1] % tile)
    large = np.pad(large, ((halo, halo + rest[0]), (halo, halo + rest[1]), (0, 0)), mode="reflect")
    lines = np.empty((size[0] + rest[0], size[1] + rest[1]), np.uint8)
    for top in range(0, size[0], tile):
        for left in range(0, size[1], tile):
            made = network(large[top : top + tile + 2 * halo, left : left + tile + 2 * halo])
            lines[top : top + tile, left : left + tile] = _grey(made)[halo:-halo, halo:-halo]
    return size[0] * size[1]


def _plain(name: str) -> Convert:
    """Return the network in eager mode, as it is loaded."""
    if name == "micro":
        generator = SketchGenerator.from_pretrained(find_model("animesketch/sketch"))
        return functools.partial(_eager, generator.cpu().to(memory_format=torch.contiguous_format), 127.5, 127.5)
    edges = hed.HED.from_pretrained(find_model("animesketch/hed")).cpu().to(memory_format=torch.contiguous_format)
    return lambda tile: 1 - hed.pencil(_eager(edges, np.float32(hed.MEAN_BGR), 1.0, tile[..., ::-1]))


@torch.no_grad()
def _eager(network: nn.Module, mean: object, scale: float, tile: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy((tile.astype(np.float32) - mean) / np.float32(scale))
    made = network(pixels.permute(2, 0, 1)[None].contiguous())[0, 0].numpy()
    return (made + 1) / 2 if scale != 1 else made
