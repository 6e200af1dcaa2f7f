"""Bad films: each ends in its typed record within the deadline, and its good neighbours are as if it were not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorTrc

from factory import pipeline, settings, tasks
from factory.candidates import candidate_frames
from factory.config import micro
from factory.sources import describe_source, segments_of
from factory.store import Store
from factory.video import VideoConfig
from tests.footage import patterns, without_start, write_film
from tests.measuring import Measured, measured

DEADLINE = 60  # s
MEMORY = 600  # MB
FRAMES = patterns(4, 24)
INDEX_FIRST = {"movflags": "faststart"}
X265 = {"x265-params": "log-level=none:bframes=0"}
ONE_KEY_FRAME = {"x264-params": "keyint=9999:scenecut=0:bframes=0"}

Maker = Callable[[Path], object]


def content(data: bytes) -> Maker:
    return lambda path: path.write_bytes(data)


def film(**options: object) -> Maker:
    return lambda path: write_film(path, FRAMES, **options)  # type: ignore[arg-type]


def cut(share: float, **options: object) -> Maker:
    def make(path: Path) -> None:
        data = write_film(path, FRAMES, **options).read_bytes()  # type: ignore[arg-type]
        path.write_bytes(data[: round(len(data) * share)])

    return make


def cut_between_frames(path: Path) -> None:
    """Only the file's length says that frames are missing."""
    data = write_film(path, FRAMES, **INDEX_FIRST).read_bytes()  # type: ignore[arg-type]
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        path.write_bytes(data[: packets[47].pos + packets[47].size])


def flipped(at: float, count: int, **options: object) -> Maker:
    """The bytes `at` a share of the file are not what they were."""

    def make(path: Path) -> None:
        data = bytearray(write_film(path, FRAMES, **options).read_bytes())  # type: ignore[arg-type]
        first = round(len(data) * at)
        data[first : first + count] = bytes(byte ^ 0xFF for byte in data[first : first + count])
        path.write_bytes(data)

    return make


def packets(change: Callable[[int, bytes], bytes], extra: bytes = b"", **options: object) -> Maker:
    """A film of 96 packets, each as `change` returns it, and 40 more that hold `extra`."""

    def make(path: Path) -> None:
        film = write_film(path.with_suffix(".whole.mkv"), FRAMES, gop=9999, **options)  # type: ignore[arg-type]
        with av.open(str(film)) as source, av.open(str(path), "w") as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            found = [packet for packet in source.demux(video=0) if packet.size]
            datas = [change(i, bytes(packet)) for i, packet in enumerate(found)] + [extra] * (40 if extra else 0)
            for i, data in enumerate(datas):
                packet = av.Packet(data)
                packet.pts = packet.dts = i * found[1].pts
                packet.stream, packet.time_base, packet.is_keyframe = stream, found[0].time_base, i == 0
                output.mux(packet)
        film.unlink()

    return make


def without_key_frame(path: Path) -> None:
    film = write_film(path.with_suffix(".whole.mkv"), FRAMES, encoder=ONE_KEY_FRAME)
    without_start(film, path, packets=1)
    film.unlink()


def audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def huge(path: Path) -> None:
    frame = np.full((8192, 8192, 3), 90, np.uint8)
    write_film(path, [frame] * 6, encoder={"preset": "ultrafast"})
    assert path.stat().st_size < 300_000


NOTHING = b"\x00\x00\x00\x03\x4c\x01\x80"  # a packet of HEVC that holds no picture

# name: how it is made, the source's status, and the words of its error
CASES: dict[str, tuple[Maker, str, str]] = {
    "empty.mp4": (content(b""), "failed", "the file is empty"),
    "header.mp4": (content(b"\x00\x00\x00\x18ftypmp42" + bytes(28)), "failed", "not a video that can be opened"),
    "text.mp4": (content(b"this is no film\n" * 50), "failed", "Invalid data"),
    "random.mp4": (content(np.random.default_rng(0).bytes(100_000)), "failed", "Invalid data"),
    "audio.mp4": (audio, "failed", "refused: the file has no video stream, only audio"),
    "list.mp4": (content(b"ffconcat version 1.0\nfile 'good.mp4'\n"), "failed", "refused: its format is none of"),
    "list.m3u8": (
        content(b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.5,\ngood.mp4\n#EXT-X-ENDLIST\n"),
        "failed",
        "refused: its format is none of",
    ),
    "index-last-cut.mp4": (cut(0.6), "failed", "Invalid data"),
    "cut-at-20.mp4": (cut(0.2, **INDEX_FIRST), "partial|failed", r"after 0\.\d\d s, decode: Invalid data"),
    "cut-at-60.mp4": (cut(0.6, **INDEX_FIRST), "partial", r"after [12]\.\d\d s, decode: Invalid data"),
    "cut-at-95.mp4": (cut(0.95, **INDEX_FIRST), "partial", r"after 3\.\d\d s, decode: Invalid data"),
    "cut.mkv": (
        cut(0.6),
        "partial",
        r"after [12]\.\d\d s, decode: (the file ends here|Invalid)",
    ),
    "cut-between-frames.mp4": (
        cut_between_frames,
        "partial",
        r"after 1\.\d\d s, decode: the file ends here, \d+ bytes",
    ),
    "cut.ts": (cut(0.6), "ok", ""),
    "flipped.mp4": (flipped(0.5, 400, **INDEX_FIRST), "partial", r"after [12]\.\d\d s, decode: "),
    "flipped.ts": (flipped(0.5, 400), "partial", r"after [12]\.\d\d s, decode: a frame is damaged"),
    "no-key-frame.mkv": (without_key_frame, "failed", "refused: the video stream has no key frame"),
    "no-first-frame.mkv": (
        packets(lambda i, data: data if i else bytes(100), codec="mjpeg", pix_fmt="yuvj420p"),
        "failed",
        r"after 0\.00 s, decode: ",
    ),
    "same-times.mkv": (film(times=[40 * (i // 2) for i in range(96)]), "failed", "do not increase.*ffmpeg -i"),
    "over-reports.nut": (
        packets(lambda _, data: data, extra=NOTHING, codec="libx265", encoder=X265),
        "partial",
        r"after 3\.\d\d s, decode: the decoder ended before frame 97 of 136",
    ),
    "hdr.mkv": (
        film(codec="libx265", pix_fmt="yuv420p10le", encoder=X265, tags={"color_trc": ColorTrc.SMPTE2084}),
        "failed",
        r"refused: the film is HDR \(PQ\).*ffmpeg -i IN -vf zscale",
    ),
    "huge.mp4": (huge, "failed", rf"decode: held \d+ MB of memory, 95 % of video.memory_limit_mb={MEMORY}"),
}


@pytest.fixture(scope="module")
def built(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The candidates of a folder with every bad film between two good ones."""
    folder = tmp_path_factory.mktemp("bad")
    for name, (make, _, _) in CASES.items():
        make(folder / name)
    for name in ("a-good.mp4", "z-good.mp4"):
        write_film(folder / name, FRAMES if name < "b" else FRAMES[::-1])
    store, notes = Store(str(folder / "root")), folder / "notes"
    store.create()
    notes.mkdir()
    made = {**vars(tasks), "DecodeSegment": lambda *arguments: Measured(tasks.DecodeSegment(*arguments), notes)}
    limits = [f"video.deadline_seconds={DEADLINE}", "video.deadline_per_second=0", f"video.memory_limit_mb={MEMORY}"]
    paths = sorted(str(path) for path in folder.iterdir() if path.is_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "tasks", SimpleNamespace(**made))
        pipeline.decode(store, paths, settings.load(micro(), None, limits))
    return store


@pytest.mark.parametrize("name", CASES)
def test_a_bad_film_is_a_record_that_says_why(built: Store, name: str) -> None:
    _, status, words = CASES[name]
    rows = built.table("sources").to_table(columns=["uri", "status", "error"]).to_pylist()
    (source,) = [row for row in rows if Path(row["uri"]).name == name]
    assert re.fullmatch(status, source["status"]), source
    assert re.search(words, source["error"] or ""), source


def test_the_neighbours_are_unharmed(built: Store) -> None:
    rows = built.table("candidates").to_table(columns=["frame_id", "source_id", "image_sha256"]).to_pylist()
    for source in built.table("sources").to_table(columns=["uri", "source_id"]).to_pylist():
        if source["uri"].endswith("-good.mp4"):
            found = sorted(
                (row["frame_id"], row["image_sha256"]) for row in rows if row["source_id"] == source["source_id"]
            )
            (segment,) = segments_of(describe_source(source["uri"], VideoConfig()))
            alone = [(row["frame_id"], row["image_sha256"]) for row in candidate_frames(segment, VideoConfig())]
            assert found == sorted(alone)
            assert len(found) == 4


def test_decoding_keeps_to_its_limits_of_time_and_memory(built: Store) -> None:
    found = measured(built.root.parent / "notes")
    sources = built.table("sources").to_table(columns=["uri", "segment_starts"]).to_pylist()
    assert {note["film"] for note in found} == {Path(row["uri"]).name for row in sources if row["segment_starts"]}
    assert len(found) > len({note["film"] for note in found}) >= 12  # some are decoded twice
    # ended before it held more
    assert {note["film"] for note in found if note["peak_mb"] is None} == {"huge.mp4"}
    assert max(note["peak_mb"] or 0 for note in found) < MEMORY
    assert max(note["seconds"] for note in found) < DEADLINE + 60  # the machine may be busy
