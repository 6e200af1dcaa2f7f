"""Files put in place whole: written aside, flushed, renamed; folders sealed by SHA256SUMS."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

SUMS = "SHA256SUMS"


class DamagedFolder(ValueError):
    """A sealed folder whose files do not match its SHA256SUMS."""


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a power cut."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _put_in_place(aside, path):
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_halves(folder: str | Path) -> None:
    """Remove what a killed `write_atomic` left in `folder`."""
    for aside in Path(folder).glob(".*.tmp"):
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a path aside to write to; on success the file is flushed and replaces `path` by rename."""
    path = Path(path)
    aside = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp.{path.name}")
    with _put_in_place(aside, path):
        yield aside


@contextlib.contextmanager
def _put_in_place(aside: Path, path: Path) -> Iterator[None]:
    """Flush the file `aside` that the block writes, and rename it to `path`; where the block fails, remove it."""
    make_folder(path.parent)
    try:
        yield
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder aside to fill; on success it is sealed with SHA256SUMS and replaces `path` by rename."""
    path = Path(path)
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        yield aside
        seal(aside)
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool) -> Iterator[None]:
    """Hold `folder`/.lock, made if need be, while the block runs; BlockingIOError when another process has it and
    `wait` is false."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def make_folder(folder: str | Path) -> None:
    """Make a folder and those above it that are not there, so that they are there after a power cut too."""
    folder = Path(folder)
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def sync(files: Iterable[Path], top: Path) -> None:
    """Flush `files`, then the folders that they lie in up to `top`, to the disk: a power cut takes none of them."""
    folders: dict[Path, None] = {}
    for file in files:
        _sync(file)
        folders.update(dict.fromkeys(folder for folder in file.parents if folder.is_relative_to(top)))
    for folder in folders:
        _sync(folder)


def seal(folder: str | Path) -> None:
    """Write `folder`/SHA256SUMS over every file below it, in the format of `sha256sum`."""
    folder = Path(folder)
    files = _files(folder)
    sync(files, top=folder)
    write_atomic(folder / SUMS, "".join(f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def check_sealed(folder: str | Path, *, exact: bool = False) -> None:
    """Raise DamagedFolder unless `folder` has a SHA256SUMS and every file named there matches it.

    With `exact` no other file may be there, such as one whose line in a damaged SHA256SUMS is lost.
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        raise DamagedFolder(f"{folder} has no {SUMS}: it was not written to its end. Use another checkpoint.")
    text = (folder / SUMS).read_bytes().decode(errors="replace")
    names = set()
    for line in text.removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if not name or not (folder / name).is_file():
            raise DamagedFolder(f"{folder / name} is missing, but {SUMS} lists it.")
        if sha256_file(folder / name) != digest:
            raise DamagedFolder(
                f"{folder / name} does not match its sha256 in {SUMS}: the file was changed or damaged."
            )
        names.add(name)
    for path in _files(folder) if exact else ():
        if path.relative_to(folder).as_posix() not in names:
            raise DamagedFolder(f"{path} is not listed in {SUMS}: remove it, or {SUMS} is cut short.")
    if not text.endswith("\n"):
        raise DamagedFolder(f"{folder / SUMS} is cut short. Use another checkpoint.")


def _files(folder: Path) -> list[Path]:
    """Return the files below `folder`, sorted, all but its own SHA256SUMS."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
