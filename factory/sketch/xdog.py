"""XDoG lines (Winnemöller, Kyprianidis, Olsen, "XDoG: an eXtended difference-of-Gaussians compendium", 2012)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from factory.settings import STRICT
from factory.sketch.converter import Converter


@dataclass(frozen=True, kw_only=True)
class XDoGConfig:
    """The operator's parameters, in the paper's letters."""

    __pydantic_config__ = STRICT

    # Width of the lines: standard deviation of the inner Gaussian, in pixels of a picture with a short side of 512.
    sigma: float = 0.45
    # The outer Gaussian is this many times as wide (the paper's 1.6 approximates the Laplacian of Gaussian).
    k: float = 1.6
    # Strength of the edge against the tone.
    p: float = 20.0
    # Level (0 to 1) between ink and paper; tones below it are filled with ink.
    epsilon: float = 0.0
    # Softness of a line's flank; the higher, the harder.
    phi: float = 4.0

    def __post_init__(self) -> None:
        if self.sigma <= 0 or self.k <= 1 or self.phi <= 0:
            raise ValueError(f"xdog needs sigma > 0, k > 1 and phi > 0, got {self.sigma}, {self.k}, {self.phi}.")


class XDoG(Converter):
    """The converter: RGB to lines by a sharpened difference of two Gaussians and a soft threshold."""

    def __init__(self, config: XDoGConfig, *, short_side: int) -> None:
        """Take the lines' width from `short_side`, the short side in pixels of the whole picture that is converted."""
        self._config = config
        self._sigma = max(0.3, config.sigma * short_side / 512)
        self.halo = math.ceil(4 * self._sigma * config.k) + 1  # pixels around a tile that its lines depend on

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        return np.stack([self._lines(tile) for tile in tiles_BHW3])

    def _lines(self, tile: np.ndarray) -> np.ndarray:
        c = self._config
        grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        sharp = (1 + c.p) * self._blur(grey, self._sigma) - c.p * self._blur(grey, self._sigma * c.k)
        return np.where(sharp >= c.epsilon, 1.0, 1.0 + np.tanh(c.phi * (sharp - c.epsilon))).astype(np.float32)

    @staticmethod
    def _blur(grey: np.ndarray, sigma: float) -> np.ndarray:
        size = 2 * math.ceil(4 * sigma) + 1
        return cv2.GaussianBlur(grey, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101)
