"""Bars: the black letterbox or pillarbox around a picture."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

_BLACK = 20  # luma (0..255) up to which a bar is black: encoders and grain lift it from 0
_LIT = 12  # the picture beside a bar is brighter than _BLACK by this much ...
_LIT_SHARE = 0.3  # ... over this share of both edges' length
_CELLS = 64  # pieces of an edge that are judged by their mean, so that grain doesn't count
_SHARES = (0.01, 0.35)  # a bar's least and largest share of the frame's side


class Bars(NamedTuple):
    """Pixels that the bars cover at each side of a frame; all 0 where there are none."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def cropped(self, image: np.ndarray) -> np.ndarray:
        """Return the part of the frame H,W,... that lies between the bars."""
        height, width = image.shape[:2]
        return np.ascontiguousarray(image[self.top : height - self.bottom, self.left : width - self.right])


def find_bars(grey: np.ndarray) -> Bars:
    """Return the bars of the uint8 frame H,W.

    Bars come in pairs of one size, are black all over, and end in a straight edge where the picture is brighter. A dark
    scene has no such edge, and stays whole; so does a dark picture between bars.
    """
    top, bottom = _pair(grey)
    left, right = _pair(grey[top : grey.shape[0] - bottom].T)
    return Bars(top, bottom, left, right)


def _pair(grey: np.ndarray) -> tuple[int, int]:
    """Return the rows that the bars at the top and at the bottom cover, with the one at the edge, often half lit."""
    height = len(grey)
    cells = cv2.resize(np.ascontiguousarray(grey), (_CELLS, height), interpolation=cv2.INTER_AREA)
    lit = np.flatnonzero(cells.max(1) > _BLACK)
    if not len(lit):
        return 0, 0
    sizes = int(lit[0]), int(height - 1 - lit[-1])
    least, most = (share * height for share in _SHARES)
    if min(sizes) < least or max(sizes) > most or max(sizes) - min(sizes) > max(2, least):
        return 0, 0
    edges = [rows[size + 1 : size + 4].mean(0) for size, rows in zip(sizes, (cells, cells[::-1]), strict=True)]
    if (np.stack(edges) > _BLACK + _LIT).mean() < _LIT_SHARE:
        return 0, 0
    return sizes[0] + 1, sizes[1] + 1
