"""The Lance sink, without Ray: units published once, damage that is named, one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lance
import pytest

from factory import schema
from factory.committer import Committer, check_keys
from factory.compact import compact
from factory.store import DamagedData, DatasetBusy, NotFinished, Store, StoreError
from factory.verify import verify
from factory.worker import WorkerFailed

REPO = Path(__file__).parent.parent


def _rows(unit: int, count: int = 3) -> list[dict]:
    return [
        {"frame_id": f"{unit:04d}-{i}", "source_id": "s", "segment_id": f"u{unit}", "image": b"picture" * 20_000}
        for i in range(count)
    ]


def _ids(store: Store) -> list[str]:
    return sorted(store.table("candidates").to_table(columns=["frame_id"])["frame_id"].to_pylist())


def test_units_are_committed_a_few_at_a_time_and_once(store: Store) -> None:
    committer = Committer(store, "candidates", every=2)
    for unit in range(5):
        entry = store.write_unit("candidates", f"u{unit}", _rows(unit))
        assert store.write_unit("candidates", f"u{unit}", _rows(unit)) == entry  # a retried task writes nothing new
        committer.add(entry)
        committer.add(entry)  # a doubled answer changes nothing
    committer.flush()
    assert len(_ids(store)) == check_keys(store, "candidates") == 15
    assert store.committed_units("candidates") == {f"u{i}" for i in range(5)}
    assert store.ledger("candidates") == []
    again = Committer(store, "candidates", every=2)
    again.flush()
    assert again.done == store.committed_units("candidates")
    assert len(_ids(store)) == 15


class _CountedRow(dict):
    """A row that a weak reference can be made to."""


def _counted(most: list[int], fail_at: int = -1) -> Iterator[_CountedRow]:
    """100 candidates of 100 kB; the number of those that are held at once goes to `most`."""
    alive: weakref.WeakValueDictionary[int, _CountedRow] = weakref.WeakValueDictionary()
    for i in range(100):
        if i == fail_at:
            raise WorkerFailed("the decoder ended")
        alive[i] = row = _CountedRow(frame_id=f"{i:04d}", source_id="s", segment_id="u0", image=bytes([i]) * 100_000)
        most.append(len(alive))
        yield row


def test_rows_are_written_as_they_come(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.store.FRAGMENT_BYTES", 1_000_000)
    most: list[int] = []
    entry = store.write_unit("candidates", "u0", _counted(most))
    assert len(most) == 100
    assert max(most) <= 12
    assert (entry["rows"], len(entry["fragments"])) == (100, 10)
    again = store.write_unit("candidates", "u0", _counted(most, fail_at=0))
    assert again == entry  # the rows of a unit that is there are not asked for
    Committer(store, "candidates", every=1).add(entry)
    pictures = store.read_pictures("candidates", "image", _addresses(store))
    assert pictures == [bytes([i]) * 100_000 for i in range(100)]
    assert verify(store).damaged == []


def test_rows_that_break_off_leave_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.store.FRAGMENT_BYTES", 1_000_000)
    with pytest.raises(WorkerFailed, match="the decoder ended"):
        store.write_unit("candidates", "u0", _counted([], fail_at=55))
    assert [file for file in Path(store.uri("candidates"), "data").rglob("*") if file.is_file()] == []
    assert store.ledger("candidates") == []
    committer = Committer(store, "candidates", every=1)
    committer.add(store.write_unit("candidates", "u0", _counted([])))  # by another decoder
    assert _ids(store) == [f"{i:04d}" for i in range(100)]
    assert verify(store).damaged == []


def test_a_unit_without_rows_is_done_too(store: Store) -> None:
    committer = Committer(store, "candidates", every=1)
    committer.add(store.write_unit("candidates", "empty", []))
    assert store.committed_units("candidates") == {"empty"}
    assert _ids(store) == []


def _addresses(store: Store) -> list[int]:
    return store.table("candidates").to_table(columns=["frame_id"], with_row_address=True)["_rowaddr"].to_pylist()


def test_an_ambiguous_commit_is_looked_up_in_the_history(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = lance.LanceDataset.commit

    def commits_then_fails(*args: object, **more: object) -> None:
        commit(*args, **more)
        raise OSError("connection lost")

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(commits_then_fails))
    committer = Committer(store, "candidates", every=1)
    committer.add(store.write_unit("candidates", "u0", _rows(0)))
    assert len(_ids(store)) == 3

    def fails(*_: object, **__: object) -> None:
        raise OSError("refused")

    monkeypatch.setattr(lance.LanceDataset, "commit", staticmethod(fails))
    with pytest.raises(OSError, match="refused"):
        committer.add(store.write_unit("candidates", "u1", _rows(1)))


def test_a_fragment_that_is_gone_or_cut_is_not_committed(store: Store) -> None:
    entry = store.write_unit("candidates", "u0", _rows(0))
    file = next(Path(store.uri("candidates"), "data").glob("*.lance"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedData, match="cut short"):
        Committer(store, "candidates", every=1).add(entry)
    assert _ids(store) == []


def test_a_picture_that_is_gone_is_noticed_before_the_commit(store: Store) -> None:
    rows = [row | {"image": bytes(6_000_000)} for row in _rows(0)]  # large pictures lie in files of their own
    entry = store.write_unit("candidates", "u0", rows)
    beside = [name for name in entry["files"] if not name.endswith(".lance")]
    assert beside
    Path(store.uri("candidates"), beside[0]).unlink()
    with pytest.raises(DamagedData, match="is gone"):
        Committer(store, "candidates", every=1).add(entry)


def test_units_are_known_by_their_rows_when_the_history_was_pruned(store: Store) -> None:
    committer = Committer(store, "candidates", every=1)
    for unit in range(3):
        committer.add(store.write_unit("candidates", f"u{unit}", _rows(unit)))
    store.table("candidates").cleanup_old_versions(older_than=timedelta(0))
    assert len(store.table("candidates").versions()) == 1
    assert Committer(store, "candidates", every=1).done >= {"u0", "u1", "u2"}


def test_a_table_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "root" / "sources.lance" / "_versions").mkdir(parents=True)
    store = Store(str(tmp_path / "root"))
    store.create()
    assert store.table("sources").count_rows() == 0


def test_updates_change_columns_and_leave_pictures(store: Store) -> None:
    committer = Committer(store, "candidates", every=1)
    for unit in range(2):
        committer.add(store.write_unit("candidates", f"u{unit}", _rows(unit)))
    before = store.table("candidates").version
    size = sum(p.stat().st_size for p in Path(store.uri("candidates")).rglob("*"))
    committer = Committer(store, "candidates", every=3)
    for fragment in range(2):
        rows = [{"frame_id": f"{fragment:04d}-1", "status": "kept", "score": 2.5}]
        committer.add(store.write_updates("candidates", fragment, rows))
    committer.flush()
    table = store.table("candidates")
    assert table.version == before + 1
    found = {row["frame_id"]: row["status"] for row in table.to_table(columns=["frame_id", "status"]).to_pylist()}
    assert {key for key, status in found.items() if status == "kept"} == {"0000-1", "0001-1"}
    assert store.read_pictures("candidates", "image", _addresses(store)) == [b"picture" * 20_000] * 6
    assert sum(p.stat().st_size for p in Path(store.uri("candidates")).rglob("*")) - size < 50_000
    old = lance.dataset(store.uri("candidates"), version=before).to_table(columns=["status"])["status"]
    assert old.null_count == 6


def _statuses(store: Store) -> dict[str, str | None]:
    rows = store.table("candidates").to_table(columns=["frame_id", "status"]).to_pylist()
    return {row["frame_id"]: row["status"] for row in rows}


@pytest.mark.parametrize("change", ["update", "compaction", "removal", "update in the same commit"])
def test_an_update_made_from_an_older_state_of_its_fragment_is_dropped(store: Store, change: str) -> None:
    committer = Committer(store, "candidates", every=1)
    for unit in range(2):
        committer.add(store.write_unit("candidates", f"u{unit}", _rows(unit)))

    def update(fragment: int, status: str) -> dict:
        rows = [{"frame_id": f"{fragment:04d}-{i}", "status": status} for i in range(2)]
        return store.write_updates("candidates", fragment, rows)

    old, good = update(0, "dropped"), update(1, "kept")
    new = update(0, "kept")
    committer = Committer(store, "candidates", every=9)
    if change == "compaction":
        compact(store, "candidates", rows=6, older_than=timedelta(0))
    elif change == "removal":
        store.remove("candidates", {"0000-2"})
    else:
        committer.add(new)
        if change == "update":
            committer.flush()
    before = store.table("candidates").version
    for entry in (good, old):
        committer.add(entry)
    with pytest.raises(NotFinished, match=r"Fragment\(s\) \[.*0\] .* run the same command again"):
        committer.flush()
    assert store.table("candidates").version == before  # a transaction is made whole or not at all
    assert _statuses(store)["0000-0"] == ("kept" if change == "update" else None)
    if change == "update":
        again = Committer(store, "candidates", every=2)
        for entry in (update(0, "failed"), good):
            again.add(entry)
        assert set(_statuses(store).values()) == {"failed", "kept", None}


def test_a_doubled_update_changes_nothing(store: Store) -> None:
    Committer(store, "candidates", every=1).add(store.write_unit("candidates", "u0", _rows(0)))
    entry = store.write_updates("candidates", 0, [{"frame_id": "0000-0", "status": "kept"}])
    committer = Committer(store, "candidates", every=2)
    for _ in range(4):  # in one commit, and in the next
        committer.add(entry)
    assert _statuses(store)["0000-0"] == "kept"
    assert store.table("candidates").version == 3


def test_there_is_one_writer_and_its_lock_dies_with_it(store: Store) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, factory.store as s\n"
            "with s.Store(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()",
            str(store.root),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPO,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(DatasetBusy, match=f"process {child.pid}"), store.lock():
        pass
    child.kill()
    child.communicate()
    with store.lock():
        pass


def test_a_root_that_cannot_be_used_says_why(tmp_path: Path, store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="python -m factory build"):
        Store(str(tmp_path / "absent")).table("samples")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"), Store(str(tmp_path / "file")).lock():
        pass
    with pytest.raises(StoreError, match="local folders"):
        Store("s3://bucket/data")
    newer = schema.SAMPLES.with_metadata({**schema.SAMPLES.metadata, b"animesketch.format": b"99"})
    other = tmp_path / "newer" / "samples.lance"
    lance.write_dataset(newer.empty_table(), str(other), data_storage_version=schema.STORAGE_VERSION)
    with pytest.raises(StoreError, match=r"animesketch\.format = 99"):
        Store(str(other.parent)).table("samples")


def test_rows_that_are_there_already_are_not_added_again_under_another_unit(store: Store) -> None:
    committer = Committer(store, "candidates", every=1)
    committer.add(store.write_unit("candidates", "u0", _rows(0)))
    with pytest.raises(DamagedData, match=r"3 row\(s\) of \['other'\] are in table"):
        committer.add(store.write_unit("candidates", "other", _rows(0)))
    assert Committer(store, "candidates", every=1).done == {"u0"}  # the next run leaves it out
    assert not store.ledger("candidates")
    committer = Committer(store, "sources", every=2)
    twice = [{"source_id": "a"}]
    committer.add(store.write_unit("sources", "one", twice))
    with pytest.raises(DamagedData, match="Nothing was added"):
        committer.add(store.write_unit("sources", "two", twice))
    assert check_keys(store, "candidates") == 3
    assert check_keys(store, "sources") == 0
    assert len(Committer(store, "sources", every=2).done) == 1  # of two that share a row one is published
    assert check_keys(store, "sources") == 1


def test_keys_that_are_there_twice_are_named(store: Store) -> None:
    for _ in range(2):
        lance.write_dataset(schema.to_table("candidates", _rows(0)), store.uri("candidates"), mode="append")
    with pytest.raises(DamagedData, match="3 keys more than once"):
        check_keys(store, "candidates")


def test_the_ledger_is_plain_json(store: Store) -> None:
    store.write_unit("candidates", "u0", _rows(0))
    files = os.listdir(store.root / "_ledger" / "candidates")
    assert len(files) == 1
    entry = json.loads((store.root / "_ledger" / "candidates" / files[0]).read_text())
    assert (entry["unit"], entry["rows"]) == ("u0", 3)
