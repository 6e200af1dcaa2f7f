"""Tone: histogram levels, so that paper is white and ink is dark."""

from __future__ import annotations

import cv2
import numpy as np


def levels(sketch: np.ndarray) -> np.ndarray:
    """Return the uint8 sketch H,W with its paper at 255 and its darkest ink (0.5th percentile) at 0.

    The white point is the histogram's peak in the bright half, the paper's tone; a picture with no ink stays as it is.
    """
    histogram = np.bincount(sketch.ravel(), minlength=256)
    white = 128 + int(histogram[128:].argmax())
    black = int(np.searchsorted(np.cumsum(histogram), 0.005 * sketch.size))
    if white - black < 32:  # no ink to speak of: stretching would only raise noise
        return sketch
    ramp = (np.arange(256, dtype=np.float32) - black) / (white - black)
    return cv2.LUT(sketch, (np.clip(ramp, 0, 1) * 255).round().astype(np.uint8))


def ink_ratio(sketch: np.ndarray) -> float:
    """Return the share of pixels of the uint8 sketch H,W that are darker than mid grey."""
    return float((sketch < 128).mean())
