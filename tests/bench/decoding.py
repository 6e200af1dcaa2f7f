"""Decode stage (decoding, scoring, shots, choice, JPEG), whole and key frames alone, against a plain decord loop."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import PictureType

from factory.candidates import candidate_frames
from factory.sources import describe_source, segments_of
from factory.toon import plan_clip, write_clip
from factory.video import VideoConfig
from tests.bench.harness import Comparison, compare


def decoding(folder: Path) -> list[Comparison]:
    """Return the comparisons on drawn films of 1280x720; all sides use one decoder thread."""
    film = write_clip(folder / "bench.mp4", plan_clip(7, shots=6, size=(1280, 720)))
    sparse = _recoded(film, folder / "sparse.mp4", gop=120)

    def ours(path: Path, config: VideoConfig) -> int:
        source = describe_source(str(path), config)
        for segment in segments_of(source):
            for _ in candidate_frames(segment, config):
                pass
        return round(source["duration"] * source["fps"])

    return [
        compare(
            "decode stage / plain decord loop, 720p",
            "frames/s",
            lambda: ours(film, VideoConfig()),
            lambda: _plain(film),
        ),
        compare(
            "key frames every 5 s / plain decord loop, 720p",
            "frames of film/s",
            lambda: ours(sparse, VideoConfig(frames="keyframes")),
            lambda: _plain(sparse),
        ),
    ]


def _plain(film: Path) -> int:
    import decord

    reader = decord.VideoReader(str(film), num_threads=1)
    for low in range(0, len(reader), 16):
        reader.get_batch(list(range(low, min(low + 16, len(reader))))).asnumpy()
    return len(reader)


def _recoded(film: Path, into: Path, *, gop: int, times: int = 4) -> Path:
    """Write the film `times` times over as H.264 with a key frame every `gop` frames and nowhere else."""
    with av.open(str(into), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "sc_threshold": "0"})
        stream.gop_size, stream.pix_fmt = gop, "yuv420p"
        stream.width, stream.height, stream.codec_context.time_base = 1280, 720, Fraction(1, 24)
        count = 0
        for _ in range(times):
            with av.open(str(film)) as source:
                for frame in source.decode(video=0):
                    frame.pts, frame.time_base = count, Fraction(1, 24)
                    frame.pict_type = PictureType.NONE  # or the film's own key frames would stay
                    container.mux(stream.encode(frame))
                    count += 1
        container.mux(stream.encode())
    return into
