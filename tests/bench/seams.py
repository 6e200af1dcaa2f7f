"""Seams: a picture tile by tile against the same picture at once, and against the plain network, on real anime art.

`make bench ARGS=seams`. Differences are in steps of 255, before tones are set. `border step` is the mean step over tile
borders by that of the same places in the picture at once: 1 where no border shows. Naive tiles are cut without a halo,
by their own statistics where the network has any.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from factory.sketch import engine
from factory.sketch.anime2sketch import Anime2Sketch, new_network
from factory.sketch.converter import Converter
from factory.sketch.engine import SketchConfig, new_converter, run_tiles
from tests.bench.art import scene

RIM = 16  # pixels at the border, where a network fills in zeros and the engine mirrors the picture
GRIDS = [(512, 0), (512, 333), (1024, 517)]  # tile, offset


def seams() -> Iterator[str]:
    """Yield the table, converter by converter."""
    torch.set_num_threads(2)
    image = scene("concert1")
    size = image.shape[:2]
    yield "| converter | tile, offset | mean | 99.9th percentile | most | border step | naive: mean | 99.9th | step |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, converter in _converters(min(size)):
        whole = run_tiles(image, converter, size=size, tile=4096)
        for tile, offset in GRIDS:
            tiled = run_tiles(image, converter, size=size, tile=tile, offset=offset)
            plain = _Naive(converter)
            naive = run_tiles(image, plain, size=size, tile=tile, offset=offset)
            cells = [name, f"{tile}, {offset}"]
            cells += [*_differences(tiled, whole), f"{_step(tiled, whole, tile, offset, converter):.3f}"]
            cells += [*_differences(naive, whole)[:2], f"{_step(naive, whole, tile, offset, plain):.3f}"]
            yield f"| {' | '.join(cells)} |"
        plain = np.rint(255 * _Naive(converter)(_padded(image, converter.stride)[None])[0]).astype(np.uint8)
        for what, rim in (("the plain network, the whole picture", 0), (f"the same, but a rim of {RIM} px", RIM)):
            inside = tuple(slice(rim, side - rim) for side in size)
            cells = [name, what, *_differences(plain[inside], whole[inside]), "", "", "", ""]
            yield f"| {' | '.join(cells)} |"


def _converters(short_side: int) -> Iterator[tuple[str, Converter]]:
    for name in ("xdog", "micro", "hed"):
        yield name, new_converter(SketchConfig(converter=name), short_side=short_side)
    torch.manual_seed(0)
    converter = Anime2Sketch.__new__(Anime2Sketch)
    converter._model = new_network("default").eval()
    yield "anime2sketch, random weights", converter


class _Naive(Converter):
    """A converter as one would run it tile by tile: no halo, no overlap, each tile's own statistics."""

    def __init__(self, converter: Converter) -> None:
        self._converter, self.stride = converter, converter.stride

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        if isinstance(self._converter, Anime2Sketch):
            for norm in self._converter._norms():
                norm.thaw()
        return self._converter(tiles_BHW3)


def _padded(image: np.ndarray, stride: int) -> np.ndarray:
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % stride), (0, -width % stride), (0, 0)), mode="reflect")


def _differences(one: np.ndarray, other: np.ndarray) -> list[str]:
    difference = np.abs(one.astype(np.int16) - other)
    return [f"{difference.mean():.4f}", f"{np.percentile(difference, 99.9):.0f}", f"{difference.max()}"]


def _step(lines: np.ndarray, whole: np.ndarray, tile: int, offset: int, converter: Converter) -> float:
    """The mean step over the borders of tiles by that over the same places of `whole`."""
    found = []
    for axis, starts in enumerate(engine.starts(lines.shape, tile, converter.overlap, offset, converter.stride)):
        for place in (start for start in starts if 0 < start < lines.shape[axis]):
            pairs = [np.moveaxis(picture, axis, 0)[place - 1 : place + 1].astype(int) for picture in (lines, whole)]
            found.append([np.abs(np.diff(pair, axis=0)).mean() for pair in pairs])
    return float(np.sum(found, 0)[0] / np.sum(found, 0)[1])
