"""Decode stage (decoding, scoring, shots, choice, JPEG) on one core: whole and key frames alone, and a plain loop."""

from __future__ import annotations

from pathlib import Path

from factory.candidates import candidate_frames
from factory.sources import describe_source, segments_of
from factory.video import VideoConfig
from tests.bench.films import FPS, drawn, frames_of
from tests.bench.harness import Comparison, compare

_KEY_FRAMES = VideoConfig(frames="keyframes")


def decoding(folder: Path) -> list[Comparison]:
    """Return the comparisons on drawn films of 1280x720, 19 s and 76 s long; one decoder thread on all sides.

    Frames are those of the film that is covered, whether decoded or not.
    """
    film = drawn(7, shots=12, size=(1280, 720), gop=5 * FPS, times=4)
    short = drawn(7, shots=12, size=(1280, 720), gop=2 * FPS)
    return [
        compare("decode stage / plain decord loop", "frames/s", lambda: _stage(short), lambda: _plain(short), rounds=3),
        compare(
            "decode stage, key frames every 5 s / all frames",
            "frames/s",
            lambda: _stage(film, _KEY_FRAMES),
            lambda: _stage(film),
            rounds=3,
        ),
        compare(
            "decode stage, key frames every 5 s / plain decord loop over all frames",
            "frames/s",
            lambda: _stage(film, _KEY_FRAMES),
            lambda: _plain(film),
        ),
    ]


def _stage(path: Path, config: VideoConfig | None = None) -> int:
    config = config or VideoConfig()
    source = describe_source(str(path), config)
    rows = [row for segment in segments_of(source) for row in candidate_frames(segment, config)]
    assert rows
    return frames_of(path)


def _plain(film: Path) -> int:
    import decord

    reader = decord.VideoReader(str(film), num_threads=1)
    for low in range(0, len(reader), 16):
        reader.get_batch(list(range(low, min(low + 16, len(reader))))).asnumpy()
    return len(reader)
