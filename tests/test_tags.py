"""Tags: one name for a version of all tables, by which a trainer pins its data."""

from __future__ import annotations

from pathlib import Path

import lance
import pytest

from factory import schema, tags
from factory.__main__ import DONE, USAGE, main
from factory.committer import Committer
from factory.store import Store, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "root"))
    store.create()
    return store


def _add(store: Store, source: str) -> None:
    Committer(store, "sources", every=1).add(store.write_unit("sources", source, [{"source_id": source}]))


def test_a_tag_names_the_present_version_of_all_tables(store: Store) -> None:
    _add(store, "a")
    versions = tags.tag(store, "round-1")
    assert versions == {name: store.table(name).version for name in schema.TABLES}
    _add(store, "b")
    assert tags.tags(store) == {"round-1": versions}
    assert lance.dataset(store.uri("sources"), version="round-1").count_rows() == 1
    assert store.table("sources").count_rows() == 2
    with pytest.raises(StoreError, match=r"'round-1' is taken: it names sources 2, .*--delete"):
        tags.tag(store, "round-1")


def test_a_tag_that_a_crash_left_on_some_tables_is_set_anew(store: Store) -> None:
    store.table("sources").tags.create("half", 1)
    _add(store, "a")
    assert "not on all tables" in tags.describe(tags.tags(store))
    assert tags.tag(store, "half")["sources"] == 2
    assert tags.tags(store)["half"]["sources"] == 2


@pytest.mark.parametrize("name", ["7", "", "a b", "../x", "é"])
def test_a_name_that_would_be_read_as_something_else_is_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="use letters"):
        tags.tag(store, name)


def test_the_command_tags_lists_and_takes_off(store: Store, capsys: pytest.CaptureFixture) -> None:
    root = ["--root", str(store.root)]
    assert main(["tag", *root]) == DONE
    assert capsys.readouterr().out == "no tags\n"
    assert main(["tag", "v1.0", *root]) == DONE
    assert capsys.readouterr().out == "v1.0                 sources 1, candidates 1, samples 1, edits 1\n"
    assert main(["tag", "v1.0", *root]) == USAGE
    assert main(["tag", "v1.0", "--delete", *root]) == DONE
    assert capsys.readouterr().out == "no tags\n"
    assert main(["tag", "v1.0", "--delete", *root]) == USAGE
    assert "No tag 'v1.0'" in capsys.readouterr().err
    assert main(["tag", "--root", str(store.root / "absent")]) == USAGE
