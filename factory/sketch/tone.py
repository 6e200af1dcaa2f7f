"""Tone: histogram levels, so that paper is white and ink is dark; and lighter shadows for frames in the dark."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_LEAST_CONTRAST = 32  # levels between ink and paper below which stretching would only raise noise
_BAND = 512  # rows that are counted at once
_CLIP = 2.0  # CLAHE's limit, for an 8x8 grid


@dataclass(frozen=True, kw_only=True)
class Tone:
    """How the levels of a sketch were set, of 255, and what its histogram then tells."""

    brightened: bool  # the frame's lightness was equalised before
    black: int  # the converter's level that became 0
    white: int  # ... that became 255
    gamma: float  # of the curve between: above 1 it lightens
    clipped_black: float  # share of pixels at or below `black`
    clipped_white: float  # share of pixels at or above `white`
    p01: int  # levels of the sketch below which 1, 5, 25 % of its pixels lie
    p05: int
    p25: int
    ink_ratio: float  # share of the sketch's pixels darker than mid grey


def brightened(image: np.ndarray, *, below: float) -> tuple[np.ndarray, bool]:
    """Return the RGB uint8 image, its lightness equalised where its mean luma (0 to 1) lies `below`; and whether."""
    if cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() >= 255 * below:
        return image, False
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(_CLIP, (8, 8)).apply(lab[..., 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), True


def level(raw: np.ndarray, *, is_brightened: bool = False) -> tuple[np.ndarray, Tone]:
    """Return the uint8 lines H,W with paper at 255 and ink at 0, and the tone.

    White is below the histogram's peak in its bright half, the paper, by as much as the paper's noise reaches above it:
    what is fainter than that is no line. Black is the darkest half percent. Gamma, from 0.6 to 1.6, brings the median
    of the tones between to the middle. A picture with no ink stays as it is.
    """
    counts = histogram(raw)
    curve, black, white, gamma = _curve(counts)
    after = np.bincount(curve, counts, minlength=256)
    shares = np.cumsum(after) / raw.size
    p01, p05, p25 = (int(np.searchsorted(shares, share)) for share in (0.01, 0.05, 0.25))
    tone = Tone(
        brightened=is_brightened,
        black=black,
        white=white,
        gamma=round(gamma, 4),
        clipped_black=float(counts[: black + 1].sum() / raw.size),
        clipped_white=float(counts[white:].sum() / raw.size),
        p01=p01,
        p05=p05,
        p25=p25,
        ink_ratio=float(shares[127]),
    )
    return cv2.LUT(raw, curve.astype(np.uint8)), tone


def _curve(counts: np.ndarray) -> tuple[np.ndarray, int, int, float]:
    """Return the levels (256,) that those of a histogram become, and black, white and gamma."""
    paper = 128 + int(counts[128:].argmax())
    noise = counts[paper:]
    reach = int(np.searchsorted(np.cumsum(noise), 0.99 * noise.sum()))
    white = max(128, paper - reach)
    black = int(np.searchsorted(np.cumsum(counts), 0.005 * counts.sum()))
    if white - black < _LEAST_CONTRAST:
        return np.arange(256), 0, 255, 1.0
    ramp = np.clip((np.arange(256) - black) / (white - black), 0, 1)
    between = np.cumsum(np.where((ramp > 0) & (ramp < 1), counts, 0))
    middle = ramp[np.searchsorted(between, between[-1] / 2)]
    gamma = float(np.clip(np.log(middle) / np.log(0.5), 0.6, 1.6)) if between[-1] else 1.0
    return np.rint(255 * ramp ** (1 / gamma)).astype(np.int64), black, white, gamma


def histogram(picture: np.ndarray) -> np.ndarray:
    """Return how often each level is in the uint8 picture H,W, (256,) float64; never more than a band is copied."""

    counts = np.zeros(256)
    for top in range(0, len(picture), _BAND):  # OpenCV counts in single precision
        counts += cv2.calcHist([picture[top : top + _BAND]], [0], None, [256], [0, 256]).ravel()
    return counts
