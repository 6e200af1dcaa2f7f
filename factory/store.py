"""The Lance sink: workers write fragments, a durable ledger keeps their metadata, one committer publishes them once.

A unit of work (a segment, a batch of samples) is written by a worker as uncommitted fragments and one ledger file. The
committer publishes units as Lance transactions whose properties name them. On start, the transactions already in the
table's history are the truth: what they name is done, what only the ledger names is published, the rest is redone.

| killed                             | on the next run                                             |
|------------------------------------|-------------------------------------------------------------|
| before the fragments are complete  | the unit is redone; stray files are referenced by nothing   |
| after the fragments, before ledger | the unit is redone; the stray fragment is never referenced  |
| after the ledger, before commit    | the ledger's fragments are committed; nothing is redone     |
| during the commit                  | the history says whether it happened; then as above         |
| after the commit, before its word  | the history names the unit; the ledger file is removed      |
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
from lance import LanceOperation
from lance.fragment import FragmentMetadata, write_fragments

from factory import schema
from factory.files import write_atomic

_UNITS = "animesketch.units"


class StoreError(ValueError):
    """The dataset root cannot be used as it is."""


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
            raise StoreError(f"--root {root}: only local folders can be written so far; give a path.")
        self.root = Path(root)

    def uri(self, name: str) -> str:
        """Return the path of table `name`."""
        return str(self.root / f"{name}.lance")

    def create(self) -> None:
        """Make the root and whatever table it lacks. Raises StoreError when a table is of another format."""
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"Dataset root {self.root} is a file. Give a folder.")
        self.root.mkdir(parents=True, exist_ok=True)
        for name, columns in schema.TABLES.items():
            if not any(Path(self.uri(name), "_versions").glob("*.manifest")):  # absent, or killed while it was made
                lance.write_dataset(
                    columns.empty_table(),
                    self.uri(name),
                    data_storage_version=schema.STORAGE_VERSION,
                    enable_v2_manifest_paths=True,
                )
            self.table(name)

    @property
    def settings_file(self) -> Path:
        """Where the settings of the last command that wrote are kept, as JSON: the next one starts from them."""
        return self.root / "config.json"

    def table(self, name: str) -> lance.LanceDataset:
        """Return the newest version of table `name`. Raises FileNotFoundError or StoreError, saying what to do."""
        if not os.path.exists(self.uri(name)):
            raise FileNotFoundError(
                f"No table {self.uri(name)}. Make the dataset first: python -m factory build SOURCES --root {self.root}"
            )
        try:
            table = lance.dataset(self.uri(name))
        except (OSError, ValueError) as error:
            raise StoreError(f"Table {self.uri(name)} cannot be opened: {error}") from error
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        for key, value in schema.TABLES[name].metadata.items():
            if found.get(key.decode()) != value.decode():
                raise StoreError(
                    f"Table {self.uri(name)} says {key.decode()} = {found.get(key.decode())}, this version reads "
                    f"{value.decode()}. Use the version that wrote it, or build into a new root."
                )
        return table

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the root as its one writer; the lock dies with its process. Raises DatasetBusy."""
        self.root.mkdir(parents=True, exist_ok=True)
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
            yield

    def write_unit(self, name: str, unit: str, rows: list[dict[str, Any]], parts: Sequence[str] = ()) -> dict[str, Any]:
        """Write `rows` of table `name` as uncommitted fragments and enter them into the ledger; return the entry.

        Called by workers, any number of times for one unit: an entry that is there already is kept. A unit may be made
        of `parts`, units themselves, which another unit may hold too: of two such units one is committed.
        """
        path = self._ledger_file(name, unit)
        if path.exists():
            return json.loads(path.read_text())
        fragments = []
        if rows:
            fragments = write_fragments(
                schema.to_table(name, rows),
                self.uri(name),
                schema=self.table(name).schema,
                mode="append",
                data_storage_version=schema.STORAGE_VERSION,
            )
        files = {
            str(file.relative_to(self.uri(name))): _settled(file) for f in fragments for file in self._files(name, f)
        }
        entry = {
            "unit": unit,
            "units": [unit, *parts],
            "rows": len(rows),
            "fragments": [f.to_json() for f in fragments],
            "files": files,
        }
        write_atomic(path, json.dumps(entry))
        return entry

    def _files(self, name: str, fragment: FragmentMetadata) -> Iterator[Path]:
        """Yield the files of a fragment: its data files, and the pictures that lie in a folder beside each."""
        for part in fragment.files:
            file = Path(self.uri(name), "data", part.path)
            yield file
            yield from sorted(file.with_suffix("").glob("*"))

    def write_updates(self, name: str, fragment_id: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Write new values of some columns for rows of one fragment; return the entry for Committer.add.

        Each row has the table's key and the new values, the same columns in all. Other columns, pictures too, stay.
        """
        key = schema.KEYS[name]
        columns = pa.schema([schema.TABLES[name].field(column) for column in rows[0]])
        fragment = self.table(name).get_fragment(fragment_id)
        if fragment is None:
            raise StoreError(f"Table {self.uri(name)} has no fragment {fragment_id} any more. Run the command again.")
        metadata, fields = fragment.update_columns(schema.arrange(rows, columns), left_on=key, right_on=key)
        return {"unit": f"update-{fragment_id}", "rows": 0, "updated": metadata.to_json(), "fields": list(fields)}

    def remove(self, name: str, keys: set[str]) -> None:
        """Remove the rows with these keys (of no special characters) from table `name`, in one transaction."""
        if keys:
            self.table(name).delete(f"{schema.KEYS[name]} IN ({', '.join(repr(key) for key in sorted(keys))})")

    def committed_units(self, name: str) -> set[str]:
        """Return the units named by the transactions in the history of table `name`, or by its rows.

        History can be pruned by a clean-up; a unit whose rows are there is done all the same.
        """
        table = self.table(name)
        units: set[str] = set()
        if "segment_id" in table.schema.names:
            units.update(table.to_table(columns=["segment_id"])["segment_id"].unique().to_pylist())
        for version in table.versions():
            transaction = table.read_transaction(version["version"])
            units.update(json.loads(((transaction and transaction.transaction_properties) or {}).get(_UNITS, "[]")))
        return units

    def ledger(self, name: str) -> list[dict[str, Any]]:
        """Return the ledger's entries of table `name`: units written, and committed or not yet."""
        folder = self.root / "_ledger" / name
        return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]

    def _ledger_file(self, name: str, unit: str) -> Path:
        return self.root / "_ledger" / name / f"{hashlib.sha256(unit.encode()).hexdigest()[:32]}.json"

    def _strike(self, name: str, unit: str) -> None:
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


class Committer:
    """Publishes units of one table, every few units, each exactly once. There is one, in the process with the lock."""

    def __init__(self, store: Store, name: str, *, every: int) -> None:
        """Take up what an earlier run left: strike committed units from the ledger, queue the uncommitted ones."""
        self._store, self._name, self._every = store, name, every
        self.done = store.committed_units(name)
        self._queue: list[dict[str, Any]] = []
        for entry in store.ledger(name):
            if not self.done.isdisjoint(entry["units"]):
                store._strike(name, entry["unit"])
            else:
                self._queue.append(entry)
        self.flush()

    def add(self, entry: dict[str, Any]) -> None:
        """Queue an entry of write_unit or of write_updates; commit when enough are queued."""
        self._queue.append(entry)
        if len(self._queue) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Commit what is queued: appended units in one transaction, updated fragments in one."""
        updates = [entry for entry in self._queue if "updated" in entry]
        appended = {entry["unit"]: entry for entry in self._queue if "updated" not in entry}
        self._queue = []
        fresh: dict[str, dict[str, Any]] = {}
        taken = set(self.done)
        for unit, entry in appended.items():
            if taken.isdisjoint(entry["units"]):
                fresh[unit] = entry
                taken.update(entry["units"])
        if fresh:
            self._append(fresh)
        if updates:
            operation = LanceOperation.Update(
                updated_fragments=[FragmentMetadata.from_json(json.dumps(entry["updated"])) for entry in updates],
                fields_modified=updates[0]["fields"],
                update_mode="rewrite_columns",
            )
            self._commit(operation, [])
        for unit in appended:
            self._store._strike(self._name, unit)

    def _append(self, entries: dict[str, dict[str, Any]]) -> None:
        for entry in entries.values():
            for name, size in entry["files"].items():
                path = Path(self._store.uri(self._name), name)
                if not path.exists() or path.stat().st_size != size:
                    raise DamagedData(
                        f"{path} was written for a unit of work and is gone or cut short. Remove "
                        f"{self._store.root / '_ledger'} and run again: the units that are not committed are redone."
                    )
        fragments = [
            FragmentMetadata.from_json(json.dumps(f)) for entry in entries.values() for f in entry["fragments"]
        ]
        before = self._store.table(self._name).count_rows()
        units = sorted(unit for entry in entries.values() for unit in entry["units"])
        self._commit(LanceOperation.Append(fragments), units)
        after = self._store.table(self._name).count_rows()
        rows = sum(entry["rows"] for entry in entries.values())
        if after != before + rows:
            raise DamagedData(
                f"Table {self._store.uri(self._name)} has {after} rows after a commit of {rows} to {before}. "
                "Something else writes to it: make sure that only this project does."
            )

    def _commit(self, operation: LanceOperation.BaseOperation, units: list[str]) -> None:
        table = self._store.table(self._name)
        properties = {_UNITS: json.dumps(units)} if units else {}
        transaction = lance.Transaction(table.version, operation, transaction_properties=properties)
        try:
            lance.LanceDataset.commit(self._store.uri(self._name), transaction)
        except Exception:
            # The answer of a failed commit is ambiguous: the history decides.
            if not units or not set(units) <= self._store.committed_units(self._name):
                raise
        self.done.update(units)


def _settled(file: Path) -> int:
    """Flush a file to the disk and return its size in bytes."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size


def check_keys(store: Store, name: str) -> int:
    """Return the number of rows of table `name`. Raises DamagedData when a key is there twice."""
    key = schema.KEYS[name]
    keys = store.table(name).to_table(columns=[key])[key]
    twice = [item["values"] for item in keys.value_counts().to_pylist() if item["counts"] > 1]
    if twice:
        raise DamagedData(f"Table {store.uri(name)} holds {len(twice)} keys more than once, such as {twice[0]}.")
    return len(keys)
