"""A dataset root: its tables, the fragments that workers write, the durable ledger of them, and the lock.

A unit of work (a segment, a batch of samples) is written by a worker as uncommitted fragments, their digests and one
ledger file. The committer (committer.py) publishes units as Lance transactions whose properties name them. On start,
the transactions already in the table's history are the truth: what they name is done, what only the ledger names is
published, the rest is redone. docs/recovery.md says what follows a kill at each point.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata, write_fragments

from factory import schema
from factory.digests import Digests
from factory.files import make_folder, remove_halves, write_atomic
from factory.settings import NothingThere, UsageError

UNITS = "animesketch.units"  # of a transaction: its units; of a table's configuration: those of pruned history
FRAGMENT_BYTES = 64 * 2**20  # of pictures that a worker holds before it writes them
_SETTINGS = b"animesketch.config"


class StoreError(ValueError):
    """The dataset root cannot be used as it is."""


class UnusableRoot(StoreError, UsageError):
    """The dataset root that was given is none, or of another version."""


class DatasetBusy(StoreError):
    """Another process writes to the dataset root."""


class NotFinished(StoreError):
    """An earlier stage has to end first."""


class DamagedData(StoreError):
    """Stored bytes do not match what was recorded of them."""


class Store:
    """A dataset root on a local disk: its four tables, its ledger and its lock."""

    def __init__(self, root: str) -> None:
        if "://" in root:
            raise UnusableRoot(f"--root {root}: only local folders can be written so far; give a path.")
        self.root = Path(root)

    def uri(self, name: str) -> str:
        """Return the path of table `name`."""
        return str(self.root / f"{name}.lance")

    def has(self, name: str) -> bool:
        """Return whether table `name` is there: of one whose making was killed only a folder is."""
        return any(Path(self.uri(name), "_versions").glob("*.manifest"))

    def create(self) -> None:
        """Make the root and whatever table it lacks. Raises UnusableRoot when a table is of another format."""
        for name, columns in schema.TABLES.items():
            make_folder(self._ledger_file(name, "").parent)
            if not self.has(name):
                lance.write_dataset(
                    columns.empty_table(),
                    self.uri(name),
                    data_storage_version=schema.STORAGE_VERSION,
                    enable_v2_manifest_paths=True,
                )
            self.record_versions(name)

    def digests(self, name: str) -> Digests:
        """Return the digests of table `name`."""
        return Digests(self.root, name, Path(self.uri(name)))

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that the samples table was last written with, from its metadata; None before that."""
        kept = (self.table("samples").schema.metadata or {}).get(_SETTINGS)
        return json.loads(kept) if kept else None

    def keep_settings(self, settings: dict[str, Any]) -> None:
        """Keep `settings` in the metadata of the samples table, where they are other ones: a version of its own."""
        if json.loads(json.dumps(settings)) != self.settings():  # tuples are lists in JSON
            table = self.table("samples")
            table.update_schema_metadata({_SETTINGS.decode(): json.dumps(settings)})
            self.record_versions("samples")

    def table(self, name: str) -> lance.LanceDataset:
        """Return the newest version of table `name`. Raises NothingThere or StoreError, saying what to do."""
        if not os.path.exists(self.uri(name)):
            raise NothingThere(
                f"No table {self.uri(name)}. Make the dataset first: python -m factory build SOURCES "
                f"--root {shlex.quote(str(self.root))}"
            )
        try:
            table = lance.dataset(self.uri(name))
        except (OSError, ValueError) as error:
            raise StoreError(f"Table {self.uri(name)} cannot be opened: {error}") from error
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        for key, value in schema.TABLES[name].metadata.items():
            if found.get(key.decode()) != value.decode():
                raise UnusableRoot(
                    f"Table {self.uri(name)} says {key.decode()} = {found.get(key.decode())}, this version reads "
                    f"{value.decode()}. Use the version that wrote it, or build into a new root."
                )
        return table

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the root as its one writer; the lock dies with its process. Raises DatasetBusy.

        What a power cut left of a commit is removed first: Lance would not open the table.
        """
        try:
            make_folder(self.root)
        except (FileExistsError, NotADirectoryError) as error:
            raise UnusableRoot(f"Dataset root {self.root} is no folder: {error.filename} is a file.") from None
        with open(self.root / ".lock", "a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise DatasetBusy(
                    f"Dataset {self.root} is being written by {holder}. Wait for it, or end it."
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()}")
            handle.flush()
            for name in schema.TABLES:
                self.digests(name).drop_torn()
            yield

    def write_unit(
        self, name: str, unit: str, rows: Iterable[dict[str, Any]], parts: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Write `rows` of table `name` as uncommitted fragments and enter them into the ledger; return the entry.

        Called by workers, any number of times for one unit: of an entry that is there already `rows` are not read. They
        are written as they come, about FRAGMENT_BYTES of pictures at a time; what `rows` raises is raised, and what was
        written of the unit is removed. A unit may be made of `parts`, units themselves, which another unit may hold
        too: of two such units one is committed.
        """
        path = self._ledger_file(name, unit)
        if path.exists() and (there := _read_entry(path)):
            return there
        key = schema.KEYS[name]
        entry: dict[str, Any] = {"unit": unit, "units": [unit, *parts], "keys": [], "fragments": [], "files": {}}
        try:
            for some in _in_parts(name, rows):
                keys = [row[key] for row in some]
                fragments = write_fragments(
                    schema.to_table(name, some),
                    self.uri(name),
                    schema=self.table(name).schema,
                    mode="append",
                    data_storage_version=schema.STORAGE_VERSION,
                )
                del some  # before the next ones are read
                entry["keys"] += keys
                entry["fragments"] += [fragment.to_json() for fragment in fragments]
                entry["files"] |= self.settle(name, fragments, keys)
        except Exception:
            for file in entry["files"]:
                Path(self.uri(name), file).unlink()
            raise
        entry["rows"] = len(entry["keys"])
        write_atomic(path, json.dumps(entry | {"sha256": _seal(entry)}))
        return entry

    def settle(
        self, name: str, fragments: list[FragmentMetadata], keys: list[str], old: Container[str] = ()
    ) -> dict[str, int]:
        """Flush the data files of `fragments`, which hold the rows `keys` in order, to the disk; record their digests.

        Return their sizes in bytes, by the path in the table's folder. Files named in `old` were settled before.
        """
        folder, digests = Path(self.uri(name)), self.digests(name)
        sizes: dict[str, int] = {}
        start = 0
        for fragment in fragments:
            end = start + fragment.physical_rows
            for part in fragment.files:
                if part.path in old:
                    continue
                file = folder / "data" / part.path
                files = [file, *sorted(file.with_suffix("").glob("*"))]  # large pictures lie in a folder beside it
                sizes.update({str(f.relative_to(folder)): f.stat().st_size for f in files})
                digests.record(file.stem, files, keys[start:end])
            start = end
        return sizes

    def write_updates(self, name: str, fragment_id: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Write new values of some columns for rows of one fragment; return the entry for Committer.add.

        Each row has the table's key and the new values, the same columns in all. Other columns, pictures too, stay.
        The entry says which state of the fragment it was made from: it is good for that one only.
        """
        key = schema.KEYS[name]
        columns = pa.schema([schema.TABLES[name].field(column) for column in rows[0]])
        fragment = self.table(name).get_fragment(fragment_id)
        if fragment is None:
            raise StoreError(f"Table {self.uri(name)} has no fragment {fragment_id} any more. Run the command again.")
        keys = fragment.to_table(columns=[key])[key].to_pylist()
        metadata, fields = fragment.update_columns(schema.arrange(rows, columns), left_on=key, right_on=key)
        files = self.settle(name, [metadata], keys, old={part.path for part in fragment.metadata.files})
        changed = {"updated": metadata.to_json(), "fields": list(fields), "files": files}
        made_from = state(fragment.metadata)
        return {"unit": f"update-{fragment_id}", "rows": len(rows), "made_from": made_from} | changed

    def remove(self, name: str, keys: set[str]) -> None:
        """Remove the rows with these keys (of no special characters) from table `name`, in one transaction."""
        if not keys:
            return
        table, digests = self.table(name), self.digests(name)
        predicate = f"{schema.KEYS[name]} IN ({', '.join(repr(key) for key in sorted(keys))})"
        left: list[FragmentMetadata] = []
        emptied: list[int] = []
        for fragment in table.get_fragments():
            if not fragment.count_rows(predicate):
                continue
            rest = fragment.delete(predicate)  # writes a file that lists the rows, and commits nothing
            if rest is None:
                emptied.append(fragment.fragment_id)
                continue
            assert rest.deletion_file is not None  # rows match, so they are listed
            file = Path(self.uri(name), rest.deletion_file.path(rest.id))
            digests.record(file.stem, [file], sorted(keys))
            left.append(rest)
        operation = lance.LanceOperation.Delete(left, emptied, predicate)
        lance.LanceDataset.commit(self.uri(name), operation, read_version=table.version)
        self.record_versions(name)

    def committed_units(self, name: str) -> set[str]:
        """Return the units that the transactions in the history of table `name`, its configuration or its rows name.

        History is pruned by a clean-up: ours (compact.py) keeps the units in the configuration first; after another's,
        a unit whose rows are there is done all the same. What is recorded of a version is not read from it again.
        """
        table, digests = self.table(name), self.digests(name)
        units: set[str] = set(json.loads(table.config().get(UNITS, "[]")))
        versions = digests.versions()
        if versions[0] > 1 and "segment_id" in table.schema.names:
            units.update(table.to_table(columns=["segment_id"])["segment_id"].unique().to_pylist())
        for version in versions:
            recorded = digests.units(version)
            units.update(_named(table, version) if recorded is None else recorded)
        return units

    def record_versions(self, name: str) -> None:
        """Flush the manifests of table `name` that are not recorded yet to the disk, and record them.

        Those of a commit just made, and those of one after which a process was killed at once.
        """
        for version in self.digests(name).unrecorded():
            self.digests(name).record_version(version, _named(self.table(name), version))

    def ledger(self, name: str) -> list[dict[str, Any]]:
        """Return the ledger's entries of table `name`: units written, and committed or not yet.

        A damaged entry is none: what it stands for is not done, unless the table's history says so.
        """
        folder = self.root / "_ledger" / name
        return [entry for path in sorted(folder.glob("*.json")) if (entry := _read_entry(path))]

    def remove_halves(self, name: str) -> None:
        """Remove what a crash left of the ledger's and the digests' files of table `name`, in a locked root."""
        for folder in ("_ledger", "_digests"):
            remove_halves(self.root / folder / name)

    def _ledger_file(self, name: str, unit: str) -> Path:
        return self.root / "_ledger" / name / f"{hashlib.sha256(unit.encode()).hexdigest()[:32]}.json"

    def strike(self, name: str, unit: str) -> None:
        """Remove the ledger's entry of a unit, if there is one."""
        self._ledger_file(name, unit).unlink(missing_ok=True)

    def rows_at(self, name: str, addresses: list[int], columns: list[str]) -> list[dict[str, Any]]:
        """Return `columns` of the rows at `addresses` (`_rowaddr` of a scan), in that order."""
        fragments = {address >> 32 for address in addresses}
        table = self.table(name)
        rows: dict[int, dict[str, Any]] = {}
        for fragment in sorted(fragments):
            scan = table.scanner(columns=columns, fragments=[table.get_fragment(fragment)], with_row_address=True)
            rows.update({row.pop("_rowaddr"): row for row in scan.to_table().to_pylist()})
        return [rows[address] for address in addresses]

    def read_pictures(self, name: str, column: str, addresses: list[int]) -> list[bytes | None]:
        """Return the blobs of `column` at row `addresses` (`_rowaddr` of a scan), in that order."""
        found = dict(self.table(name).read_blobs(column, addresses=addresses))
        return [found[address] for address in addresses]


def _in_parts(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield `rows` in lists of about FRAGMENT_BYTES of pictures."""
    some: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        some.append(row)
        size += sum(len(row.get(column) or b"") for column in schema.BLOBS[name])
        if size >= FRAGMENT_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def state(fragment: FragmentMetadata) -> list[str]:
    """Return what tells a fragment from itself before a change: the names of its data files and its list of removed
    rows. Each change writes files of new names."""
    removed = fragment.deletion_file
    return [part.path for part in fragment.files] + ([removed.path(fragment.id)] if removed else [])


def _named(table: lance.LanceDataset, version: int) -> list[str]:
    """Return the units that the transaction of a version names."""
    transaction = table.read_transaction(version)
    return json.loads(((transaction and transaction.transaction_properties) or {}).get(UNITS, "[]"))


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def _read_entry(path: Path) -> dict[str, Any] | None:
    """Return the entry in a file of the ledger; None where it is not as it was written."""
    try:
        entry = json.loads(path.read_bytes())
        seal = entry.pop("sha256")
    except (ValueError, KeyError):
        return None
    return entry if seal == _seal(entry) else None
