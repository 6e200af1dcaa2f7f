"""Whose fault it is that a file can't be hashed or opened: the file's is a row, the machine's is tried again."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factory import candidates, intake, locations, pipeline, settings, sources, tasks, worker
from factory.config import micro
from factory.sources import describe_source, segments_of
from factory.store import NotFinished, Store
from factory.video import VideoConfig
from tests.conftest import REPO
from tests.footage import patterns, write_film
from tests.test_worker import _spins

DISK = OSError(errno.EIO, "Input/output error")


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
            raise DISK
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
            raise DISK
        return super().read(4096)


def test_what_the_machine_could_not_open_is_looked_at_by_any_build_that_follows(
    film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, other = shutil.copy(film, tmp_path / "lost.mp4"), shutil.copy(REPO / "docs/demo.jpg", tmp_path / "b.jpg")
    monkeypatch.setattr(intake, "run_tasks", lambda stage, task, rows, _: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        _breaks(patch, sources, worker.ATTEMPTS)
        intake.add_sources(store, [str(lost)], micro())
    with pytest.raises(NotFinished, match="cannot be read: Input/output error"):
        pipeline.select(store, micro())
    os.remove(lost)
    built = intake.add_sources(store, [str(other)], micro())
    rows = store.table("sources").to_table(columns=["source_id", "uri", "status", "error"]).to_pylist()
    assert {(row["uri"], row["status"]) for row in rows} == {(str(lost), "failed"), (str(other), "pending")}
    assert built == {row["source_id"] for row in rows if row["uri"] == str(other)}


def test_nothing_is_selected_without_a_source_that_the_machine_did_not_open(
    film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(film, tmp_path / "film.mp4")
    monkeypatch.setattr(intake, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"film.mp4": "killed"})
        intake.add_sources(store, [str(path)], micro())
    with pytest.raises(NotFinished, match=r"build again\.\n  .*film\.mp4: probe: the process was killed"):
        pipeline.select(store, micro())
    intake.add_sources(store, [str(path)], micro())
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
    monkeypatch.setattr(intake, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"lost.mp4": "killed"})
        intake.add_sources(store, [str(lost)], micro())
        of_other = intake.add_sources(store, [str(other)], micro())  # the lost one is tried again, and killed again
    assert _told(store) == {str(lost): ("pending", None), str(other): ("pending", [0.0])}
    if fate == "gone":
        lost.unlink()
    else:
        write_film(lost, patterns(2, 6))
    assert intake.add_sources(store, [str(other)], micro()) == of_other
    assert _told(store) == {str(lost): ("failed", None), str(other): ("pending", [0.0])}
    (row,) = store.table("sources").to_table(columns=["error"], filter="status = 'failed'").to_pylist()
    assert row["error"] == error


@pytest.mark.parametrize("moved", [False, True])
def test_a_source_that_the_machine_did_not_open_is_opened_by_the_next_build_of_others(
    moved: bool, film: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "film.mp4", tmp_path / "moved.mp4"
    shutil.copy(film, before)
    monkeypatch.setattr(intake, "run_tasks", lambda _, task, rows, __: (task(row) for row in rows))  # without Ray
    with monkeypatch.context() as patch:
        probing_fails(patch, {"film.mp4": "killed"})
        intake.add_sources(store, [str(before)], micro())
    if moved:
        before.rename(after)
    intake.add_sources(store, [str(after)] if moved else [], micro())
    assert _told(store) == {str(after if moved else before): ("pending", [0.0])}


def _told(store: Store) -> dict[str, tuple[str, list[float] | None]]:
    """Status and segment starts of each source, by its uri."""
    rows = store.table("sources").to_table(columns=["uri", "status", "segment_starts"]).to_pylist()
    return {row["uri"]: (row["status"], row["segment_starts"]) for row in rows}
