"""Sources: what files, folders and globs name, each one's identity and container facts, and its segments."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

from factory.files import sha256_file
from factory.video import REMUX, Segment, VideoConfig

# Columns of a `sources` row that describe what is in the file.
FACTS = ("container", "codec", "width", "height", "fps", "start_time", "duration", "segment_starts", "status")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")


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
            raise ValueError(f"the decoder misplaces frames of MPEG-TS. {REMUX}")
        stream = container.streams.video[0]
        times, keys = time_stamps(container)
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


def time_stamps(container: Any) -> tuple[list[float], list[float]]:
    """Return the time stamps (s) of all frames and of the key frames of the first video stream, in order of showing."""
    stream = container.streams.video[0]
    found = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    if any(pts is None for pts, _ in found):
        raise ValueError(f"the stream has frames without time stamp. {REMUX}")
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
