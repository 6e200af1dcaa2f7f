"""Films on a node's own disk: a local one where it is, an object fetched into a cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from factory import worker
from factory.files import locked, new_file
from factory.locations import SourceGone, copy_stream, is_remote, open_binary, stamp
from factory.video import Segment, VideoConfig

_POLL_SECONDS = 0.5
_NAME = re.compile("[0-9a-f]{64}")  # of a cached film: its source_id
T = TypeVar("T")


class SourceChanged(SourceGone):
    """A file or object is not what it was when it was hashed."""


def unread(segment: Segment, error: Exception) -> dict[str, Any]:
    """Return the answer that stands for a segment which is not done: its source, why, and what that makes the source.

    Failed where the source is gone, closed to us or changed (SourceGone); pending, to be tried again, for any other
    error, of the cache or the dataset's own files too: the machine is at fault.
    """
    gone = isinstance(error, SourceGone)
    reason = getattr(error, "strerror", None) or error
    return {
        "source_id": segment.source_id,
        "status": "failed" if gone else "pending",
        "error": f"decode: {reason}",
    }


def retried(read: Callable[[], T]) -> T:
    """Return what `read` returns, called again after an OSError that the machine may be at fault for.

    Raises SourceGone at once, another OSError when it has come as often as work is tried.
    """
    for _ in range(worker.ATTEMPTS - 1):
        try:
            return read()
        except SourceGone:
            raise
        except OSError:
            continue
    return read()


@contextlib.contextmanager
def on_disk(segment: Segment, config: VideoConfig) -> Iterator[Segment]:
    """Yield the segment of a film as this node's disk has it: the film itself, or the copy of an object.

    SourceGone when it can't be opened, SourceChanged when it is not what was hashed. What changes within the block is
    seen by those who ask `check_unchanged` of what was yielded; a copy that changed is removed, to be fetched again.
    """
    if not is_remote(segment.uri):
        check_unchanged(segment)
        open_binary(segment.uri).close()  # a decoder does not tell a film that is closed to us from other errors
        yield segment
        return
    with _cached(segment, config) as path:
        try:
            yield replace(segment, uri=str(path), modified_ns=stamp(str(path))[1])
        except SourceGone as error:
            path.unlink(missing_ok=True)
            raise OSError(f"{path}, the copy of {segment.uri}, was changed or removed while it was read") from error


def check_unchanged(segment: Segment) -> None:
    """Raise SourceChanged unless the segment's file was last changed when it was hashed, SourceGone without one."""
    if stamp(segment.uri)[1] != segment.modified_ns:
        raise SourceChanged(f"{segment.uri} changed after it was hashed. Build again.")


def cache_folder(config: VideoConfig) -> Path:
    """Return the folder, ours alone, in which this node keeps what it fetched and what it found out about films."""
    return Path(config.cache_folder or tempfile.gettempdir(), f"animesketch-cache-{os.getuid()}")


@contextlib.contextmanager
def _cached(segment: Segment, config: VideoConfig) -> Iterator[Path]:
    """Yield the cached copy of an object, kept from eviction by a shared lock on it; fetch it where there is none."""
    folder = cache_folder(config)
    path = folder / segment.source_id
    with contextlib.ExitStack() as held:
        if not _hold(path, held):
            with locked(folder, wait=True):  # one fetch at a time on a node
                if not _hold(path, held):
                    _fetch(segment, path, round(config.cache_gigabytes * 1e9))
                    _hold(path, held)
        yield path


def _hold(path: Path, held: contextlib.ExitStack) -> bool:
    """Lock the file at `path` against eviction until `held` closes, and mark it as used; return whether it is there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    held.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink == 0:  # it was evicted while this waited
        return False
    os.utime(path, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
    return True


def _fetch(segment: Segment, path: Path, limit: int) -> None:
    """Put the object in place at `path`, whole and checked against its sha256."""
    os.chmod(path.parent, 0o700)
    for half in path.parent.glob(".*.tmp.*"):  # of a fetch that was killed: nobody else writes, by the lock
        half.unlink()
    size = stamp(segment.uri)[0]
    if size > limit:
        raise OSError(
            f"{segment.uri} has {size / 1e9:.1f} GB, the cache at most {limit / 1e9:g}: raise video.cache_gigabytes"
        )
    while _evict(path.parent, limit - size):
        time.sleep(_POLL_SECONDS)
    with new_file(path) as aside:
        with open(aside, "wb") as target:
            digest = copy_stream(segment.uri, target)
        if digest != segment.source_id:
            raise SourceChanged(f"{segment.uri} changed after it was hashed. Build again.")


def _evict(folder: Path, limit: int) -> bool:
    """Remove cached films, the longest unused first, until they take `limit` bytes; return whether they take more, all
    being in use."""
    films = sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: p.stat().st_atime_ns)
    left = sum(p.stat().st_size for p in films)
    for film in films:
        if left <= limit:
            break
        with open(film, "rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left -= film.stat().st_size
            film.unlink()
    return left > limit
