"""Digests: the sha256 of each file of a table, taken when it was written, since Lance keeps no checksum of its own.

`<root>/_digests/<table>/<data file>.json` holds the sha256 of a data file, those of the pictures that lie in a folder
beside it, and the keys of its rows; a file that lists removed rows has one too. It is written before anything refers
to the file: what a table refers to is recorded, whatever was killed. `<version>.json` holds the sha256 of a manifest,
taken right after its commit. What is recorded was flushed to the disk before, with the folders that it lies in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from factory.files import sha256_file, sync, write_atomic


class Digests:
    """The digests of one table, which lies in `folder`; paths in them are relative to it."""

    def __init__(self, root: Path, name: str, folder: Path) -> None:
        self.folder, self._records = folder, root / "_digests" / name

    def record(self, name: str, files: Iterable[Path], keys: list[str], **more: Any) -> None:
        """Flush `files` to the disk, then write the record `name`: their sha256, the keys of their rows, and `more`."""
        files = list(files)
        sync(files, top=self.folder.parent)
        digests = {str(file.relative_to(self.folder)): sha256_file(file) for file in files}
        write_atomic(self._path(name), json.dumps({"files": digests, "keys": keys, **more}))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return {"files": {path: sha256}, "keys": [...]} of the record `name`; None where it is absent or damaged."""
        try:
            record = json.loads(self._path(name).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return record if {"files", "keys"} <= record.keys() else None

    def record_version(self, version: int, units: list[str]) -> None:
        """Write the record of a version's manifest, and of the units that its transaction names."""
        self.record(_version(version), [self.manifest(version)], [], units=units)

    def unrecorded(self) -> list[int]:
        """Return the versions without a record, ascending: a process was killed right after their commit."""
        return [version for version in self.versions() if self.read_version(version) is None]

    def units(self, version: int) -> list[str] | None:
        """Return the units that a version's transaction names, or None without a record of this very manifest.

        Where a manifest was lost, another one may have its number.
        """
        record = self.read(_version(version)) or {}
        if "units" not in record or self.read_version(version) != sha256_file(self.manifest(version)):
            return None
        return record["units"]

    def drop_torn(self) -> None:
        """Remove manifests that a power cut cut short, in a locked root: newer than all records, without their end.

        What they published is in the ledger still, or is done again. Nothing else that is damaged is touched.
        """
        recorded = self.newest_version()
        for version in self.versions():
            if version > recorded and not self.manifest(version).read_bytes().endswith(_END):
                self.manifest(version).unlink()

    def read_version(self, version: int) -> str | None:
        """Return the recorded sha256 of a version's manifest, or None."""
        record = self.read(_version(version))
        return next(iter(record["files"].values())) if record else None

    def newest_version(self) -> int:
        """Return the highest version that has a record, or 0."""
        return max((int(path.stem[1:]) for path in self._records.glob("v*.json")), default=0)

    def versions(self) -> list[int]:
        """Return the versions whose manifests are there, ascending."""
        return sorted(_LAST - int(p.stem) for p in (self.folder / "_versions").glob("[0-9]*.manifest"))

    def manifest(self, version: int) -> Path:
        """Return the path of a version's manifest: Lance counts them downwards, so that the newest is listed first."""
        return self.folder / "_versions" / f"{_LAST - version:020d}.manifest"

    def prune(self) -> None:
        """Remove the records of data files and manifests that are gone: after a clean-up, in a locked root."""
        kept = {_version(version) for version in self.versions()}
        kept |= {path.stem for kind in ("data/*.lance", "_deletions/*") for path in self.folder.glob(kind)}
        for path in self._records.glob("*.json"):
            if path.stem not in kept:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._records / f"{name}.json"


_LAST = 2**64 - 1
_END = b"LANC"  # of each manifest


def _version(version: int) -> str:
    return f"v{version:012d}"
