"""The committer: publishes what workers wrote as Lance transactions, a few units at a time, each exactly once."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import lance
from lance import LanceOperation
from lance.fragment import FragmentMetadata

from factory import schema
from factory.key_index import KeyIndex
from factory.store import UNITS, DamagedData, NotFinished, Store, state


class Committer:
    """Publishes units of one table, every few units, each exactly once. There is one, in the process with the lock."""

    def __init__(self, store: Store, name: str, *, every: int) -> None:
        """Take up what an earlier run left: strike committed units from the ledger, publish the uncommitted ones.

        Units whose files are gone are struck too, and done again: those of a worker that outlived its run are strays to
        a clean-up in the moment between its files and its ledger entry. So are those of which the table has rows: from
        such a worker too, where the same rows came in other units since.
        """
        self._store, self._name, self._every = store, name, every
        store.record_versions(name)
        self.done = store.committed_units(name)
        self._queue: list[dict[str, Any]] = []
        taken: set[str] = set()
        for entry in store.ledger(name):
            if not self.done.isdisjoint(entry["units"]):
                store.strike(name, entry["unit"])
            elif broken := self._broken(entry):
                print(f"store    {broken} is gone or cut short: {entry['unit']} is done again", flush=True)
                store.strike(name, entry["unit"])
            elif not taken.isdisjoint(entry["keys"]) or self._present(entry["keys"]):
                print(f"store    rows of {entry['unit']} are there already: what is not is done again", flush=True)
                store.strike(name, entry["unit"])
            else:
                self._queue.append(entry)
                taken.update(entry["keys"])
        self.flush()

    def add(self, entry: dict[str, Any]) -> None:
        """Queue an entry of write_unit or of write_updates; commit when enough are queued."""
        self._queue.append(entry)
        if len(self._queue) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Commit what is queued: appended units in one transaction, updated fragments in one.

        Of two units that share a part, the one that came first is published. Raises DamagedData when a fragment's file
        is gone, or a row is in the table already, and NotFinished when a fragment is no longer the one that an update
        was made from: then nothing of that transaction is published.
        """
        updates = [entry for entry in self._queue if "updated" in entry]
        appended = {entry["unit"]: entry for entry in self._queue if "updated" not in entry}
        self._queue = []
        fresh: dict[str, dict[str, Any]] = {}
        taken: set[str] = set()
        for unit, entry in appended.items():
            if self.done.isdisjoint(entry["units"]) and taken.isdisjoint(entry["units"]):
                fresh[unit] = entry
                taken.update(entry["units"])
        if fresh:
            self._append(fresh)
        if updates:
            self._update(updates)
        for unit in appended:
            self._store.strike(self._name, unit)

    def _append(self, entries: dict[str, dict[str, Any]]) -> None:
        for entry in entries.values():
            self._check_files(entry)
        table = self._store.table(self._name)
        key = schema.KEYS[self._name]
        keys = [k for entry in entries.values() for k in entry["keys"]]
        present = self._present(keys)
        if present or len(set(keys)) < len(keys):
            raise DamagedData(
                f"{present or len(keys) - len(set(keys))} row(s) of {sorted(entries)[:3]} are in table "
                f"{self._store.uri(self._name)} already, under another unit of work. Nothing was added. "
                "Run the same command again: these are left out then, and what is missing is redone."
            )
        fragments = [
            FragmentMetadata.from_json(json.dumps(f)) for entry in entries.values() for f in entry["fragments"]
        ]
        old, before = {fragment.fragment_id for fragment in table.get_fragments()}, table.count_rows()
        self._commit(LanceOperation.Append(fragments), sorted(u for entry in entries.values() for u in entry["units"]))
        table = self._store.table(self._name)
        added = [fragment for fragment in table.get_fragments() if fragment.fragment_id not in old]
        found = table.scanner(columns=[key], fragments=added).to_table()[key].to_pylist() if added else []
        after = table.count_rows()
        if after != before + len(keys) or sorted(found) != sorted(keys):
            raise DamagedData(
                f"Table {self._store.uri(self._name)} has {after} rows, {len(found)} of them new, after a commit of "
                f"{len(keys)} to {before}. Something else writes to it: make sure that only this project does."
            )
        self._keys.add(keys)

    @cached_property
    def _keys(self) -> KeyIndex:
        return KeyIndex(self._store.table(self._name), schema.KEYS[self._name])

    def _present(self, keys: list[str]) -> int:
        """Return how many rows of the table have one of `keys`."""
        return self._keys.count(self._store.table(self._name), keys)

    def _update(self, entries: list[dict[str, Any]]) -> None:
        states = {f.fragment_id: state(f.metadata) for f in self._store.table(self._name).get_fragments()}
        fresh: list[FragmentMetadata] = []
        stale: list[int] = []
        for entry in entries:
            updated = FragmentMetadata.from_json(json.dumps(entry["updated"]))
            present, new = states.get(updated.id), state(updated)
            if present == entry["made_from"]:
                self._check_files(entry)
                states[updated.id] = new
                fresh.append(updated)
            elif present != new:  # a doubled answer is there already
                stale.append(updated.id)
        if stale:
            raise NotFinished(
                f"Fragment(s) {stale} of table {self._store.uri(self._name)} were changed while new values of their "
                "rows were made. These were dropped: run the same command again."
            )
        if fresh:
            fields = sorted({field for entry in entries for field in entry["fields"]})
            operation = LanceOperation.Update(
                updated_fragments=fresh, fields_modified=fields, update_mode="rewrite_columns"
            )
            self._commit(operation, [])

    def _check_files(self, entry: dict[str, Any]) -> None:
        if broken := self._broken(entry):
            raise DamagedData(
                f"{broken} was written for a unit of work and is gone or cut short. Look at the disk, then run the "
                "same command again: the units that are not committed are redone."
            )

    def _broken(self, entry: dict[str, Any]) -> Path | None:
        """Return a file of an entry that does not have the size it was written with, if there is one."""
        for name, size in entry["files"].items():
            path = Path(self._store.uri(self._name), name)
            if not path.exists() or path.stat().st_size != size:
                return path
        return None

    def _commit(self, operation: LanceOperation.BaseOperation, units: list[str]) -> None:
        table = self._store.table(self._name)
        properties = {UNITS: json.dumps(units)} if units else {}
        transaction = lance.Transaction(table.version, operation, transaction_properties=properties)
        try:
            lance.LanceDataset.commit(self._store.uri(self._name), transaction)
        except Exception:
            # The answer of a failed commit is ambiguous: the history decides.
            if not units or not set(units) <= self._store.committed_units(self._name):
                raise
        self._store.digests(self._name).record_version(self._store.table(self._name).version, units)
        self.done.update(units)


def check_keys(store: Store, name: str) -> int:
    """Return the number of rows of table `name`. Raises DamagedData when a key is there twice."""
    key = schema.KEYS[name]
    keys = store.table(name).to_table(columns=[key])[key]
    twice = [item["values"] for item in keys.value_counts().to_pylist() if item["counts"] > 1]
    if twice:
        raise DamagedData(f"Table {store.uri(name)} holds {len(twice)} keys more than once, such as {twice[0]}.")
    return len(keys)
