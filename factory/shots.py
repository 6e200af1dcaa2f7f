"""Shots: where one ends and the next begins, and the best frame of each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from factory import scores
from factory.decode import Decoded
from factory.video import VideoConfig

# A later frame is better only if it is so much sharper: a shot that is shown twice, and encoded twice, then gives the
# same frame twice, and its second showing is found to be a duplicate.
_SHARPER = 1.05


@dataclass
class Frame:
    index: int
    timestamp: float  # s
    image: np.ndarray  # H,W,3 uint8 RGB
    sharpness: float
    luma: float  # 0..1
    pattern: np.ndarray  # 16x16 luma, mean 0 and length 1: what stays the same in a fade


@dataclass
class Shot:
    start: float  # s
    end: float  # s, its last frame's
    best: Frame


def find_shots(frames: Iterator[Decoded], config: VideoConfig, *, until: float = math.inf) -> Iterator[Shot]:
    """Yield the shots that start before `until` (s) with their best frame.

    In memory are that frame and the few that the detector looks back on.
    """
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector: AdaptiveDetector | None = None
    recent: deque[Frame] = deque()
    cuts: set[int] = set()
    shot: Shot | None = None
    before: Frame | None = None

    def is_cut(frame: Frame) -> bool:
        if frame.index not in cuts or before is None:
            return False
        return float((frame.pattern * before.pattern).sum()) < config.same_picture

    def closed(frame: Frame | None) -> Iterator[Shot]:
        """Fold the oldest undecided frame into the running shot; yield the shot that it ends."""
        nonlocal shot, before
        black = frame is None or frame.luma < config.black_level
        if shot is not None and (frame is None or black or is_cut(frame)):
            yield shot
            shot = None
        before = frame
        if frame is None or black:
            return
        if shot is None:
            shot = Shot(start=frame.timestamp, end=frame.timestamp, best=frame)
        elif frame.timestamp - shot.start <= config.max_shot_seconds:
            shot.end = frame.timestamp
            if frame.sharpness > _SHARPER * shot.best.sharpness:
                shot.best = frame

    failures: list[Exception] = []
    for index, timestamp, fps, image in _readable(frames, failures):
        if detector is None:
            fps = fps or 25.0
            least = max(1, round(config.min_shot_seconds * fps))
            detector = AdaptiveDetector(
                adaptive_threshold=config.adaptive_threshold,
                min_content_val=config.min_content_val,
                min_scene_len=least,
            )
        small = scores.reduced(image)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        bgr = cv2.cvtColor(cv2.resize(small, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
        cuts.update(cut.frame_num for cut in detector.process_frame(FrameTimecode(index, fps), bgr))
        recent.append(
            Frame(index, timestamp, image, scores.sharpness(grey), float(grey.mean()) / 255, scores.pattern(grey))
        )
        if len(recent) > detector.event_buffer_length + 1:
            yield from closed(recent.popleft())
            if shot is not None and shot.start >= until:
                return
    while recent:
        yield from closed(recent.popleft())
        if shot is not None and shot.start >= until:
            return
    yield from closed(None)
    if failures:
        raise failures[0]


def _readable(frames: Iterator[Any], failures: list[Exception]) -> Iterator[Any]:
    """Yield `frames` up to where they break, and put the error there: the shot that was running counts so far."""
    try:
        yield from frames
    except Exception as error:
        failures.append(error)
