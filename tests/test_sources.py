"""What can be given as sources: names, links, things that are no film, files that change, and one source more."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from factory import intake, pipeline, schema, settings, tasks, worker
from factory.config import FactoryConfig, micro
from factory.decode import decode
from factory.sources import describe_source, find_sources, segments_of
from factory.store import UNITS, NotFinished, Store
from factory.video import VideoConfig
from tests.conftest import REPO
from tests.footage import patterns, write_film

LIMITS = {"deadline_seconds": 30, "memory_limit_mb": 4000}
NAMES = ("two words.mp4", 'it\'s "quoted".mp4', "new\nline.mp4", "映画 é.mp4", "-x ;$(y)`z`.mp4", "[a]%20#?*.mp4")


def _config(*overrides: str) -> FactoryConfig:
    return settings.load(micro(), None, ["split.validation_share=0", *overrides])


def _describe(path: object) -> dict[str, Any]:
    return describe_source(str(path), VideoConfig())


def test_folders_files_and_globs_are_found(tmp_path: Path) -> None:
    for name in ("a.mp4", "b/c.MKV", "b/p.JPG", "b/notes.txt", ".hidden.mp4", ".thumbnails/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_sources([str(tmp_path)]) == [str(tmp_path / name) for name in ("a.mp4", "b/c.MKV", "b/p.JPG")]
    assert find_sources([f"file://{tmp_path}/b"]) == find_sources([f"{tmp_path}/b/*.[MJ]*"])
    assert len(find_sources([str(tmp_path / "*.mp4"), str(tmp_path / "a.mp4")])) == 1
    assert find_sources([f"{tmp_path}/*"]) == find_sources([str(tmp_path)])  # folders that a glob matches are walked
    assert find_sources([f"{tmp_path}/b/*.txt"]) == find_sources([f"{tmp_path}/b/notes.txt"])
    assert find_sources([str(tmp_path / "b/notes.txt")]) == [str(tmp_path / "b/notes.txt")]
    with pytest.raises(FileNotFoundError, match="No video at"):
        find_sources([str(tmp_path / "*.avi")])


@pytest.mark.parametrize(
    "location",
    [
        "https://example.org/film.mp4",
        "http://example.org/f.m3u8",
        "rtsp://camera",
        "file://host/film.mkv",
        "s3:///film.mkv",
        "s3://key:secret@bucket/film.mkv",
        "s3://bucket/film.mkv?endpoint_override=elsewhere",
    ],
)
def test_only_paths_and_object_stores_are_sources(location: str) -> None:
    with pytest.raises(ValueError, match="cannot be a source") as error:
        find_sources([location])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("location", ["concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "pipe:0"])
def test_protocols_of_ffmpeg_are_names_of_files(location: str) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        find_sources([location])


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read(film: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copy(film, path)
    assert find_sources([str(tmp_path)]) == find_sources([str(path)]) == [str(path)]
    row = _describe(path)
    assert (row["status"], row["uri"]) == ("pending", str(path))
    assert len(list(decode(segments_of(row)[0], VideoConfig()))) == 24


def test_a_name_that_is_no_text_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").touch()
    with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb"):
        pass
    bad, good = find_sources([str(tmp_path)])
    assert bad.endswith(r"caf\xe9.mp4")
    assert good.endswith("good.mp4")
    assert _describe(bad)["status"] == "failed"


def test_links_to_files_are_followed_and_links_to_folders_are_not(film: Path, tmp_path: Path) -> None:
    (tmp_path / "out-of-root.mp4").symlink_to(film)
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "to-nothing.mp4").symlink_to(tmp_path / "absent.mp4")
    (tmp_path / "itself.mp4").symlink_to(tmp_path / "itself.mp4")
    rows = {Path(path).name: _describe(path) for path in find_sources([str(tmp_path)])}
    assert {name: row["status"] for name, row in rows.items()} == {
        "itself.mp4": "failed",
        "out-of-root.mp4": "pending",
        "to-nothing.mp4": "failed",
    }
    assert rows["to-nothing.mp4"]["error"] == "cannot be read: No such file or directory"


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (path,) = find_sources([str(tmp_path)])
    assert find_sources([path]) == [path]
    (row,) = worker.run_killable("tests.test_sources:_described", path, **LIMITS)
    assert (row["status"], row["error"]) == ("failed", "cannot be read: it is no regular file")


def _described(path: str, user: int | None = None) -> Iterator[dict[str, Any]]:
    """For a process of its own: the rows of what is found at `path`, by another user where one is given."""
    if user is not None:
        os.seteuid(user)
    yield from (_describe(found) for found in find_sources([path]))


def test_what_may_not_be_read_is_a_failed_row(film: Path) -> None:
    user = 65534 if os.geteuid() == 0 else None  # root may read everything: somebody else looks
    with tempfile.TemporaryDirectory() as folder:
        film_file, closed = Path(folder, "film.mp4"), Path(folder, "closed")
        closed.mkdir()
        shutil.copy(film, film_file)
        shutil.copy(film, closed)
        for path, mode in ((film_file, 0), (closed, 0), (Path(folder), 0o755)):
            path.chmod(mode)
        rows = list(worker.run_killable("tests.test_sources:_described", folder, user, **LIMITS))
        closed.chmod(0o755)
    assert {row["uri"]: row["error"] for row in rows} == {
        str(film_file): "cannot be read: Permission denied",
        str(closed): "cannot be read: it is a folder that may not be listed",
    }


def test_a_folder_named_like_a_film_is_a_folder(film: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x.mp4"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="No video at"):
        find_sources([str(folder)])
    shutil.copy(film, folder)
    assert find_sources([str(tmp_path)]) == find_sources([str(folder)]) == [str(folder / "film.mp4")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.mp4", b""),
        ("text.mp4", b"this is no film\n" * 50),
        ("header.mp4", b"\x00\x00\x00\x18ftypmp42" + bytes(28)),
        ("empty.png", b""),
        ("text.png", b"this is no picture\n" * 50),
    ],
)
def test_what_is_neither_film_nor_picture_is_a_failed_row(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    row = _describe(tmp_path / name)
    assert row["status"] == "failed"
    assert row["error"].startswith("not a video" if name.endswith(".mp4") else "not a picture")
    assert len(row["source_id"]) == 64


_HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffconcat version 1.0\nfile film.mp4\n", "refused: its format is none of "),
        (_HLS.format("film.mp4"), "not a video that can be opened"),
        (_HLS.format("http://127.0.0.1:1/film.mp4"), "not a video that can be opened"),
    ],
    ids=["concat", "hls", "http"],
)
def test_a_playlist_named_like_a_film_opens_no_other_file(film: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copy(film, tmp_path)
    path = tmp_path / "playlist.mp4"
    path.write_text(text)
    row = _describe(path)
    assert row["status"] == "failed"
    assert row["error"].startswith(message)
    if text.startswith("ff"):
        with av.open(str(path)) as container:  # as it comes, the library follows it
            assert container.streams.video


def _grown(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("change", "message"),
    [(_grown, "changed after it was hashed. Build again."), (os.remove, "No such file or directory")],
    ids=["grown", "gone"],
)
def test_a_film_that_changes_before_it_is_decoded_is_not_decoded(
    film: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    path = tmp_path / "f.mp4"
    shutil.copy(film, path)
    store = Store(str(tmp_path / "root"))
    store.create()
    (segment,) = segments_of(_describe(path))
    change(path)
    entry = json.loads(tasks.DecodeSegment(store, _config())(asdict(segment))["entry"])
    assert message in entry["error"]
    assert entry["source_id"] == segment.source_id
    assert not store.ledger("candidates")


def test_a_source_that_changed_in_a_build_is_recorded_and_taken_up_by_the_next(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for i, name in enumerate(("good.mp4", "grows.mp4", "goes.mp4")):
        write_film(films / name, patterns(3 + i, 12))
    picture = films / "goes.jpg"
    shutil.copy(REPO / "docs/demo.jpg", picture)
    (films / "late.mp4").symlink_to(tmp_path / "late")
    store, describe = Store(str(tmp_path / "root")), intake.add_sources
    store.create()

    def described_then_changed(*args: Any) -> set[str]:
        built = describe(*args)
        _grown(films / "grows.mp4")
        (films / "goes.mp4").rename(tmp_path / "aside")
        picture.rename(tmp_path / "picture")
        return built

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "add_sources", described_then_changed)
        pipeline.decode(store, find_sources([str(films)]), _config())
    rows = {Path(row["uri"]).name: row for row in store.table("sources").to_table().to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good.mp4": "ok",
        "grows.mp4": "failed",
        "goes.mp4": "failed",
        "goes.jpg": "failed",
        "late.mp4": "failed",
    }
    assert "changed after it was hashed" in rows["grows.mp4"]["error"]
    assert all("No such file" in rows[name]["error"] for name in ("goes.mp4", "goes.jpg"))

    (tmp_path / "aside").rename(films / "goes.mp4")
    (tmp_path / "picture").rename(picture)
    write_film(tmp_path / "late.mkv", patterns(1, 12)).rename(tmp_path / "late")
    pipeline.decode(store, find_sources([str(films)]), _config())
    found = [(Path(r["uri"]).name, r["status"]) for r in store.table("sources").to_table().to_pylist()]
    # what grew is another source: what it was cannot be read any more; what could not be read at all is one row now
    assert sorted(found) == [
        ("goes.jpg", "ok"),
        ("goes.mp4", "ok"),
        ("good.mp4", "ok"),
        ("grows.mp4", "failed"),
        ("grows.mp4", "ok"),
        ("late.mp4", "ok"),
    ]


def test_a_source_that_comes_and_goes_is_always_in_the_table(ray_session: str, film: Path, tmp_path: Path) -> None:
    store, path = Store(str(tmp_path / "root")), tmp_path / "late.mp4"
    store.create()
    path.symlink_to(tmp_path / "late")
    for there in (False, True, False):
        if there:
            shutil.copy(film, tmp_path / "late")
        else:
            (tmp_path / "late").unlink(missing_ok=True)
        built = intake.add_sources(store, [str(path)], _config())
        found = store.table("sources").to_table(columns=["source_id", "status"]).to_pylist()
        assert {row["source_id"]: row["status"] for row in found}[built.pop()] == ("pending" if there else "failed")


def test_sources_of_the_lots_before_a_crash_are_not_read_again(
    ray_session: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    for name, count in (("a.mp4", 3), ("b.mp4", 4), ("c.mp4", 3), ("d.mp4", 5), ("e.mp4", 6)):  # a and c are alike
        write_film(folder / name, patterns(count, 4))
    shutil.copy(folder / "a.mp4", folder / "c.mp4")
    whole, store = Store(str(tmp_path / "whole")), Store(str(tmp_path / "root"))
    whole.create()
    store.create()
    intake.add_sources(whole, find_sources([str(folder)]), _config())
    monkeypatch.setattr(intake, "_UNITS_PER_LOT", 2)
    run_tasks, lots = intake.run_tasks, []

    def crashing(stage: str, task: Any, rows: list[Any], *args: Any) -> Iterator[Any]:
        lots.append([Path(row["uris"][0]).name for row in rows])
        if len(lots) == 2:
            raise KeyboardInterrupt
        return run_tasks(stage, task, rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(intake, "run_tasks", crashing)
        with pytest.raises(KeyboardInterrupt):
            intake.add_sources(store, find_sources([str(folder)]), _config())
    assert lots == [["a.mp4", "b.mp4"], ["c.mp4", "d.mp4"]]
    for name in ("a.mp4", "b.mp4"):  # whoever reads one of them finds another source
        path = folder / name
        found = path.stat()
        path.write_bytes(bytes(found.st_size))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    intake.add_sources(store, find_sources([str(folder)]), _config())
    rows, expected = (s.table("sources").to_table().sort_by("source_id").to_pylist() for s in (store, whole))
    assert rows == expected
    assert sorted(Path(row["uri"]).name for row in rows) == ["a.mp4", "b.mp4", "d.mp4", "e.mp4"]


def test_a_file_that_no_worker_survives_holds_no_other_up(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("a.mp4", 3), ("b.mp4", 4), ("c.mp4", 5)):
        write_film(tmp_path / name, patterns(count, 4))
    store, run_tasks = Store(str(tmp_path / "root")), intake.run_tasks
    store.create()

    def deadly(stage: str, task: Any, rows: list[Any], *args: Any) -> Iterator[Any]:
        spared = [row for row in rows if not row["uris"][0].endswith("b.mp4")]
        yield from run_tasks(stage, task, spared, *args)
        if len(spared) < len(rows):
            raise NotFinished("b.mp4 has no answer")

    with monkeypatch.context() as patch:
        patch.setattr(intake, "run_tasks", deadly)
        patch.setattr(intake, "_UNITS_PER_LOT", 2)
        with pytest.raises(NotFinished, match=r"b\.mp4 has no answer"):
            intake.add_sources(store, find_sources([str(tmp_path)]), _config())
    uris = store.table("sources").to_table(columns=["uri"])["uri"].to_pylist()
    assert sorted(Path(uri).name for uri in uris) == ["a.mp4", "c.mp4"]
    assert len(intake.add_sources(store, find_sources([str(tmp_path)]), _config())) == 3


def test_one_source_more_than_fifty_is_the_only_one_that_is_read_and_decoded(
    ray_session: str, film: Path, tmp_path: Path
) -> None:
    folder, config = tmp_path / "series", _config("video.segment_seconds=0.4")
    folder.mkdir()
    for i in range(46):
        blocks = np.random.default_rng(i).integers(0, 255, (9, 16, 3), np.uint8)
        Image.fromarray(cv2.resize(blocks, (320, 180), interpolation=cv2.INTER_NEAREST)).save(folder / f"{i}.png")
    for i in range(4):
        write_film(folder / f"{i}.mp4", patterns(2, 12)[i + 1 :])
    store = Store(str(tmp_path / "root"))
    store.create()
    pipeline.decode(store, find_sources([str(folder)]), config)
    before, version = _decoded(store), store.table("candidates").version
    assert (before["sources"].num_rows, before["candidates"].num_rows) == (50, 46 + 4 * 2)
    for path in folder.iterdir():  # whoever reads or decodes one of them finds another source, or none
        kept = path.stat()
        path.write_bytes(bytes(kept.st_size))
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))

    pipeline.decode(store, find_sources([str(folder), str(film)]), config)
    after, added = _decoded(store), segments_of(describe_source(str(film), config.video))
    assert len(added) == 2
    for name, table in before.items():
        assert after[name].filter(pc.field("source_id") != added[0].source_id).equals(table)
    new = after["candidates"].filter(pc.field("source_id") == added[0].source_id)
    assert set(new["segment_id"].to_pylist()) == {segment.segment_id for segment in added}
    committed = [store.table("candidates").read_transaction(v) for v in store.digests("candidates").versions()]
    named = [json.loads((t.transaction_properties or {}).get(UNITS, "[]")) for t in committed[version:] if t]
    assert {unit for units in named for unit in units} == {segment.segment_id for segment in added}


def _decoded(store: Store) -> dict[str, pa.Table]:
    """The rows of sources and candidates, without pictures, in the order of their keys."""
    return {
        name: store.table(name)
        .to_table(columns=[field.name for field in schema.TABLES[name] if not schema.is_blob(field)])
        .sort_by(schema.KEYS[name])
        for name in ("sources", "candidates")
    }
