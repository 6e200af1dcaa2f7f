"""A power cut: what is flushed to the disk before what, and what the next run makes of what was not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest
from lance.optimize import Compaction

from factory import tags
from factory.committer import Committer
from factory.compact import compact
from factory.store import Store
from factory.verify import verify
from tests.test_verify import picture_rows

TABLE = "candidates"
_LEFT_TO_CHANCE = (".lock", ".txn", "latest_version_hint.json")  # of no use to a reader; see the test of torn commits


class Disk:
    """What of a root would be left after a power cut: a file is, once it and all folders above it were flushed.

    A folder's flush counts for the names that are in it by then. Renames, removals and commits are steps, in `steps`.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.steps: list[str] = []
        self._flushed: set[Path] = set()  # files, by what they hold
        self._named: set[Path] = set()  # files and folders, by their name in the folder above
        fsync, replace = os.fsync, os.replace

        def flush(handle: int) -> None:
            fsync(handle)
            path = Path(f"/proc/self/fd/{handle}").resolve()
            if path.is_dir():
                self._named.update(path.iterdir())
            else:
                self._flushed.add(path)

        def rename(old: Any, new: Any) -> None:
            replace(old, new)
            self._flushed.discard(Path(new))
            self._named.discard(Path(new))
            if Path(old) in self._flushed:
                self._flushed.add(Path(new))

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "replace", rename)

    def lost(self) -> list[str]:
        """The files that are there and would be gone, or be empty, after a power cut."""
        files = [path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(_LEFT_TO_CHANCE)]
        return sorted(str(path.relative_to(self.root)) for path in files if not self._kept(path))

    def _kept(self, path: Path) -> bool:
        above = [folder for folder in path.parents if folder.is_relative_to(self.root)]
        return path in self._flushed and self._named.issuperset([path, *above])

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, check: Callable[[], None]) -> None:
        """Run `check` before each call of a function."""
        static = isinstance(owner.__dict__.get(name), staticmethod)
        function = getattr(owner, name)

        def checked(*args: Any, **more: Any) -> Any:
            check()
            self.steps.append(name)
            return function(*args, **more)

        monkeypatch.setattr(owner, name, staticmethod(checked) if static else checked)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under a new root: before each commit, strike and clean-up, all that is there has to be flushed."""
    disk = Disk(tmp_path / "root", monkeypatch)

    def nothing_is_lost() -> None:
        assert disk.lost() == [], disk.steps

    for owner, name in (
        (lance.LanceDataset, "commit"),
        (lance.LanceDataset, "cleanup_old_versions"),
        (Compaction, "commit"),
        (Store, "strike"),
    ):
        disk.watch(monkeypatch, owner, name, nothing_is_lost)
    return disk


def test_everything_is_on_the_disk_before_what_refers_to_it(disk: Disk) -> None:
    store = Store(str(disk.root))
    with store.lock():
        store.create()
        assert disk.lost() == []
        committer = Committer(store, TABLE, every=1)
        for unit, size in enumerate((100, 100_000, 6_000_000)):  # the last ones lie in files of their own
            entry = store.write_unit(TABLE, f"u{unit}", picture_rows(unit, size))
            assert disk.lost() == []
            committer.add(entry)
        rows = [{"frame_id": "0000-1", "status": "kept", "score": 2.5}]
        committer.add(store.write_updates(TABLE, 0, rows))
        store.remove(TABLE, {"0001-1"})
        store.keep_settings({"a": 1})
        tags.tag(store, "done")
        compact(store, TABLE, rows=9, older_than=timedelta(0))
    assert disk.lost() == []
    assert verify(store).damaged == []
    assert {Path(file).suffix for file in entry["files"]} == {".lance", ".blob"}
    assert disk.steps.count("commit") == 7  # 3 units, update, removal, compaction and its look
    assert disk.steps.count("strike") == 3


def test_a_unit_s_ledger_entry_comes_after_its_files(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(disk.root))
    store.create()
    seen: list[list[str]] = []
    monkeypatch.setattr("factory.store.write_atomic", lambda *_: seen.append(disk.lost()))
    store.write_unit(TABLE, "u0", picture_rows(0, 6_000_000))
    assert seen == [[]]


@pytest.mark.parametrize("left", [b"", bytes(3000), b"half"], ids=["empty", "zeros", "half"])
def test_a_commit_that_a_power_cut_tore_is_made_again(tmp_path: Path, left: bytes) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    committer = Committer(store, TABLE, every=1)
    committer.add(store.write_unit(TABLE, "u0", picture_rows(0)))
    entry = store.write_unit(TABLE, "u1", picture_rows(1))
    ledger = [(path, path.read_text()) for path in (store.root / "_ledger").rglob("*.json")]
    committer.add(entry)
    # What was not flushed yet: the manifest's contents, its digest, the ledger's strike, Lance's own files.
    digests, version = store.digests(TABLE), store.table(TABLE).version
    digests.manifest(version).write_bytes(left)
    (store.root / "_digests" / TABLE / f"v{version:012d}.json").unlink()
    for path, text in ledger:
        path.write_text(text)
    for path in Path(store.uri(TABLE)).rglob("*"):
        if path.name.endswith(_LEFT_TO_CHANCE):
            path.write_bytes(b"")

    with store.lock():
        store.create()
        committer = Committer(store, TABLE, every=1)
        committer.add(store.write_unit(TABLE, "u2", picture_rows(2)))
        assert store.table(TABLE).count_rows() == 9
        assert committer.done == store.committed_units(TABLE) == {"u0", "u1", "u2"}
        compact(store, TABLE, rows=9, older_than=timedelta(0))
    assert store.committed_units(TABLE) == {"u0", "u1", "u2"}
    assert verify(store).damaged == []


def test_a_damaged_manifest_that_was_recorded_is_left_for_verify(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    Committer(store, TABLE, every=1).add(store.write_unit(TABLE, "u0", picture_rows(0)))
    manifest = store.digests(TABLE).manifest(2)
    manifest.write_bytes(b"")
    with store.lock():
        assert manifest.exists()
    assert [damage.file for damage in verify(store).damaged] == [f"_versions/{manifest.name}"]


def test_the_history_is_read_without_lance_s_transaction_files(tmp_path: Path) -> None:
    """They are not flushed: a manifest holds its transaction too, however large."""
    store = Store(str(tmp_path / "root"))
    store.create()
    parts = [f"{'part' * 10}{i}" for i in range(20_000)]
    Committer(store, TABLE, every=1).add(store.write_unit(TABLE, "u0", [], parts))
    shutil.rmtree(Path(store.uri(TABLE), "_transactions"))
    shutil.rmtree(store.root / "_digests")
    assert store.committed_units(TABLE) == {"u0", *parts}
