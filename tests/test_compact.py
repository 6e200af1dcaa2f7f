"""Compaction and clean-up: fewer fragments, the same rows, tags and committed units as before; strays gone."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lance
import pytest
from lance.fragment import FragmentMetadata

from factory import compact, tags
from factory import store as store_module
from factory.__main__ import DONE, UNFINISHED, main
from factory.committer import Committer
from factory.store import DamagedData, Store
from factory.verify import verify
from tests.test_verify import files_of, picture_rows

NOW = timedelta(0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Six units of three candidates and one without rows, each its own commit; the first fragment was updated."""
    store = Store(str(tmp_path / "root"))
    store.create()
    committer = Committer(store, "candidates", every=1)
    for unit in range(6):
        committer.add(store.write_unit("candidates", f"u{unit}", picture_rows(unit)))
    committer.add(store.write_unit("candidates", "empty", []))
    committer.add(store.write_updates("candidates", 0, [{"frame_id": "0000-1", "status": "kept", "score": 2.5}]))
    return store


def _contents(store: Store, version: int | str | None = None) -> tuple[int, int]:
    table = lance.dataset(store.uri("candidates"), version=version)
    return compact.contents(table, "candidates", table.get_fragments())


def test_fragments_are_merged_and_their_rows_stay(store: Store) -> None:
    before = _contents(store)
    done = compact.compact(store, "candidates", rows=9, older_than=NOW)
    assert (done.fragments_before, done.fragments_after) == (6, 2)
    assert _contents(store) == before
    assert before[0] == 18
    assert verify(store).damaged == verify(store).unrecorded == []
    assert len(files_of(store, ".lance")) == 2  # old ones are gone
    again = compact.compact(store, "candidates", rows=9, older_than=NOW)
    assert (again.fragments_before, again.fragments_after) == (2, 2)


def test_the_contents_cover_order_values_and_pictures(store: Store, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "other"))
    other.create()
    committer = Committer(other, "candidates", every=9)
    for unit in (5, 4, 3, 2, 1, 0):
        committer.add(other.write_unit("candidates", f"u{unit}", picture_rows(unit)))
    committer.flush()
    assert _contents(other) != _contents(store)
    Committer(other, "candidates", every=1).add(
        other.write_updates("candidates", 5, [{"frame_id": "0000-1", "status": "kept", "score": 2.5}])
    )
    assert _contents(other) == _contents(store)
    longer = [row | {"image": row["image"] + b"!"} for row in picture_rows(7)]
    for place, rows in ((store, picture_rows(7)), (other, longer)):
        Committer(place, "candidates", every=1).add(place.write_unit("candidates", "u7", rows))
    assert _contents(other) != _contents(store)


def test_committed_units_stay_known_when_history_is_pruned(store: Store) -> None:
    units = store.committed_units("candidates")
    compact.compact(store, "candidates", rows=9, older_than=NOW)
    assert len(store.table("candidates").versions()) == 1
    assert store.committed_units("candidates") == units == {*(f"u{i}" for i in range(6)), "empty"}
    late = store.write_unit("candidates", "u3", picture_rows(3))  # by a worker that outlived its driver
    committer = Committer(store, "candidates", every=1)
    committer.add(late)
    committer.add(store.write_unit("candidates", "u6", picture_rows(6)))
    assert store.table("candidates").count_rows() == 21
    assert store.committed_units("candidates") == units | {"u6"}
    assert store.ledger("candidates") == []


def test_tagged_versions_and_young_ones_stay(store: Store) -> None:
    tags.tag(store, "round-1")
    before = _contents(store)
    tagged = store.table("candidates").version
    compact.compact(store, "candidates", rows=9, older_than=timedelta(days=14))
    assert len(store.table("candidates").versions()) > 8
    compact.compact(store, "candidates", rows=9, older_than=NOW)
    assert store.table("candidates").versions()[0]["version"] == tagged
    assert _contents(store, "round-1") == _contents(store) == before
    assert verify(store).damaged == []


def test_what_a_crash_left_is_published_or_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_unit("candidates", "u7", picture_rows(7))  # killed after the ledger
    with monkeypatch.context() as patch:  # stopped before it
        patch.setattr("factory.store.write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write_unit("candidates", "u8", picture_rows(8))
    assert len(files_of(store, ".lance")) == 9
    compact.compact(store, "candidates", rows=3, older_than=timedelta(days=14))
    assert store.table("candidates").count_rows() == 21
    assert "u7" in store.committed_units("candidates")
    assert len(files_of(store, ".lance")) == 8  # the stray is gone
    records = (store.root / "_digests" / "candidates").glob("[01]*.json")
    assert {path.stem for path in records} == {path.stem for path in files_of(store, ".lance")}


def test_halves_of_files_that_a_crash_left_are_removed(store: Store) -> None:
    halves = [store.root / folder / "candidates" / ".x.json.0123abcd.tmp" for folder in ("_ledger", "_digests")]
    for half in halves:
        half.write_text("{")
    compact.compact(store, "candidates", rows=9, older_than=NOW)
    assert not any(half.exists() for half in halves)


def test_a_worker_that_outlived_its_run_loses_its_files_to_a_clean_up_and_its_unit_is_done_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write = store_module.write_atomic

    def compact_first(path: Path, data: str) -> None:  # between the unit's files and its ledger entry
        compact.compact(Store(str(store.root)), "candidates", rows=9, older_than=NOW)
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_atomic", compact_first)
        store.write_unit("candidates", "u7", picture_rows(7))
    committer = Committer(store, "candidates", every=1)
    assert "u7 is done again" in capsys.readouterr().out
    assert "u7" not in committer.done
    assert store.ledger("candidates") == []
    committer.add(store.write_unit("candidates", "u7", picture_rows(7)))
    assert store.table("candidates").count_rows() == 21
    assert verify(store).damaged == []


@pytest.mark.parametrize("change", ["value", "picture", "row"])
def test_a_compaction_that_would_change_rows_is_not_published(
    store: Store, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that goes wrong, as Lance's did (lance #8123 and others): one row is another in the new fragment."""
    before, version = _contents(store), store.table("candidates").version
    rows = [row for unit in range(6) for row in picture_rows(unit)]
    rows[1] |= {"status": "kept", "score": 2.5}
    if change == "value":
        rows[4]["sharpness"] = 0.5
    elif change == "picture":
        rows[4]["image"] = rows[5]["image"]
    else:
        rows.pop()
    wrong = store.write_unit("candidates", "wrong", rows)
    store.strike("candidates", "wrong")

    result = SimpleNamespace(new_fragments=[FragmentMetadata.from_json(json.dumps(f)) for f in wrong["fragments"]])
    replaced = [fragment.metadata for fragment in store.table("candidates").get_fragments()]
    plan = SimpleNamespace(tasks=[SimpleNamespace(fragments=replaced, execute=lambda _: result)])
    monkeypatch.setattr(compact.Compaction, "plan", lambda *_: plan)
    with pytest.raises(DamagedData, match="would have changed rows"):
        compact.compact(store, "candidates", rows=99, older_than=NOW)
    assert store.table("candidates").version == version
    assert _contents(store) == before


def test_the_command_compacts_all_tables_and_waits_for_no_writer(store: Store, capsys: pytest.CaptureFixture) -> None:
    arguments = ["compact", "--root", str(store.root), "--older-than", "0"]
    assert main(arguments) == DONE
    assert "candidates: 6 -> 1 fragments" in capsys.readouterr().out
    with store.lock():
        assert main(arguments) == UNFINISHED
    assert "is being written by process" in capsys.readouterr().err
