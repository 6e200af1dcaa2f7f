"""The store's whole life in a process that is killed before its n-th effect on the disk, for each n.

`python -m tests.crash_points FOLDER` prints {"killed": [outcome, ...], "whole": outcome} as JSON. Each life is a
process of its own, forked before Lance is used: a start from nothing would take a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
from lance.dataset import Tags
from lance.optimize import Compaction

import factory.store
from factory import compact, tags
from factory.committer import Committer
from factory.store import Store
from factory.verify import verify

TABLE = "candidates"
UNITS = {**{f"u{unit}": 2 for unit in range(3)}, "empty": 0}  # rows in each
LATE = "late"  # a unit of two rows, by a worker whose driver was killed before it was committed


def life(store: Store) -> None:
    """What the stages do, and a tag and a compaction at the end: the same command each time it is run."""
    with store.lock():
        store.create()
        committer = Committer(store, TABLE, every=2)
        for unit, count in UNITS.items():
            if unit not in committer.done:
                committer.add(store.write_unit(TABLE, unit, [row(unit, i) for i in range(count)]))
        committer.flush()
        committer = Committer(store, TABLE, every=2)
        scan = store.table(TABLE).to_table(columns=["frame_id", "status"], with_row_address=True).to_pylist()
        for fragment in sorted({r["_rowaddr"] >> 32 for r in scan if r["status"] is None}):
            changed = [r["frame_id"] for r in scan if r["_rowaddr"] >> 32 == fragment]
            rows = [{"frame_id": frame_id, "status": "kept"} for frame_id in changed]
            committer.add(store.write_updates(TABLE, fragment, rows))
        committer.flush()
        if len(tags.tags(store).get("done", {})) < 4:
            tags.tag(store, "done")
        if LATE not in committer.done:
            store.write_unit(TABLE, LATE, [row(LATE, i) | {"status": "kept"} for i in range(2)])
        compact.compact(store, TABLE, rows=4, older_than=timedelta(0))


def row(unit: str, number: int) -> dict[str, Any]:
    return {
        "frame_id": f"{unit}-{number}",
        "source_id": "s",
        "segment_id": unit,
        "image": f"picture {unit} {number}".encode() * 10_000,
    }


def effects() -> list[tuple[Any, str]]:
    """The functions through which a life changes the disk; all else reads, or writes files that nothing refers to."""
    return [
        (os, "replace"),  # of write_atomic: ledger and digests
        (Path, "unlink"),
        (lance, "write_dataset"),
        (factory.store, "write_fragments"),
        (lance.LanceFragment, "update_columns"),
        (lance.LanceDataset, "commit"),
        (lance.LanceDataset, "update_config"),
        (lance.LanceDataset, "cleanup_old_versions"),
        (Compaction, "commit"),
        (Tags, "create"),
        (Tags, "update"),
    ]


def watch(log: Path, kill_before: int) -> None:
    """Write the name of each effect to `log` before it happens; SIGKILL this process before number `kill_before`."""
    count = 0

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            if count == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            with open(log, "a") as file:
                file.write(name + "\n")
            return function(*args, **more)

        return call

    for owner, name in effects():
        static = isinstance(owner.__dict__.get(name), staticmethod)
        function = watched(getattr(owner, name), name)
        setattr(owner, name, staticmethod(function) if static else function)


def outcome(root: Path, log: Path) -> dict[str, Any]:
    """What readers see of a dataset: contents, committed units, ledger, damage; and the effects of all its lives."""
    store = Store(str(root))
    table = store.table(TABLE)
    report = verify(store)
    return {
        "contents": compact.contents(table, TABLE, table.get_fragments()),
        "tagged": lance.dataset(store.uri(TABLE), version="done").count_rows(),
        "keys": sorted(table.to_table(columns=["frame_id"])["frame_id"].to_pylist()),
        "units": sorted(store.committed_units(TABLE)),
        "ledger": store.ledger(TABLE),
        "damaged": [str(damage) for damage in report.damaged] + report.unrecorded,
        "effects": log.read_text().split(),
    }


def in_process(function: Callable[[], None]) -> int:
    """Run `function` in a forked process; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def case(folder: Path, kill_before: int) -> dict[str, Any]:
    """One life that is killed, unless it ends before that, then the same again: the outcome, and how each ended."""
    root, log, result = folder / "root", folder / "effects", folder / "outcome"
    folder.mkdir()

    def killed() -> None:
        watch(log, kill_before)
        life(Store(str(root)))

    def again() -> None:
        watch(log, -1)
        life(Store(str(root)))
        result.write_text(json.dumps(outcome(root, log)))

    ended = {"first": in_process(killed), "second": in_process(again)}
    return ended | (json.loads(result.read_text()) if ended["second"] == 0 else {})


def main(folder: Path) -> None:
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote; only a power cut would
    cases = []
    while not cases or cases[-1]["first"] != 0:
        cases.append(case(folder / str(len(cases)), len(cases)))
    print(json.dumps({"killed": cases[:-1], "whole": cases[-1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
