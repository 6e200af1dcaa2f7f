"""The tile engine: a converter over a picture of any size, in bounded memory, without seams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np

from factory.models import OWNER, files_hash, find_model
from factory.settings import STRICT, UsageError
from factory.sketch.converter import Converter
from factory.sketch.tone import Tone, brightened, level
from factory.sketch.xdog import XDoG, XDoGConfig

VERSION = "3"  # raised when the same frame would give another sketch
_SPREAD = 2 / 15  # standard deviation of a blended tile's Gaussian window, by its side
_SMALLEST_WEIGHT = 1e-3  # of that window, whose middle is 1: that which it has at the edge

ConverterName = Literal["xdog", "micro", "hed", "anime2sketch"]
BLENDED = ("anime2sketch",)  # converters whose tiles differ by what else is in the picture
Size = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # top, bottom, left, right
Watch = Callable[[int, int], None]  # told of the tiles done, those that are only looked at too, of how many


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How a frame becomes lines."""

    __pydantic_config__ = STRICT

    # The converter: `xdog`, an operator of two Gaussians; `micro`, a network trained on drawn line layers, shipped;
    # `hed` and `anime2sketch`, published networks (python -m factory weights --help).
    converter: ConverterName = "xdog"
    # Folder of the network; none: animesketch/<converter>, shipped or fetched.
    model: str | None = None
    # Long side of the sketch (pixels); none: the frame's own size.
    size: int | None = None
    # The sketch is a square of `size`: `pad`, the whole frame with white beside it; `crop`, its middle; `stretch`, the
    # whole frame out of its aspect.
    square: Literal["pad", "crop", "stretch"] | None = None
    # Side of a tile (pixels); memory grows with its square.
    tile: int = 1024
    # Pixels in which neighbouring tiles are blended; none: what the converter needs.
    overlap: int | None = None
    # The grid of tiles begins this many pixels left of the picture and above it. For proofs: no seam tells it.
    tile_offset: int = 0
    # Tiles computed at once; more are faster on a GPU.
    batch: int = 1
    # A frame whose mean luma (0 to 1) lies below has its lightness equalised locally (CLAHE) before; 0: none.
    brighten_below: float = 0.15
    # Parameters of the converter xdog.
    xdog: XDoGConfig = field(default_factory=XDoGConfig)

    def __post_init__(self) -> None:
        if self.converter not in get_args(ConverterName):
            there = ", ".join(get_args(ConverterName))
            raise ValueError(f"sketch.converter must be one of {there}, got {self.converter!r}.")
        if self.size is not None and not 16 <= self.size <= 20480:
            raise ValueError(f"sketch.size must lie in 16 to 20480, got {self.size}.")
        if self.square and self.size is None:
            raise ValueError("sketch.square needs sketch.size.")
        if self.tile < 64 or self.tile % 64:
            raise ValueError(f"sketch.tile must be a multiple of 64, got {self.tile}.")
        if self.overlap is not None and not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(f"sketch.overlap must lie in 0 to half of sketch.tile, got {self.overlap}.")
        if not 0 <= self.tile_offset < self.tile:
            raise ValueError(f"sketch.tile_offset must lie in 0 to sketch.tile, got {self.tile_offset}.")
        if self.batch < 1:
            raise ValueError(f"sketch.batch must be at least 1, got {self.batch}.")
        if not 0 <= self.brighten_below <= 1:
            raise ValueError(f"sketch.brighten_below must lie in 0 to 1, got {self.brighten_below}.")

    @property
    def network(self) -> str:
        """The id or folder of the converter's network."""
        return self.model or OWNER + {"micro": "sketch"}.get(self.converter, self.converter)

    def decides(self) -> dict[str, Any]:
        """Return what a sketch depends on: settings by name, and the network's files.

        The grid of tiles is among them only where blended tiles differ: elsewhere it moves a value by 1 of 255.
        """
        found = asdict(self)
        grid = ("tile", "overlap", "tile_offset") if self.converter not in BLENDED else ()
        for name in ("model", "batch", *grid):
            del found[name]
        if self.converter != "xdog":
            del found["xdog"]
            found["files"] = files_hash(self.network)
        return found


class Sketch(NamedTuple):
    """A sketch and how its tones were set."""

    lines: np.ndarray  # uint8 H,W, ink dark on white 255
    tone: Tone


def sketch(image: np.ndarray, config: SketchConfig, *, watch: Watch | None = None) -> np.ndarray:
    """Return the sketch of the RGB uint8 image H,W,3: uint8 H',W', ink dark on white 255."""
    return draw(image, config, watch=watch).lines


def draw(image: np.ndarray, config: SketchConfig, *, watch: Watch | None = None) -> Sketch:
    """Return the sketch of the RGB uint8 image H,W,3, and its tone; `watch` is told of each batch of tiles."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f'A picture is RGB uint8 (H,W,3), as np.asarray(Image.open(file).convert("RGB")); got {got}.')
    image, size = fitted(image, config)
    converter = new_converter(config, short_side=min(size))
    image, is_brightened = brightened(image, below=config.brighten_below)
    raw = run_tiles(
        image,
        converter,
        size=size,
        tile=config.tile,
        overlap=config.overlap,
        offset=config.tile_offset,
        batch=config.batch,
        watch=watch,
    )
    lines, tone = level(raw, is_brightened=is_brightened)
    if config.square != "pad" or config.size is None:
        return Sketch(lines, tone)
    page = np.full((config.size, config.size), 255, np.uint8)
    top, left = (config.size - size[0]) // 2, (config.size - size[1]) // 2
    page[top : top + size[0], left : left + size[1]] = lines
    return Sketch(page, tone)


def fitted(image: np.ndarray, config: SketchConfig) -> tuple[np.ndarray, Size]:
    """Return the part of the image that is drawn, and the size at which: what `size` and `square` say."""
    height, width = image.shape[:2]
    if config.size is None:
        return image, (height, width)
    if config.square == "stretch":
        return image, (config.size, config.size)
    if config.square == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side], (config.size, config.size)
    scale = config.size / max(height, width)
    return image, (max(1, round(height * scale)), max(1, round(width * scale)))


def new_converter(config: SketchConfig, *, short_side: int) -> Converter:
    """Return the converter that `config` names, for a picture with this short side in pixels."""
    if config.converter == "xdog":
        return XDoG(config.xdog, short_side=short_side)
    folder = find_model(config.network)
    if config.converter == "hed":  # torch, which the operator does without
        from factory.sketch.hed import Pencil

        return Pencil(folder)
    if config.converter == "anime2sketch":
        from factory.sketch.anime2sketch import Anime2Sketch

        return Anime2Sketch(folder)
    from factory.sketch.generator import Generator

    return Generator(folder)


def run_tiles(
    image: np.ndarray,
    converter: Converter,
    *,
    size: Size,
    tile: int,
    overlap: int | None = None,
    offset: int = 0,
    batch: int = 1,
    watch: Watch | None = None,
) -> np.ndarray:
    """Return the converter's lines, uint8, of the RGB uint8 image H,W,3 brought to `size`.

    Each tile is computed with the converter's halo around it, the picture mirrored beyond its borders; where tiles
    overlap they are weighted by a Gaussian window. The enlarged picture exists a batch of tiles at a time, the sums of
    weighted lines one row of tiles at a time; a side that shrinks is reduced at once, by area.
    """
    height, width = size
    image = shrunk(image, size)
    overlap = converter.overlap if overlap is None else overlap
    down, across = (_Axis.of(side, tile, overlap, offset, converter.stride) for side in size)
    lines = np.empty(size, np.uint8)
    sums = np.zeros((down.tile, width), np.float32)
    pieces = _cover(size, tile, converter.stride)
    done, steps = 0, converter.sweeps * len(pieces) + len(down.starts) * len(across.starts)

    def step(count: int) -> None:
        nonlocal done
        done += count
        if watch:
            watch(done, steps)

    def cover() -> Iterator[np.ndarray]:
        for piece in pieces:
            yield enlarged(image, piece, size)
            step(1)

    step(0)
    converter.calibrate(cover)
    for i, top in enumerate(down.starts):
        for start in range(0, len(across.starts), batch):
            lefts = across.starts[start : start + batch]
            boxes = [(top, top + down.tile, left, left + across.tile) for left in lefts]
            for left, made in zip(lefts, _lines(image, converter, boxes, size), strict=True):
                into, used = across.inside(left, width)
                sums[:, into] += (made * down.window[:, None] * across.window)[:, used]
            step(len(lefts))
        # The rows above the next row of tiles are complete.
        end = down.starts[i + 1] if i + 1 < len(down.starts) else height
        first = max(top, 0)
        last = max(first, min(end, height))
        whole = sums[first - top : last - top] / (down.weights[first:last, None] * across.weights)
        lines[first:last] = _as_bytes(whole)
        sums[: down.tile - (end - top)] = sums[end - top :].copy()
        sums[max(0, down.tile - (end - top)) :] = 0
    return lines


def starts(size: Size, tile: int, overlap: int, offset: int, stride: int) -> list[list[int]]:
    """Return where the tiles of a picture of `size` begin, from above and from the left, as `run_tiles` lays them."""
    return [_Axis.of(side, tile, overlap, offset, stride).starts for side in size]


def window(image: np.ndarray, box: Box, config: SketchConfig) -> np.ndarray:
    """Return what `sketch` would give in a box of its lines, without the rest; but the tones are set by the box.

    For converters without overlap: ValueError for another, of which nothing can be told without the rest.
    """
    image, size = fitted(image, config)
    converter = new_converter(config, short_side=min(size))
    if converter.overlap:
        raise ValueError(f"{config.converter} has no lines of a part alone.")
    image, _ = brightened(image, below=config.brighten_below)
    (made,) = _lines(shrunk(image, size), converter, [box], size)
    return level(_as_bytes(made))[0]


def _lines(image: np.ndarray, converter: Converter, boxes: list[Box], size: Size) -> list[np.ndarray]:
    """Return the lines, float32, in boxes of one size of the image brought to `size`."""
    stride, halo = converter.stride, converter.halo

    def shown(first: int, last: int) -> tuple[int, int]:
        first = (first - halo) // stride * stride
        return first, first - (first - last - halo) // stride * stride

    seen = [(*shown(top, bottom), *shown(left, right)) for top, bottom, left, right in boxes]
    tiles = converter(np.stack([enlarged(image, box, size) for box in seen]))
    if not np.isfinite(tiles).all():
        raise UsageError("The network draws values that are no numbers: its weights are damaged. Get it again.")
    return [
        tile[top - y : bottom - y, left - x : right - x]
        for tile, (top, bottom, left, right), (y, _, x, _) in zip(tiles, boxes, seen, strict=True)
    ]


def _as_bytes(lines: np.ndarray) -> np.ndarray:
    return np.rint(lines * 255).clip(0, 255).astype(np.uint8)


def shrunk(image: np.ndarray, size: Size) -> np.ndarray:
    """Return the image with each side that is longer than in `size` brought to it, by area."""
    height, width = (min(side, wanted) for side, wanted in zip(image.shape, size, strict=False))
    return (
        image
        if (height, width) == image.shape[:2]
        else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    )


class _Axis(NamedTuple):
    """The tiles along one side of the picture."""

    starts: list[int]  # where a tile's lines begin: the first may lie before the picture
    tile: int  # pixels that a tile's lines cover
    window: np.ndarray  # (tile,) weights of a tile's lines
    weights: np.ndarray  # (side,) sums of the weights that each place gets

    @classmethod
    def of(cls, side: int, tile: int, overlap: int, offset: int, stride: int) -> _Axis:
        # As few tiles as there must be, as small as they may be then: all of one size, and none far over the border.
        overlap = min(overlap, tile // 2)
        count = max(1, math.ceil((side + offset - overlap) / (tile - overlap)))
        tile = math.ceil((math.ceil((side + offset - overlap) / count) + overlap) / stride) * stride
        step = max(stride, (tile - overlap) // stride * stride) if overlap else tile
        starts = [start for start in range(-offset, max(side - (tile - step), 1), step) if start + tile > 0]
        middle, spread = (tile - 1) / 2, tile * _SPREAD if overlap else math.inf
        window = np.maximum(np.exp(-(((np.arange(tile) - middle) / spread) ** 2) / 2), _SMALLEST_WEIGHT)
        weights = np.zeros(starts[-1] + tile + offset)
        for start in starts:
            weights[start + offset :][:tile] += window
        return cls(starts, tile, window.astype(np.float32), weights[offset:][:side].astype(np.float32))

    def inside(self, start: int, side: int) -> tuple[slice, slice]:
        """Return where in the picture the lines of the tile at `start` go, and which of them."""
        first, last = max(start, 0), min(start + self.tile, side)
        return slice(first, last), slice(first - start, last - start)


def _cover(size: Size, tile: int, stride: int) -> list[Box]:
    """Return boxes that cover a picture of `size` once, of sides that are multiples of `stride`."""
    tile = -(-tile // stride) * stride
    spans = [
        [(start, min(start + tile, -(-side // stride) * stride)) for start in range(0, side, tile)] for side in size
    ]
    return [(*down, *across) for down, across in itertools.product(*spans)]


def enlarged(image: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """Return the box (top, bottom, left, right) of the image brought to `size`, mirrored beyond its borders.

    By Lanczos, at places rounded to 1/32 of a pixel, as OpenCV does: a pixel does not depend on the box it is in.
    """
    rows, columns = np.arange(box[0], box[1]), np.arange(box[2], box[3])
    rows, columns = _mirrored(rows, size[0]), _mirrored(columns, size[1])
    if size == image.shape[:2]:
        return image[rows[:, None], columns]
    # Pixel centres: output x + 0.5 lies over input (x + 0.5) / scale.
    y, x = (
        np.rint(((places + 0.5) * of / to - 0.5) * 32) / 32
        for places, of, to in zip((rows, columns), image.shape, size, strict=False)
    )
    # OpenCV takes sides below 32,767 only: the part that is read is cut out, with the four pixels that Lanczos needs.
    top, left = (max(0, math.floor(places.min()) - 4) for places in (y, x))
    part = image[top : math.floor(y.max()) + 6, left : math.floor(x.max()) + 6]
    map_y, map_x = (np.ascontiguousarray(m, np.float32) for m in np.broadcast_arrays((y - top)[:, None], x - left))
    return cv2.remap(part, map_x, map_y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101)


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
