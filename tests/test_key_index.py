"""The index of keys: what a commit reads of its table, and that a hash alone decides nothing."""

from __future__ import annotations

from typing import Any

import lance
import numpy as np
import pytest

from factory import key_index
from factory.committer import Committer
from factory.key_index import KeyIndex
from factory.store import DamagedData, Store


def _sources(*names: str) -> list[dict[str, Any]]:
    return [{"source_id": name} for name in names]


def _write(store: Store, *names: str) -> dict[str, Any]:
    return store.write_unit("sources", f"unit {names}", _sources(*names))


def test_keys_are_counted_among_those_read_and_those_added(store: Store) -> None:
    committer = Committer(store, "sources", every=1)
    committer.add(_write(store, "a", "it's"))
    index = KeyIndex(store.table("sources"), "source_id")
    assert index.count(store.table("sources"), ["a", "b", "it's", "x' OR '1' = '1"]) == 2
    committer.add(_write(store, "b", "c"))
    index.add(["c", "b"])
    assert index.count(store.table("sources"), ["0", "c", "b", "a", "z"]) == 3
    store.remove("sources", {"b"})
    assert index.count(store.table("sources"), ["b", "c"]) == 1


def test_keys_of_one_hash_are_told_apart(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "_hashes", lambda keys: np.zeros(len(list(keys)), np.int64))
    committer = Committer(store, "sources", every=1)
    for name in "abc":
        committer.add(_write(store, name))
    with pytest.raises(DamagedData, match=r"1 row\(s\) of .* are in table"):
        committer.add(store.write_unit("sources", "other", _sources("d", "b")))
    assert store.table("sources").count_rows() == 3


def test_a_commit_reads_the_keys_of_its_own_fragments_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in "ab":
        Committer(store, "sources", every=1).add(_write(store, f"{unit}1", f"{unit}2"))
    committer = Committer(store, "sources", every=1)
    read: list[int] = []
    scan = lance.LanceDataset.scanner

    def scanner(table: lance.LanceDataset, *args: Any, fragments: Any = None, **more: Any) -> Any:
        read.append(len(table.get_fragments() if fragments is None else fragments))
        return scan(table, *args, fragments=fragments, **more)

    monkeypatch.setattr(lance.LanceDataset, "scanner", scanner)
    for unit in "cdefg":
        committer.add(_write(store, f"{unit}1", f"{unit}2"))
    assert read == [2, 1, 1, 1, 1, 1]  # all that was there, once; then what was added
    monkeypatch.undo()
    assert store.table("sources").count_rows() == 14
    with pytest.raises(DamagedData, match=r"2 row\(s\)"):
        committer.add(store.write_unit("sources", "other", _sources("a1", "g2", "h1")))


def test_the_history_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    committer = Committer(store, "sources", every=1)
    for unit in "abc":
        committer.add(_write(store, unit))
    units = store.committed_units("sources")
    assert len(units) == 3
    read: list[int] = []
    transaction = lance.LanceDataset.read_transaction

    def read_transaction(table: lance.LanceDataset, version: int) -> Any:
        read.append(version)
        return transaction(table, version)

    monkeypatch.setattr(lance.LanceDataset, "read_transaction", read_transaction)
    assert Committer(store, "sources", every=1).done == units
    assert read == []
    (store.root / "_digests" / "sources" / "v000000000003.json").unlink()
    assert Committer(store, "sources", every=1).done == units
    assert read == [3]


def test_what_is_recorded_of_a_manifest_that_was_lost_says_nothing_of_the_next(store: Store) -> None:
    """Killed between a commit and its record, where an older record has its number."""
    Committer(store, "sources", every=1).add(_write(store, "a"))
    digests = store.digests("sources")
    record = store.root / "_digests" / "sources" / "v000000000002.json"
    stale = record.read_text()
    digests.manifest(2).unlink()
    Committer(store, "sources", every=1).add(_write(store, "b"))
    assert store.table("sources").version == 2
    record.write_text(stale)
    assert store.committed_units("sources") == {"unit ('b',)"}
