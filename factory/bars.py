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
# Bars are a film's if such a share of the frames looked at have them; fewer than _FRAMES in all say nothing.
_FRAMES = 6
_FRAME_SHARE = 0.12
_SAME = 4  # pixels by which the sides of one film's bars differ


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


class Profile(NamedTuple):
    """A frame's edges at all depths: the mean luma of each row's and of each column's _CELLS pieces."""

    rows: np.ndarray  # H,_CELLS uint8
    columns: np.ndarray  # W,_CELLS uint8


class FilmBars(NamedTuple):
    """What frames from all over a film say of its bars."""

    always: Bars = Bars()  # no frame shows anything there
    seen: tuple[Bars, ...] | None = None  # those of enough frames to be believed; None: too few frames to say

    def of(self, grey: np.ndarray) -> Bars:
        """Return the bars of the film's uint8 frame H,W: its own if such are the film's, else those it always has.

        A dark frame between bars is cropped as its neighbours are, and one between dark edges isn't.
        """
        own = find_bars(grey)
        if self.seen is None or any(_alike(own, bars) for bars in self.seen):
            return own
        return self.always

    def to_array(self) -> np.ndarray:
        """Return it as int64 n,4; of no rows where there were too few frames."""
        return np.array([] if self.seen is None else [self.always, *self.seen], np.int64).reshape(-1, 4)

    @classmethod
    def from_array(cls, array: np.ndarray) -> FilmBars:
        """Return what `to_array` was made from."""
        if not len(array):
            return cls()
        always, *seen = (Bars(*row) for row in array.tolist())
        return cls(always, tuple(seen))


def film_bars(profiles: list[Profile]) -> FilmBars:
    """Return what the profiles of a film's frames say of its bars."""
    if len(profiles) < _FRAMES:
        return FilmBars()
    shape = profiles[0].rows.shape, profiles[0].columns.shape
    profiles = [profile for profile in profiles if (profile.rows.shape, profile.columns.shape) == shape]
    always = _bars(Profile(*(np.maximum.reduce(edges) for edges in zip(*profiles, strict=True))))
    found = [_bars(profile) for profile in profiles]
    least = max(2, _FRAME_SHARE * len(found))
    believed = [bars for bars in found if sum(_alike(bars, other) for other in found) >= least]
    return FilmBars(always, tuple(sorted({bars for bars in believed if any(bars) and not _alike(bars, always)})))


def _alike(one: Bars, other: Bars) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= _SAME


def find_bars(grey: np.ndarray) -> Bars:
    """Return the bars of the uint8 frame H,W.

    Bars come in pairs of one size, are black all over, and end in a straight edge where the picture is brighter. A dark
    scene has no such edge, and stays whole; so does a dark picture between bars.
    """
    return _bars(profile_of(grey))


def profile_of(grey: np.ndarray) -> Profile:
    """Return the profile of the uint8 frame H,W."""
    sides = (np.ascontiguousarray(side) for side in (grey, grey.T))
    return Profile(*(cv2.resize(side, (_CELLS, len(side)), interpolation=cv2.INTER_AREA) for side in sides))


def _bars(profile: Profile) -> Bars:
    top, bottom = _pair(profile.rows)
    height = len(profile.rows)
    between = np.s_[-(-_CELLS * top // height) : _CELLS - -(-_CELLS * bottom // height)]
    left, right = _pair(profile.columns[:, between])
    return Bars(top, bottom, left, right)


def _pair(cells: np.ndarray) -> tuple[int, int]:
    """Return the rows that the bars at the top and at the bottom cover, with the one at the edge, often half lit."""
    height = len(cells)
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
