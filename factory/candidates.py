"""Candidates: the best frame of each shot of a segment, encoded, with its scores; run in a killable process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import cv2

from factory.bars import find_bars
from factory.decode import decode, decode_in_order
from factory.picture import encode_jpeg
from factory.schema import frame_id
from factory.scores import scores
from factory.shots import Shot, find_shots
from factory.video import Segment, VideoConfig


def candidate_frames(
    segment: Segment, config: VideoConfig, decoder: Literal["decord", "av"] = "decord"
) -> Iterator[dict[str, Any]]:
    """Yield a `candidates` row for the best frame of each shot that starts in `segment`, in order of time.

    Raises RuntimeError where the file stops being readable; the rows yielded before stay good. Decord reads ahead in a
    thread of its own, so how much of a damaged file it gives before the error is chance; PyAV, slower, gives all that
    comes before, each time.
    """
    cv2.setNumThreads(1)
    frames = {"decord": decode, "av": decode_in_order}[decoder](segment, config)
    for shot in find_shots(frames, config, until=segment.end):
        if shot.start >= segment.start:
            yield _row(segment, shot, config)


def _row(segment: Segment, shot: Shot, config: VideoConfig) -> dict[str, Any]:
    frame = shot.best
    bars = find_bars(cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY))
    picture = bars.cropped(frame.image) if config.crop_bars else frame.image
    found = scores(picture)
    below = found["subtitle_height"]
    if config.crop_subtitles and below:
        picture = picture[:-below]
        found = scores(picture) | {"subtitle_height": below}
    jpeg = encode_jpeg(picture, config.jpeg_quality)
    return {
        "frame_id": frame_id(segment.source_id, frame.timestamp),
        "source_id": segment.source_id,
        "segment_id": segment.segment_id,
        "frame_index": frame.index,
        "timestamp": frame.timestamp,
        "shot": frame_id(segment.source_id, shot.start),
        "shot_start": shot.start,
        "shot_end": shot.end,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "image": jpeg,
        "image_sha256": hashlib.sha256(jpeg).hexdigest(),
        **{f"bar_{side}": size for side, size in bars._asdict().items()},
        **found,
    }
