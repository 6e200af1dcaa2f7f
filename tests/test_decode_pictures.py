"""Decoded pictures: colours, bit depth, size, shape of pixels, rotation and fields, against known answers."""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, ColorTrc

from factory.decode import decode, decode_in_order
from factory.sources import describe_source, segments_of
from factory.video import VideoConfig
from tests.footage import candidates, join, patterns, write_film

COLOURS = np.uint8([[200, 60, 40], [40, 180, 70], [50, 60, 220], [230, 230, 30], [128, 128, 128], [250, 250, 250]])
# Weights of red and blue in luma (ITU-T H.273, table 4)
LUMA = {Colorspace.ITU709: (0.2126, 0.0722), Colorspace.ITU601: (0.299, 0.114), Colorspace.BT2020: (0.2627, 0.0593)}
X265 = {"x265-params": "log-level=none:lossless=1"}
LOSSLESS = {"yuv420p": ("libx264", {"crf": "0"}), "yuv420p10le": ("libx265", X265)}


def pictures(path: Path, decoder=decode) -> list[np.ndarray]:
    source = describe_source(str(path), VideoConfig())
    assert source["status"] == "pending", source["error"]
    return [frame[2] for frame in decoder(segments_of(source)[0], VideoConfig())]


def stripes(matrix: Colorspace, full: bool, pix_fmt: str, size: tuple[int, int] = (192, 48)) -> av.VideoFrame:
    """A frame of stripes in COLOURS, computed here (ITU-T H.273, equations 38 to 55)."""
    bits = 10 if pix_fmt.endswith("10le") else 8
    red, blue = LUMA[matrix]
    r, g, b = (COLOURS / 255).T
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))]
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    luma = y * top if full else (16 + 219 * y) * scale
    channels = [luma, *(c * top + 128 * scale if full else (128 + 224 * c) * scale for c in chroma)]
    frame = av.VideoFrame(*size, pix_fmt)
    for plane, values in zip(frame.planes, channels, strict=True):
        pixels = np.frombuffer(plane, np.uint16 if bits > 8 else np.uint8).reshape(plane.height, -1)
        pixels[:, : plane.width] = np.round(values).astype(int)[np.arange(plane.width) * len(COLOURS) // plane.width]
    frame.colorspace, frame.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
    return frame


@pytest.mark.parametrize(("matrix", "full", "pix_fmt"), list(product(LUMA, [False, True], LOSSLESS)))
def test_colours_are_those_that_were_filmed(tmp_path: Path, matrix: Colorspace, full: bool, pix_fmt: str) -> None:
    codec, encoder = LOSSLESS[pix_fmt]
    tags = {"colorspace": matrix, "color_range": ColorRange.JPEG if full else ColorRange.MPEG}
    frames = [stripes(matrix, full, pix_fmt) for _ in range(4)]
    path = write_film(tmp_path / "film.mkv", frames, codec=codec, pix_fmt=pix_fmt, encoder=encoder, tags=tags)
    centres = (2 * np.arange(len(COLOURS)) + 1) * 192 // (2 * len(COLOURS))
    for decoder in (decode, decode_in_order):
        image = pictures(path, decoder)[2]
        assert np.abs(image[24, centres].astype(int) - COLOURS).max() <= 3


def test_10_bits_become_the_8_that_ffmpeg_gives(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", patterns(1, 6), codec="ffv1", pix_fmt="yuv420p10le")
    with av.open(str(path)) as container:
        reference = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for decoder in (decode, decode_in_order):
        for image, expected in zip(pictures(path, decoder), reference, strict=True):
            assert np.abs(image.astype(int) - expected).mean() < 1  # they differ where chroma is scaled up


@pytest.mark.parametrize(("transfer", "word"), [(ColorTrc.SMPTE2084, "PQ"), (ColorTrc.ARIB_STD_B67, "HLG")])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv"])
def test_hdr_is_refused_with_the_command_that_tone_maps(
    tmp_path: Path, name: str, transfer: ColorTrc, word: str
) -> None:
    tags = {"color_trc": transfer, "colorspace": Colorspace.BT2020}
    path = write_film(tmp_path / name, patterns(1, 6), codec="libx265", pix_fmt="yuv420p10le", tags=tags, encoder=X265)
    row = describe_source(str(path), VideoConfig())
    assert row["status"] == "failed"
    assert f"refused: the film is HDR ({word})" in row["error"]
    assert "ffmpeg -i IN -vf zscale" in row["error"]


@pytest.mark.parametrize("size", [(63, 47), (481, 271), (48, 160)])
def test_odd_and_narrow_sizes_are_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.stack([np.tile(np.linspace(0, 250, width), (height, 1))] * 3, axis=2).astype(np.uint8)
    path = write_film(tmp_path / "film.mkv", [ramp] * 3, codec="ffv1", pix_fmt="yuv444p")
    for decoder in (decode, decode_in_order):
        image = pictures(path, decoder)[1]
        assert image.shape == (height, width, 3)
        assert np.abs(image.astype(int) - ramp).max() <= 3


@pytest.mark.parametrize(
    ("aspect", "shape"), [(Fraction(4, 3), (270, 640)), (Fraction(8, 9), (304, 480)), (Fraction(1), (270, 480))]
)
def test_pixels_become_square_by_the_longer_side(tmp_path: Path, aspect: Fraction, shape: tuple[int, int]) -> None:
    tags = {"sample_aspect_ratio": aspect}
    path = write_film(tmp_path / "film.mp4", patterns(1, 3, (480, 270)), tags=tags)
    for decoder in (decode, decode_in_order):
        assert pictures(path, decoder)[0].shape == (*shape, 3)


def test_pixels_of_an_absurd_shape_are_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", patterns(1, 3), tags={"sample_aspect_ratio": Fraction(6, 1)})
    assert (
        "refused: the film's pixels are 6 times as wide as high" in describe_source(str(path), VideoConfig())["error"]
    )


@pytest.mark.parametrize(("rotation", "side"), [(-90, "bottom"), (90, "top"), (180, "left")])
def test_a_turned_film_is_shown_upright(tmp_path: Path, rotation: int, side: str) -> None:
    picture = np.full((96, 192, 3), 30, np.uint8)
    picture[:, 160:] = 220  # what is stored at the right
    path = write_film(tmp_path / "film.mp4", [picture] * 3, rotation=rotation)
    if rotation == -90:  # the display matrix of a telephone held upright: right (1, 0) becomes down (0, 1)
        assert struct.pack(">5i", 0, 1 << 16, 0, -1 << 16, 0) in path.read_bytes()
    for decoder in (decode, decode_in_order):
        image = pictures(path, decoder)[1].mean(axis=2)
        edges = {"bottom": image[-8:], "top": image[:8], "left": image[:, :8], "right": image[:, -8:]}
        assert image.shape == ((96, 192) if rotation == 180 else (192, 96))
        assert {name for name, edge in edges.items() if edge.mean() > 200} == {side}


def woven(fields: list[np.ndarray]) -> list[np.ndarray]:
    """Two fields of a moving edge, woven into one frame as a camera does."""
    frames = []
    for even, odd in zip(fields[::2], fields[1::2], strict=True):
        picture = np.empty((192, 320, 3), np.uint8)
        picture[::2], picture[1::2] = even[None, :, None], odd[None, :, None]
        frames.append(picture)
    return frames


def combs(image: np.ndarray) -> float:
    return np.abs(np.diff(image[:, :, 1].astype(int), axis=0)).mean()


FIELDS = [np.where(np.arange(320) < 40 + 10 * i, 220, 30).astype(np.uint8) for i in range(24)]


def test_interlaced_frames_lose_their_combs(tmp_path: Path) -> None:
    frames = woven(FIELDS)
    encoder = {"x264-params": "tff=1"}
    path = write_film(tmp_path / "film.mp4", frames, encoder=encoder, pix_fmt="yuv444p")
    for number, image in enumerate(pictures(path)):
        assert combs(frames[number]) > 5
        assert combs(image) < 1
        grey = image[:, :, 1].astype(int)
        assert min(np.abs(grey[96] - FIELDS[2 * number + i]).mean() for i in (0, 1)) < 1  # one moment


def interlaced_late(folder: Path) -> Path:
    """Write a film that begins with twelve progressive frames, a second of them."""
    still = [np.repeat(np.repeat(FIELDS[0][None, :, None], 192, 0), 3, 2)] * 12
    options = {"pix_fmt": "yuv444p", "rate": 12, "gop": 6}
    params = "repeat-headers=1:bframes=0"
    parts = [
        write_film(folder / "a.mkv", still, encoder={"x264-params": params}, **options),
        write_film(folder / "b.mkv", woven(FIELDS) * 2, encoder={"x264-params": f"{params}:tff=1"}, **options),
    ]
    return join(folder / "film.mkv", parts)


def test_a_film_that_begins_progressive_loses_its_combs_too(tmp_path: Path) -> None:
    images = pictures(interlaced_late(tmp_path))
    assert len(images) == 36
    assert max(combs(image) for image in images) < 1


@pytest.mark.parametrize("frames", ["shots", "keyframes", "interval"])
def test_interlaced_films_give_the_same_rows_for_any_segment_length(tmp_path: Path, frames: str) -> None:
    texture = np.random.default_rng(0).integers(40, 220, (192, 320, 3), np.uint8)
    options = {"gop": 6, "rate": 12, "encoder": {"x264-params": "tff=1"}}
    path = write_film(tmp_path / "f.mkv", [np.roll(texture, i // 18, 0) for i in range(48)], **options)

    def rows(seconds: float) -> list[tuple]:
        config = VideoConfig(segment_seconds=seconds, frames=frames, interval_seconds=0.5)
        return [(row["frame_id"], row["image_sha256"]) for row in candidates(path, config)]

    assert len(rows(300)) >= (5 if frames != "shots" else 1)
    assert rows(0.5) == rows(300)
