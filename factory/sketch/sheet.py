"""The contact sheet: the same places of a frame, pixel by pixel, through each converter."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import cv2
import numpy as np

from factory.settings import NothingThere
from factory.sketch.engine import Box, SketchConfig, enlarged, fitted, window


def variants(config: SketchConfig) -> dict[str, SketchConfig]:
    """Return `config` by each converter that is on this machine, by its name; that of `config` first."""
    names = get_args(get_type_hints(SketchConfig)["converter"])
    found = {}
    for name in (config.converter, *names):
        one = config if name == config.converter else dataclasses.replace(config, converter=name, model=None)
        try:
            one.decides()  # asks for the network's files
        except NothingThere:
            continue
        found[name] = one
    return found


def busiest(image: np.ndarray, config: SketchConfig, side: int) -> Box:
    """Return that square of the sketch, of `side` pixels or what there is, whose part of the image has most edges."""
    part, size = fitted(image, config)
    height, width = (min(side, length) for length in size)
    grey = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)
    scale = 64 / min(grey.shape)  # edges that count are seen at this size too
    small = cv2.resize(grey, None, fx=min(1, scale), fy=min(1, scale), interpolation=cv2.INTER_AREA)
    edges = cv2.resize(np.abs(cv2.Laplacian(small, cv2.CV_32F)), (size[1] // 8 + 1, size[0] // 8 + 1))
    sums = cv2.boxFilter(edges, -1, (max(1, width // 8), max(1, height // 8)), borderType=cv2.BORDER_CONSTANT)
    y, x = np.unravel_index(int(sums.argmax()), sums.shape)
    top = int(np.clip(y * 8 - height // 2, 0, size[0] - height))
    left = int(np.clip(x * 8 - width // 2, 0, size[1] - width))
    return top, top + height, left, left + width


def crops(image: np.ndarray, box: Box, configs: dict[str, SketchConfig]) -> dict[str, np.ndarray]:
    """Return the box of the RGB uint8 image at the sketch's size as `frame`, and its lines by each of `configs`."""
    config = next(iter(configs.values()))
    part, size = fitted(image, config)
    return {"frame": enlarged(part, box, size)} | {name: window(image, box, config) for name, config in configs.items()}
