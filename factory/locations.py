"""Locations: local paths and object-store URIs, found and read in one way."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import PurePath
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from factory.settings import UsageError

# What is asked of each store: where its network is lost, pyarrow gives up on S3 within seconds, on Google's within 15
# minutes unless told otherwise.
_OPTIONS = {"s3": "", "gs": "?retry_limit_seconds=30"}
_PIECE = 8 << 20  # bytes
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
_FORBIDDEN = ("AWS Error ACCESS_DENIED", "google::cloud::Status(PERMISSION_DENIED")  # pyarrow gives no errno with them


class SourceGone(OSError):
    """The source's fault, not the machine's: there is no file at its location, or none that we may read."""


def normal(location: str) -> str:
    """Return `location` as it is recorded: an absolute path, or an object-store URI with its path percent-encoded.

    A file:// URI becomes a path. UsageError for any other scheme, and for credentials or options in a URI, which would
    be recorded with it; its words don't repeat them.
    """
    scheme, sign, rest = location.partition("://")
    if not sign or "/" in scheme:
        return os.path.abspath(location)
    if scheme == "file" and rest.startswith("/"):
        return os.path.abspath(unquote(rest))
    if scheme not in _OPTIONS:
        raise UsageError(
            f"A {scheme}:// address cannot be a source. Give local paths, or file:///, s3:// or gs:// URIs; download "
            "anything else first."
        )
    parts = urlsplit(location.replace("#", "%23"))
    if parts.query or not re.fullmatch(r"[\w.-]+", parts.netloc):
        raise UsageError(
            f"This {scheme}:// URI cannot be a source. Give bucket and path alone: {scheme}://bucket/folder/film.mkv. "
            "Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...); "
            "write a ? in a name as %3F."
        )
    return f"{scheme}://{parts.netloc}{quote(parts.path.rstrip('/'), safe='/%*[]!')}"


def is_remote(location: str) -> bool:
    """Return whether a location, as `normal` gives it, lies in an object store."""
    return not location.startswith("/")


def path_of(location: str) -> PurePath:
    """Return the path of a file, or bucket and key of an object, in plain characters."""
    return PurePath(unquote(location.partition("://")[2]) if is_remote(location) else location)


def find_files(location: str, suffixes: Collection[str]) -> set[str]:
    """Return the locations that a file, a folder or a glob names; none is an empty set.

    In folders, at any depth, files with one of `suffixes` count, and names that begin with a dot don't. A glob names
    the files and folders that it matches; of the files those with one of `suffixes` count, or any where the glob itself
    ends in a suffix. What can't be read, a folder too, is among them: whoever reads it says why.
    """
    return _objects(location, suffixes) if is_remote(location) else _local_files(location, suffixes)


def _local_files(location: str, suffixes: Collection[str]) -> set[str]:
    if os.path.isdir(location):
        return _in_folder(location, suffixes)
    if os.path.lexists(location):
        return {_utf8(location)}
    found = [path.rstrip("/") for path in glob.glob(location, recursive=True)]
    files = {_utf8(path) for path in found if not os.path.isdir(path) and _counts(path, suffixes, location)}
    return files.union(*(_in_folder(path, suffixes) for path in found if os.path.isdir(path)))


def _in_folder(location: str, suffixes: Collection[str]) -> set[str]:
    files: set[str] = set()
    unreadable: list[str] = []
    for folder, folders, names in os.walk(location, onerror=lambda error: unreadable.append(error.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        counted = [name for name in names if not name.startswith(".") and _counts(name, suffixes)]
        files.update(os.path.join(folder, name) for name in counted)
    return {_utf8(path) for path in (*files, *unreadable)}


def _objects(location: str, suffixes: Collection[str]) -> set[str]:
    from fsspec.utils import glob_translate

    store, path = _store(location), str(path_of(location))
    info = store.get_file_info(path)
    if info.type == fs.FileType.File:
        return {f"{urlsplit(location).scheme}://{quote(path)}"}
    is_folder = info.type == fs.FileType.Directory
    # of a glob: what matches below the last folder without * ? [
    folder = path if is_folder else re.split(r"[*?[]", path)[0].rpartition("/")[0]
    matches = re.compile(glob_translate(path)).match

    def is_named(key: str) -> bool:
        if is_folder or any(matches(str(parent)) for parent in PurePath(key).parents):
            return _counts(key, suffixes)
        return bool(matches(key)) and _counts(key, suffixes, path)

    listed = store.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    keys = [i.path for i in listed if i.type == fs.FileType.File and is_named(i.path)]
    return {f"{urlsplit(location).scheme}://{quote(key)}" for key in keys if "/." not in key[len(folder) :]}


def _counts(name: str, suffixes: Collection[str], pattern: str = "") -> bool:
    """Return whether a file in a folder, or one that `pattern` matches, is taken for a source."""
    suffix = os.path.splitext(name)[1]
    return suffix.lower() in suffixes or (suffix != "" and pattern.endswith(suffix))


def _utf8(path: str) -> str:
    """Return `path` with bytes that are no UTF-8 written as \\xNN: tables hold text only."""
    return os.fsencode(path).decode(errors="backslashreplace")


@functools.lru_cache(maxsize=64)
def _bucket(root: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(root)[0]


def _store(location: str) -> fs.FileSystem:
    parts = urlsplit(location)
    return _bucket(f"{parts.scheme}://{parts.netloc}{_OPTIONS[parts.scheme]}")


@contextlib.contextmanager
def _told_by_fault() -> Iterator[None]:
    """Raise SourceGone in place of an OSError in the block which says that the file is gone or closed to us."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE or any(words in str(error) for words in _FORBIDDEN):
            raise SourceGone(error.strerror or str(error)) from error
        raise


@_told_by_fault()
def stamp(location: str) -> tuple[int, int]:
    """Return size (bytes) and time of the last change (ns since 1970) of a file or object.

    SourceGone when there is none, it is closed to us or no regular file; OSError when it can't be reached.
    """
    if is_remote(location):
        info = _store(location).get_file_info(str(path_of(location)))
        if info.type != fs.FileType.File:
            raise SourceGone("there is no such object")
        return info.size, info.mtime_ns
    found = os.stat(location)
    if stat.S_ISDIR(found.st_mode):
        raise SourceGone("it is a folder that may not be listed")
    if not stat.S_ISREG(found.st_mode):
        raise SourceGone("it is no regular file")
    return found.st_size, found.st_mtime_ns


@_told_by_fault()
def open_binary(location: str) -> BinaryIO:
    """Return a file or object opened for reading, which can seek. SourceGone or OSError as `stamp`."""
    if not is_remote(location):
        return open(location, "rb")
    return _store(location).open_input_file(str(path_of(location)))  # type: ignore[return-value]


def copy_stream(location: str, target: BinaryIO | None = None) -> str:
    """Read a file or object from its start to its end, into `target` where given; return the sha256, 64 hex digits."""
    digest = hashlib.sha256()
    with open_binary(location) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if target is not None:
                target.write(piece)
    return digest.hexdigest()
