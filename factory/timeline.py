"""A film's timeline: when its frames are shown, and what key frames all over it say of the whole film.

Every segment must know it, and it takes all packets of the film to know: it is read once on a node, and kept there.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from factory.bars import FilmBars, film_bars, profile_of
from factory.fetch import cache_folder
from factory.files import locked, new_file
from factory.sources import film_stream, open_film, time_stamps
from factory.video import Segment, VideoConfig

_FORMAT = 1  # raised when the same film would be kept as another timeline
_KEPT = 4  # timelines in each of 256 folders: 1.4 MB for two hours
_SAMPLES = 24  # key frames that are looked at, spread over the film
_FIRST = 8  # frames that are looked at where it begins


@dataclass(frozen=True)
class Timeline:
    """What a film's packets say, and its samples."""

    times: np.ndarray  # s, of each frame, in order of showing
    keys: np.ndarray  # s, of the key frames, those that are not shown too
    unseen: int  # frames in the file that no player shows
    interlaced: bool  # whether any of the frames that were looked at is
    bars: FilmBars


def timeline_of(segment: Segment, config: VideoConfig) -> Timeline:
    """Return the timeline of the segment's film, read from the file or kept on this node since it was.

    Raises Refused, or PyAV's errors, where the file can't be read.
    """
    folder = cache_folder(config) / ".timelines" / segment.source_id[:2]
    path = folder / f"{segment.source_id}-{_FORMAT}.npz"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=True))  # the film's other segments wait for the first one
            os.chmod(cache_folder(config), 0o700)
        except OSError:  # there is no disk to keep it on: every segment reads it
            return _read(segment.uri)
        return _kept(path) or _keep(path, _read(segment.uri))


def _kept(path: Path) -> Timeline | None:
    try:
        os.utime(path)
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        bars = FilmBars.from_array(kept["bars"])
        return Timeline(kept["times"], kept["keys"], int(kept["unseen"]), bool(kept["interlaced"]), bars)


def _keep(path: Path, timeline: Timeline) -> Timeline:
    """Put the timeline in place at `path`, and remove those of its folder that were not used for longest."""
    with contextlib.suppress(OSError), new_file(path) as aside, open(aside, "wb") as file:
        np.savez(
            file,
            times=timeline.times,
            keys=timeline.keys,
            unseen=timeline.unseen,
            interlaced=timeline.interlaced,
            bars=timeline.bars.to_array(),
        )
    with contextlib.suppress(OSError):
        files = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-_KEPT]:
            file.unlink()
    return timeline


def _read(uri: str) -> Timeline:
    with open_film(uri) as container:
        stamps = time_stamps(container)
    with open_film(uri) as container:
        interlaced = _begins_interlaced(container)
    profiles = []
    with open_film(uri) as container:
        stream = film_stream(container)
        stream.codec_context.thread_count = 1
        stream.codec_context.skip_frame = "NONKEY"
        size, pixel_aspect = (stream.width, stream.height), stream.sample_aspect_ratio or Fraction(1)
        reformatter = VideoReformatter()
        for place in np.unique(np.linspace(0, len(stamps.keys) - 1, _SAMPLES).round().astype(int)):
            with contextlib.suppress(FFmpegError, StopIteration):  # damaged here: who decodes it says so
                container.seek(round(stamps.keys[place] / stream.time_base), stream=stream)
                frame = next(container.decode(stream))
                interlaced = interlaced or frame.interlaced_frame
                grey = cv2.cvtColor(picture(frame, size, pixel_aspect, reformatter), cv2.COLOR_RGB2GRAY)
                profiles.append(profile_of(grey))
    times, keys = np.asarray(stamps.times), np.asarray(stamps.keys)
    return Timeline(times, keys, stamps.unseen, bool(interlaced), film_bars(profiles))


def _begins_interlaced(container: Any) -> bool:
    stream = film_stream(container)
    stream.codec_context.thread_count = 1
    with contextlib.suppress(FFmpegError):
        if any(frame.interlaced_frame for frame in islice(container.decode(stream), _FIRST)):
            return True
    return stream.codec_context.field_order > 1  # 1 is progressive


def picture(frame: Any, size: tuple[int, int], pixel_aspect: Fraction, reformatter: VideoReformatter) -> np.ndarray:
    """Return PyAV's `frame` as RGB uint8 H,W,3: scaled to `size` (width, height), with square pixels, upright."""
    rgb = reformatter.reformat(frame, *size, "rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(square(rgb, pixel_aspect), frame.rotation // 90))


def square(image: np.ndarray, pixel_aspect: Fraction) -> np.ndarray:
    """Return the image H,W,3 with square pixels in place of `pixel_aspect` times as wide as high: one side grows."""
    if pixel_aspect == 1:
        return image
    height, width = image.shape[:2]
    size = (round(width * max(pixel_aspect, 1)), round(height / min(pixel_aspect, 1)))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
