"""Candidates: the stored picture is what lies between the bars, and the row says what was cut off."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from factory import schema
from factory.picture import decode_image
from factory.toon import draw, plan_clip, random_scene, write_clip
from factory.video import VideoConfig
from tests.footage import candidates, patterns, write_film
from tests.test_scores import LINES, written


@pytest.fixture(scope="module")
def letterboxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    return write_clip(folder / "wide.mp4", plan_clip(5, shots=6, fps=12, size=(480, 270), letterbox=2.2, grain=3))


def test_bars_are_cut_off_and_recorded(letterboxed: Path) -> None:
    rows = candidates(letterboxed, VideoConfig())
    assert len(rows) >= 5
    for row in rows:
        assert 26 <= min(row["bar_top"], row["bar_bottom"]) <= max(row["bar_top"], row["bar_bottom"]) <= 29
        assert (row["bar_left"], row["bar_right"]) == (0, 0)
        picture = decode_image(row["image"])
        assert picture.shape[:2] == (row["height"], row["width"]) == (270 - row["bar_top"] - row["bar_bottom"], 480)
    schema.to_table("candidates", rows)  # every column has its type


def test_a_shot_between_dark_edges_is_whole_where_the_film_has_no_bars(tmp_path: Path) -> None:
    frames = patterns(8, 12)
    for frame in frames[36:48]:
        frame[:30] = frame[-30:] = 0
    rows = candidates(write_film(tmp_path / "f.mp4", frames, gop=12), VideoConfig(segment_seconds=1))
    assert len(rows) == 8
    assert {(row["height"], row["bar_top"], row["bar_bottom"]) for row in rows} == {(180, 0, 0)}


def test_bars_can_be_kept(letterboxed: Path) -> None:
    cut, whole = (candidates(letterboxed, VideoConfig(crop_bars=crop)) for crop in (True, False))
    assert [row["height"] for row in whole] == [270] * len(cut)
    assert [row["bar_top"] for row in whole] == [row["bar_top"] for row in cut]
    assert all(a["brightness"] < b["brightness"] for a, b in zip(whole, cut, strict=True))


def test_subtitles_are_cut_off_when_asked(tmp_path: Path) -> None:
    film, picture = tmp_path / "titled.mp4", draw(random_scene(random.Random(2)), (640, 360)).image
    titled = written(picture, LINES, 0.82)
    with av.open(film, "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(titled)))
        container.mux(stream.encode())
    (kept,) = candidates(film, VideoConfig())
    assert kept["height"] == 360
    assert kept["subtitle_share"] > 0.01
    (cut,) = candidates(film, VideoConfig(crop_subtitles=True))
    assert cut["subtitle_share"] == 0
    assert cut["height"] == 360 - cut["subtitle_height"] < 310
    difference = np.abs(decode_image(cut["image"]).astype(int) - picture[: cut["height"]])
    assert difference.mean() < 3
