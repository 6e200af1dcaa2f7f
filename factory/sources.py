"""Sources: what files, folders and globs name, each one's identity and facts, and its segments."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from factory import still
from factory.fetch import SourceChanged, retried
from factory.locations import SourceGone, copy_stream, find_files, is_remote, normal, open_binary, path_of, stamp
from factory.settings import NothingThere
from factory.video import REMUX, Segment, VideoConfig
from factory.worker import is_of_machine

# Columns of a `sources` row that describe what is in the file.
FACTS = ("container", "codec", "width", "height", "fps", "start_time", "duration", "segment_starts", "status")
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".gif")
# Demuxers of FFmpeg's that films may need; those of playlists, which open other files and addresses, are left out.
FORMATS = ("mov", "matroska", "avi", "flv", "gif", "asf", "ogg", "ivf", "nut", "mxf", "rm", "mpegts", "mpeg")
READ_BYTES_PER_SECOND = 2e6  # at least: all of a film's packets are read, from an object store too
_BUFFER = 4 << 20  # bytes read at once: few requests where the film is in an object store
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
TO_SDR = (
    "Tone-map it: ffmpeg -i IN -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p -crf 12 OUT.mkv"
)
SQUARE_PIXELS = "If that is wrong, correct it: ffmpeg -i IN -c copy -aspect 16:9 OUT.mkv"


class Refused(ValueError):
    """The file is a film that would give wrong frames; the words say what to do with it."""


def find_sources(patterns: list[str]) -> list[str]:
    """Return the locations of the films and still pictures that files, folders and globs name, sorted, each once.

    Raises NothingThere for a pattern that names nothing, UsageError for one that is no path and no URI of a known
    object store.
    """
    suffixes = (*SUFFIXES, *still.SUFFIXES)
    found: set[str] = set()
    for pattern in patterns:
        location = normal(pattern)
        here = find_files(location, suffixes)
        if not here:
            if not is_remote(location) and not re.search(r"[*?[]", location):
                try:
                    os.stat(location)
                except OSError as error:
                    raise NothingThere(f"{pattern!r} cannot be looked at: {error.strerror}.") from None
            raise NothingThere(
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
    row = identify(uri)
    return row if "error" in row else row | _facts(uri, config)


def identify(uri: str) -> dict[str, Any]:
    """Return what of a `sources` row needs no look into the file `uri`.

    Failed where the file is gone, closed to us, empty or being written; pending where the machine can't read it.
    """
    row: dict[str, Any] = {"uri": uri, "collection": path_of(uri).parent.name, "licence": "unknown"}
    try:
        row |= retried(lambda: _hashed(uri))
    except OSError as error:
        status = "failed" if isinstance(error, SourceGone) else "pending"
        reason = f"cannot be read: {error.strerror or error}"
        return row | {"source_id": unread_id(uri), "status": status, "error": reason}
    if not row["size_bytes"]:
        error = f"not a {_noun(uri)}: the file is empty"
        return row | {"source_id": unread_id(uri), "status": "failed", "error": error}  # not one source with all others
    return row


def _hashed(uri: str) -> dict[str, Any]:
    size, modified_ns = stamp(uri)
    source_id = copy_stream(uri)
    if stamp(uri) != (size, modified_ns):
        raise SourceChanged("it changed while it was read. Build again when it is complete")
    return {"size_bytes": size, "modified_ns": modified_ns, "source_id": source_id}


def probe_sources(uris: list[str], config: VideoConfig) -> Iterator[dict[str, Any]]:
    """Yield the FACTS of each file: what is in it, and its status; failed with the error for what can't be opened.

    Run in a killable process: a library may spin over a damaged header. Raises OSError, ImportError or MemoryError
    where the machine is at fault.
    """
    for uri in uris:
        yield _facts(uri, config)


def unopened(uri: str, reason: object) -> dict[str, Any]:
    """Return the columns of a `sources` row that say why the file can't be opened."""
    return {"status": "failed", "error": f"not a {_noun(uri)} that can be opened: {reason}"}


def _facts(uri: str, config: VideoConfig) -> dict[str, Any]:
    try:
        return (_probe_picture if is_picture(uri) else _probe)(uri, config) | {"status": "pending"}
    except Refused as error:
        return {"status": "failed", "error": f"refused: {error}"}
    except Exception as error:  # any file may be here: the libraries' own errors are many
        if is_of_machine(error) and not isinstance(error, SourceGone):
            raise
        return unopened(uri, getattr(error, "strerror", None) or error)


def _noun(uri: str) -> str:
    return "picture" if is_picture(uri) else "video"


def unread_id(uri: str) -> str:
    """Return the source_id of what can't be read at `uri`."""
    return hashlib.sha256(f"uri:{uri}".encode()).hexdigest()


def _probe_picture(uri: str, config: VideoConfig) -> dict[str, Any]:
    size = stamp(uri)[0]
    if size > still.MAX_BYTES:
        raise ValueError(f"the file has {size / 1e9:.1f} GB; pictures of up to {still.MAX_BYTES / 1e9:.1f} are read")
    data = io.BytesIO()
    copy_stream(uri, data)
    data.seek(0)
    try:
        return still.facts(data)
    except OSError as error:  # Pillow's: what can't be read is in memory
        raise ValueError(str(error)) from error


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


@contextlib.contextmanager
def open_film(uri: str) -> Iterator[Any]:
    """Yield the PyAV container of the film at `uri`. It reads that file and no other, whatever a playlist in it names.

    Raises Refused when its format is none of FORMATS, PyAV's errors when it is damaged.
    """
    import av
    from av.error import ArgumentError

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_binary(uri))
        try:
            container = opened.enter_context(av.open(file, options=options, buffer_size=_BUFFER))
        except ArgumentError:
            raise Refused(
                f"its format is none of {', '.join(FORMATS)}. Give the films that a playlist names, and rewrite "
                "others: ffmpeg -i IN -c copy OUT.mkv"
            ) from None
        yield container


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
        Segment(
            source_id=source["source_id"], uri=source["uri"], start=start, end=end, modified_ns=source["modified_ns"]
        )
        for start, end in zip(starts, ends, strict=True)
    ]
