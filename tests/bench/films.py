"""Drawn films for the speed benchmarks: drawn once, kept in out/bench/films."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import PictureType

from factory.toon import plan_clip, write_clip

FOLDER = Path("out/bench/films")
FPS = 24


def drawn(seed: int, *, shots: int, size: tuple[int, int], gop: int, times: int = 1) -> Path:
    """Return a film of `shots` drawn shots, 1 to 2 s each, shown `times` times over.

    H.264 in MP4, 24 fps, with a key frame every `gop` frames and nowhere else.
    """
    path = FOLDER.resolve() / f"{seed}-{shots}x{times}-{size[0]}x{size[1]}-{gop}.mp4"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        once = write_clip(path.with_name("once.mp4"), plan_clip(seed, shots=shots, fps=FPS, size=size))
        part = path.with_suffix(".part.mp4")
        _write(once, part, size=size, gop=gop, times=times)
        part.rename(path)
        once.unlink()
    return path


def frames_of(path: Path) -> int:
    """Return the number of frames in a film, by its header."""
    with av.open(str(path)) as container:
        return container.streams.video[0].frames


def _write(film: Path, into: Path, *, size: tuple[int, int], gop: int, times: int) -> None:
    with av.open(str(into), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "sc_threshold": "0"})
        stream.gop_size, stream.pix_fmt = gop, "yuv420p"
        stream.width, stream.height = size
        count = 0
        for _ in range(times):
            with av.open(str(film)) as source:
                for frame in source.decode(video=0):
                    frame.pts, frame.time_base = count, Fraction(1, FPS)
                    frame.pict_type = PictureType.NONE  # or the film's own key frames would stay
                    container.mux(stream.encode(frame))
                    count += 1
        container.mux(stream.encode())
