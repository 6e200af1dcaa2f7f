"""Selection: every decision has its reason, and none depends on the order of candidates."""

from __future__ import annotations

import random
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from factory import pipeline
from factory.committer import Committer
from factory.config import micro
from factory.scores import scores
from factory.selection import COLUMNS, SelectionConfig
from factory.settings import load
from factory.store import Store
from factory.toon import draw, random_scene
from tests.selecting import select


def _row(frame_id: str, image: np.ndarray, **more: object) -> dict:
    height, width = image.shape[:2]
    return {"frame_id": frame_id, "status": None, "width": width, "height": height, **scores(image)} | more


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = random.Random(3)
    return [draw(random_scene(rng), (480, 270)).image for _ in range(8)]


BROKEN = [
    ("min_short_side", {"width": 200}, "too_small"),
    ("max_text_share", {"text_share": 0.2}, "credits"),
    ("max_subtitle_share", {"subtitle_share": 0.03}, "subtitles"),
    ("min_brightness", {"brightness": 0.01}, "too_dark"),
    ("max_brightness", {"brightness": 0.99}, "too_bright"),
    ("min_contrast", {"contrast": 0.01}, "flat"),
    ("min_entropy", {"entropy": 0.5}, "few_tones"),
    ("min_sharpness", {"sharpness": 3.0}, "blurred"),
]


@pytest.mark.parametrize(("setting", "change", "reason"), BROKEN)
def test_a_dropped_frame_says_why_and_each_threshold_can_be_switched_off(
    pictures: list[np.ndarray], setting: str, change: dict, reason: str
) -> None:
    row = _row("a", pictures[0], **change)
    decision = select([row], SelectionConfig())["a"]
    assert (decision["status"], decision["reason"]) == ("dropped", reason)
    assert decision["score"] == pytest.approx(next(iter(change.values())))
    assert decision["threshold"] == pytest.approx(getattr(SelectionConfig(), setting))
    off = load(micro(), None, [f"selection.{setting}=null"]).selection
    assert select([row], off)["a"]["status"] == "kept"


@pytest.mark.parametrize("setting", ["max_text_share=2", "duplicate_hash_bits=65", "duplicate_change=-1"])
def test_a_threshold_out_of_range_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="must lie in 0 to"):
        load(micro(), None, [f"selection.{setting}"])


def test_the_sharper_duplicate_wins_in_any_order(pictures: list[np.ndarray]) -> None:
    soft = cv2.GaussianBlur(pictures[0], (0, 0), 0.6)
    rows = [_row("a", soft), _row("b", pictures[0]), *(_row(f"c{i}", p) for i, p in enumerate(pictures[1:]))]
    expected = select(rows, SelectionConfig())
    assert expected["a"]["duplicate_of"] == "b"
    assert expected["a"]["score"] <= expected["a"]["threshold"]
    assert sum(d["status"] == "kept" for d in expected.values()) == len(pictures)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(rows)
        assert select(rows, SelectionConfig()) == expected


def test_duplicates_stay_when_their_search_is_off(pictures: list[np.ndarray]) -> None:
    rows = [_row("a", pictures[0]), _row("b", pictures[0])]
    assert {d["status"] for d in select(rows, SelectionConfig(duplicate_hash_bits=None)).values()} == {"kept"}


def test_what_an_earlier_selection_kept_stays(pictures: list[np.ndarray]) -> None:
    soft = cv2.GaussianBlur(pictures[0], (0, 0), 0.6)
    rows = [_row("a", soft, status="kept"), _row("b", pictures[0])]
    decisions = select(rows, SelectionConfig())
    assert decisions["a"]["status"] == "kept"
    assert decisions["b"]["duplicate_of"] == "a"


def test_flat_frames_are_compared_whatever_their_hash() -> None:
    noise = np.random.default_rng(0)
    flat = [np.clip(noise.normal(120, 2, (270, 480, 3)), 0, 255).astype(np.uint8) for _ in range(3)]
    rows = [_row(f"f{i}", image) for i, image in enumerate(flat)]
    assert len({row["phash"] for row in rows}) == 3
    decisions = select(rows, SelectionConfig(min_contrast=None, min_entropy=None, min_sharpness=None))
    assert sorted(d["status"] for d in decisions.values()) == ["dropped", "dropped", "kept"]


def test_candidates_without_scores_are_refused(pictures: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="1 candidate"):
        select([_row("a", pictures[0]), _row("b", pictures[1], entropy=None)], SelectionConfig())


def test_ten_thousand_candidates_take_a_second_or_two(pictures: list[np.ndarray]) -> None:
    noise, row = np.random.default_rng(1), _row("a", pictures[0])
    hashes = noise.integers(-(2**63), 2**63 - 1, 10_000)
    rows = [row | {"frame_id": f"{i:05d}", "phash": int(value)} for i, value in enumerate(hashes)]
    rows += [row | {"frame_id": f"{i:05d}-again"} for i, row in enumerate(rows[:500])]
    start = time.process_time()
    decisions = select(rows, SelectionConfig())
    assert time.process_time() - start < 10
    assert sum(d["status"] == "dropped" for d in decisions.values()) == 500
    assert set(COLUMNS) <= set(rows[0])


def test_of_many_candidates_those_that_failed_are_left_alone(
    pictures: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "root"))
    store.create()
    names = {"source_id": "s", "segment_id": "u", "signature": b"not compared", "embedding": None}
    row = _row("a", pictures[0]) | names
    rows = [row | {"frame_id": f"{i:05d}"} for i in range(3_000)]
    rows.append({"frame_id": "failed", **names, "status": "failed", "reason": "decode: it ended"})
    Committer(store, "candidates", every=1).add(store.write_unit("candidates", "u", rows))
    Committer(store, "sources", every=1).add(store.write_unit("sources", "s", [{"source_id": "s", "status": "ok"}]))
    units: list[dict] = []
    monkeypatch.setattr(pipeline, "run", lambda *arguments: units.extend(arguments[4]) or [])
    pipeline.select(store, load(micro(), None, ["selection.duplicate_hash_bits=null"]))
    assert sum(unit["amount"] for unit in units) == 3_000
    found = store.table("candidates").to_table(columns=["status", "reason", "select_fingerprint"]).to_pylist()
    assert found[-1] == {"status": "failed", "reason": "decode: it ended", "select_fingerprint": None}
    assert {row["status"] for row in found[:-1]} == {"kept"}
