"""Sources: what files, folders and globs name, each one's identity and container facts, and its segments."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from factory.files import sha256_file
from factory.video import REMUX, Segment, VideoConfig

# Columns of a `sources` row that describe what is in the file.
FACTS = ("container", "codec", "width", "height", "fps", "start_time", "duration", "segment_starts", "status")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")

# Demuxers of FFmpeg's that files may need; those of playlists, which open other files and addresses, are left out.
FORMATS = ("mov", "matroska", "avi", "flv", "gif", "asf", "ogg", "ivf", "nut", "mxf", "rm", "mpegts", "mpeg")
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
TO_SDR = (
    "Tone-map it: ffmpeg -i IN -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p -crf 12 OUT.mkv"
)
SQUARE_PIXELS = "If that is wrong, correct it: ffmpeg -i IN -c copy -aspect 16:9 OUT.mkv"


class Refused(ValueError):
    """The file is a film that would give wrong frames; the words say what to do with it."""


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
    except Refused as error:
        return row | {"status": "failed", "error": f"refused: {error}"}
    except Exception as error:  # any file may be here: the library's own errors are many
        reason = getattr(error, "strerror", None) or error
        return row | {"status": "failed", "error": f"not a video that can be opened: {reason}"}


def _probe(uri: str, config: VideoConfig) -> dict[str, Any]:
    with open_film(uri) as container:
        stream = film_stream(container)
        if stream.codec_context.color_trc in _HDR:
            raise Refused(f"the film is HDR ({_HDR[stream.codec_context.color_trc]}), frames here are SDR. {TO_SDR}")
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / 4 <= aspect <= 4:
            raise Refused(f"the film's pixels are {aspect} times as wide as high. {SQUARE_PIXELS}")
        stamps = time_stamps(container)
        starts = [0.0]
        for key in stamps.keys:
            if key - stamps.times[0] - starts[-1] >= config.segment_seconds:
                starts.append(key - stamps.times[0])
        length = stamps.times[-1] - stamps.times[0]
        return {
            "container": container.format.name,
            "codec": stream.codec_context.name,
            "width": stream.width,
            "height": stream.height,
            "fps": float(stream.average_rate or 0),
            "start_time": stamps.times[0],
            "duration": length + (float(1 / stream.average_rate) if stream.average_rate else 0.0),
            "segment_starts": starts,
        }


def open_film(uri: str) -> Any:
    """Return the file `uri` opened by PyAV: its bytes alone, never what a playlist in it names.

    Raises Refused when its format is none of FORMATS, PyAV's errors when it is damaged.
    """
    import av
    from av.error import ArgumentError

    try:
        return av.open(uri, options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"})
    except ArgumentError:
        raise Refused(
            f"its format is none of {', '.join(FORMATS)}. Give the films that a playlist names, and rewrite others: "
            f"ffmpeg -i IN -c copy OUT.mkv"
        ) from None


def film_stream(container: Any) -> Any:
    """Return the video stream that is the film: by FFmpeg's choice, where a cover or a preview is the last."""
    stream = container.streams.best("video")
    if stream is None:
        raise Refused("the file has no video stream, only " + ", ".join(s.type for s in container.streams))
    return stream


class Stamps(NamedTuple):
    """Time stamps (s) of a film's frames, in order of showing."""

    times: list[float]
    keys: list[float]  # of the key frames, those that are not shown too
    unseen: int  # frames in the file that no player shows: cut off by an edit list, or from before the first key frame


def time_stamps(container: Any) -> Stamps:
    """Return the time stamps of the film in `container`, read from its packets: nothing is decoded.

    Raises Refused when it has frames without time stamp, or no key frame.
    """
    stream = film_stream(container)
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
    if any(pts is None for pts, _, _ in packets):
        raise Refused(f"the stream has frames without time stamp. {REMUX}")
    at = next((i for i, (_, key, _) in enumerate(packets) if key), len(packets))
    readable = sorted(packet for packet in packets[at:] if packet[0] >= packets[at][0])
    shown = [pts for pts, _, discard in readable if not discard]
    if not shown:
        raise Refused("the video stream has no key frame: nothing of it can be decoded")
    tick = stream.time_base
    times, keys = [float(pts * tick) for pts in shown], [float(pts * tick) for pts, key, _ in readable if key]
    return Stamps(times, keys, unseen=len(packets) - len(shown))


def segments_of(source: dict[str, Any]) -> list[Segment]:
    """Return the segments of a `sources` row, from the starts recorded when the source was first seen."""
    starts = source["segment_starts"] or []
    ends = [*starts[1:], source["duration"] + 1.0] if starts else []
    return [
        Segment(source_id=source["source_id"], uri=source["uri"], start=start, end=end)
        for start, end in zip(starts, ends, strict=True)
    ]
