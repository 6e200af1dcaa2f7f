"""A film's timeline: when its frames are shown, and what key frames all over it say of the whole film.

Every segment must know it, and it takes all packets of the film to know: it is read once on a node, and kept there.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from factory.bars import FilmBars, Profile, film_bars, profile_of
from factory.fetch import cache_folder, check_unchanged
from factory.files import locked, new_file
from factory.sources import READ_BYTES_PER_SECOND, Stamps, film_stream, open_film, time_stamps
from factory.video import VERSION, Segment, VideoConfig
from factory.worker import WorkerFailed, run_killable

Samples = tuple[bool, list[Profile]]  # whether any of the frames is interlaced, and their profiles

_KEPT = 1024  # timelines on a node: 1.4 MB for two hours of film
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

    It is read in a killable process. Where that crashes, or goes beyond the limits, while it looks at frames, the
    timeline has no samples: each frame's bars are judged alone then, and one bad place costs its own segment only.
    Raises WorkerFailed where the file can't be read, WorkerLost where the machine failed, SourceChanged.
    """
    folder = cache_folder(config) / ".timelines" / segment.source_id
    path = folder / f"{VERSION}-av{av.__version__}-{config.limits}.npz"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=True))  # the film's other segments wait for the first one
            os.chmod(cache_folder(config), 0o700)
        except OSError:  # there is no disk to keep it on: every segment reads it
            return _read(segment.uri, config)
        if timeline := _kept(path):
            return timeline
        timeline = _read(segment.uri, config)
        check_unchanged(segment)  # its name is the sha256 of what was there
        return _keep(path, timeline)


def read_timeline(uri: str) -> Timeline:
    """Return the timeline of the film at `uri`, read in this process: Refused, or PyAV's errors, where it can't be."""
    return _joined(*parts(uri))


def _kept(path: Path) -> Timeline | None:
    try:
        os.utime(path)
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            bars = FilmBars.from_array(kept["bars"])
            return Timeline(kept["times"], kept["keys"], int(kept["unseen"]), bool(kept["interlaced"]), bars)
    except Exception:  # none, or damaged, of which NumPy has many errors: it is read anew
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _keep(path: Path, timeline: Timeline) -> Timeline:
    """Put the timeline in place at `path`, and remove those of the films that were not used for longest."""
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
        files = sorted(path.parent.parent.glob("*/*.npz"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-_KEPT]:
            shutil.rmtree(file.parent, ignore_errors=True)  # who waits for its lock reads it anew
    return timeline


def _read(uri: str, config: VideoConfig) -> Timeline:
    found: list[Any] = []
    deadline = config.deadline_seconds + os.path.getsize(uri) / READ_BYTES_PER_SECOND
    limits = {"deadline_seconds": deadline, "memory_limit_mb": config.memory_limit_mb}
    try:
        for part in run_killable("factory.timeline:parts", uri, **limits):
            found.append(part)
    except WorkerFailed:
        if not found:
            raise
    return _joined(*found)


def _joined(stamps: Stamps, begins_interlaced: bool = False, samples: Samples = (False, [])) -> Timeline:
    interlaced, profiles = samples
    times, keys = np.asarray(stamps.times), np.asarray(stamps.keys)
    return Timeline(times, keys, stamps.unseen, begins_interlaced or interlaced, film_bars(profiles))


def parts(uri: str) -> Iterator[Any]:
    """Yield what a timeline is made of: the Stamps, whether the film begins interlaced, all Samples.

    The samples come at once: how many of them a failure leaves would be chance.
    """
    cv2.setNumThreads(1)
    with open_film(uri) as container:
        stamps = time_stamps(container)
    yield stamps
    with open_film(uri) as container:
        yield _begins_interlaced(container)
    yield _samples(uri, stamps.keys)


def _samples(uri: str, keys: list[float]) -> Samples:
    interlaced, profiles = False, []
    with open_film(uri) as container:
        stream = film_stream(container)
        stream.codec_context.thread_count = 1
        stream.codec_context.skip_frame = "NONKEY"
        size, pixel_aspect = (stream.width, stream.height), stream.sample_aspect_ratio or Fraction(1)
        reformatter = VideoReformatter()
        for place in np.unique(np.linspace(0, len(keys) - 1, _SAMPLES).round().astype(int)):
            with contextlib.suppress(FFmpegError, StopIteration):  # damaged here: who decodes it says so
                container.seek(round(keys[place] / stream.time_base), stream=stream)
                frame = next(container.decode(stream))
                interlaced = interlaced or bool(frame.interlaced_frame)
                grey = cv2.cvtColor(picture(frame, size, pixel_aspect, reformatter), cv2.COLOR_RGB2GRAY)
                profiles.append(profile_of(grey))
    return interlaced, profiles


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
