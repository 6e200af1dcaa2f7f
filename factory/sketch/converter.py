"""The converter: what turns tiles of a picture into lines, and what the engine has to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np


class Converter(ABC):
    """Tiles (B,H,W,3), RGB uint8, to lines (B,H,W), float32 in [0, 1]: ink 0 on paper 1."""

    # Pixels around a tile that its lines depend on: they are computed too, and thrown away.
    halo: int = 0
    # Tiles begin at multiples of this many pixels of the picture, and their sides are multiples of it.
    stride: int = 1
    # Pixels in which neighbouring tiles are blended: 0 where a halo makes them agree to the last bit or nearly.
    overlap: int = 0
    # Times that `calibrate` goes over the picture.
    sweeps: int = 0

    @abstractmethod
    def __call__(self, tiles_BHW3: np.ndarray, /) -> np.ndarray:
        """Return the lines of tiles of one size."""

    def calibrate(self, tiles: Callable[[], Iterable[np.ndarray]], /) -> None:  # noqa: B027 - most take nothing
        """Take what the picture as a whole decides from tiles (H,W,3) that cover it once; each call gives them anew."""
