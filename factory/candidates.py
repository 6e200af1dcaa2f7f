"""Candidates: the frames chosen from a segment, or a still picture, encoded, with their scores.

Run in a killable process.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from factory import still
from factory.bars import FilmBars
from factory.cuts import starts_shot
from factory.decode import decode, decode_in_order
from factory.fetch import SourceChanged, check_unchanged, retried, unread
from factory.locations import copy_stream
from factory.picture import encode_jpeg
from factory.scores import scores
from factory.shots import Shot, find_shots
from factory.timeline import Timeline, read_timeline
from factory.video import Segment, VideoConfig


def candidate_frames(
    segment: Segment, config: VideoConfig, in_order: bool = False, timeline: Timeline | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the `candidates` rows of `segment` in order of time.

    They are the best frame of each shot that starts in it, or with `config.frames` its key frames, or the first frame
    of each interval; each of those is a shot of its own. Raises RuntimeError where the file stops being readable; the
    rows yielded before stay good. Decord reads ahead in a thread of its own, so how much of a damaged file it gives
    before the error is chance; with `in_order` PyAV reads it, which gives all that comes before, each time.
    Without the film's `timeline` it is read here.
    """
    cv2.setNumThreads(1)
    timeline = timeline or read_timeline(segment.uri)
    frames = functools.partial(decode_in_order if in_order else decode, timeline=timeline)
    row = functools.partial(_row, segment, config, timeline.bars)
    if config.frames == "shots":
        for shot in _shots(segment, config, frames):
            if shot.start >= segment.start:
                best = shot.best
                at = {"index": best.look.index, "timestamp": best.look.timestamp}
                yield row(best.image, **at, start=shot.start, end=shot.end)
    else:
        for index, timestamp, image in frames(segment, config):
            yield row(image, index=index, timestamp=timestamp, start=timestamp, end=timestamp)


def picture_candidates(segments: list[Segment], config: VideoConfig) -> Iterator[dict[str, Any]]:
    """Yield one `candidates` row per segment, each of a still picture, in order; failed where it is damaged.

    In place of the row of a picture that is gone, changed or can't be reached: what fetch.unread tells of it.
    """
    cv2.setNumThreads(1)
    for segment in segments:
        try:
            data = retried(functools.partial(_read_unchanged, segment))
        except OSError as error:
            yield unread(segment, error)
            continue
        try:
            row = _row(segment, config, FilmBars(), still.decode(data))
        except (ImportError, MemoryError):
            raise  # the machine's, not the picture's
        except Exception as error:  # any file may be here: the libraries' own errors are many
            row = failed_candidate(segment, 0.0, " ".join(str(error).split()))
        yield row


def failed_candidate(segment: Segment, after: float, reason: str, limits: str = "") -> dict[str, Any]:
    """Return the `candidates` row that says from where on, in s, a segment is not read, or not within `limits`."""
    # by the segment, which has one such row at most: two may break at the same time
    key = f"{segment.frame_id(segment.start)}-failed"
    return {
        "frame_id": f"{key}-{limits}" if limits else key,
        "source_id": segment.source_id,
        "segment_id": segment.within(limits) if limits else segment.segment_id,
        "timestamp": after,
        "status": "failed",
        "reason": f"decode: {reason}",
    }


def _shots(segment: Segment, config: VideoConfig, frames: Any) -> Iterator[Shot]:
    if config.detector == "transnetv2":
        from factory.transnetv2 import TransNetV2

        # The film is decoded twice: the network looks far ahead, and thumbs are all that fits in memory.
        starts = TransNetV2(frames(segment, config)).starts_shot
    else:
        starts = functools.partial(starts_shot, config=config)
    return find_shots(frames(segment, config), starts, config, until=segment.end)


def _read_unchanged(segment: Segment) -> bytes:
    check_unchanged(segment)
    data = io.BytesIO()
    if copy_stream(segment.uri, data) != segment.source_id:
        raise SourceChanged(f"{segment.uri} changed after it was hashed. Build again.")
    return data.getvalue()


def _row(
    segment: Segment,
    config: VideoConfig,
    film_bars: FilmBars,
    image: np.ndarray,
    *,
    index: int = 0,
    timestamp: float = 0.0,
    start: float = 0.0,
    end: float = 0.0,
) -> dict[str, Any]:
    bars = film_bars.of(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    picture = bars.cropped(image) if config.crop_bars else image
    found = scores(picture)
    below = found["subtitle_height"]
    if config.crop_subtitles and below:
        picture = picture[:-below]
        found = scores(picture) | {"subtitle_height": below}
    jpeg = encode_jpeg(picture, config.jpeg_quality)
    return {
        "frame_id": segment.frame_id(timestamp),
        "source_id": segment.source_id,
        "segment_id": segment.segment_id,
        "frame_index": index,
        "timestamp": timestamp,
        "shot": segment.frame_id(start),
        "shot_start": start,
        "shot_end": end,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "image": jpeg,
        "image_sha256": hashlib.sha256(jpeg).hexdigest(),
        **{f"bar_{side}": size for side, size in bars._asdict().items()},
        **found,
    }
