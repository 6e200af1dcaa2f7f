"""Extent: a film that was cut off anywhere says how much is missing, where its format states a length."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from factory.extent import bytes_missing
from factory.sources import open_film
from tests.footage import patterns, write_film

FRAMES = patterns(2, 12)
STATED = {
    "index-first.mp4": {"movflags": "faststart"},
    "index-last.mov": {},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "film.mkv": {},
    "index-first.mkv": {"cues_to_front": "1", "reserve_index_space": "500"},
    "film.webm": {"codec": "libvpx"},
    "film.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
UNSTATED = {"live.mkv": {"live": "1"}, "film.ts": {}, "film.flv": {}}


@pytest.mark.parametrize("name", STATED)
def test_each_byte_that_is_missing_is_counted(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, FRAMES, **STATED[name])  # type: ignore[arg-type]
    container, data = named(path), path.read_bytes()
    assert bytes_missing(io.BytesIO(data), container) == 0
    assert bytes_missing(io.BytesIO(data[:-1]), container) == 1
    assert bytes_missing(io.BytesIO(data[: len(data) * 2 // 3]), container) > 0


def test_what_follows_the_last_part_is_not_missing(tmp_path: Path) -> None:
    for name in ("index-first.mp4", "film.mkv", "film.avi"):
        path = write_film(tmp_path / name, FRAMES, **STATED[name])  # type: ignore[arg-type]
        assert bytes_missing(io.BytesIO(path.read_bytes() + b"TAG" + b"title".ljust(125)), named(path)) == 0


@pytest.mark.parametrize("name", UNSTATED)
def test_a_format_that_states_no_length_misses_nothing(tmp_path: Path, name: str) -> None:
    path = write_film(tmp_path / name, FRAMES, **UNSTATED[name])  # type: ignore[arg-type]
    assert bytes_missing(io.BytesIO(path.read_bytes()[:-100]), named(path)) == 0


def test_an_avi_that_was_written_to_a_pipe_misses_nothing() -> None:
    assert bytes_missing(io.BytesIO(b"RIFF\xff\xff\xff\xffAVI " + bytes(100)), "avi") == 0


@pytest.mark.parametrize("container", ["mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"])
@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 40, b"RIFF", b"\x1a", b"\x1a\x45\xdf\xa3\x01", bytes(range(64))])
def test_any_bytes_can_be_asked(container: str, data: bytes) -> None:
    assert bytes_missing(io.BytesIO(data), container) >= 0


def test_a_box_of_64_bits_and_one_to_the_end() -> None:
    box = (1).to_bytes(4) + b"mdat" + (40).to_bytes(8) + bytes(24)
    rest = (0).to_bytes(4) + b"mdat" + bytes(9)
    assert bytes_missing(io.BytesIO(box + rest), "mov,mp4,m4a,3gp,3g2,mj2") == 0
    assert bytes_missing(io.BytesIO(box[:-5]), "mov,mp4,m4a,3gp,3g2,mj2") == 5


def named(path: Path) -> str:
    with open_film(str(path)) as container:
        return container.format.name
