"""Decoding: whatever the container, the codec and the time stamps, the frame that a player shows at the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from factory import decode as decode_module
from factory.decode import Decoded, _film, _nearest, decode, decode_in_order
from factory.sources import describe_source, segments_of
from factory.video import Segment, VideoConfig
from tests.footage import join, number_of, numbered, without_start, write_film

CONFIG = VideoConfig(overlap_seconds=1)
COUNT = 60
X265 = {"x265-params": "log-level=none:open-gop=1:bframes=4:keyint=12"}


def whole(path: Path) -> Segment:
    source = describe_source(str(path), CONFIG)
    assert source["status"] == "pending", source["error"]
    return segments_of(source)[0]


def from_second(path: Path, start: float) -> Segment:
    """The film from `start` s on, as a segment in its midst has it."""
    return replace(whole(path), start=start + CONFIG.overlap_seconds)


def shown(segment: Segment, decoder: Callable = decode) -> list[tuple[int, int, float]]:
    """Index, the number that the frame carries, and time in ms."""
    return [(index, number_of(image), round(time * 1000)) for index, time, image in decoder(segment, CONFIG)]


FILMS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264.flv": {},
    "h264.ts": {},
    "hevc.mp4": {"codec": "libx265", "encoder": X265},
    "hevc.ts": {"codec": "libx265", "encoder": X265},
    "hevc-10-bit.mkv": {"codec": "libx265", "encoder": X265, "pix_fmt": "yuv420p10le"},
    "av1.mkv": {"codec": "libsvtav1", "encoder": {"preset": "12"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "mpeg2.mpg": {"codec": "mpeg2video", "tags": {"max_b_frames": 2}},
    "mpeg2-interlaced.ts": {"codec": "mpeg2video", "encoder": {"flags": "+ildct+ilme"}},
    "mpeg4-b-frames.avi": {"codec": "mpeg4", "tags": {"max_b_frames": 2}},
    "wmv2.wmv": {"codec": "wmv2"},
    "motion-jpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "b-frames.mp4": {"encoder": {"bf": "4"}},
    "open-gop.mkv": {"encoder": {"x264-params": "open-gop=1:bframes=4:keyint=12:scenecut=0"}},
    "one-key-frame.mp4": {"gop": 9999},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "interlaced.mp4": {"encoder": {"x264-params": "tff=1"}},
    "rgb.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
}


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_is_the_one_of_its_time(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, numbered(COUNT), **FILMS[name])
    expected = [(i, i, round(i * 1000 / 24)) for i in range(COUNT)]
    for segment, frames in ((whole(path), expected), (from_second(path, 0.84), expected[20:])):
        found = shown(segment)
        assert [frame[:2] for frame in found] == [frame[:2] for frame in frames]
        assert [frame[2] for frame in found] == pytest.approx([frame[2] for frame in frames], abs=1)


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4"])
def test_time_is_the_stream_s_own(tmp_path: Path, name: str) -> None:
    steps = [40] * 20 + [200] * 20 + [20] * 20
    times = [500 + sum(steps[:i]) for i in range(COUNT)]
    path = write_film(tmp_path / name, numbered(COUNT), times=times)
    assert shown(whole(path)) == [(i, i, time - 500) for i, time in enumerate(times)]
    assert shown(from_second(path, 2.8)) == [(i, i, time - 500) for i, time in enumerate(times) if time >= 3300]


JUMPED = {
    "h264.mp4": {"encoder": {"bf": "4"}},
    "open-gop.mkv": {"encoder": {"x264-params": "open-gop=1:bframes=4:keyint=12:scenecut=0"}},
    "h264.ts": {"encoder": {"bf": "4"}},
    "mpeg2-interlaced.ts": {"codec": "mpeg2video", "encoder": {"flags": "+ildct+ilme"}},
    "hevc.ts": {"codec": "libx265", "encoder": X265},
}


@pytest.mark.parametrize("name", JUMPED)
def test_a_jump_gives_the_frames_that_reading_up_to_them_gives(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / name, numbered(256), rate=12, **JUMPED[name])
    jumps, jump = [], decode_module._jump
    monkeypatch.setattr(decode_module, "_jump", lambda *args: jumps.append(args[0]) or jump(*args))
    jumped = [frame[:2] for frame in shown(from_second(path, 15))]
    assert jumped == [(i, i) for i in range(180, 256)]
    assert len(jumps) == 2
    monkeypatch.setattr(decode_module, "_JUMP_FORMATS", ())
    assert [frame[:2] for frame in shown(from_second(path, 15))] == jumped
    assert len(jumps) == 2


def test_a_gif_shows_its_frames(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.gif", numbered(30), codec="gif", rate=25, pix_fmt="rgb8")
    assert shown(whole(path)) == [(i, i, 40 * i) for i in range(30)]


def test_one_frame_is_a_film(tmp_path: Path) -> None:
    assert shown(whole(write_film(tmp_path / "film.mp4", numbered(1)))) == [(0, 0, 0)]


def test_negative_times_stay_times(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", numbered(COUNT), times=[40 * i - 500 for i in range(COUNT)])
    assert shown(whole(path)) == [(i, i, 40 * i) for i in range(COUNT)]


def test_what_an_edit_list_cuts_off_is_not_shown(tmp_path: Path) -> None:
    """MP4 writes negative times as an edit list: the film begins at time 0, in the midst of a GOP."""
    path = write_film(tmp_path / "film.mp4", numbered(COUNT), times=[40 * i - 500 for i in range(COUNT)])
    assert shown(whole(path)) == [(i, i + 13, 40 * i) for i in range(COUNT - 13)]
    assert shown(from_second(path, 0.8))[0] == (20, 33, 800)


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4", "film.ts"])
def test_a_film_cut_in_the_midst_of_a_gop_begins_at_its_first_key_frame(tmp_path: Path, name: str) -> None:
    film = write_film(tmp_path / "film.ts", numbered(COUNT), encoder={"x264-params": "keyint=12:scenecut=0:bframes=2"})
    path = without_start(film, tmp_path / f"cut-{name}", packets=5)
    found = shown(whole(path))
    assert [frame[:2] for frame in found] == [(i, i + 12) for i in range(COUNT - 12)]
    assert [frame[2] for frame in found] == pytest.approx([i * 1000 / 24 for i in range(COUNT - 12)], abs=1)


def test_a_size_that_changes_midway_is_scaled_to_the_stream_s(tmp_path: Path) -> None:
    options = {"encoder": {"x264-params": "repeat-headers=1:bframes=0"}}
    small = write_film(tmp_path / "small.mkv", numbered(COUNT)[:30], **options)
    large = write_film(tmp_path / "large.mkv", numbered(COUNT, (320, 192))[30:], **options)
    path = join(tmp_path / "film.mkv", [small, large])
    for decoder in (decode, decode_in_order):
        frames = list(decoder(whole(path), CONFIG))
        assert [number_of(frame[2]) for frame in frames] == list(range(COUNT))
        assert {frame[2].shape for frame in frames} == {(96, 160, 3)}


@pytest.mark.parametrize("cover_first", [True, False])
def test_a_cover_is_not_the_film(tmp_path: Path, cover_first: bool) -> None:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        streams = {}
        for codec, size in (("mjpeg", (200, 200)), ("libx264", (160, 96)))[:: 1 if cover_first else -1]:
            streams[codec] = stream = container.add_stream(codec, rate=24)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        cover = np.full((200, 200, 3), 99, np.uint8)
        for codec, pictures in (("mjpeg", [cover]), ("libx264", numbered(COUNT))):
            for picture in pictures:
                container.mux(streams[codec].encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(streams[codec].encode())
    source = describe_source(str(path), CONFIG)
    assert (source["codec"], source["width"]) == ("h264", 160)
    assert [frame[1] for frame in shown(whole(path))] == list(range(COUNT))


@pytest.mark.parametrize(
    ("name", "options", "by_decord"),
    [
        ("film.mp4", {}, True),
        ("film.mkv", {"codec": "libx265", "encoder": X265, "pix_fmt": "yuv420p10le"}, True),
        ("film.avi", {"codec": "mpeg4"}, False),
        ("film.ts", {}, False),
        ("turned.mp4", {"rotation": 90}, False),
        ("interlaced.mp4", {"encoder": {"x264-params": "tff=1"}}, False),
        ("edit-list.mp4", {"times": [40 * i - 500 for i in range(COUNT)]}, False),
    ],
)
def test_decord_reads_what_it_reads_right(tmp_path: Path, name: str, options: dict, by_decord: bool) -> None:
    path = write_film(tmp_path / name, numbered(COUNT), **options)
    assert _film(whole(path), CONFIG).for_decord == by_decord


def test_both_decoders_give_the_same_frames(tmp_path: Path) -> None:
    from factory.toon import plan_clip, write_clip

    path = write_clip(tmp_path / "toon.mp4", plan_clip(42, shots=6, size=(480, 270)))
    frames: list[list[Decoded]] = [
        list(decoder(from_second(path, 1.8), CONFIG)) for decoder in (decode, decode_in_order)
    ]
    assert [frame[:2] for frame in frames[0]] == [frame[:2] for frame in frames[1]]
    for one, other in zip(*frames, strict=True):
        assert np.abs(one[2].astype(int) - other[2].astype(int)).max() <= 2


def test_time_stamps_that_contradict_the_order_are_an_error(tmp_path: Path) -> None:
    """AVI holds no time stamps, and those guessed for H.264 with B-frames are wrong."""
    path = write_film(tmp_path / "film.avi", numbered(COUNT), encoder={"bf": "2"})
    with pytest.raises(RuntimeError, match=r"do not follow the order of the frames.*ffmpeg -i IN -c copy"):
        list(decode(whole(path), CONFIG))
    again = without_start(path, tmp_path / "again.mkv", packets=0)
    assert [frame[1] for frame in shown(whole(again))] == list(range(COUNT))


@pytest.mark.parametrize("frames", ["shots", "keyframes", "interval"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_damage_before_the_border_costs_the_segment_before_it_alone(
    tmp_path: Path, frames: str, interlaced: bool
) -> None:
    config = VideoConfig(overlap_seconds=1, frames=frames, interval_seconds=0.5)  # type: ignore[arg-type]
    options = {"x264-params": "keyint=12:scenecut=0:bframes=0" + ":tff=1" * interlaced}
    path = write_film(tmp_path / "film.mp4", numbered(COUNT), encoder=options)

    def found(start: float) -> list[int]:
        segment = replace(whole(path), start=start, end=start + 1 if start < 2 else 9)
        return [index for index, *_ in decode_in_order(segment, config)]

    undamaged = found(2)
    _zero_packet(path, 36, keep=0.5)  # a key frame, 1.5 s: in the overlap
    assert found(2) == [index for index in undamaged if index >= 48]
    with pytest.raises(RuntimeError):
        found(1)


def test_a_film_whose_first_frame_is_damaged_is_read_behind_it(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", numbered(COUNT), gop=12, encoder={"bf": "0"})
    _zero_packet(path, 0)
    assert shown(from_second(path, 1), decode_in_order)[-1][1] == COUNT - 1


@pytest.mark.parametrize(("time", "index"), [(-1.0, 0), (0.0, 0), (0.4, 0), (0.6, 1), (1.0, 1), (9.0, 2)])
def test_a_frame_is_the_one_of_the_nearest_time(time: float, index: int) -> None:
    assert _nearest(np.array([0.0, 1.0, 2.0]), time) == index


def _zero_packet(path: Path, number: int, keep: float = 0.0) -> None:
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        place, size = packet.pos, packet.size
    with open(path, "rb+") as file:
        file.seek(place + round(keep * size))
        file.write(bytes(size - round(keep * size)))
