"""Still pictures as sources: each kind as it looks, limits from the header, and units of many."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from factory import candidates, pipeline, settings, still, tasks
from factory.committer import Committer
from factory.config import FactoryConfig, micro
from factory.picture import decode_image
from factory.sources import describe_source, find_sources, segments_of
from factory.store import UNITS, Store
from factory.video import VideoConfig

RED, WHITE = (200, 30, 40), (255, 255, 255)


def _config(*overrides: str) -> FactoryConfig:
    return settings.load(micro(), None, ["split.validation_share=0", *overrides])


def _encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _facts(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return describe_source(str(path), VideoConfig())


def _wide(mode: str = "RGB", colour: Any = RED) -> Image.Image:
    return Image.new(mode, (40, 20), colour)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (_encoded(_wide()), RED),
        (_encoded(_wide(), "BMP"), RED),
        (_encoded(_wide(), "TIFF"), RED),
        (_encoded(_wide(), "WEBP", lossless=True), RED),
        (_encoded(_wide("L", 77)), (77, 77, 77)),
        (_encoded(_wide("1", 1)), WHITE),
        (_encoded(_wide("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        (_encoded(_wide("RGBA", (*RED, 255))), RED),
        (_encoded(_wide("RGBA", (*RED, 0))), WHITE),
        (_encoded(_wide("RGBA", (0, 0, 0, 51))), (204, 204, 204)),
        (_encoded(_wide("LA", (0, 51))), (204, 204, 204)),
        (_encoded(_wide("RGBA", (*RED, 0)).convert("P"), transparency=0), WHITE),
        (_encoded(Image.fromarray(np.full((20, 40), 77 * 257, np.uint16))), (77, 77, 77)),
    ],
    ids=[
        "png",
        "bmp",
        "tiff",
        "webp",
        "grey",
        "bit",
        "cmyk",
        "opaque",
        "transparent",
        "veil",
        "grey-veil",
        "palette",
        "16-bit",
    ],
)
def test_a_picture_is_taken_as_it_looks_on_white(data: bytes, colour: tuple[int, int, int]) -> None:
    image = still.decode(data)
    assert (image.shape, image.dtype) == ((20, 40, 3), np.uint8)
    assert np.abs(image.reshape(-1, 3).mean(0) - colour).max() <= 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(tmp_path: Path, orientation: int) -> None:
    """OpenCV turns JPEGs by their EXIF too, by code of its own."""
    noise = np.random.default_rng(0).integers(0, 255, (5, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(noise, np.ones((8, 8, 1), np.uint8)))
    data = _encoded(image, "JPEG", quality=100, subsampling=0, exif=exif)
    upright, row = still.decode(data), _facts(tmp_path / "p.jpg", data)
    assert np.abs(upright.astype(int) - decode_image(data)).mean() < 1
    assert (row["height"], row["width"]) == upright.shape[:2] == ((72, 40) if orientation > 4 else (40, 72))


def test_colours_are_taken_to_srgb_by_the_profile() -> None:
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = still.decode(_encoded(_wide()))
    assert np.abs(still.decode(_encoded(_wide(), icc_profile=srgb)).astype(int) - plain).max() <= 1
    # the same profile with the curve of linear light, as a camera's raw converter writes it
    linear = _with_curve(srgb, gamma=1.0)
    brighter = still.decode(_encoded(_wide("RGB", (100, 100, 100)), icc_profile=linear))
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(brighter - expected).max() <= 2
    for broken in (swapped, b"no profile"):
        with pytest.raises(ValueError, match="its colour profile cannot be used"):
            still.decode(_encoded(_wide(), icc_profile=broken))


def _with_curve(profile: bytes, gamma: float) -> bytes:
    """A profile whose three tone curves are a plain power."""
    data = bytearray(profile)
    for i in range(struct.unpack_from(">I", data, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * i)
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 16] = struct.pack(">4sIHHi", b"para", 0, 0, 0, round(gamma * 65536))
    return bytes(data)


def _png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that claims a size, without the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("huge.png", _png(40_000, 40_000), "more than the 120 million pixels that are read"),
        ("large.png", _png(12_000, 12_000), "it has 12000x12000 pixels; at most 120 million are read"),
        ("strip.png", _png(70_000, 1), "it has 70000x1 pixels"),
        ("moves.webp", _encoded(_wide(), "WEBP", save_all=True, append_images=[_wide("RGB", WHITE)]), "2 pictures"),
        ("moves.png", _encoded(_wide(), save_all=True, append_images=[_wide("RGB", WHITE)]), "2 pictures"),
        ("pages.tif", _encoded(_wide(), "TIFF", save_all=True, append_images=[_wide()]), "2 pictures"),
        ("film.png", b"\x00\x00\x00\x18ftypmp42" + bytes(28), "no picture of a kind that is read"),
    ],
    ids=["huge", "large", "strip", "webp", "png", "tiff", "film"],
)
def test_what_is_refused_is_refused_by_its_header(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    row = _facts(tmp_path / name, data)
    assert row["status"] == "failed"
    assert words in row["error"]


def test_our_own_largest_sketch_is_within_the_limits(tmp_path: Path) -> None:
    row = _facts(tmp_path / "sketch.png", _png(10_240, 10_240))
    assert (row["status"], row["width"], row["height"]) == ("pending", 10_240, 10_240)


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (63, 47)])
def test_any_shape_has_scores(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "p.png"
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    source = _facts(path, _encoded(Image.fromarray(noise)))
    (row,) = candidates.picture_candidates(segments_of(source), VideoConfig())
    assert (row["width"], row["height"], row["timestamp"], row["frame_index"]) == (*size, 0.0, 0)
    assert row["frame_id"] == row["shot"] == f"{source['source_id'][:16]}-000000000000"
    assert (row["shot_start"], row["shot_end"]) == (0.0, 0.0)
    assert np.isfinite([row[name] for name in ("sharpness", "brightness", "contrast", "entropy")]).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of coloured blocks, and one of them cut short."""
    folder = tmp_path / "stills"
    folder.mkdir()
    for i in range(7):
        blocks = np.random.default_rng(i).integers(0, 255, (9, 16, 3), np.uint8)
        Image.fromarray(cv2.resize(blocks, (480, 270), interpolation=cv2.INTER_NEAREST)).save(folder / f"{i}.png")
    data = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) * 2 // 3])
    return folder


def test_a_folder_is_decoded_in_units_of_many(ray_session: str, folder: Path, tmp_path: Path) -> None:
    tables = []
    (folder / "empty.mp4").touch()  # it has no size, and stands in nobody's way
    for name, size in (("one", 64), ("many", 3)):
        store = Store(str(tmp_path / name))
        config = _config(f"video.pictures_per_unit={size}")
        store.create()
        pipeline.decode(store, find_sources([str(folder)]), config)
        pipeline.select(store, config)
        sources = store.table("sources").to_table().to_pylist()
        status = {Path(row["uri"]).name: row["status"] for row in sources}
        bad = {"cut.png": "failed", "empty.mp4": "failed"}
        assert status == {**{f"{i}.png": "ok" for i in range(7)}, **bad}
        (cut,) = (row for row in sources if row["uri"].endswith("cut.png"))
        assert "decode: " in cut["error"]
        facts = {(row["collection"], row["container"], row["duration"]) for row in sources}
        assert facts == {("stills", "png", 0.0), ("stills", None, None)}
        assert store.table("samples").count_rows() == 7
        rows = store.table("candidates").to_table().to_pylist()
        tables.append(sorted((row["frame_id"], row["image_sha256"], row["status"]) for row in rows))
        # one unit in the ledger's history for as many pictures as fit, not one each
        versions = [v["version"] for v in store.table("candidates").versions()]
        units = [store.table("candidates").read_transaction(v) for v in versions]
        named = {u for t in units if t for u in json.loads((t.transaction_properties or {}).get(UNITS, "[]"))}
        assert len([u for u in named if u.startswith("pictures-")]) == -(-8 // size)
    assert tables[0] == tables[1]
    assert len(tables[0]) == 8


def test_a_unit_of_pictures_has_no_more_pixels_than_a_worker_may_hold() -> None:
    pixels = {"small": 2_000_000, "large": 100_000_000}
    pictures = [{"source_id": name} for name in ("small", "large", "large", "small", "small", "small")]
    lots = pipeline._picture_lots(pictures, pixels, 3)
    assert [[picture["source_id"] for picture in lot] for lot in lots] == [
        ["small", "large"],
        ["large", "small", "small"],
        ["small"],
    ]
    assert pipeline._picture_lots([], pixels, 3) == []


def test_of_two_units_that_share_a_picture_one_is_committed(tmp_path: Path) -> None:
    """As a killed run leaves them whose task went on, when a picture was added in between."""
    store = Store(str(tmp_path))
    store.create()
    for name, parts in (("pictures-a", "xy"), ("pictures-b", "yz"), ("pictures-c", "z")):
        rows = [{"frame_id": part, "source_id": part, "segment_id": part} for part in parts]
        store.write_unit("candidates", name, rows, list(parts))
    assert Committer(store, "candidates", every=8).done == {"pictures-a", *"xy", "pictures-c", "z"}
    store.write_unit("candidates", "pictures-d", [], ["x"])
    assert Committer(store, "candidates", every=8).done == {"pictures-a", *"xy", "pictures-c", "z"}
    assert not store.ledger("candidates")
    keys = store.table("candidates").to_table(columns=["frame_id"])["frame_id"].to_pylist()
    assert sorted(keys) == ["x", "y", "z"]


def test_a_picture_that_ends_its_process_is_a_failed_row_and_its_neighbours_are_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    rows = [describe_source(path, VideoConfig()) for path in find_sources([str(folder)])]
    segments = [segment for row in rows for segment in segments_of(row)]
    monkeypatch.setenv("DEADLY", segments[2].source_id)
    monkeypatch.setenv("KILLED", segments[5].source_id)
    run = tasks.worker.run_killable
    monkeypatch.setattr(
        tasks.worker, "run_killable", lambda _, *args, **limits: run("tests.test_pictures:_deadly", *args, **limits)
    )
    os.remove(segments[4].uri)
    entry = json.loads(
        tasks.DecodePictures(store, _config())({"segments": [asdict(segment) for segment in segments]})["entry"]
    )
    assert entry["rows"] == len(segments) - 2 == 6
    gone, killed = entry["unread"]
    gone_for = {"status": "failed", "error": "decode: No such file or directory"}
    assert gone == {"source_id": segments[4].source_id, **gone_for}
    assert (killed["source_id"], killed["status"]) == (segments[5].source_id, "pending")
    assert f"{segments[2].source_id[:16]}-000000000000-failed" in entry["keys"]
    assert set(entry["units"][1:]) == {segment.segment_id for i, segment in enumerate(segments) if i not in (4, 5)}


def _deadly(segments: list, config: VideoConfig) -> Any:
    for segment in segments:
        if segment.source_id == os.environ["DEADLY"]:
            os.abort()
        if segment.source_id == os.environ["KILLED"]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from candidates.picture_candidates([segment], config)


def test_a_moved_folder_of_pictures_adds_nothing(ray_session: str, folder: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    pipeline.decode(store, find_sources([str(folder)]), _config())
    version = store.table("candidates").version
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(folder)
    pipeline.decode(store, find_sources([str(tmp_path / "moved")]), _config())
    assert store.table("candidates").version == version
    assert {row["collection"] for row in store.table("sources").to_table().to_pylist()} == {"moved"}
