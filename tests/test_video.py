"""Films to candidates: cuts, time stamps, segments, and files that break."""

from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from factory import worker
from factory.candidates import candidate_frames
from factory.decode import decode
from factory.picture import decode_image
from factory.sources import describe_source, find_sources, segments_of
from factory.video import Segment, VideoConfig


def write_film(
    path: Path, frames: list[np.ndarray], *, times: list[int] | None = None, gop: int = 12, **options: str
) -> Path:
    """Write RGB frames as H.264 at 24 fps, or at `times` in ms."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "12", "threads": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patterns(count: int, frames_each: int, size: tuple[int, int] = (320, 180)) -> list[np.ndarray]:
    """`count` shots of `frames_each` frames: random blocks, a new set of them per shot, shifting slowly."""
    frames = []
    for shot in range(count):
        blocks = np.random.default_rng(shot).integers(40, 250, (9, 16, 3), np.uint8)
        picture = np.kron(blocks, np.ones((size[1] // 9, size[0] // 16, 1), np.uint8))
        frames += [np.roll(picture, i, axis=1) for i in range(frames_each)]
    return frames


def candidates(path: Path, config: VideoConfig | None = None) -> list[dict]:
    config = config or VideoConfig()
    source = describe_source(str(path), config)
    assert source["status"] == "pending", source
    return [row for segment in segments_of(source) for row in candidate_frames(segment, config)]


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.mp4", b"", "not a video"),
        ("text.mp4", b"this is no film\n" * 50, "not a video"),
        ("header.mp4", b"\x00\x00\x00\x18ftypmp42" + bytes(28), "not a video"),
    ],
    ids=["empty", "text", "header"],
)
def test_what_is_no_film_is_a_failed_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    row = describe_source(str(path), VideoConfig())
    assert row["status"] == "failed"
    assert message in row["error"]
    assert len(row["source_id"]) == 64


def test_mpeg_ts_is_refused_since_the_decoder_misplaces_its_frames(tmp_path: Path) -> None:
    row = describe_source(str(write_film(tmp_path / "f.ts", patterns(3, 24))), VideoConfig())
    assert row["status"] == "failed"
    assert "MPEG-TS" in row["error"]
    assert "ffmpeg" in row["error"]


@pytest.mark.parametrize("name", ["f.mp4", "f.mkv", "f.flv", "f.mov"])
def test_every_container_gives_the_frame_that_is_shown_at_the_time(tmp_path: Path, name: str) -> None:
    """Each frame carries its own number as grey level: what is stored must be the frame that its time stamp says."""
    texture = np.random.default_rng(0).integers(0, 60, (180, 320, 3))
    frames = [np.clip(texture + 3 * i, 0, 255).astype(np.uint8) for i in range(60)]
    path = write_film(tmp_path / name, frames)
    source = describe_source(str(path), VideoConfig())
    segment = replace(segments_of(source)[0], start=1.8)
    for _, timestamp, image in decode(segment, VideoConfig(overlap_seconds=1.0)):
        expected = frames[round(timestamp * 24)].mean()
        assert abs(image.mean() - expected) < 2.0, (timestamp, image.mean(), expected)


def test_an_unreadable_file_keeps_an_identity(tmp_path: Path) -> None:
    row = describe_source(str(tmp_path / "gone.mp4"), VideoConfig())
    assert (row["status"], "cannot be read" in row["error"]) == ("failed", True)


def test_a_film_that_breaks_midway_fails_in_bounded_time(tmp_path: Path) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(6, 24), movflags="faststart")
    size = path.stat().st_size
    os.truncate(path, size // 2)
    source = describe_source(str(path), VideoConfig())
    (segment,) = segments_of(source)
    start = time.monotonic()
    rows, error = _run("factory.candidates:candidate_frames", segment, VideoConfig(), deadline_seconds=20)
    assert error
    assert time.monotonic() - start < 25
    assert all(row["image"] for row in rows)


def test_all_that_lies_before_the_damage_is_given_each_time(tmp_path: Path) -> None:
    path = write_film(tmp_path / "f.mp4", patterns(6, 24), movflags="faststart")
    whole = candidates(path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    (segment,) = segments_of(describe_source(str(path), VideoConfig()))
    found = [
        _run("factory.candidates:candidate_frames", segment, VideoConfig(), "av", deadline_seconds=60) for _ in "ab"
    ]
    assert found[0] == found[1]
    rows, error = found[0]
    assert "Invalid data" in error
    assert [row["image_sha256"] for row in rows[:3]] == [row["image_sha256"] for row in whole[:3]]


def turn(path: Path, into: Path) -> None:
    """Copy an MP4 with the display matrix of a film that was taken upright."""
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    into.write_bytes(data)


def test_both_decoders_give_the_same_rows(films: Path, tmp_path: Path) -> None:
    shifted = write_film(tmp_path / "f.mkv", patterns(4, 20), times=[1000 + 40 * i + i % 3 for i in range(80)])
    turned = tmp_path / "turned.mp4"
    turn(write_film(tmp_path / "t.mp4", patterns(4, 20)), turned)
    for path in (next(films.glob("*.mp4")), shifted, turned):
        config = VideoConfig(segment_seconds=1)
        segments = segments_of(describe_source(str(path), config))
        assert len(segments) > 1
        for segment in segments:
            rows, others = (list(candidate_frames(segment, config, name)) for name in ("decord", "av"))
            assert [row["shot"] for row in rows] == [row["shot"] for row in others]
            for row, other in zip(rows, others, strict=True):
                assert row["frame_id"] == other["frame_id"]
                assert path != turned or row["width"] < row["height"]
                images = [decode_image(one["image"]).astype(int) for one in (row, other)]
                assert np.abs(images[0] - images[1]).mean() < 2


def test_a_worker_that_spins_is_ended_and_what_it_gave_stays() -> None:
    start = time.monotonic()
    rows, error = _run("tests.test_video:_spins", deadline_seconds=8)
    assert rows == [1, 2]
    assert "not finished after 8 s" in error
    assert time.monotonic() - start < 16
    with pytest.raises(worker.WorkerEnded, match="code -9"):
        list(worker.run_killable("tests.test_video:_dies", deadline_seconds=30))
    with pytest.raises(worker.WorkerFailed, match="a reason"):
        list(worker.run_killable("tests.test_video:_raises", deadline_seconds=30))


def _run(function: str, *args: object, deadline_seconds: float) -> tuple[list, str]:
    """What came before the failure, and the failure's words."""
    rows: list = []
    try:
        for row in worker.run_killable(function, *args, deadline_seconds=deadline_seconds):
            rows.append(row)
    except worker.WorkerFailed as error:
        return rows, str(error)
    return rows, ""


def _spins():
    yield 1
    yield 2
    # one call that never returns and never lets go of the GIL
    import re

    re.match(r"(a+)+$", "a" * 64 + "b")


def _dies():
    yield 1
    os.kill(os.getpid(), 9)


def _raises():
    yield 1
    raise ValueError("a reason")


def test_find_sources(tmp_path: Path) -> None:
    for name in ("a.mp4", "b/c.MKV", "b/notes.txt", "-x ;$(y)'.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [os.path.relpath(p, tmp_path) for p in find_sources([str(tmp_path)])]
    assert names == ["-x ;$(y)'.webm", "a.mp4", "b/c.MKV"]
    assert len(find_sources([str(tmp_path / "*.mp4"), str(tmp_path / "a.mp4")])) == 1
    with pytest.raises(FileNotFoundError, match="No video at"):
        find_sources([str(tmp_path / "*.avi")])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="jpeg_quality"):
        VideoConfig(jpeg_quality=0)
    segment = Segment(source_id="0" * 64, uri="x", start=0, end=1.5)
    assert segment.segment_id == "0000000000000000@0-1500000"
    assert replace(segment, start=1.0).segment_id != segment.segment_id
