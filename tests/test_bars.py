"""Bars: found where the picture ends in a straight edge, and never in a dark scene."""

from __future__ import annotations

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest

from factory.bars import Bars, FilmBars, film_bars, find_bars, profile_of
from factory.picture import decode_image, encode_jpeg
from factory.toon import draw, random_scene


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(decode_image(encode_jpeg(image, 80)), cv2.COLOR_RGB2GRAY)


def _framed(picture: np.ndarray, top: int, side: int, grain: float = 0.0) -> np.ndarray:
    image = cv2.copyMakeBorder(picture, top, top, side, side, cv2.BORDER_CONSTANT).astype(np.float32)
    return (image + np.random.default_rng(0).normal(0, grain, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("top", "side"), [(46, 0), (0, 80), (24, 40), (0, 0)])
@pytest.mark.parametrize("grain", [0.0, 6.0])
def test_bars_are_found_to_the_pixel_and_one_row_more(top: int, side: int, grain: float) -> None:
    rng = random.Random(5)
    for _ in range(4):
        picture = draw(random_scene(rng, lighting="day"), (640 - 2 * side, 360 - 2 * top)).image
        found = find_bars(_grey(_framed(picture, top, side, grain)))
        for size, truth in zip(found, (top, top, side, side), strict=True):
            assert truth <= size <= truth + 3 if truth else size == 0


def test_a_dark_scene_is_not_cropped() -> None:
    rng = random.Random(6)
    for i in range(12):
        scene = random_scene(rng, lighting="dark", background=("night", "forest", "city")[i % 3])
        picture = draw(replace(scene, camera="full figure"), (640, 360)).image
        assert find_bars(_grey(picture)) == Bars()
        assert find_bars(_grey(cv2.convertScaleAbs(picture, alpha=0.3))) == Bars()


def test_black_below_and_above_without_an_edge_is_no_bar() -> None:
    glow = np.clip(1 - np.abs(np.linspace(-1.4, 1.4, 360)), 0, 1)[:, None, None] * np.full((1, 640, 3), 200)
    assert find_bars(_grey(glow.astype(np.uint8))) == Bars()
    assert find_bars(np.zeros((360, 640), np.uint8)) == Bars()


def test_one_black_edge_is_no_bar() -> None:
    picture = np.full((360, 640, 3), 180, np.uint8)
    picture[:40] = 0
    assert find_bars(_grey(picture)) == Bars()


def test_cropped_is_what_lies_between() -> None:
    image = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    assert np.array_equal(Bars(1, 2, 3, 0).cropped(image), image[1:6, 3:])
    assert np.array_equal(Bars().cropped(image), image)


def _bright(count: int, top: int = 0, side: int = 0) -> list[np.ndarray]:
    rng = random.Random(9)
    size = (320 - 2 * side, 180 - 2 * top)
    drawn = [draw(random_scene(rng, lighting="day"), size).image for _ in range(count)]
    return [_grey(_framed(picture, top, side, 4.0)) for picture in drawn]


def test_a_frame_with_dark_edges_keeps_them_where_the_film_has_none() -> None:
    frames = _bright(11)
    slit = frames[0].copy()
    slit[:24] = slit[-24:] = 8
    assert find_bars(slit).top > 20
    found = film_bars([profile_of(frame) for frame in [slit, *frames[1:]]])
    assert found.of(slit) == Bars()


def test_a_dark_frame_is_cropped_as_the_rest_of_its_film() -> None:
    frames = _bright(12, top=24)
    found = film_bars([profile_of(frame) for frame in frames])
    assert find_bars(frames[0] // 6) == Bars()
    assert found.of(frames[0] // 6) == found.always
    assert 24 <= found.always.top <= 27


def test_parts_of_a_film_may_have_bars_of_their_own() -> None:
    wide, narrow = _bright(9, top=24), _bright(3, side=40)
    found = film_bars([profile_of(frame) for frame in [*wide, *narrow]])
    assert found.always == Bars()
    for frame in (*wide, *narrow):
        assert found.of(frame) == find_bars(frame) != Bars()
    assert FilmBars.from_array(found.to_array()) == found


def test_too_few_frames_say_nothing_of_their_film() -> None:
    (frame,) = _bright(1, top=24)
    found = film_bars([profile_of(frame)])
    assert found.of(frame) == find_bars(frame) != Bars()
    assert FilmBars.from_array(found.to_array()) == found
