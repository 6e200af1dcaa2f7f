"""Whose fault a failure is: what the film does is a row, what the machine does is tried again and left open."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from factory import candidates, locations, pipeline, settings, sources, tasks, worker
from factory.config import micro
from factory.sources import describe_source, segments_of
from factory.store import NotFinished, Store
from factory.timeline import Timeline
from factory.video import Segment, VideoConfig
from tests.conftest import REPO
from tests.footage import patterns, write_film
from tests.test_worker import _spins


@pytest.fixture
def segment(film: Path, tmp_path: Path) -> Segment:
    """A copy of the film of two shots, as a segment."""
    path = Path(shutil.copy(film, tmp_path / "film.mp4"))
    (found,) = segments_of(describe_source(str(path), VideoConfig()))
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "root"))
    made.create()
    return made


def decoded(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch, failure: str, decoders: str, *limits: str
) -> dict[str, Any]:
    """What is told of a segment whose worker fails with any of the `decoders`, as _fails does."""
    run = worker.run_killable
    notes = str(store.root.parent / "attempts")
    monkeypatch.setattr(
        worker,
        "run_killable",
        lambda _, *args, **more: run(f"{__name__}:_fails", failure, decoders, notes, *args, **more),
    )
    config = settings.load(micro(), None, ["video.deadline_per_second=0", *limits])
    return json.loads(tasks.DecodeSegment(store, config)(asdict(segment))["entry"])


def _fails(
    failure: str,
    decoders: str,
    notes: str,
    segment: Segment,
    config: VideoConfig,
    in_order: bool,
    timeline: Timeline,
) -> Iterator[dict[str, Any]]:
    decoder = "again" if in_order else "first"
    with open(notes, "a") as file:
        file.write(f"{decoder}\n")
    rows = candidates.candidate_frames(segment, config, in_order, timeline)
    if decoder in decoders.split():
        yield next(rows)
        held = [os.urandom(1_000_000) * 700] if failure == "memory" else []
        if failure in ("hang", "memory"):
            list(_spins())
            held.clear()
        if failure == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if failure == "killed" or (Path(notes).read_text().count("\n") == 1 and failure == "killed once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "gone":
            os.remove(segment.uri)
            failure = "disk"
        if failure in _ERRORS:
            raise _ERRORS[failure]
    yield from rows


_ERRORS = {
    "disk": OSError(errno.EIO, "Input/output error"),
    "damage": RuntimeError("a frame is damaged"),
}


def attempts(store: Store) -> list[str]:
    return (store.root.parent / "attempts").read_text().split()


@pytest.mark.parametrize(
    ("failure", "limit"),
    [("hang", "video.deadline_seconds=8"), ("memory", "video.memory_limit_mb=600"), ("crash", "commit_every=8")],
)
def test_what_ends_the_first_pass_is_read_once_more(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch, failure: str, limit: str
) -> None:
    entry = decoded(store, segment, monkeypatch, failure, "first", limit)
    assert entry["unit"] == segment.segment_id
    assert entry["rows"] == 2
    assert not any(key.endswith("failed") for key in entry["keys"])
    assert attempts(store) == ["first", "again"]


@pytest.mark.parametrize("failure", ["crash", "damage"])
def test_a_film_that_fails_both_times_keeps_what_came_before(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    entry = decoded(store, segment, monkeypatch, failure, "first again")
    assert entry["unit"] == segment.segment_id
    assert entry["rows"] == 2
    assert entry["keys"][-1].endswith("-failed")
    assert attempts(store) == ["first", "again"]


def test_what_no_pass_does_within_the_limits_is_a_row_of_these_limits(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = decoded(store, segment, monkeypatch, "memory", "first again", "video.memory_limit_mb=600")
    assert entry["units"] == [segment.within("120s+0-600MB")]
    assert entry["keys"] == [f"{segment.source_id[:16]}-000000000000-failed-120s+0-600MB"]
    assert attempts(store) == ["first", "again"]


@pytest.mark.parametrize("failure", ["killed", "disk"])
def test_what_the_machine_does_is_tried_again_and_then_left_open(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    entry = decoded(store, segment, monkeypatch, failure, "first")
    assert (entry["source_id"], entry["status"]) == (segment.source_id, "pending")
    assert entry["error"].startswith("decode: ")
    assert not store.ledger("candidates")
    assert attempts(store) == ["first"] * worker.ATTEMPTS


def test_what_the_machine_did_once_changes_nothing(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = decoded(store, segment, monkeypatch, "killed once", "first")
    assert entry["unit"] == segment.segment_id
    assert entry["rows"] == 2
    assert attempts(store) == ["first", "first"]


def test_a_film_that_goes_while_it_is_decoded_is_the_films_failure(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = decoded(store, segment, monkeypatch, "gone", "first")
    assert entry == {
        "source_id": segment.source_id,
        "status": "failed",
        "error": "decode: No such file or directory",
    }
    assert attempts(store) == ["first"]


@pytest.mark.parametrize("failure", ["", "damage", "memory"])
def test_of_a_film_that_changes_after_its_last_row_nothing_is_kept(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    run = worker.run_killable

    def touched_at_its_end(*args: Any, **limits: Any) -> Iterator[Any]:
        try:
            yield from run(*args, **limits)
        finally:
            os.utime(segment.uri)

    monkeypatch.setattr(worker, "run_killable", touched_at_its_end)
    entry = decoded(store, segment, monkeypatch, failure, "first again", "video.memory_limit_mb=600")
    assert entry["status"] == "failed"
    assert "changed after it was hashed" in entry["error"]
    assert not store.ledger("candidates")
    assert not list(Path(store.uri("candidates"), "data").glob("*"))


@pytest.mark.parametrize("place", ["ledger", "cache", "temporary"])
def test_a_folder_of_ours_that_cannot_be_written_is_the_machines_failure(
    store: Store, segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def closed(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    cache = tmp_path / "cache"
    if place == "ledger":
        monkeypatch.setattr("factory.store.write_atomic", closed)
    elif place == "cache":
        cache.touch()  # a file
        segment = replace(segment, uri="s3://bucket/film.mp4")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    config = settings.load(micro(), None, [f"video.cache_folder={cache}"])
    entry = json.loads(tasks.DecodeSegment(store, config)(asdict(segment))["entry"])
    assert (entry["source_id"], entry["status"]) == (segment.source_id, "pending")


def test_a_film_that_is_closed_to_us_is_the_films_failure(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: str, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(locations, "open", closed, raising=False)
    entry = json.loads(tasks.DecodeSegment(store, micro())(asdict(segment))["entry"])
    assert (entry["status"], entry["error"]) == ("failed", "decode: Permission denied")


def _describes(failure_of: dict[str, str], uris: list[str], config: VideoConfig) -> Iterator[dict[str, Any]]:
    for uri in uris:
        failure = failure_of.get(Path(uri).name)
        if failure == "hang":
            list(_spins())
        if failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "disk":
            sources.open_binary = locations.open_binary = _breaks_midway
        if failure == "gone" and os.path.exists(uri):
            os.remove(uri)
        yield from sources.probe_sources([uri], config)


def probing_fails(monkeypatch: pytest.MonkeyPatch, failure_of: dict[str, str]) -> None:
    run = worker.run_killable
    monkeypatch.setattr(
        worker, "run_killable", lambda _, *args, **more: run(f"{__name__}:_describes", failure_of, *args, **more)
    )


def test_a_file_that_hangs_the_prober_is_a_failed_source_and_its_neighbours_are_described(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a.mp4", "hangs.mp4", "killed.mp4", "z.mp4")
    for name in names:
        shutil.copy(film, tmp_path / name)
    uris = [str(tmp_path / name) for name in names]
    probing_fails(monkeypatch, {"hangs.mp4": "hang", "killed.mp4": "killed"})
    config = settings.load(micro(), None, ["video.deadline_seconds=8"])
    rows = json.loads(tasks.DescribeSources(config, [])({"uris": uris})["json"])
    assert [row["status"] for row in rows] == ["pending", "failed", "pending", "pending"]
    assert rows[1]["error"].startswith("not a video that can be opened: not finished after 8")
    assert rows[2]["error"].startswith("probe: the process was killed from outside")
    assert [row.get("segment_starts") for row in rows] == [[0.0], None, None, [0.0]]
    monkeypatch.undo()
    whole = json.loads(tasks.DescribeSources(config, [])({"uris": uris})["json"])
    assert whole == [sources.describe_source(uri, config.video) for uri in uris]
    assert [rows[0], rows[3]] == [whole[0], whole[3]]


def _breaks(monkeypatch: pytest.MonkeyPatch, module: Any, times: int) -> list[str]:
    """Let the disk break in the midst of a file, so many times, for one module; return a list of what it read."""
    read: list[str] = []
    copy = module.copy_stream

    def copies(uri: str, *target: Any) -> str:
        read.append(uri)
        if len(read) <= times:
            raise _ERRORS["disk"]
        return copy(uri, *target)

    monkeypatch.setattr(module, "copy_stream", copies)
    return read


@pytest.mark.parametrize("times", [1, worker.ATTEMPTS])
def test_a_disk_that_breaks_while_a_file_is_hashed_is_tried_again_and_then_left_open(
    film: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    whole = sources.identify(str(film))
    read = _breaks(monkeypatch, sources, times)
    row = sources.identify(str(film))
    if times == 1:
        assert row == whole
    else:
        assert (row["status"], row["error"]) == ("pending", "cannot be read: Input/output error")
        assert len(row["source_id"]) == 64
    assert len(read) == min(times + 1, worker.ATTEMPTS)


@pytest.mark.parametrize("times", [1, worker.ATTEMPTS])
def test_a_disk_that_breaks_while_a_picture_is_read_is_tried_again_and_then_left_open(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    segments = segments_of(describe_source(str(REPO / "docs/demo.jpg"), VideoConfig()))
    whole = list(candidates.picture_candidates(segments, VideoConfig()))
    read = _breaks(monkeypatch, candidates, times)
    (row,) = candidates.picture_candidates(segments, VideoConfig())
    if times == 1:
        assert [row] == whole
    else:
        assert (row["status"], row["error"]) == ("pending", "decode: Input/output error")
    assert len(read) == min(times + 1, worker.ATTEMPTS)


@pytest.mark.parametrize("failure", ["disk", "gone"])
def test_a_disk_that_breaks_while_a_file_is_probed_is_no_failure_of_the_file(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    uris = [shutil.copy(film, tmp_path / "a.mp4"), shutil.copy(REPO / "docs/demo.jpg", tmp_path / "b.jpg")]
    probing_fails(monkeypatch, {Path(uri).name: failure for uri in uris})
    rows = json.loads(tasks.DescribeSources(micro(), [])({"uris": [str(uri) for uri in uris]})["json"])
    if failure == "disk":
        told = ("pending", "probe: [Errno 5] Input/output error")
        assert [(row["status"], row["error"]) for row in rows] == [told] * 2
    else:
        assert [row["status"] for row in rows] == ["failed"] * 2
        assert all(row["error"].endswith("that can be opened: No such file or directory") for row in rows)


def _breaks_midway(uri: str) -> io.BytesIO:
    return _BreaksMidway(Path(uri).read_bytes())


class _BreaksMidway(io.BytesIO):
    """A file whose first bytes alone can be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 0:
            raise _ERRORS["disk"]
        return super().read(4096)


def test_what_the_machine_could_not_open_is_looked_at_by_any_build_that_follows(
    film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, other = shutil.copy(film, tmp_path / "lost.mp4"), shutil.copy(REPO / "docs/demo.jpg", tmp_path / "b.jpg")
    monkeypatch.setattr(pipeline, "run_tasks", lambda stage, task, rows, _: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        _breaks(patch, sources, worker.ATTEMPTS)
        pipeline.add_sources(store, [str(lost)], micro())
    with pytest.raises(NotFinished, match="cannot be read: Input/output error"):
        pipeline.select(store, micro())
    os.remove(lost)
    built = pipeline.add_sources(store, [str(other)], micro())
    rows = store.table("sources").to_table(columns=["source_id", "uri", "status", "error"]).to_pylist()
    assert {(row["uri"], row["status"]) for row in rows} == {(str(lost), "failed"), (str(other), "pending")}
    assert built == {row["source_id"] for row in rows if row["uri"] == str(other)}


def test_nothing_is_selected_without_a_source_that_the_machine_did_not_open(
    film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(film, tmp_path / "film.mp4")
    monkeypatch.setattr(pipeline, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"film.mp4": "killed"})
        pipeline.add_sources(store, [str(path)], micro())
    with pytest.raises(NotFinished, match=r"build again\.\n  .*film\.mp4: probe: the process was killed"):
        pipeline.select(store, micro())
    pipeline.add_sources(store, [str(path)], micro())
    (row,) = store.table("sources").to_table(columns=["status", "error", "segment_starts"]).to_pylist()
    assert row == {"status": "pending", "error": None, "segment_starts": [0.0]}


@pytest.mark.parametrize(
    ("fate", "error"),
    [
        ("gone", "cannot be read: No such file or directory"),
        ("replaced", "it was replaced by another file before it could be opened"),
    ],
)
def test_a_source_that_was_never_opened_and_is_no_more_holds_nothing_up(
    fate: str, error: str, film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Path(shutil.copy(film, tmp_path / "lost.mp4"))
    other = write_film(tmp_path / "other.mp4", patterns(1, 12))
    monkeypatch.setattr(pipeline, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"lost.mp4": "killed"})
        pipeline.add_sources(store, [str(lost)], micro())
        of_other = pipeline.add_sources(store, [str(other)], micro())  # the lost one is tried again, and killed again
    assert _told(store) == {str(lost): ("pending", None), str(other): ("pending", [0.0])}
    if fate == "gone":
        lost.unlink()
    else:
        write_film(lost, patterns(2, 6))
    assert pipeline.add_sources(store, [str(other)], micro()) == of_other
    assert _told(store) == {str(lost): ("failed", None), str(other): ("pending", [0.0])}
    (row,) = store.table("sources").to_table(columns=["error"], filter="status = 'failed'").to_pylist()
    assert row["error"] == error


@pytest.mark.parametrize("moved", [False, True])
def test_a_source_that_the_machine_did_not_open_is_opened_by_the_next_build_of_others(
    moved: bool, film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "film.mp4", tmp_path / "moved.mp4"
    shutil.copy(film, before)
    monkeypatch.setattr(pipeline, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"film.mp4": "killed"})
        pipeline.add_sources(store, [str(before)], micro())
    if moved:
        before.rename(after)
    pipeline.add_sources(store, [str(after)] if moved else [], micro())
    assert _told(store) == {str(after if moved else before): ("pending", [0.0])}


def _told(store: Store) -> dict[str, tuple[str, list[float] | None]]:
    """Status and segment starts of each source, by its uri."""
    rows = store.table("sources").to_table(columns=["uri", "status", "segment_starts"]).to_pylist()
    return {row["uri"]: (row["status"], row["segment_starts"]) for row in rows}
