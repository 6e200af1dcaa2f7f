"""Candidates: the frames chosen from a segment, encoded, with their scores; run in a killable process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import cv2
import numpy as np

from factory import quality
from factory.cuts import starts_shot
from factory.decode import decode, decode_in_order
from factory.picture import encode_jpeg
from factory.schema import frame_id
from factory.shots import Shot, find_shots
from factory.video import Segment, VideoConfig


def candidate_frames(
    segment: Segment, config: VideoConfig, decoder: Literal["decord", "av"] = "decord"
) -> Iterator[dict[str, Any]]:
    """Yield the `candidates` rows of `segment` in order of time.

    They are the best frame of each shot that starts in it, or with `config.frames` its key frames, or the first frame
    of each interval; each of those is a shot of its own. Raises RuntimeError where the file stops being readable; the
    rows yielded before stay good. Decord reads ahead in a thread of its own, so how much of a damaged file it gives
    before the error is chance; PyAV, slower, gives all that comes before, each time.
    """
    cv2.setNumThreads(1)
    frames = {"decord": decode, "av": decode_in_order}[decoder]
    if config.frames == "shots":
        for shot in _shots(segment, config, frames):
            if shot.start >= segment.start:
                best = shot.best
                yield _row(segment, best.look.index, best.look.timestamp, best.image, (shot.start, shot.end), config)
    else:
        for index, timestamp, image in frames(segment, config):
            yield _row(segment, index, timestamp, image, (timestamp, timestamp), config)


def _shots(segment: Segment, config: VideoConfig, frames: Any) -> Iterator[Shot]:
    if config.detector == "transnetv2":
        from factory.transnetv2 import TransNetV2

        # The film is decoded twice: the network looks far ahead, and thumbs are all that fits in memory.
        starts = TransNetV2(frames(segment, config)).starts_shot
    else:
        starts = functools.partial(starts_shot, config=config)
    return find_shots(frames(segment, config), starts, config, until=segment.end)


def _row(
    segment: Segment, index: int, timestamp: float, image: np.ndarray, shot: tuple[float, float], config: VideoConfig
) -> dict[str, Any]:
    jpeg = encode_jpeg(image, config.jpeg_quality)
    return {
        "frame_id": frame_id(segment.source_id, timestamp),
        "source_id": segment.source_id,
        "segment_id": segment.segment_id,
        "frame_index": index,
        "timestamp": timestamp,
        "shot": frame_id(segment.source_id, shot[0]),
        "shot_start": shot[0],
        "shot_end": shot[1],
        "width": image.shape[1],
        "height": image.shape[0],
        "image": jpeg,
        "image_sha256": hashlib.sha256(jpeg).hexdigest(),
        **quality.scores(image),
    }
