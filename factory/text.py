"""Text in a picture: lines of letters, found by their strokes and their like heights."""

from __future__ import annotations

import cv2
import numpy as np

_STROKE = 0.025  # a stroke is narrower than this share of the picture's height
_CONTRAST = 80  # levels (0..255) that a stroke stands out from what surrounds it
# On a bright ground a stroke is at least this bright against the brightest beside it; each is one reading.
_BRIGHT = (0, 0.72, 0.85)
_HEIGHTS = (0.014, 0.085)  # least and largest height of a letter, as a share of the picture's
_LETTERS = 5  # a line has at least so many


def text_mask(grey: np.ndarray) -> np.ndarray:
    """Return where the uint8 picture H,W has lines of bright letters: bool H,W, the lines' boxes filled.

    A top-hat leaves what is thin and brighter than its surroundings: letters, and on a bright ground the gaps between
    their dark outlines too, so that more readings take the brightest alone. Connected pieces of a letter's size that
    stand side by side make a row; a row of at least five of like height on one base line is text. The gaps between
    drawn lines are of all sizes.
    """
    side = round(_STROKE * len(grey)) | 1
    strokes = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, np.ones((side, side), np.uint8)) > _CONTRAST
    beside = cv2.dilate(grey, np.ones((2 * side + 1, 2 * side + 1), np.uint8))
    found = np.zeros(grey.shape, bool)
    for least in _BRIGHT:
        reading = strokes & (grey > least * beside)
        for x, y, width, height in _lines(_letters(reading), grey.shape):
            found[y : y + height, x : x + width] = True
    return found


def _letters(strokes: np.ndarray) -> np.ndarray:
    """Return the boxes (n,4: x, y, width, height) of the connected pieces that have a letter's size."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(strokes.astype(np.uint8), connectivity=8)
    boxes = stats[1:, :4]
    tall = boxes[:, 3]
    least, most = (share * len(strokes) for share in _HEIGHTS)
    return boxes[(tall >= least) & (tall <= most) & (boxes[:, 2] <= 3 * tall)]


def _lines(letters: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return the boxes of the rows of letters that are text; letters nearer than their height are of one row."""
    rows = np.zeros(shape, np.uint8)
    for x, y, width, height in letters:
        rows[y : y + height, max(0, x - height // 2) : x + width + height // 2] = 1
    count, labels, stats, _ = cv2.connectedComponentsWithStats(rows)
    row_of = labels[letters[:, 1], letters[:, 0]]
    return [stats[row, :4] for row in range(1, count) if _is_text(letters[row_of == row])]


def _is_text(letters: np.ndarray) -> bool:
    if len(letters) < _LETTERS:
        return False
    tall, base = letters[:, 3], letters[:, 1] + letters[:, 3]
    middle = np.median(tall)
    like = np.abs(tall - middle) <= 0.35 * middle
    level = np.abs(base - np.median(base)) <= 0.25 * middle
    return bool((like & level).mean() >= 0.6)
