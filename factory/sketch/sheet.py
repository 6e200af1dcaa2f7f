"""The contact sheet: the same place of a frame, pixel by pixel, through each converter."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import cv2
import numpy as np

from factory.settings import NothingThere
from factory.sketch.engine import Box, SketchConfig, enlarged, fitted, shrunk, window

_WHOLE_PICTURE = ("anime2sketch",)  # converters whose lines of a part need all of it
_CELL = 8  # pixels of a sketch that are looked at as one where its busiest square is sought


def variants(config: SketchConfig) -> dict[str, SketchConfig]:
    """Return `config` by each converter that is on this machine and draws a part alone, by its name."""
    found = {}
    for name in get_args(get_type_hints(SketchConfig)["converter"]):
        one = config if name == config.converter else dataclasses.replace(config, converter=name, model=None)
        try:
            one.decides()  # asks for the network's files
        except NothingThere:
            continue
        if name not in _WHOLE_PICTURE:
            found[name] = one
    return found


def busiest(image: np.ndarray, config: SketchConfig, side: int) -> Box:
    """Return that square of the sketch, of `side` pixels or what there is, whose part of the image has most edges."""
    part, (height, width) = fitted(image, config)
    cells = (width // _CELL + 1, height // _CELL + 1)
    edges = cv2.resize(np.abs(cv2.Laplacian(cv2.cvtColor(part, cv2.COLOR_RGB2GRAY), cv2.CV_32F)), cells)
    reach = tuple(max(1, min(side, length) // _CELL) for length in (width, height))
    y, x = np.unravel_index(int(cv2.blur(edges, reach, borderType=cv2.BORDER_CONSTANT).argmax()), edges.shape)
    tall, wide = min(side, height), min(side, width)
    top = int(np.clip(y * _CELL - tall // 2, 0, height - tall))
    left = int(np.clip(x * _CELL - wide // 2, 0, width - wide))
    return top, top + tall, left, left + wide


def crops(image: np.ndarray, box: Box, configs: dict[str, SketchConfig]) -> dict[str, np.ndarray]:
    """Return the box of the RGB uint8 image at the sketch's size as `frame`, and its lines by each of `configs`."""
    found = {}
    for name, config in configs.items():
        part, size = fitted(image, config)
        found |= {"frame": enlarged(shrunk(part, size), box, size), name: window(image, box, config)}
    return found


def sheet(rows: list[dict[str, np.ndarray]], gap: int = 6) -> np.ndarray:
    """Return `rows` of pictures of one size each, RGB or grey, as one RGB picture on white."""
    shown = []
    for row in rows:
        pictures = [p if p.ndim == 3 else cv2.cvtColor(p, cv2.COLOR_GRAY2RGB) for p in row.values()]
        bordered = [cv2.copyMakeBorder(p, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=(255,) * 3) for p in pictures]
        shown.append(np.hstack(bordered))
    return np.vstack(shown)
