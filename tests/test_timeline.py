"""Timelines: read once on a node, kept there, and the same however they were got; a place at which that fails costs no
more than its own segment."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import decode, settings, tasks, timeline, worker
from factory.bars import FilmBars
from factory.committer import Committer
from factory.config import micro
from factory.fetch import SourceChanged
from factory.sources import describe_source, segments_of
from factory.store import Store
from factory.timeline import read_timeline, timeline_of
from factory.video import Segment, VideoConfig
from tests.footage import patterns, write_film
from tests.test_worker import _spins


@pytest.fixture
def config(tmp_path: Path) -> VideoConfig:
    return VideoConfig(cache_folder=str(tmp_path / "cache"), segment_seconds=1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each reading of a film from its start to its end."""
    found: list[str] = []
    run = worker.run_killable

    def noted(function: str, uri: str, **limits: Any) -> Iterator[Any]:
        found.append(uri)
        return run(function, uri, **limits)

    monkeypatch.setattr(timeline, "run_killable", noted)
    return found


def segments(path: Path, config: VideoConfig) -> list[Segment]:
    return segments_of(describe_source(str(path), config))


def kept(config: VideoConfig) -> list[Path]:
    return sorted(Path(config.cache_folder).rglob("*.npz"))


def same(one: timeline.Timeline, other: timeline.Timeline) -> bool:
    arrays = np.array_equal(one.times, other.times) and np.array_equal(one.keys, other.keys)
    facts = [(found.unseen, found.interlaced, found.bars) for found in (one, other)]
    return arrays and facts[0] == facts[1]


def built(folder: Path, segments: list[Segment], *changes: str) -> list[dict[str, Any]]:
    """The entries of the film's segments, decoded into a new store in `folder`."""
    store = Store(str(folder / "root"))
    store.create()
    task = tasks.DecodeSegment(store, settings.load(micro(), None, [f"video.cache_folder={folder}/cache", *changes]))
    return [json.loads(task(asdict(segment))["entry"]) for segment in segments]


def test_all_segments_of_a_film_read_it_once(tmp_path: Path, config: VideoConfig, reads: list[str]) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(4, 24))
    entries = built(tmp_path, segments(path, config))
    assert [entry["rows"] for entry in entries] == [1] * 4
    assert reads == [str(path)]
    first, *_ = segments(path, config)
    assert same(timeline_of(first, replace(config, cache_folder=f"{tmp_path}/cache")), read_timeline(str(path)))


def test_two_workers_at_once_read_it_once(tmp_path: Path, config: VideoConfig, reads: list[str]) -> None:
    segment = segments(write_film(tmp_path / "f.mp4", patterns(2, 24)), config)[0]
    found: list[timeline.Timeline] = []
    workers = [threading.Thread(target=lambda: found.append(timeline_of(segment, config))) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert len(found) == 4
    assert len(reads) == 1
    assert all(same(other, found[0]) for other in found)


def test_of_a_film_that_changes_meanwhile_none_is_kept(
    film: Path, tmp_path: Path, config: VideoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film.mp4"
    shutil.copy(film, path)
    (segment,) = segments(path, config)
    monkeypatch.setattr(timeline, "_read", lambda uri, _: path.touch() or read_timeline(uri))
    with pytest.raises(SourceChanged, match="changed after it was hashed"):
        timeline_of(segment, config)
    assert not kept(config)


def test_no_more_than_a_few_are_kept(film: Path, config: VideoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (segment,) = segments(film, config)
    monkeypatch.setattr(timeline, "_read", lambda uri, _: read_timeline(uri))
    monkeypatch.setattr(timeline, "_KEPT", 4)
    for i in range(6):
        timeline_of(replace(segment, source_id=f"{i}b{i:062}"), config)
    assert [file.parent.name for file in kept(config)] == [f"{i}b{i:062}" for i in range(2, 6)]


def test_without_a_place_to_keep_it_the_film_is_read(tmp_path: Path, film: Path, reads: list[str]) -> None:
    (tmp_path / "file").touch()
    config = VideoConfig(cache_folder=str(tmp_path / "file"))
    (segment,) = segments(film, config)
    assert same(timeline_of(segment, config), read_timeline(str(film)))
    assert reads


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: bytes(len(data)), lambda data: data[: len(data) // 2]]
)
def test_a_damaged_one_is_read_anew(
    film: Path, config: VideoConfig, reads: list[str], damage: Callable[[bytes], bytes]
) -> None:
    (segment,) = segments(film, config)
    whole = timeline_of(segment, config)
    (file,) = kept(config)
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert same(timeline_of(segment, config), whole)
    assert len(reads) == 2
    assert same(timeline_of(segment, config), whole)
    assert len(reads) == 2


@pytest.mark.parametrize("other", ["PyAV", "code", "limits"])
def test_one_by_other_versions_or_within_other_limits_is_not_taken(
    film: Path, config: VideoConfig, reads: list[str], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (segment,) = segments(film, config)
    timeline_of(segment, config)
    if other == "PyAV":
        monkeypatch.setattr(timeline.av, "__version__", "1.2.3")
    if other == "code":
        monkeypatch.setattr(timeline, "VERSION", "1")
    if other == "limits":
        config = replace(config, memory_limit_mb=5000)
    timeline_of(segment, config)
    assert len(reads) == 2


def test_another_film_s_reading_is_not_waited_for(film: Path, config: VideoConfig) -> None:
    (segment,) = segments(film, config)
    timeline_of(segment, config)
    lock = next(Path(config.cache_folder).rglob(".lock"))
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = replace(segment, source_id=segment.source_id[:-1] + "x")
        assert len(timeline_of(other, config).times)


def test_waiting_for_the_timeline_does_not_count_against_the_deadline(
    tmp_path: Path, film: Path, config: VideoConfig
) -> None:
    (segment,) = segments(film, replace(config, segment_seconds=300))
    timeline_of(segment, config)
    limits = ("video.deadline_seconds=6", "video.deadline_per_second=0")
    lock = next(Path(config.cache_folder).rglob(".lock"))
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(8, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        start = time.monotonic()
        (entry,) = built(tmp_path, [segment], *limits)
    assert time.monotonic() - start > 7
    assert entry["unit"] == segment.segment_id
    assert entry["rows"] == 2


@pytest.mark.parametrize("failure", ["crash", "hang"])
def test_samples_that_cannot_be_taken_leave_a_timeline_without(
    tmp_path: Path, config: VideoConfig, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(5, 24), gop=6)
    segment, *_ = segments(path, config)
    whole = read_timeline(str(path))
    assert whole.bars.seen is not None
    starts = fail_at_the_end(monkeypatch, failure)
    found = timeline_of(segment, replace(config, deadline_seconds=6))
    assert same(found, replace(whole, bars=FilmBars()))
    assert same(timeline_of(segment, replace(config, deadline_seconds=6)), found)
    assert len(starts) == 1


def test_a_film_keeps_all_segments_but_the_one_in_which_the_decoder_crashes(
    tmp_path: Path, config: VideoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(5, 24), gop=6)
    pieces = segments(path, replace(config, segment_seconds=2))
    good = rows_of(tmp_path / "good", pieces)
    fail_at_the_end(monkeypatch, "crash")
    found = rows_of(tmp_path / "bad", pieces)
    assert len(pieces) == 3
    last = pieces[-1].segment_id
    assert [row for row in found if row["segment_id"] != last] == [row for row in good if row["segment_id"] != last]
    assert [row["status"] for row in found if row["segment_id"] == last] == ["failed"]


def rows_of(folder: Path, segments: list[Segment]) -> list[dict[str, Any]]:
    entries = built(folder, segments, "video.max_shot_seconds=0.5")
    store = Store(str(folder / "root"))
    committer = Committer(store, "candidates", every=len(entries))
    for entry in entries:
        committer.add(entry)
    committer.flush()
    columns = ["frame_id", "segment_id", "status", "shot_end", "image_sha256"]
    return store.table("candidates").to_table(columns=columns).sort_by("frame_id").to_pylist()


def fail_at_the_end(monkeypatch: pytest.MonkeyPatch, failure: str) -> list[str]:
    """Let all decoding fail near the film's end, at 4.75 s; return the readings of timelines from here on."""
    run, found = worker.run_killable, []

    def failing(function: str, *args: Any, **limits: Any) -> Iterator[Any]:
        if function.startswith("factory.timeline:"):
            found.append(function)
        return run(f"{__name__}:_fails", failure, function, *args, **limits)

    for module in (timeline, worker):
        monkeypatch.setattr(module, "run_killable", failing)
    return found


def _fails(failure: str, function: str, *args: Any) -> Iterator[Any]:
    def until_near_the_end(frame: Any, *more: Any) -> np.ndarray:
        if frame.time >= 4.75:
            if failure == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            list(_spins())
        return picture(frame, *more)

    picture = timeline.picture
    timeline.picture = decode.picture = until_near_the_end
    module, _, name = function.partition(":")
    yield from getattr(importlib.import_module(module), name)(*args)
