"""Decode stage (decoding, scoring, shots, choice, JPEG) against a plain decord loop that only decodes."""

from __future__ import annotations

from pathlib import Path

from factory.candidates import candidate_frames
from factory.sources import describe_source, segments_of
from factory.toon import plan_clip, write_clip
from factory.video import VideoConfig
from tests.bench.harness import Comparison, compare


def decoding(folder: Path) -> list[Comparison]:
    """Return the comparison on one drawn film of 1280x720; both sides use one decoder thread."""
    import decord

    film = write_clip(folder / "bench.mp4", plan_clip(7, shots=6, size=(1280, 720)))
    config = VideoConfig()
    source = describe_source(str(film), config)
    frames = len(decord.VideoReader(str(film), num_threads=1))

    def ours() -> int:
        for segment in segments_of(source):
            for _ in candidate_frames(segment, config):
                pass
        return frames

    def plain() -> int:
        reader = decord.VideoReader(str(film), num_threads=1)
        for low in range(0, len(reader), 16):
            reader.get_batch(list(range(low, min(low + 16, len(reader))))).asnumpy()
        return frames

    return [compare("decode stage / plain decord loop, 720p", "frames/s", ours, plain)]
