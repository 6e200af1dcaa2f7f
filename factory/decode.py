"""Decoding: the frames of a segment with their stream time, by Decord, or by PyAV where a file breaks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from factory.sources import open_film, time_stamps
from factory.video import REMUX, Segment, VideoConfig

Decoded = tuple[int, float, float, np.ndarray]  # index, timestamp s, average fps, RGB frame


def decode(segment: Segment, config: VideoConfig) -> Iterator[Decoded]:
    """Yield the frames from the segment's overlap to the bound of its last shot."""
    import decord

    times, first, last = _bounds(segment, config)
    reader = decord.VideoReader(segment.uri, num_threads=config.decode_threads)
    if len(reader) != len(times):
        raise RuntimeError(f"the decoder counts {len(reader)} frames, the container {len(times)}. {REMUX}")
    height, width = reader[first].shape[:2]
    step = max(1, min(16, int(64e6 / (height * width * 3))))  # at most 64 MB of raw frames at once
    for low in range(first, last, step):
        indices = range(low, min(low + step, last))
        for index, image in zip(indices, reader.get_batch(list(indices)).asnumpy(), strict=True):
            yield index, float(times[index] - times[0]), reader.get_avg_fps(), image


def decode_in_order(segment: Segment, config: VideoConfig) -> Iterator[Decoded]:
    """Yield what `decode` does, one frame after the other, up to the very frame that can't be read."""
    from av.error import FFmpegError

    times, first, last = _bounds(segment, config)
    index = first - 1
    with open_film(segment.uri) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = config.decode_threads
        fps = float(stream.average_rate or 0)
        container.seek(round(times[first] / stream.time_base), stream=stream)
        try:
            for frame in container.decode(stream):
                if frame.time is None:
                    raise RuntimeError(f"a frame has no time stamp. {REMUX}")
                index = int(np.abs(times - frame.time).argmin())
                if index >= last:
                    return
                if index >= first:
                    image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    yield index, float(times[index] - times[0]), fps, np.ascontiguousarray(image)
        except FFmpegError as error:
            raise RuntimeError(error.strerror) from error
    if index < last - 1:
        raise RuntimeError(f"the decoder ended at frame {index + 1} of {len(times)}. {REMUX}")


def _bounds(segment: Segment, config: VideoConfig) -> tuple[np.ndarray, int, int]:
    """Return the stream's time stamps (s) of the film's frames, and the range of them that decides the segment."""
    with open_film(segment.uri) as container:
        times = np.asarray(time_stamps(container)[0])
    if np.any(np.diff(times) <= 0):
        raise RuntimeError(f"the stream's time stamps do not increase. {REMUX}")
    since = times - times[0]
    first = int(np.searchsorted(since, segment.start - config.overlap_seconds)) if segment.start > 0 else 0
    return times, first, int(np.searchsorted(since, segment.end + config.max_shot_seconds))
