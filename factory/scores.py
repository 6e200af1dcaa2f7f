"""Scores of a frame: numbers that a selection can decide by, whatever the frame's resolution."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from factory.signature import layout, phash, signature
from factory.text import text_mask

VERSION = "2"  # raised when the same picture would get other scores
_SIDE = 360  # short side at which frames are compared, so that scores do not depend on resolution
_LOWER = 0.25  # share of the picture, at its lower edge, in which text is a subtitle


def scores(image: np.ndarray) -> dict[str, Any]:
    """Return the columns of scores, with phash, signature and embedding, of the RGB uint8 image H,W,3."""
    small = reduced(image)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    text = text_mask(grey)
    upper, lower = np.split(text, [round((1 - _LOWER) * len(text))])
    lines = np.flatnonzero(lower.any(axis=1))
    return {
        "sharpness": sharpness(grey),
        "brightness": float(grey.mean()) / 255,
        "contrast": float(grey.std()) / 255,
        "entropy": float(-(share * np.log2(share)).sum()),
        "text_share": float(upper.sum()) / text.size,
        "subtitle_share": float(lower.sum()) / text.size,
        "subtitle_height": round((len(lower) - lines[0]) / len(text) * len(image)) if len(lines) else 0,
        "phash": phash(grey),
        "signature": signature(small),
        "embedding": layout(small),
    }


def reduced(image: np.ndarray) -> np.ndarray:
    """Return the uint8 image H,W,3 at a short side of at most 360 pixels."""
    factor = _SIDE / min(image.shape[:2])
    if factor >= 1:
        return image
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def sharpness(grey: np.ndarray) -> float:
    """Return the variance of the Laplacian of the uint8 image H,W: the higher, the sharper."""
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())
