"""Verify: every file of a dataset against the digest taken when it was written, every picture against its row.

Lance keeps no checksums: a flipped byte reads as another value, and where the newest manifest is gone the version
before it is served. So manifests are compared before Lance opens them, then the data files that the newest and the
tagged versions refer to (digests.py), then the pictures of the newest version: whole files could have mixed them up.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import lance

from factory import schema
from factory.committer import check_keys
from factory.digests import Digests
from factory.files import sha256_file
from factory.stage import Progress
from factory.store import DamagedData, Store

HASHES = {"image": "image_sha256", "sketch": "sketch_sha256"}  # picture columns, and the columns of their sha256
_KEYS_SAID = 5


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was written."""

    table: str
    file: str  # its path in the table's folder; empty where the table as a whole is meant
    problem: str
    keys: tuple[str, ...] = ()  # of the rows that it concerns

    def __str__(self) -> str:
        rows = ", ".join(self.keys[:_KEYS_SAID]) + (", ..." if len(self.keys) > _KEYS_SAID else "")
        where = f"{self.table} {self.file}".rstrip()
        return f"{where}: {self.problem}" + (f" ({len(self.keys)} rows: {rows})" if rows else "")


@dataclass(kw_only=True)
class Report:
    """What was read, and what of it is damaged."""

    files: int = 0
    bytes: int = 0
    pictures: int = 0
    # Versions without a digest: a process was killed right after their commit. The next command that writes takes it.
    unrecorded: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"damaged: {damage}" for damage in self.damaged]
        lines += [f"not recorded: the manifest of {version}" for version in self.unrecorded]
        count = f"{self.files} files, {self.bytes / 1e6:.1f} MB, {self.pictures} pictures"
        return "\n".join([*lines, f"read: {count}; {len(self.damaged) or 'nothing'} damaged"])


def verify(store: Store) -> Report:
    """Read all that the newest and the tagged versions of the tables refer to, on all cores, in bounded memory.

    Needs no lock: what is read is never changed in place. NothingThere where there is no table at all.
    """
    if not any(os.path.exists(store.uri(name)) for name in schema.TABLES):
        store.table("samples")  # says what to do
    report = Report()
    for name in schema.TABLES:
        before = len(report.damaged)
        versions = _whole_versions(store, name, report)
        paths = {path: None for table in versions for fragment in table.get_fragments() for path in _files(fragment)}
        unreadable = _check_files(store.digests(name), name, list(paths), report)
        for table in versions[-1:]:
            fragments = [f for f in table.get_fragments() if unreadable.isdisjoint(_files(f))]
            _check_pictures(table, name, fragments, report)
            if len(report.damaged) == before:
                try:
                    check_keys(store, name)
                except DamagedData as error:
                    report.damaged.append(Damage(table=name, file="", problem=str(error)))
    return report


def _files(fragment: lance.LanceFragment) -> list[str]:
    """Return the paths in the table's folder of a fragment's data files, and of its list of removed rows."""
    removed = fragment.deletion_file()
    return [f"data/{part.path}" for part in fragment.metadata.files] + ([removed] if removed else [])


def _whole_versions(store: Store, name: str, report: Report) -> list[lance.LanceDataset]:
    """Return the tagged versions and the newest one, last, whose manifests are as they were written."""
    digests, uri = store.digests(name), store.uri(name)
    newest = digests.newest_version()  # first: beside a writer, a version may come in between
    there = digests.versions()
    if newest > max(there, default=0):
        problem = (
            "the newest manifest is gone: what it published is no longer seen. Restore it, or build again and compact"
        )
        lost = digests.manifest(newest).name
        report.damaged.append(Damage(table=name, file=f"_versions/{lost}", problem=problem))
    elif not there:
        report.damaged.append(Damage(table=name, file="", problem="the table is gone"))
    good = [version for version in there if _is_whole(digests, name, version, report)]
    if good[-1:] != there[-1:] or not there:
        return []  # Lance opens the newest manifest before any other
    tagged = {facts["version"]: tag for tag, facts in lance.dataset(uri).tags.list().items()}
    for version in sorted(tagged.keys() - set(there)):
        problem = f"version {version}, tagged {tagged[version]}, is gone"
        report.damaged.append(Damage(table=name, file=f"_versions/{digests.manifest(version).name}", problem=problem))
    wanted = sorted((tagged.keys() & set(good)) - {there[-1]})
    missing = [version for version in (*wanted, there[-1]) if digests.read_version(version) is None]
    report.unrecorded += [f"{name}, version {version}" for version in missing]
    return [*(lance.dataset(uri, version=version) for version in wanted), store.table(name)]


def _is_whole(digests: Digests, name: str, version: int, report: Report) -> bool:
    """Return whether a version's manifest is as it was written, or has no digest."""
    file, expected = digests.manifest(version), digests.read_version(version)
    report.files += 1
    report.bytes += file.stat().st_size
    if expected in (None, sha256_file(file)):
        return True
    problem = "does not match its sha256: this version was not read further"
    report.damaged.append(Damage(table=name, file=f"_versions/{file.name}", problem=problem))
    return False


def _check_files(digests: Digests, name: str, paths: list[str], report: Report) -> set[str]:
    """Compare the files at `paths`, and the pictures beside them; return those that Lance should not read."""
    unreadable = set()
    if not paths:
        return unreadable
    progress = Progress("verify", f"files of {name}", len(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: _check_file(digests, name, path), paths)
        for path, (damaged, files, size) in zip(paths, results, strict=True):
            report.files += files
            report.bytes += size
            report.damaged += damaged
            if any(damage.file == path for damage in damaged):
                unreadable.add(path)
            progress.step()
    return unreadable


def _check_file(digests: Digests, name: str, path: str) -> tuple[list[Damage], int, int]:
    """Return what is damaged of a file and the pictures beside it, how many files were read, and their bytes."""
    record = digests.read(Path(path).stem)
    if record is None:
        return [Damage(table=name, file=path, problem="has no readable digest")], 0, 0
    damaged, size = [], 0
    for file, expected in record["files"].items():
        there = digests.folder / file
        problem = ""
        if not there.is_file():
            problem = "is gone"
        else:
            size += there.stat().st_size
            if sha256_file(there) != expected:
                problem = "does not match its sha256"
        if problem:
            damaged.append(Damage(table=name, file=file, problem=problem, keys=tuple(record["keys"])))
    return damaged, len(record["files"]), size


def _check_pictures(table: lance.LanceDataset, name: str, fragments: list[lance.LanceFragment], report: Report) -> None:
    """Compare the pictures in `fragments` with the sha256 in their rows."""
    jobs = [(fragment, column) for fragment in fragments for column in HASHES if column in schema.BLOBS[name]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, column), (wrong, count) in zip(
            jobs, pool.map(lambda job: _wrong_pictures(table, name, *job), jobs), strict=True
        ):
            report.pictures += count
            if wrong:
                problem = f"{column} does not match the sha256 in its row"
                report.damaged.append(Damage(table=name, file="", problem=problem, keys=tuple(wrong)))


def _wrong_pictures(
    table: lance.LanceDataset, name: str, fragment: lance.LanceFragment, column: str
) -> tuple[list[str], int]:
    """Return the keys of the rows of a fragment whose picture is not what they say, and how many were read."""
    key, hashes = schema.KEYS[name], HASHES[column]
    scan = table.scanner(columns=[key, hashes], fragments=[fragment], with_row_address=True)
    rows = [row for row in scan.to_table().to_pylist() if row[hashes] is not None]
    return [row[key] for row in rows if _sha256(table, column, row["_rowaddr"]) != row[hashes]], len(rows)


def _sha256(table: lance.LanceDataset, column: str, address: int) -> str | None:
    """Return the sha256 of a picture, or None where it cannot be read."""
    try:
        ((_, picture),) = table.read_blobs(column, addresses=[address])
    except (OSError, ValueError):  # its file is gone or cut short, and named already
        return None
    return None if picture is None else hashlib.sha256(picture).hexdigest()
