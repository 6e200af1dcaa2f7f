"""Timelines: read once on a node, kept there, and the same however they were got."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from factory import timeline
from factory.candidates import candidate_frames
from factory.sources import describe_source, segments_of
from factory.timeline import timeline_of
from factory.video import Segment, VideoConfig
from tests.footage import patterns, write_film


@pytest.fixture
def config(tmp_path: Path) -> VideoConfig:
    return VideoConfig(cache_folder=str(tmp_path / "cache"), segment_seconds=1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each reading of a film from its start to its end."""
    found: list[str] = []
    read = timeline._read
    monkeypatch.setattr(timeline, "_read", lambda uri: found.append(uri) or read(uri))
    return found


def segments(path: Path, config: VideoConfig) -> list[Segment]:
    return segments_of(describe_source(str(path), config))


def test_all_segments_of_a_film_read_it_once(tmp_path: Path, config: VideoConfig, reads: list[str]) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(4, 24))

    def rows() -> list[dict]:
        return [row for segment in segments(path, config) for row in candidate_frames(segment, config)]

    first = rows()
    assert len(first) == len(segments(path, config)) == 4
    assert reads == [str(path)]
    for file in Path(config.cache_folder).rglob("*.npz"):
        file.unlink()
    assert rows() == first
    assert len(reads) == 2


def test_two_workers_at_once_read_it_once(tmp_path: Path, config: VideoConfig, reads: list[str]) -> None:
    segment = segments(write_film(tmp_path / "f.mp4", patterns(2, 24)), config)[0]
    found: list[timeline.Timeline] = []
    workers = [threading.Thread(target=lambda: found.append(timeline_of(segment, config))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert len(reads) == 1
    for other in found[1:]:
        assert np.array_equal(other.times, found[0].times)
        assert np.array_equal(other.keys, found[0].keys)
        assert (other.unseen, other.interlaced, other.bars) == (found[0].unseen, found[0].interlaced, found[0].bars)


def test_no_more_than_a_few_are_kept(
    tmp_path: Path, config: VideoConfig, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (segment,) = segments(film, config)
    for i in range(6):
        timeline_of(replace(segment, source_id=f"ab{i:062}"), config)
    left = sorted(file.name[:64] for file in Path(config.cache_folder).rglob("*.npz"))
    assert left == [f"ab{i:062}" for i in range(2, 6)]


def test_without_a_place_to_keep_it_the_film_is_read(tmp_path: Path, film: Path, reads: list[str]) -> None:
    (tmp_path / "file").touch()
    config = VideoConfig(cache_folder=str(tmp_path / "file"))
    (segment,) = segments(film, config)
    assert len(list(candidate_frames(segment, config))) == 2
    assert reads
