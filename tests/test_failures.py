"""Whose fault it is that a segment fails: the film's is a row, the machine's is tried again and left open."""

from __future__ import annotations

import errno
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

from factory import candidates, locations, settings, tasks, worker
from factory.config import micro
from factory.sources import describe_source, segments_of
from factory.store import Store
from factory.timeline import Timeline
from factory.video import Segment, VideoConfig
from tests.test_worker import _spins


@pytest.fixture
def segment(film: Path, tmp_path: Path) -> Segment:
    """A copy of the film of two shots, as a segment."""
    path = Path(shutil.copy(film, tmp_path / "film.mp4"))
    (found,) = segments_of(describe_source(str(path), VideoConfig()))
    return found


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
