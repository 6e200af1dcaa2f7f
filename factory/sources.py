"""Sources: what files, folders and globs name, each one's identity and facts, and its segments."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from factory import still
from factory.locations import copy_stream, find_files, normal, open_binary, path_of, stamp
from factory.video import REMUX, Segment, VideoConfig

# Columns of a `sources` row that describe what is in the file.
FACTS = ("container", "codec", "width", "height", "fps", "start_time", "duration", "segment_starts", "status")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
# Demuxers of FFmpeg's that films may need; those of playlists, which open other files and addresses, are left out.
FORMATS = ("mov", "matroska", "avi", "flv", "gif", "asf", "ogg", "ivf", "nut", "mxf", "rm", "mpegts", "mpeg")
_BUFFER = 4 << 20  # bytes read at once: few requests where the film is in an object store


def find_sources(patterns: list[str]) -> list[str]:
    """Return the locations of the films and still pictures that files, folders and globs name, sorted, each once.

    Raises FileNotFoundError for a pattern that names nothing, ValueError for one that is no path and no URI of a known
    object store.
    """
    suffixes = (*SUFFIXES, *still.SUFFIXES)
    found: set[str] = set()
    for pattern in patterns:
        here = find_files(normal(pattern), suffixes)
        if not here:
            raise FileNotFoundError(
                f"No video at {pattern!r}, nor a picture. Give files, folders or globs; in folders these count: "
                f"{', '.join(suffixes)}."
            )
        found |= here
    return sorted(found)


def is_picture(uri: str) -> bool:
    """Return whether the source at `uri` is a still picture, by the end of its name."""
    return path_of(uri).suffix.lower() in still.SUFFIXES


def describe_source(uri: str, config: VideoConfig) -> dict[str, Any]:
    """Return the `sources` row of the file `uri`: identity, facts, segment starts; bad input is a row too."""
    row: dict[str, Any] = {"uri": uri, "collection": path_of(uri).parent.name, "licence": "unknown"}
    try:
        row["size_bytes"], row["modified_ns"] = before = stamp(uri)
        row["source_id"] = copy_stream(uri)
        if stamp(uri) != before:
            raise OSError("it changed while it was read. Build again when it is complete")
    except OSError as error:
        row["source_id"] = unread_id(uri)
        return row | {"status": "failed", "error": f"cannot be read: {error.strerror or error}"}
    noun, probe = ("picture", _probe_picture) if is_picture(uri) else ("video", _probe)
    if not row["size_bytes"]:
        return row | {"status": "failed", "error": f"not a {noun}: the file is empty"}
    try:
        return row | probe(uri, config) | {"status": "pending"}
    except Exception as error:  # any file may be here: the libraries' own errors are many
        reason = getattr(error, "strerror", None) or error
        return row | {"status": "failed", "error": f"not a {noun} that can be opened: {reason}"}


def unread_id(uri: str) -> str:
    """Return the source_id of what can't be read at `uri`."""
    return hashlib.sha256(f"uri:{uri}".encode()).hexdigest()


def _probe_picture(uri: str, config: VideoConfig) -> dict[str, Any]:
    size = stamp(uri)[0]
    if size > still.MAX_BYTES:
        raise ValueError(f"the file has {size / 1e9:.1f} GB; pictures of up to {still.MAX_BYTES / 1e9:.1f} are read")
    with open_binary(uri) as file:
        return still.facts(file)


@contextlib.contextmanager
def open_film(uri: str) -> Iterator[Any]:
    """Yield the PyAV container of the film at `uri`. It reads that file and no other, whatever the file says."""
    import av

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with open_binary(uri) as file, av.open(file, options=options, buffer_size=_BUFFER) as container:
        yield container


def _probe(uri: str, config: VideoConfig) -> dict[str, Any]:
    with open_film(uri) as container:
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
        Segment(
            source_id=source["source_id"], uri=source["uri"], start=start, end=end, modified_ns=source["modified_ns"]
        )
        for start, end in zip(starts, ends, strict=True)
    ]
