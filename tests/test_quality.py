"""Scores and selection: known answers, and independence from order."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest

from factory import quality
from factory.quality import SelectionConfig, select
from factory.toon import draw, random_scene


def _row(frame_id: str, image: np.ndarray, **more: object) -> dict:
    height, width = image.shape[:2]
    return {"frame_id": frame_id, "status": None, "width": width, "height": height, **quality.scores(image)} | more


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = random.Random(3)
    return [draw(random_scene(rng), (480, 270)).image for _ in range(8)]


def test_a_blurred_picture_is_less_sharp_at_any_resolution(pictures: list[np.ndarray]) -> None:
    for picture in pictures:
        sharp = quality.scores(picture)["sharpness"]
        assert quality.scores(cv2.GaussianBlur(picture, (0, 0), 3))["sharpness"] < 0.2 * sharp


def test_scores_have_known_answers() -> None:
    checks = np.zeros((256, 256, 3), np.uint8)
    checks[:, 128:] = 255
    scores = quality.scores(checks)
    assert scores["brightness"] == pytest.approx(0.5)
    assert scores["contrast"] == pytest.approx(0.5)
    assert scores["entropy"] == pytest.approx(1.0)
    assert np.linalg.norm(scores["embedding"]) == pytest.approx(1.0)
    assert quality.scores(np.full((256, 256, 3), 77, np.uint8))["sharpness"] == 0


def test_the_hash_survives_encoding_and_tells_pictures_apart(pictures: list[np.ndarray]) -> None:
    hashes = [quality.scores(picture)["phash"] for picture in pictures]
    for picture, phash in zip(pictures, hashes, strict=True):
        again = cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
        assert _bits(quality.scores(again)["phash"], phash) <= 6
    far = [_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(far) > 10


def _bits(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 200}, "too_small"),
        ({"brightness": 0.01}, "too_dark"),
        ({"brightness": 0.99}, "too_bright"),
        ({"contrast": 0.01}, "flat"),
        ({"sharpness": 3.0}, "blurred"),
    ],
)
def test_a_dropped_frame_says_why(pictures: list[np.ndarray], change: dict, reason: str) -> None:
    decision = select([_row("a", pictures[0], **change)], SelectionConfig())["a"]
    assert (decision["status"], decision["reason"]) == ("dropped", reason)
    assert decision["score"] == pytest.approx(next(iter(change.values())))
    assert decision["threshold"] is not None


def test_the_sharper_duplicate_wins_in_any_order(pictures: list[np.ndarray]) -> None:
    soft = cv2.GaussianBlur(pictures[0], (0, 0), 0.6)
    rows = [_row("a", soft), _row("b", pictures[0]), *(_row(f"c{i}", p) for i, p in enumerate(pictures[1:]))]
    expected = select(rows, SelectionConfig())
    assert expected["a"]["duplicate_of"] == "b"
    assert sum(d["status"] == "kept" for d in expected.values()) == len(pictures)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(rows)
        assert select(rows, SelectionConfig()) == expected


def test_what_an_earlier_selection_kept_stays(pictures: list[np.ndarray]) -> None:
    soft = cv2.GaussianBlur(pictures[0], (0, 0), 0.6)
    rows = [_row("a", soft, status="kept"), _row("b", pictures[0])]
    decisions = select(rows, SelectionConfig())
    assert decisions["a"]["status"] == "kept"
    assert decisions["b"]["duplicate_of"] == "a"


def test_failed_rows_are_left_alone() -> None:
    assert select([{"frame_id": "x", "status": "failed"}], SelectionConfig()) == {}
