"""Shots: the frames from one cut to the next, and the best frame of each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from factory import scores
from factory.cuts import Look, is_settled, look_at, similarity
from factory.decode import Decoded, readable
from factory.video import VideoConfig

# A later frame is better only if it is so much sharper: a shot that is shown twice, and encoded twice, then gives the
# same frame twice, and its second showing is found to be a duplicate.
_SHARPER = 1.05

StartsShot = Callable[[Sequence[Look], int], bool]  # the film around a frame, and the frame's place in it


@dataclass(frozen=True)
class Frame:
    """A decoded frame with what the choice among frames needs."""

    look: Look
    image: np.ndarray  # H,W,3 uint8 RGB
    sharpness: float


@dataclass
class Shot:
    """A shot, or the part of one in which it shows one picture."""

    start: float  # s, of the whole shot
    end: float  # s, the last frame's
    first: Look
    best: Frame
    settled: bool  # whether the best frame lies outside transitions


def find_shots(
    frames: Iterable[Decoded], starts_shot: StartsShot, config: VideoConfig, *, until: float = math.inf
) -> Iterator[Shot]:
    """Yield the shots that start before `until` (s) with their best frame: the sharpest outside transitions.

    A shot in which the picture becomes another one (a long pan, a slow morph) is yielded in parts with the same start.
    In memory are the best frame and those of the next `config.reach_seconds`. An error of `frames` is raised after the
    shot that was running.
    """
    shot: Shot | None = None
    failures: list[Exception] = []
    for frame, starts, settled in _judged(readable(frames, failures), starts_shot, config):
        now = frame.look.timestamp
        if shot is None and now >= until:
            return
        if frame.look.blank or (shot is None and not starts):
            continue
        if shot is None or starts:
            if shot is not None:
                yield shot
            if now >= until:
                return
            shot = Shot(start=now, end=now, first=frame.look, best=frame, settled=settled)
        elif now - shot.start > config.max_shot_seconds:
            continue
        elif settled and similarity(shot.first, frame.look) < config.other_picture:
            yield shot
            shot = Shot(start=shot.start, end=now, first=frame.look, best=frame, settled=settled)
        else:
            shot.end = now
            if (settled, frame.sharpness) > (shot.settled, _SHARPER * shot.best.sharpness):
                shot.best, shot.settled = frame, settled
    if shot is not None:
        yield shot
    if failures:
        raise failures[0]


def _judged(
    frames: Iterable[Decoded], starts_shot: StartsShot, config: VideoConfig
) -> Iterator[tuple[Frame, bool, bool]]:
    """Yield each frame, whether it starts a shot, and whether it is settled, as soon as what follows it is known."""
    looks: list[Look] = []
    waiting: deque[Frame] = deque()

    def judged() -> tuple[Frame, bool, bool]:
        frame = waiting.popleft()
        # What is kept depends on the frame alone, not on where decoding began.
        while looks[0] is not frame.look and looks[1].timestamp <= frame.look.timestamp - 2 * config.reach_seconds:
            del looks[0]
        place = len(looks) - len(waiting) - 1
        return frame, starts_shot(looks, place), is_settled(looks, place, config)

    for index, timestamp, image in frames:
        small = scores.reduced(image)
        looks.append(look_at(index, timestamp, small, config))
        waiting.append(Frame(looks[-1], image, scores.sharpness(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))))
        while timestamp - waiting[0].look.timestamp > config.reach_seconds:
            yield judged()
    while waiting:
        yield judged()
