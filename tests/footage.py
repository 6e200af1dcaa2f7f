"""Small films written by PyAV for tests: any codec, container, time stamps and tags; frames that say their number; and
the candidates of a film."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from factory.candidates import candidate_frames
from factory.sources import describe_source, segments_of
from factory.video import VideoConfig

_BITS = 8  # of a frame's number


def write_film(
    path: Path,
    frames: Iterable[np.ndarray | av.VideoFrame],
    *,
    codec: str = "libx264",
    rate: int = 24,
    times: list[int] | None = None,
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    encoder: dict[str, str] | None = None,
    tags: dict[str, Any] | None = None,
    rotation: int = 0,
    **muxer: str,
) -> Path:
    """Write RGB frames H,W,3 (or frames of PyAV's) at `rate` fps, or at `times` in ms.

    `tags` are attributes of the codec context (colorspace, sample_aspect_ratio, ...), `encoder` and `muxer` options of
    FFmpeg's, `rotation` the degrees that the display matrix says.
    """
    defaults = {"crf": "12"} if codec in ("libx264", "libx265") else {}
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", **defaults, **(encoder or {})})
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image, format="rgb24")
            if not i:
                stream.height, stream.width = frame.height, frame.width
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def join(path: Path, films: list[Path]) -> Path:
    """Write the packets of `films`, which share a codec and have no B-frames, one film after the other."""
    with av.open(str(path), "w") as output:
        stream = None
        offset = 0
        for film in films:
            with av.open(str(film)) as container:
                source = container.streams.video[0]
                stream = stream or output.add_stream_from_template(source)
                packets = [packet for packet in container.demux(source) if packet.size]
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                    output.mux(packet)
                offset = packets[-1].pts + packets[-1].duration
    return path


def without_start(film: Path, path: Path, *, packets: int) -> Path:
    """Copy the packets of `film` without the first `packets` of them."""
    with av.open(str(film), options={"fflags": "+genpts"}) as container, av.open(str(path), "w") as output:
        source = container.streams.video[0]
        stream = output.add_stream_from_template(source)
        for i, packet in enumerate(container.demux(source)):
            if packet.size and i >= packets:
                packet.stream = stream
                output.mux(packet)
    return path


def patterns(count: int, frames_each: int, size: tuple[int, int] = (320, 180)) -> list[np.ndarray]:
    """`count` shots of `frames_each` frames: random blocks, a new set of them per shot, shifting slowly."""
    frames = []
    for shot in range(count):
        blocks = np.random.default_rng(shot).integers(40, 250, (9, 16, 3), np.uint8)
        picture = np.kron(blocks, np.ones((size[1] // 9, size[0] // 16, 1), np.uint8))
        frames += [np.roll(picture, i, axis=1) for i in range(frames_each)]
    return frames


def numbered(count: int, size: tuple[int, int] = (160, 96)) -> list[np.ndarray]:
    """`count` frames (at most 256) of which each carries its number: eight bars, black for 0 and white for 1."""
    width, height = size
    frames = []
    for number in range(count):
        bits = np.unpackbits(np.uint8([number])) * 200 + 20
        column = np.arange(width) * _BITS // width
        frames.append(np.broadcast_to(bits[column][None, :, None], (height, width, 3)).astype(np.uint8))
    return frames


def number_of(image: np.ndarray) -> int:
    """The number that a frame of `numbered` carries, at any size."""
    height, width = image.shape[:2]
    centres = (np.arange(_BITS) * 2 + 1) * width // (2 * _BITS)
    bits = image[height // 4 : 3 * height // 4, centres].mean(axis=(0, 2)) > 128
    return int(np.packbits(bits)[0])


def candidates(path: Path, config: VideoConfig | None = None) -> list[dict[str, Any]]:
    """The candidates of all segments of the film at `path`, which must be a good one."""
    config = config or VideoConfig()
    source = describe_source(str(path), config)
    assert source["status"] == "pending", source
    return [row for segment in segments_of(source) for row in candidate_frames(segment, config)]
