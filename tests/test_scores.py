"""Scores of a frame: known answers, whatever its resolution; text found where there is some, and nowhere else."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from factory.scores import scores
from factory.toon import draw, random_scene

LINES = ("Where have you been all this time?", "I looked for you everywhere.")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = random.Random(3)
    return [draw(random_scene(rng), (640, 360)).image for _ in range(8)]


def written(picture: np.ndarray, lines: tuple[str, ...], top: float) -> np.ndarray:
    """The picture with outlined white lines of text, the first at `top` of its height."""
    image = Image.fromarray(picture)
    pen, size = ImageDraw.Draw(image), picture.shape[0] // 16
    font = ImageFont.load_default(size)
    for i, line in enumerate(lines):
        place = ((image.width - pen.textlength(line, font)) / 2, image.height * top + 1.2 * size * i)
        pen.text(place, line, "white", font, stroke_width=2, stroke_fill="black")
    return np.array(image)


def test_a_blurred_picture_is_less_sharp_at_any_resolution(pictures: list[np.ndarray]) -> None:
    for picture in pictures:
        sharp = scores(picture)["sharpness"]
        assert scores(cv2.GaussianBlur(picture, (0, 0), 3))["sharpness"] < 0.2 * sharp


def test_scores_have_known_answers() -> None:
    checks = np.zeros((256, 256, 3), np.uint8)
    checks[:, 128:] = 255
    found = scores(checks)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx(1.0)
    assert np.linalg.norm(found["embedding"]) == pytest.approx(1.0)
    assert (found["text_share"], found["subtitle_share"], found["subtitle_height"]) == (0, 0, 0)
    assert scores(np.full((256, 256, 3), 77, np.uint8))["sharpness"] == 0


def test_subtitles_are_found_with_their_height(pictures: list[np.ndarray]) -> None:
    for picture in pictures:
        assert scores(picture)["subtitle_share"] == 0
        found = scores(written(picture, LINES, 0.82))
        assert found["subtitle_share"] > 0.01
        assert found["subtitle_height"] / 360 == pytest.approx(0.18, abs=0.03)


def test_text_above_the_lower_quarter_is_no_subtitle(pictures: list[np.ndarray]) -> None:
    credit = scores(written(pictures[0], LINES * 4, 0.1))
    assert credit["text_share"] > 0.05
    assert credit["subtitle_share"] == 0


def test_text_takes_the_same_share_at_any_resolution(pictures: list[np.ndarray]) -> None:
    picture = written(cv2.resize(pictures[1], (1920, 1080)), LINES, 0.82)
    small = cv2.resize(picture, (960, 540), interpolation=cv2.INTER_AREA)
    assert scores(picture)["subtitle_share"] == pytest.approx(scores(small)["subtitle_share"], rel=0.25)
