"""Decoding: the frames of a segment with their stream time, by PyAV, or by Decord where few of many are wanted."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np

from factory.extent import bytes_missing
from factory.locations import open_binary
from factory.sources import film_stream, open_film
from factory.timeline import Timeline, picture, read_timeline, square
from factory.video import REMUX, Segment, VideoConfig

Decoded = tuple[int, float, np.ndarray]  # index, timestamp s, RGB frame H,W,3 uint8

# Demuxers of FFmpeg's in which Decord finds the frame that it is asked for. Elsewhere (MPEG-TS and -PS, AVI and ASF
# with B-frames) it jumps to the wrong key frame and gives frames of another time.
_DECORD_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "gif")
# Demuxers in which a jump to some time lands before the frames of that time; elsewhere the film is read up to them.
_JUMP_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
_JUMP_SECONDS = 5.0  # this far before: MPEG-TS lands where the bytes are, which belong to later frames
_DECORD_WIDTH = 160  # pixels; below, its batches of some widths (32, 48, 96, 144) fail


_REORDERED = 16  # frames, among which those that are stored in another order than shown have shown it


class OutOfOrder(RuntimeError):
    """The frames' time stamps contradict the order in which they are shown."""


@dataclass(frozen=True)
class Film:
    """What the decoders must know of a film, and which of its frames decide a segment."""

    times: np.ndarray  # s, of each frame, in order of showing
    keys: np.ndarray  # s, of the key frames
    wanted: list[int]  # indices of the frames to decode, at least one
    entry: float  # s, of the last key frame up to the first of these frames
    size: tuple[int, int]  # width and height as stored, pixels
    pixel_aspect: Fraction  # width of a pixel by its height
    interlaced: bool
    for_decord: bool
    bytes_missing: int  # at the end of the file, where the segment is the last one


def decode(segment: Segment, config: VideoConfig, timeline: Timeline | None = None) -> Iterator[Decoded]:
    """Yield the frames that the segment's candidates are chosen from, in order, upright and with square pixels.

    Without the film's `timeline` it is read here. Raises RuntimeError where the file can't be read on.
    """
    film = _film(segment, config, timeline)
    return _to_its_end(film, _by_either(film, segment, config) if film.wanted else iter(()))


def decode_in_order(segment: Segment, config: VideoConfig, timeline: Timeline | None = None) -> Iterator[Decoded]:
    """Yield what `decode` does, by PyAV: one frame after the other, up to the very frame that can't be read.

    Where that comes before the segment's start, in the segment before it, this one begins at its own key frame.
    """
    film = _film(segment, config, timeline)
    own = int(np.searchsorted(film.times - film.times[0], segment.start))
    if film.wanted and own and film.entry < film.times[own]:
        before = [index for index in film.wanted if index < own] or [own - 1]
        if not _is_readable(replace(film, wanted=before), segment, config):
            wanted = [index for index in film.wanted if index >= own]
            film = replace(film, wanted=wanted, entry=_entry(film.times, film.keys, own))
    return _to_its_end(film, _by_av(film, segment, config) if film.wanted else iter(()))


def _is_readable(film: Film, segment: Segment, config: VideoConfig) -> bool:
    try:
        for _ in _by_av(film, segment, config):
            pass
    except OutOfOrder:
        raise
    except RuntimeError:
        return False
    return True


def readable(frames: Iterable[Decoded], failures: list[Exception]) -> Iterator[Decoded]:
    """Yield `frames` up to where they break, and put the error into `failures`."""
    try:
        yield from frames
    except Exception as error:
        failures.append(error)


def _to_its_end(film: Film, frames: Iterator[Decoded]) -> Iterator[Decoded]:
    yield from frames
    if film.bytes_missing:
        raise RuntimeError(f"the file ends here, {film.bytes_missing} bytes before the end that its header states")


def _by_either(film: Film, segment: Segment, config: VideoConfig) -> Iterator[Decoded]:
    if not film.for_decord:
        return _by_av(film, segment, config)
    if config.frames == "interval":
        return _by_decord(film, segment, config)
    frames = _by_av(film, segment, config)
    try:
        return chain(list(islice(frames, max(1, min(_REORDERED, _at_once(film))))), frames)
    except OutOfOrder:  # an AVI's, copied into another container: Decord asks for no more than their number
        return _by_decord(film, segment, config)


def _film(segment: Segment, config: VideoConfig, timeline: Timeline | None = None) -> Film:
    timeline = timeline or read_timeline(segment.uri)
    times, keys = timeline.times, timeline.keys
    if np.any(np.diff(times) <= 0):
        raise RuntimeError(f"the stream's time stamps do not increase. {REMUX}")
    wanted = _wanted(times, keys, segment, config)
    first = wanted[0] if wanted else 0
    before = max(first - timeline.interlaced, 0)  # deinterlacing looks one frame back, or one key frame
    with open_film(segment.uri) as container:
        stream = film_stream(container)
        stream.codec_context.thread_count = config.decode_threads
        frame = _first_frame(container, stream)
        missing = 0
        if segment.end > times[-1] - times[0]:  # the last segment
            with open_binary(segment.uri) as file:
                missing = bytes_missing(file, container.format.name)
        return Film(
            times=times,
            keys=keys,
            wanted=wanted,
            entry=_entry(times, keys, before),
            size=(stream.width, stream.height),
            pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
            interlaced=timeline.interlaced,
            for_decord=_is_for_decord(
                container.format.name, frame, unseen=timeline.unseen, interlaced=timeline.interlaced
            ),
            bytes_missing=missing,
        )


def _entry(times: np.ndarray, keys: np.ndarray, index: int) -> float:
    """Return the time (s) of the last key frame up to the frame `index`."""
    return float(keys[int(np.searchsorted(keys, times[index], side="right")) - 1])


def _first_frame(container: Any, stream: Any) -> Any:
    """Return PyAV's first frame that can be decoded; who wants those before it finds out that they can't."""
    from av.error import FFmpegError

    reason = "the end"
    for packet in container.demux(stream):
        try:
            if frames := packet.decode():
                return frames[0]
        except FFmpegError as error:
            reason = error.strerror
    raise RuntimeError(f"not one frame can be decoded: {reason}")


def _wanted(times: np.ndarray, keys: np.ndarray, segment: Segment, config: VideoConfig) -> list[int]:
    """Return the indices of the frames that decide `segment`.

    For shots these are all from the overlap before it to the bound of its last shot and the overlap behind that, with
    the frames that are shown at both ends: one may be shown for longer than the overlap. Otherwise they are its own key
    frames, or in it the first frame at or after each multiple of the interval.
    """
    since = times - times[0]

    def at(seconds: float) -> int:
        return int(np.searchsorted(since, seconds))

    if config.frames == "shots":
        context, end = config.context_frames, segment.end + config.max_shot_seconds
        shown = int(np.searchsorted(since, segment.start - config.overlap_seconds, side="right")) - 1
        first = min(at(segment.start) - context, shown)
        last = max(at(end) + context, at(end + config.overlap_seconds) + 1)
        return list(range(max(first, 0), min(last, len(times))))
    if config.frames == "keyframes":
        indices = np.flatnonzero(np.isin(times, keys))
    else:
        indices = np.flatnonzero(np.diff(np.floor(since / config.interval_seconds + 1e-6), prepend=-1))
    return [int(index) for index in indices if at(segment.start) <= index < at(segment.end)]


def _is_for_decord(container: str, frame: Any, *, unseen: int, interlaced: bool) -> bool:
    """Return whether Decord gives the right frames of the film in `container` that begins with PyAV's `frame`.

    It counts packets that are never shown as frames, and neither turns frames nor deinterlaces them.
    """
    return (
        container in _DECORD_FORMATS and frame.width >= _DECORD_WIDTH and not (unseen or interlaced or frame.rotation)
    )


def _at_once(film: Film) -> int:
    """Return how many raw frames of the film take 128 MB."""
    width, height = film.size
    return int(128e6 / (height * width * 3))


def _by_decord(film: Film, segment: Segment, config: VideoConfig) -> Iterator[Decoded]:
    import decord

    reader = decord.VideoReader(segment.uri, num_threads=config.decode_threads)
    if len(reader) != len(film.times):
        raise RuntimeError(f"the decoder counts {len(reader)} frames, the container {len(film.times)}. {REMUX}")
    step = max(1, min(16, _at_once(film) // 2))
    for low in range(0, len(film.wanted), step):
        indices = film.wanted[low : low + step]
        for index, image in zip(indices, reader.get_batch(indices).asnumpy(), strict=True):
            yield index, float(film.times[index] - film.times[0]), square(image, film.pixel_aspect)


def _by_av(film: Film, segment: Segment, config: VideoConfig) -> Iterator[Decoded]:
    from av.error import FFmpegError
    from av.video.reformatter import VideoReformatter

    start = film.times[film.wanted[0]]
    reformatter = VideoReformatter()
    missing = deque(film.wanted)
    index = missing[0] - 1
    jumps = _jump_lands(film.entry, segment.uri)
    with open_film(segment.uri) as container:
        stream = film_stream(container)
        stream.codec_context.thread_count = config.decode_threads
        if config.frames == "keyframes":
            stream.codec_context.skip_frame = "NONKEY"
        try:
            if jumps:
                _jump(film.entry, container, stream)
            frames = _frames_from(film.entry, container, stream)
            for frame in _deinterlaced(frames, stream) if film.interlaced else frames:
                if frame.time is None:
                    raise RuntimeError(f"a frame has no time stamp. {REMUX}")
                if frame.is_corrupt:
                    raise RuntimeError("a frame is damaged")
                if frame.time < start:
                    continue
                before, index = index, _nearest(film.times, frame.time)
                if index <= before:
                    raise OutOfOrder(f"the time stamps do not follow the order of the frames. {REMUX}")
                while missing and missing[0] < index:  # the decoder left it out
                    missing.popleft()
                if missing and missing[0] == index:
                    image = picture(frame, film.size, film.pixel_aspect, reformatter)
                    yield index, float(film.times[index] - film.times[0]), image
                    missing.popleft()
                if not missing:
                    return
        except FFmpegError as error:
            raise RuntimeError(error.strerror) from error
    if missing:
        raise RuntimeError(f"the decoder ended before frame {missing[0] + 1} of {len(film.times)}. {REMUX}")


def _nearest(times: np.ndarray, time: float) -> int:
    """Return the index of that of the ascending `times` which is nearest to `time`."""
    right = int(np.searchsorted(times, time))
    return right - 1 if right == len(times) or (right and time - times[right - 1] <= times[right] - time) else right


def _jump_lands(entry: float, uri: str) -> bool:
    """Return whether, in the film at `uri`, a jump comes out before the key frame at `entry` (s), which then comes."""
    from av.error import FFmpegError

    with open_film(uri) as container, contextlib.suppress(FFmpegError):
        stream = film_stream(container)
        if container.format.name in _JUMP_FORMATS:
            _jump(entry, container, stream)
            keys = (packet.pts for packet in container.demux(stream) if packet.is_keyframe and packet.pts is not None)
            times = (float(pts * stream.time_base) for pts in keys)
            return next((time for time in times if time >= entry), None) == entry
    return False


def _jump(entry: float, container: Any, stream: Any) -> None:
    container.seek(round((entry - _JUMP_SECONDS) / stream.time_base), stream=stream)


def _frames_from(entry: float, container: Any, stream: Any) -> Iterator[Any]:
    """Yield PyAV's frames from the key frame at `entry` (s) on, which is read up to."""
    reached = False
    for packet in container.demux(stream):
        if not reached and packet.is_keyframe and packet.pts is not None:
            reached = float(packet.pts * stream.time_base) == entry
        if reached:
            yield from packet.decode()


def _deinterlaced(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Yield PyAV's `frames`, the interlaced ones with both fields brought to one moment (FFmpeg's bwdif)."""
    from av.filter import Graph

    graph = Graph()
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(graph.add_buffer(template=stream), bwdif, graph.add("buffersink")).configure()
    for frame in chain(frames, [None]):
        graph.push(frame)
        with contextlib.suppress(BlockingIOError, EOFError):  # it looks one frame ahead
            while True:
                yield graph.pull()
