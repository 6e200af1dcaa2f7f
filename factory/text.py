"""Text in a picture: lines of letters, found by their strokes and their like heights."""

from __future__ import annotations

import cv2
import numpy as np

_STROKE = 0.025  # a stroke is narrower than this share of the picture's height
_CONTRAST = 80  # levels (0..255) that a stroke stands out from what surrounds it
# On a bright ground a stroke is at least this bright against the brightest beside it; each is one reading.
_BRIGHT = (0, 0.72, 0.85)
_HEIGHTS = (0.014, 0.085)  # least and largest height of a letter, as a share of the picture's
_LETTERS = 5  # so many stand beside each other


def text_mask(grey: np.ndarray) -> np.ndarray:
    """Return where the uint8 picture H,W has bright text: bool H,W, the letters' boxes and what is between them.

    A top-hat leaves what is thin and brighter than its surroundings: letters, and on a bright ground the gaps between
    their dark outlines too, so that more readings take the brightest alone. A connected piece of a letter's size is a
    letter if four others of like height stand near it on the same base line; the gaps between drawn lines are of all
    sizes, at all heights.
    """
    side = round(_STROKE * len(grey)) | 1
    strokes = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, np.ones((side, side), np.uint8)) > _CONTRAST
    beside = cv2.dilate(grey, np.ones((2 * side + 1, 2 * side + 1), np.uint8))
    found = np.zeros(grey.shape, bool)
    for least in _BRIGHT:
        for x, y, width, height in _letters(strokes & (grey > least * beside)):
            found[y : y + height, max(0, x - height // 2) : x + width + height // 2] = True
    return found


def _letters(strokes: np.ndarray) -> np.ndarray:
    """Return the boxes (n,4: x, y, width, height) of the connected pieces that are letters of a line."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(strokes.astype(np.uint8), connectivity=8)
    boxes = stats[1:, :4]
    tall = boxes[:, 3]
    least, most = (share * len(strokes) for share in _HEIGHTS)
    boxes = boxes[(tall >= least) & (tall <= most) & (boxes[:, 2] <= 2 * tall)]
    x, y, width, tall = boxes.T.astype(np.float32)
    middle, base = x + width / 2, y + tall
    beside = np.abs(middle[:, None] - middle) <= 4 * tall
    level = np.abs(base[:, None] - base) <= 0.15 * tall + 0.5
    like = np.abs(np.log(tall[:, None] / tall)) <= 0.35
    return boxes[(beside & level & like).sum(1) >= _LETTERS]
