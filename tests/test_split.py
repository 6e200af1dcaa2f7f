"""Splits: by source whatever its names, and what a user is told of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from factory import intake, pipeline, status
from factory.__main__ import main
from factory.config import FactoryConfig, micro
from factory.settings import load
from factory.sources import find_sources
from factory.split import SplitConfig, notes, split_of
from factory.store import Store
from tests.footage import patterns, write_film


def _source(number: int, *uris: str) -> dict[str, Any]:
    return {"source_id": f"{number * 0x11111111:08x}" + "0" * 56, "uri": uris[0], "other_uris": list(uris[1:])}


def _config(*more: str) -> FactoryConfig:
    return load(micro(), None, ["split.validation_share=0", "caption.model=rule:colours-1", *more])


def test_a_folder_of_pictures_is_in_one_split() -> None:
    config = SplitConfig(validation_share=0.5)
    splits = {name: {split_of(_source(i, f"/stills/{name}/{i}.png"), config) for i in range(16)} for name in "abcdefgh"}
    assert all(len(split) == 1 for split in splits.values())
    assert {next(iter(split)) for split in splits.values()} == {"train", "validation"}
    assert len({split_of(_source(i, f"/films/a/{i}.mp4"), config) for i in range(16)}) == 2
    held = SplitConfig(holdout=("two words",), validation_share=0)
    assert split_of(_source(0, "s3://bucket/two%20words/a.png"), held) == "validation"


def test_a_film_is_held_out_by_any_of_its_names() -> None:
    config = SplitConfig(holdout=("*-ep12.mkv", "pilot"), validation_share=0)
    assert split_of(_source(1, "/a/show-ep12.mkv"), config) == "validation"
    assert split_of(_source(1, "/a/copy.mkv", "/b/show-ep12.mkv"), config) == "validation"
    assert split_of(_source(1, "/a/copy.mkv", "/pilot/x.mkv"), config) == "validation"
    assert split_of(_source(1, "/a/copy.mkv", "/b/other.mkv"), config) == "train"


def test_notes_tell_what_holds_nothing_out_and_what_stays_as_it_is() -> None:
    sources = [_source(i, f"/films/{i}.mp4") for i in range(5)]
    splits = {source["source_id"]: "train" for source in sources}
    assert notes(sources, splits, SplitConfig(validation_share=0)) == []
    assert notes(sources, {}, SplitConfig(holdout=("*.mp4", "9.mp4"))) == []  # they have no samples yet
    nothing = " of split.holdout holds nothing out: no source of that name has samples"
    assert notes(sources, splits, SplitConfig(holdout=("9.mp4",), validation_share=0)) == [f"'9.mp4'{nothing}"]
    dropped = [*sources, _source(5, "/films/5.mp4")]  # nothing of it was kept
    assert notes(dropped, splits, SplitConfig(holdout=("5.mp4",), validation_share=0)) == [f"'5.mp4'{nothing}"]
    (note,) = notes(sources, splits, SplitConfig(holdout=("*.mp4",), validation_share=0))
    assert note.startswith("5 source(s) stay in train, though these settings would have them in validation: 0.mp4, 1")
    (note,) = notes([_source(0, "/a/0.mp4", "/b/z.mp4")], splits, SplitConfig(holdout=("z.mp4",), validation_share=0))
    assert note.startswith(
        "1 source(s) stay in train, though these settings would have them in validation: 0.mp4 (also"
    )
    held = {key: "validation" for key in splits}
    (note,) = notes(sources[:2], held, SplitConfig(validation_share=0))
    assert note.startswith("2 source(s) stay in validation, though these settings would have them in train: 0.mp4, 1.m")


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder with two films, one of which is there under two names."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_film(folder / "a.mp4", patterns(2, 12, (480, 270)))
    write_film(folder / "b.mp4", patterns(3, 12, (480, 270))[24:])
    shutil.copy(folder / "a.mp4", folder / "z.mp4")
    return folder


def test_a_copy_is_held_out_whichever_name_is_recorded(ray_session: str, copies: Path, store: Store) -> None:
    config = _config("split.holdout=[z.mp4]")
    pipeline.build(store, find_sources([str(copies)]), config)
    sources = {Path(row["uri"]).name: row for row in store.table("sources").to_table().to_pylist()}
    assert {name: row["other_uris"] for name, row in sources.items()} == {"a.mp4": [str(copies / "z.mp4")], "b.mp4": []}
    splits = store.table("samples").to_table(columns=["source_id", "split"]).to_pylist()
    by_source = {row["source_id"]: row["split"] for row in splits}
    assert by_source[sources["a.mp4"]["source_id"]] == "validation"
    assert by_source[sources["b.mp4"]["source_id"]] == "train"
    version = store.table("sources").version
    pipeline.decode(store, find_sources([str(copies)]), config)
    assert store.table("sources").version == version


def test_a_name_that_comes_later_is_told_where_it_can_no_longer_hold_out(
    ray_session: str, copies: Path, store: Store, capsys: pytest.CaptureFixture
) -> None:
    root = ["--root", str(store.root), "--set", "caption.model=rule:colours-1", "--set", "split.validation_share=0"]
    assert main(["build", str(copies / "a.mp4"), *root, "--set", "split.holdout=[z.mp4]"]) == 0
    assert "split    'z.mp4' of split.holdout holds nothing out" in capsys.readouterr().out
    assert main(["build", str(copies), "--root", str(store.root)]) == 0
    assert "split    1 source(s) stay in train, though these settings would" in capsys.readouterr().out
    assert main(["status", "--root", str(store.root)]) == 0
    assert "split   1 source(s) stay in train" in capsys.readouterr().out
    (note,) = status.split_notes(store, _config("split.holdout=[z.mp4]"))
    assert "a.mp4 (also z.mp4). A model may have been trained with them; for another split build into a new" in note


def test_a_name_counts_while_the_same_bytes_are_there(ray_session: str, copies: Path, store: Store) -> None:
    def names() -> dict[str, list[str]]:
        intake.add_sources(store, find_sources([str(copies)]), _config())
        rows = store.table("sources").to_table().to_pylist()
        return {Path(row["uri"]).name: [Path(uri).name for uri in row["other_uris"]] for row in rows}

    assert names() == {"a.mp4": ["z.mp4"], "b.mp4": []}
    (copies / "a.mp4").rename(copies / "moved.mp4")
    assert names() == {"moved.mp4": ["z.mp4"], "b.mp4": []}
    shutil.copy(copies / "b.mp4", copies / "z.mp4")  # other bytes at its place
    assert names() == {"moved.mp4": [], "b.mp4": ["z.mp4"]}
    (copies / "z.mp4").unlink()
    version = store.table("sources").version
    assert names() == {"moved.mp4": [], "b.mp4": ["z.mp4"]}  # it may come back
    assert store.table("sources").version == version


def test_empty_files_are_sources_of_their_own(ray_session: str, tmp_path: Path, film: Path, store: Store) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).touch()

    def errors() -> dict[str, str | None]:
        intake.add_sources(store, find_sources([str(folder)]), _config())
        return {Path(row["uri"]).name: row["error"] for row in store.table("sources").to_table().to_pylist()}

    assert errors() == dict.fromkeys(("a.mp4", "b.mp4"), "not a video: the file is empty")
    shutil.copy(film, folder / "b.mp4")
    assert errors() == {"a.mp4": "not a video: the file is empty", "b.mp4": None}
