"""Video: sources -> segments -> shots -> one candidate frame per shot, by stream time."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from factory import quality
from factory.files import sha256_file
from factory.schema import frame_id
from factory.settings import STRICT

VERSION = "2"  # raised when the same file would give other candidates
# Settings that change how the work is done, not what comes out of it.
RUNTIME_ONLY = ("segment_seconds", "decode_threads", "deadline_seconds", "deadline_per_second")
_REMUX = "Rewrite the container without encoding again: ffmpeg -i IN -c copy -fflags +genpts OUT.mkv"
# Columns of a `sources` row that describe what is in the file.
FACTS = ("container", "codec", "width", "height", "fps", "start_time", "duration", "segment_starts", "status")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How films are cut into segments and shots, and how frames are encoded."""

    __pydantic_config__ = STRICT

    # Length of a segment, the unit of work, retry and commit (s); borders lie on key frames.
    segment_seconds: float = 300.0
    # Decoded before a segment's start, so that a cut near the border is seen as in the whole film (s).
    overlap_seconds: float = 2.0
    # A shot is read at most this far; a longer one is judged by this much of it (s).
    max_shot_seconds: float = 60.0
    # A shot is at least this long (s).
    min_shot_seconds: float = 0.4
    # PySceneDetect's AdaptiveDetector: how far a frame's change must stand out from its neighbours'.
    adaptive_threshold: float = 3.0
    # ... and its least change, in mean HSV levels (0 to 255).
    min_content_val: float = 15.0
    # A cut is none when the frames on both sides correlate this much (-1 to 1): a fade or a flash of one picture.
    same_picture: float = 0.9
    # Frames with a mean luma below this (0 to 1) are black: they end a shot and are never chosen.
    black_level: float = 0.03
    # JPEG quality of the stored frame, 4:4:4 chroma.
    jpeg_quality: int = 95
    # Decoder threads per segment.
    decode_threads: int = 1
    # Time a segment may take before its process is ended: this many seconds and this many per second of film.
    deadline_seconds: float = 120.0
    deadline_per_second: float = 10.0

    def __post_init__(self) -> None:
        for name in ("segment_seconds", "max_shot_seconds", "min_shot_seconds", "deadline_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"video.{name} must be above 0, got {getattr(self, name)}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"video.jpeg_quality must lie in 1 to 100, got {self.jpeg_quality}.")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a film: it owns the shots that start in [start, end) seconds of stream time."""

    source_id: str
    uri: str
    start: float
    end: float

    @property
    def segment_id(self) -> str:
        """The segment's key: `<source_id[:16]>@<start>-<end>` in microseconds."""
        return f"{self.source_id[:16]}@{round(self.start * 1e6)}-{round(self.end * 1e6)}"


def find_sources(patterns: list[str]) -> list[str]:
    """Return the absolute paths of the videos that files, folders and globs name, sorted, each once.

    Raises FileNotFoundError for a pattern that names nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        if os.path.isdir(pattern):
            here = [str(p) for p in Path(pattern).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        elif os.path.isfile(pattern):
            here = [pattern]
        else:
            here = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not here:
            raise FileNotFoundError(
                f"No video at {pattern!r}. Give files, folders or globs; in folders these count: {', '.join(SUFFIXES)}."
            )
        found.update(os.path.abspath(p) for p in here)
    return sorted(found)


def describe_source(uri: str, config: VideoConfig) -> dict[str, Any]:
    """Return the `sources` row of the file `uri`: identity, container facts, segment starts; bad input is a row too."""
    row: dict[str, Any] = {"uri": uri, "collection": Path(uri).parent.name, "licence": "unknown"}
    try:
        row["source_id"] = sha256_file(uri)
        row["size_bytes"] = os.path.getsize(uri)
        if not row["size_bytes"]:
            return row | {"status": "failed", "error": "not a video: the file is empty"}
    except OSError as error:
        row["source_id"] = hashlib.sha256(f"uri:{uri}".encode()).hexdigest()
        return row | {"status": "failed", "error": f"cannot be read: {error.strerror}"}
    try:
        return row | _probe(uri, config) | {"status": "pending"}
    except Exception as error:  # any file may be here: the library's own errors are many
        reason = getattr(error, "strerror", None) or error
        return row | {"status": "failed", "error": f"not a video that can be opened: {reason}"}


def _probe(uri: str, config: VideoConfig) -> dict[str, Any]:
    import av

    with av.open(uri) as container:
        if not container.streams.video:
            raise ValueError("the file has no video stream")
        if container.format.name == "mpegts":
            raise ValueError(f"the decoder misplaces frames of MPEG-TS. {_REMUX}")
        stream = container.streams.video[0]
        times, keys = _packets(container)
        if not keys:
            raise ValueError("the video stream has no key frame")
        starts = [0.0]
        for key in keys:
            if key - times[0] - starts[-1] >= config.segment_seconds:
                starts.append(key - times[0])
        return {
            "container": container.format.name,
            "codec": stream.codec_context.name,
            "width": stream.width,
            "height": stream.height,
            "fps": float(stream.average_rate or 0),
            "start_time": times[0],
            "duration": times[-1] - times[0] + (float(1 / stream.average_rate) if stream.average_rate else 0.0),
            "segment_starts": starts,
        }


def _packets(container: Any) -> tuple[list[float], list[float]]:
    """Return the time stamps (s) of all frames and of the key frames of the first video stream, in order of showing."""
    stream = container.streams.video[0]
    found = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    if any(pts is None for pts, _ in found):
        raise ValueError(f"the stream has frames without time stamp. {_REMUX}")
    found.sort()
    tick = stream.time_base
    return [float(pts * tick) for pts, _ in found], [float(pts * tick) for pts, key in found if key]


def segments_of(source: dict[str, Any]) -> list[Segment]:
    """Return the segments of a `sources` row, from the starts recorded when the source was first seen."""
    starts = source["segment_starts"] or []
    ends = [*starts[1:], source["duration"] + 1.0] if starts else []
    return [
        Segment(source_id=source["source_id"], uri=source["uri"], start=start, end=end)
        for start, end in zip(starts, ends, strict=True)
    ]


def candidate_frames(
    segment: Segment, config: VideoConfig, decoder: Literal["decord", "av"] = "decord"
) -> Iterator[dict[str, Any]]:
    """Yield a `candidates` row for the best frame of each shot that starts in `segment`, in order of time.

    Raises RuntimeError where the file stops being readable; the rows yielded before stay good. Decord reads ahead in a
    thread of its own, so how much of a damaged file it gives before the error is chance; PyAV, slower, gives all that
    comes before, each time.
    """
    cv2.setNumThreads(1)
    frames = {"decord": _decode, "av": _decode_in_order}[decoder](segment, config)
    for shot in _shots(frames, config, until=segment.end):
        if shot.start >= segment.start:
            yield _row(segment, shot, config)


@dataclass
class _Frame:
    index: int
    timestamp: float  # s
    image: np.ndarray  # H,W,3 uint8 RGB
    sharpness: float
    luma: float  # 0..1
    pattern: np.ndarray  # 16x16 luma, mean 0 and length 1: what stays the same in a fade


@dataclass
class _Shot:
    start: float  # s
    end: float  # s, its last frame's
    best: _Frame


_Decoded = tuple[int, float, float, np.ndarray]  # index, timestamp s, average fps, RGB frame


def _decode(segment: Segment, config: VideoConfig) -> Iterator[_Decoded]:
    """Yield the frames from the segment's overlap to the bound of its last shot."""
    import decord

    times, first, last = _bounds(segment, config)
    reader = decord.VideoReader(segment.uri, num_threads=config.decode_threads)
    if len(reader) != len(times):
        raise RuntimeError(f"the decoder counts {len(reader)} frames, the container {len(times)}. {_REMUX}")
    height, width = reader[first].shape[:2]
    step = max(1, min(16, int(64e6 / (height * width * 3))))  # at most 64 MB of raw frames at once
    for low in range(first, last, step):
        indices = range(low, min(low + step, last))
        for index, image in zip(indices, reader.get_batch(list(indices)).asnumpy(), strict=True):
            yield index, float(times[index] - times[0]), reader.get_avg_fps(), image


def _decode_in_order(segment: Segment, config: VideoConfig) -> Iterator[_Decoded]:
    """Yield what `_decode` does, one frame after the other, up to the very frame that can't be read."""
    import av
    from av.error import FFmpegError

    times, first, last = _bounds(segment, config)
    index = first - 1
    with av.open(segment.uri) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = config.decode_threads
        fps = float(stream.average_rate or 0)
        container.seek(round(times[first] / stream.time_base), stream=stream)
        try:
            for frame in container.decode(stream):
                if frame.time is None:
                    raise RuntimeError(f"a frame has no time stamp. {_REMUX}")
                index = int(np.abs(times - frame.time).argmin())
                if index >= last:
                    return
                if index >= first:
                    image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    yield index, float(times[index] - times[0]), fps, np.ascontiguousarray(image)
        except FFmpegError as error:
            raise RuntimeError(error.strerror) from error
    if index < last - 1:
        raise RuntimeError(f"the decoder ended at frame {index + 1} of {len(times)}. {_REMUX}")


def _bounds(segment: Segment, config: VideoConfig) -> tuple[np.ndarray, int, int]:
    """Return the stream's time stamps (s) of the film's frames, and the range of them that decides the segment."""
    import av

    with av.open(segment.uri) as container:
        times = np.asarray(_packets(container)[0])
    if np.any(np.diff(times) <= 0):
        raise RuntimeError(f"the stream's time stamps do not increase. {_REMUX}")
    since = times - times[0]
    first = int(np.searchsorted(since, segment.start - config.overlap_seconds)) if segment.start > 0 else 0
    return times, first, int(np.searchsorted(since, segment.end + config.max_shot_seconds))


def _shots(frames: Iterator[_Decoded], config: VideoConfig, *, until: float = math.inf) -> Iterator[_Shot]:
    """Yield the shots that start before `until` (s) with their best frame.

    In memory are that frame and the few that the detector looks back on.
    """
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector: AdaptiveDetector | None = None
    recent: deque[_Frame] = deque()
    cuts: set[int] = set()
    shot: _Shot | None = None
    before: _Frame | None = None

    def is_cut(frame: _Frame) -> bool:
        if frame.index not in cuts or before is None:
            return False
        return float((frame.pattern * before.pattern).sum()) < config.same_picture

    def closed(frame: _Frame | None) -> Iterator[_Shot]:
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
            shot = _Shot(start=frame.timestamp, end=frame.timestamp, best=frame)
        elif frame.timestamp - shot.start <= config.max_shot_seconds:
            shot.end = frame.timestamp
            if frame.sharpness > shot.best.sharpness:
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
        small = quality.reduced(image)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        bgr = cv2.cvtColor(cv2.resize(small, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
        cuts.update(cut.frame_num for cut in detector.process_frame(FrameTimecode(index, fps), bgr))
        recent.append(
            _Frame(index, timestamp, image, quality.sharpness(grey), float(grey.mean()) / 255, quality.pattern(grey))
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


def _row(segment: Segment, shot: _Shot, config: VideoConfig) -> dict[str, Any]:
    frame = shot.best
    jpeg = encode_jpeg(frame.image, config.jpeg_quality)
    return {
        "frame_id": frame_id(segment.source_id, frame.timestamp),
        "source_id": segment.source_id,
        "segment_id": segment.segment_id,
        "frame_index": frame.index,
        "timestamp": frame.timestamp,
        "shot": frame_id(segment.source_id, shot.start),
        "shot_start": shot.start,
        "shot_end": shot.end,
        "width": frame.image.shape[1],
        "height": frame.image.shape[0],
        "image": jpeg,
        "image_sha256": hashlib.sha256(jpeg).hexdigest(),
        **quality.scores(frame.image),
    }


def encode_jpeg(image: np.ndarray, quality_level: int) -> bytes:
    """Return the RGB uint8 image H,W,3 as a JPEG with 4:4:4 chroma."""
    flags = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality_level,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise RuntimeError(f"a frame of {image.shape[1]}x{image.shape[0]} could not be encoded as JPEG")
    return data.tobytes()


def decode_image(data: bytes) -> np.ndarray:
    """Return an encoded picture as RGB uint8 H,W,3. Raises ValueError when it is none."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("the bytes are no picture that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
