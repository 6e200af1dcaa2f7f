"""Cuts: which frames begin a shot, decided from the frames shortly before and after, each at 48x27 pixels.

Two pictures are compared by template matching: the middle of the one is moved over the other and the best correlation
counts. So neither light (fades, flashes) nor a moving camera (pans) makes a cut, and grain is averaged away. Nothing
further away than twice `reach_seconds` has a say: a frame is judged the same wherever decoding began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from factory.video import VideoConfig

SIZE = (48, 27)  # width and height of a thumb, pixels: also what TransNetV2 takes
_MIDDLE = np.s_[4:23, 8:40]  # rows and columns that letterbox bars leave free, and how far a camera may move
_ALIKE = 0.95  # correlation of the ends of a dissolve, or of a part of one, at which nothing can be seen of it
_FLAT = 4.0  # standard deviation of luma (levels of 255) below which there is no picture


@dataclass(frozen=True, kw_only=True)
class Look:
    """A frame as far as cuts are concerned."""

    index: int
    timestamp: float  # s
    thumb: np.ndarray  # 27,48,3 uint8 RGB
    blank: bool  # black, or of one colour: there is no picture


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How a frame lies between one before it and one after it that show other pictures."""

    before: float  # the later picture's share in the frame before this one
    share: float  # ... and in this one: from 0 to 1 in a dissolve
    residual: float  # what a mixture of the two leaves unexplained, relative to their distance


def look_at(index: int, timestamp: float, image: np.ndarray, config: VideoConfig) -> Look:
    """Return the look of the RGB uint8 frame H,W,3."""
    thumb = cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)
    middle = cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY)[_MIDDLE]
    blank = bool(middle.mean() < 255 * config.black_level or middle.std() < _FLAT)
    return Look(index=index, timestamp=timestamp, thumb=thumb, blank=blank)


def similarity(a: Look, b: Look) -> float:
    """Return the correlation (-1 to 1) of the middle of `a` with `b`, moved by up to a sixth of the frame."""
    return float(cv2.matchTemplate(b.thumb, a.thumb[_MIDDLE], cv2.TM_CCOEFF_NORMED).max())


def starts_shot(looks: Sequence[Look], i: int, config: VideoConfig) -> bool:
    """Return whether frame `i` of `looks`, the film around it, is the first after a cut, a fade or half a dissolve."""
    now = looks[i].timestamp
    if _is_cut(looks, i, config):
        soon = _while(looks, i + 1, 1, now, config.min_shot_seconds)
        return not any(_is_cut(looks, later, config) for later in soon)
    if not _is_dissolve(looks, i, config):
        return False
    lately = _while(looks, i - 1, -1, now, config.transition_seconds)
    return not any(_is_dissolve(looks, earlier, config) for earlier in lately)


def is_settled(looks: Sequence[Look], i: int, config: VideoConfig) -> bool:
    """Return whether frame `i` shows one whole picture: it lies at no cut, in no dissolve and in no flash."""
    now = looks[i]
    beside = [looks[k] for k in (i - 1, i + 1) if 0 <= k < len(looks)]
    if any(look.blank or similarity(look, now) < config.same_picture for look in beside):
        return False
    first, last = _around(looks, i, config.min_shot_seconds)
    if first is not None and last is not None:
        returns = similarity(looks[first], looks[last]) >= config.same_picture
        if returns and similarity(looks[first], now) < config.same_picture:
            return False
    mix = mixture(looks, i, config.transition_seconds, _ALIKE)
    return mix is None or mix.residual > config.dissolve_residual or not 0.03 < mix.share < 0.97


def mixture(looks: Sequence[Look], i: int, distance: float, alike: float) -> Mix | None:
    """Return how frame `i` lies between those `distance` seconds before and after it.

    None where there are none, or these correlate as much as `alike`: they show one picture.
    """
    first, last = _around(looks, i, distance)
    if first is None or last is None or any(look.blank for look in looks[first : last + 1]):
        return None
    if similarity(looks[first], looks[last]) >= alike:
        return None
    a, before, this, b = (looks[k].thumb.astype(np.float32).ravel() for k in (first, i - 1, i, last))
    way = b - a
    square = float(way @ way)
    share = float((this - a) @ way) / square
    residual = float(np.linalg.norm(this - a - share * way)) / square**0.5
    return Mix(before=float((before - a) @ way) / square, share=share, residual=residual)


def _is_cut(looks: Sequence[Look], i: int, config: VideoConfig) -> bool:
    """Whether the picture changes at frame `i` and neither returns soon (a flash) nor was there shortly before."""
    now, least = looks[i], config.min_shot_seconds
    if now.blank:
        return False
    lately = [k for k in _while(looks, i - 1, -1, now.timestamp, least) if not looks[k].blank]
    if i and not looks[i - 1].blank and not lately:
        lately = [i - 1]  # a frame that is shown for long
    if not lately:
        return True
    before = looks[lately[0]]
    alike = similarity(before, now)
    if alike > 1 - config.min_change or (alike >= config.same_picture and not _stands_out(looks, i, 1 - alike, config)):
        return False
    returned = (1 + alike) / 2  # a picture that comes half the way back from the change is the old one
    soon = [looks[k] for k in _while(looks, i + 1, 1, now.timestamp, least)]
    flash = any(similarity(before, look) >= returned for look in soon if not look.blank)
    return not flash and all(similarity(looks[k], now) < returned for k in lately[1:])


def _stands_out(looks: Sequence[Look], i: int, change: float, config: VideoConfig) -> bool:
    """Whether the `change` at frame `i` is `adaptive_threshold` times as large as any other around it."""
    now, reach = looks[i].timestamp, config.min_shot_seconds
    others = _while(looks, i - 1, -1, now, reach) + _while(looks, i + 1, 1, now, reach)
    pairs = [(looks[k - 1], looks[k]) for k in others if k and not (looks[k - 1].blank or looks[k].blank)]
    return all(change >= config.adaptive_threshold * (1 - similarity(*pair)) for pair in pairs)


def _is_dissolve(looks: Sequence[Look], i: int, config: VideoConfig) -> bool:
    """Whether frame `i` is the first that is more the later picture than the earlier one of a mixture."""
    mix = mixture(looks, i, config.transition_seconds, config.dissolve_similarity)
    return mix is not None and mix.before < 0.5 <= mix.share and mix.residual <= config.dissolve_residual


def _around(looks: Sequence[Look], i: int, distance: float) -> tuple[int | None, int | None]:
    """The indices of the frames nearest to `i` that are at least `distance` seconds before and after it."""
    now = looks[i].timestamp
    first = next((k for k in range(i - 1, -1, -1) if looks[k].timestamp <= now - distance), None)
    return first, next((k for k in range(i + 1, len(looks)) if looks[k].timestamp >= now + distance), None)


def _while(looks: Sequence[Look], i: int, step: int, now: float, reach: float) -> list[int]:
    """The indices from `i` on, forwards or backwards, of frames at most `reach` seconds from `now`."""
    found = []
    while 0 <= i < len(looks) and abs(looks[i].timestamp - now) <= reach:
        found.append(i)
        i += step
    return found
