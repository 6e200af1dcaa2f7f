"""The tile engine: a converter over a picture of any size, in bounded memory, without seams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from factory.models import files_hash, find_model
from factory.settings import STRICT
from factory.sketch import tone
from factory.sketch.xdog import XDoG, XDoGConfig

SHIPPED = "animesketch/sketch"  # the network that converter `micro` runs
Corner = tuple[int, int]  # top and left of a tile
VERSION = "2"  # raised when the same frame would give another sketch


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How a frame becomes lines."""

    __pydantic_config__ = STRICT

    # The converter: `xdog`, an operator of two Gaussians; `micro`, a network trained on drawn line layers, shipped.
    converter: Literal["xdog", "micro"] = "xdog"
    # Long side of the sketch (pixels); none: the frame's own size.
    size: int | None = None
    # The sketch is a square of `size`: the frame fits into it, white above and below.
    square: bool = False
    # Side of a tile (pixels); memory grows with its square.
    tile: int = 1024
    # Parameters of the converter xdog.
    xdog: XDoGConfig = field(default_factory=XDoGConfig)

    def __post_init__(self) -> None:
        if self.size is not None and not 16 <= self.size <= 20480:
            raise ValueError(f"sketch.size must lie in 16 to 20480, got {self.size}.")
        if self.square and self.size is None:
            raise ValueError("sketch.square needs sketch.size.")
        if self.tile < 64 or self.tile % 64:
            raise ValueError(f"sketch.tile must be a multiple of 64, got {self.tile}.")

    def decides(self) -> dict[str, Any]:
        """Return what a sketch depends on: settings by name, and the network's files.

        The tile is among them: where a picture is enlarged, OpenCV rounds its places by the tile.
        """
        found = asdict(self)
        if self.converter != "xdog":
            found["xdog"], found["files"] = None, files_hash(SHIPPED)
        return found


class Converter(Protocol):
    """RGB uint8 H,W,3 to lines H,W float32 in [0, 1]; a line depends on at most `halo` pixels around it."""

    halo: int

    def __call__(self, tile: np.ndarray, /) -> np.ndarray: ...


def sketch(
    image: np.ndarray, config: SketchConfig, *, watch: Callable[[list[Corner]], Iterable[Corner]] = iter
) -> np.ndarray:
    """Return the sketch of the RGB uint8 image H,W,3: uint8 H',W', ink dark on white 255.

    `watch` wraps the list of tiles and yields them, as a progress bar does.
    """
    height, width = image.shape[:2]
    scale = config.size / max(height, width) if config.size else 1.0
    out_height, out_width = max(1, round(height * scale)), max(1, round(width * scale))
    converter = new_converter(config, short_side=min(out_height, out_width))
    lines = tone.levels(run_tiles(image, converter, size=(out_height, out_width), tile=config.tile, watch=watch))
    if not config.square or config.size is None:
        return lines
    page = np.full((config.size, config.size), 255, np.uint8)
    top, left = (config.size - out_height) // 2, (config.size - out_width) // 2
    page[top : top + out_height, left : left + out_width] = lines
    return page


def new_converter(config: SketchConfig, *, short_side: int) -> Converter:
    """Return the converter that `config` names, for a picture with this short side in pixels."""
    if config.converter == "xdog":
        return XDoG(config.xdog, short_side=short_side)
    from factory.sketch.generator import Generator  # torch, which the operator does without

    return Generator(find_model(SHIPPED))


def run_tiles(
    image: np.ndarray,
    converter: Converter,
    *,
    size: tuple[int, int],
    tile: int,
    watch: Callable[[list[Corner]], Iterable[Corner]] = iter,
) -> np.ndarray:
    """Return the converter's lines, uint8, of the RGB uint8 image H,W,3 brought to `size` (height, width).

    Each tile is computed with the converter's halo around it and cropped: the result does not depend on the grid. The
    enlarged picture exists one tile at a time; a smaller one is reduced at once, by area.
    """
    height, width = size
    if height < image.shape[0]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    scale_x, scale_y = width / image.shape[1], height / image.shape[0]
    lines = np.empty((height, width), np.uint8)
    corners = list(itertools.product(range(0, height, tile), range(0, width, tile)))
    for top, left in watch(corners):
        bottom, right = min(top + tile, height), min(left + tile, width)
        piece = _enlarged(image, (left, top, right, bottom), converter.halo, scale_x, scale_y)
        done = converter(piece)[converter.halo :, converter.halo :][: bottom - top, : right - left]
        lines[top:bottom, left:right] = np.rint(done * 255).astype(np.uint8)
    return lines


def _enlarged(
    image: np.ndarray, box: tuple[int, int, int, int], halo: int, scale_x: float, scale_y: float
) -> np.ndarray:
    """Return the box (left, top, right, bottom) of the enlarged picture with `halo` around it, borders mirrored."""
    left, top, right, bottom = box[0] - halo, box[1] - halo, box[2] + halo, box[3] + halo
    if scale_x == scale_y == 1:
        rows = _mirrored(np.arange(top, bottom), image.shape[0])
        columns = _mirrored(np.arange(left, right), image.shape[1])
        return image[rows[:, None], columns]
    # Pixel centres: output x + 0.5 lies over input (x + 0.5) / scale.
    back = np.array(
        [
            [1 / scale_x, 0, (left + 0.5) / scale_x - 0.5],
            [0, 1 / scale_y, (top + 0.5) / scale_y - 0.5],
        ]
    )
    return cv2.warpAffine(
        image,
        back,
        (right - left, bottom - top),
        flags=cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def _mirrored(index: np.ndarray, length: int) -> np.ndarray:
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index)


def reduced(sketch_image: np.ndarray, long_side: int) -> np.ndarray:
    """Return the picture with its long side at most `long_side` pixels."""
    factor = long_side / max(sketch_image.shape[:2])
    if factor >= 1:
        return sketch_image
    size = [max(1, math.floor(side * factor)) for side in sketch_image.shape[1::-1]]
    return cv2.resize(sketch_image, size, interpolation=cv2.INTER_AREA)
