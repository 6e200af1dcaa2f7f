"""Signatures: the hash and the small picture that pictures are compared by."""

from __future__ import annotations

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest

from factory.scores import scores
from factory.signature import BYTES, changed_share, signature
from factory.toon import Pose, draw, random_scene

SCENE = random_scene(random.Random(4), camera="bust", lighting="day")
PICTURE = draw(SCENE, (640, 360)).image


def _changed(one: np.ndarray, other: np.ndarray) -> float:
    return float(changed_share(signature(one), [signature(other)])[0])


def _encoded(image: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)


def test_the_hash_survives_encoding_and_tells_pictures_apart() -> None:
    rng = random.Random(3)
    pictures = [draw(random_scene(rng), (480, 270)).image for _ in range(8)]
    hashes = [scores(picture)["phash"] for picture in pictures]
    for picture, phash in zip(pictures, hashes, strict=True):
        assert _bits(scores(_encoded(picture))["phash"], phash) <= 6
    assert min(_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def _bits(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize(
    "treated",
    [
        _encoded(PICTURE),
        cv2.resize(PICTURE, (854, 480)),
        cv2.convertScaleAbs(PICTURE, alpha=1.05, beta=4),
        np.roll(PICTURE, (1, 1), (0, 1)),
        draw(SCENE, (640, 360), Pose(mouth=0.55)).image,
    ],
    ids=["encoded", "scaled", "brightened", "shifted", "mouth"],
)
def test_the_same_drawing_has_not_changed(treated: np.ndarray) -> None:
    assert _changed(PICTURE, treated) <= 0.004
    assert _changed(treated, PICTURE) <= 0.004


def test_another_drawing_has_changed() -> None:
    figure = replace(SCENE.figures[0], expression="surprised" if SCENE.figures[0].expression != "surprised" else "sad")
    assert _changed(PICTURE, draw(replace(SCENE, figures=(figure,)), (640, 360)).image) > 0.01
    assert _changed(PICTURE, draw(replace(SCENE, background="city"), (640, 360)).image) > 0.05
    assert _changed(PICTURE, cv2.convertScaleAbs(PICTURE, alpha=0.5)) == 1.0


def test_many_are_compared_at_once() -> None:
    others = [signature(np.roll(PICTURE, x, 1)) for x in (0, 1, 40)]
    assert {len(other) for other in others} == {BYTES}
    alone = [float(changed_share(signature(PICTURE), [other])[0]) for other in others]
    assert changed_share(signature(PICTURE), others).tolist() == pytest.approx(alone)
    assert alone[0] == 0 < 0.1 < alone[2]
