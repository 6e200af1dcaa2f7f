"""The contact sheet: the same place of a frame, pixel by pixel, through each converter."""

from __future__ import annotations

import dataclasses
from typing import get_args

import cv2
import numpy as np

from factory.settings import NothingThere
from factory.sketch.engine import BLENDED, Box, ConverterName, SketchConfig, enlarged, fitted, shrunk, window

_HEAD = 22  # pixels of a name above its picture
_CELL = 8  # pixels of a sketch that are looked at as one where its busiest square is sought


def variants(config: SketchConfig) -> dict[str, SketchConfig]:
    """Return `config` by each converter that is on this machine and draws a part alone, by its name."""
    found = {}
    for name in get_args(ConverterName):
        one = config if name == config.converter else dataclasses.replace(config, converter=name, model=None)
        try:
            one.decides()  # asks for the network's files
        except NothingThere:
            continue
        if name not in BLENDED:
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
    """Return `rows` of pictures by name, RGB or grey and all of one size, as one RGB picture, each under its name."""
    shown = [[_framed(_named(picture, name), gap) for name, picture in row.items()] for row in rows]
    return np.vstack([np.hstack(row) for row in shown])


def _named(picture: np.ndarray, name: str) -> np.ndarray:
    colour = picture if picture.ndim == 3 else cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    head = np.full((_HEAD, colour.shape[1], 3), 255, np.uint8)
    cv2.putText(head, name, (2, _HEAD - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 60), 1, cv2.LINE_AA)
    return np.vstack([head, colour])


def _framed(picture: np.ndarray, gap: int) -> np.ndarray:
    return cv2.copyMakeBorder(picture, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=(255,) * 3)
