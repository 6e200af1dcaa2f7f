"""Compaction and clean-up: few larger fragments in place of many small ones, old versions and strays removed.

Lance's compaction had data-loss bugs, so nothing is taken on trust: the new fragments are read as a version that nobody
sees (a detached one) and compared with the old ones, row for row and byte for byte, before they are published.
Row addresses change; keys don't.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import lance
from lance import LanceOperation
from lance.optimize import Compaction

from factory import schema
from factory.committer import Committer, check_keys
from factory.store import UNITS, DamagedData, Store

ROWS = 4096  # of a fragment after compaction, but in the samples table


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a compaction did to one table."""

    fragments_before: int
    fragments_after: int
    versions_removed: int
    bytes_removed: int

    def __str__(self) -> str:
        return (
            f"{self.fragments_before} -> {self.fragments_after} fragments, {self.versions_removed} old versions and "
            f"{self.bytes_removed / 1e6:.1f} MB removed"
        )


def compact(store: Store, name: str, *, rows: int, older_than: timedelta) -> Compacted:
    """Merge small fragments of table `name` into fragments of about `rows`, then clean up, in a locked root.

    Versions older than `older_than` are removed unless a tag names them, and all files that nothing refers to: what a
    crash left. Raises DamagedData where the new fragments differ from the old: these stay in use.
    """
    committer = Committer(store, name, every=1)  # publishes what the ledger holds: then no file waits for its commit
    before = store.table(name)
    _merge(store, name, rows)
    table = store.table(name)
    # History is pruned below; what it says of the units has to be known from the present version.
    kept = json.dumps(sorted(committer.done))
    if table.config().get(UNITS, "[]") != kept:
        table.update_config({UNITS: kept})
        store.record_versions(name)
    stats = table.cleanup_old_versions(older_than, delete_unverified=True, error_if_tagged_old_versions=False)
    store.digests(name).prune()
    store.remove_halves(name)
    for folder in Path(store.uri(name), "data").glob("*/"):  # Lance leaves those of the pictures that it removed
        if not any(folder.iterdir()):
            folder.rmdir()
    return Compacted(
        fragments_before=len(before.get_fragments()),
        fragments_after=len(store.table(name).get_fragments()),
        versions_removed=stats.old_versions,
        bytes_removed=stats.bytes_removed,
    )


def _merge(store: Store, name: str, rows: int) -> None:
    """Publish the merged fragments of a table, after they were compared with those that they replace."""
    table = store.table(name)
    version, expected = table.version, check_keys(store, name)
    tasks = Compaction.plan(table, {"target_rows_per_fragment": rows}).tasks
    if not tasks:
        return
    results, old = [], []
    for task in tasks:
        replaced = [table.get_fragment(fragment.id) for fragment in task.fragments]
        keys = table.scanner(columns=[schema.KEYS[name]], fragments=replaced).to_table()[schema.KEYS[name]].to_pylist()
        result = task.execute(table)
        store.settle(name, result.new_fragments, keys)
        results.append(result)
        old += replaced
    new = [fragment for result in results for fragment in result.new_fragments]
    merged = lance.LanceDataset.commit(
        store.uri(name), LanceOperation.Overwrite(table.schema, new), read_version=version, detached=True
    )
    same = contents(table, name, old) == contents(merged, name, merged.get_fragments())
    for manifest in Path(store.uri(name), "_versions").glob("d*.manifest"):  # of detached versions, also of a crash
        manifest.unlink()
    if not same:
        raise DamagedData(
            f"Compaction of {store.uri(name)} would have changed rows. Nothing was published; the table is as it was. "
            f"Look at it: python -m factory verify --root {shlex.quote(str(store.root))}"
        )
    Compaction.commit(table, results)
    store.record_versions(name)
    if check_keys(store, name) != expected:
        lance.dataset(store.uri(name), version=version).restore()
        store.record_versions(name)
        raise DamagedData(f"Compaction of {store.uri(name)} lost rows: version {version} was put back in place.")


def contents(table: lance.LanceDataset, name: str, fragments: list[lance.LanceFragment]) -> tuple[int, int]:
    """Return the number of rows in `fragments` and a sum over their hashes, the same in any order of rows.

    A row's sha256 covers all its values, and the bytes of its pictures, read one at a time.
    """
    rows = total = 0
    columns = [column.name for column in schema.TABLES[name] if not schema.is_blob(column)]
    for fragment in fragments:
        scan = table.scanner(columns=columns, fragments=[fragment], with_row_address=True)
        for batch in scan.to_batches():
            for row in batch.to_pylist():
                address = row.pop("_rowaddr")
                digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode())
                for column in schema.BLOBS[name]:
                    ((_, picture),) = table.read_blobs(column, addresses=[address])
                    digest.update(hashlib.sha256(picture).digest() if picture is not None else b"none")
                rows, total = rows + 1, (total + int.from_bytes(digest.digest())) % 2**256
    return rows, total
