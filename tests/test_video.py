"""Films to candidates: cuts, time stamps, segments, the frame that is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from factory.candidates import candidate_frames
from factory.picture import decode_image
from factory.sources import describe_source, segments_of
from factory.video import Segment, VideoConfig
from tests.footage import patterns, write_film


def candidates(path: Path, config: VideoConfig | None = None) -> list[dict]:
    config = config or VideoConfig()
    source = describe_source(str(path), config)
    assert source["status"] == "pending", source
    return [row for segment in segments_of(source) for row in candidate_frames(segment, config)]


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


def test_the_rows_are_the_same_for_any_segment_length(tmp_path: Path) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(9, 20))
    whole = candidates(path)
    assert len(whole) == 9
    for seconds in (0.5, 2, 7):
        pieces = candidates(path, VideoConfig(segment_seconds=seconds))
        assert {row["segment_id"] for row in pieces} != {row["segment_id"] for row in whole} or seconds == 7
        assert [row["frame_id"] for row in pieces] == [row["frame_id"] for row in whole]
        assert [row["image_sha256"] for row in pieces] == [row["image_sha256"] for row in whole]


def test_time_comes_from_the_stream_when_the_frame_rate_varies(tmp_path: Path) -> None:
    frames = patterns(3, 12)
    steps = [40] * 12 + [200] * 12 + [20] * 12
    times = [500 + sum(steps[:i]) for i in range(36)]
    path = write_film(tmp_path / "vfr.mkv", frames, times=times)
    rows = candidates(path)
    assert [row["shot_start"] for row in rows] == pytest.approx([0.0, 0.48, 2.88], abs=0.002)
    for row in rows:
        assert row["timestamp"] == pytest.approx((times[row["frame_index"]] - 500) / 1000, abs=0.002)
        assert row["frame_id"].endswith(f"-{round(row['timestamp'] * 1e6):012d}")
    assert describe_source(str(path), VideoConfig())["start_time"] == pytest.approx(0.5)


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
    import cv2

    frames = patterns(1, 24)
    frames = [frame if i == 15 else cv2.GaussianBlur(frame, (0, 0), 4) for i, frame in enumerate(frames)]
    (row,) = candidates(write_film(tmp_path / "f.mp4", frames, gop=1))
    assert row["frame_index"] == 15
    image = decode_image(row["image"])
    assert np.abs(image.astype(int) - frames[15].astype(int)).mean() < 6


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="jpeg_quality"):
        VideoConfig(jpeg_quality=0)
    segment = Segment(source_id="0" * 64, uri="x", start=0, end=1.5, modified_ns=0)
    assert segment.segment_id == "0000000000000000@0-1500000"
    assert replace(segment, start=1.0).segment_id != segment.segment_id
