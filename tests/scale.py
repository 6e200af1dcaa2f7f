"""A driver of many tiny segments and their selection: `python -m tests.scale ROOT SEGMENTS` prints its cost as JSON."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from factory import pipeline, stage
from factory.committer import Committer
from factory.config import micro
from factory.picture import encode_jpeg
from factory.scores import scores
from factory.session import ray_session
from factory.store import Store

SIZE = (480, 270)
SOURCE = "0" * 64
KEPT = 2  # of the three candidates of a segment


class WriteSegment:
    """{"segment"} -> two candidates of some 40 kB and a duplicate of the first, scored as decoded ones are."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit, rng = f"u{row['segment']}", np.random.default_rng(row["segment"])
        pictures = [_picture(rng) for _ in range(KEPT)]
        rows = [_candidate(unit, i, picture) for i, picture in enumerate([*pictures, pictures[0]])]
        return {"entry": json.dumps(self._store.write_unit("candidates", unit, rows))}


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A soft picture that is like no other, under fine grain."""
    soft = cv2.resize(rng.uniform(0, 255, (6, 10, 3)).astype(np.float32), SIZE, interpolation=cv2.INTER_CUBIC)
    return (soft + rng.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)


def _candidate(unit: str, number: int, picture: np.ndarray) -> dict[str, Any]:
    image = encode_jpeg(picture, 90)
    return {
        "frame_id": f"{unit}-{number}",
        "source_id": SOURCE,
        "segment_id": unit,
        "width": SIZE[0],
        "height": SIZE[1],
        "image": image,
        "image_sha256": hashlib.sha256(image).hexdigest(),
        **scores(picture),
    }


def main(root: str, segments: int) -> None:
    store, config = Store(root), replace(micro(), samples_per_unit=16)
    store.create()
    store.keep_settings(asdict(config))
    source = [{"source_id": SOURCE, "uri": "/films/s.mp4", "status": "ok"}]
    Committer(store, "sources", every=1).add(store.write_unit("sources", "s", source))
    with ray_session(), store.lock():
        committer = Committer(store, "candidates", every=config.commit_every)
        found: dict[str, Any] = {"segments": segments, "before_mb": _resident_mb()}
        started = time.monotonic()
        rows = [{"segment": segment, "amount": config.video.segment_seconds} for segment in range(segments)]
        stage.run("decode", "segments", stage.FILM, WriteSegment(store), rows, committer, config)
        found["decode_s"] = round(time.monotonic() - started, 1)
        found["commits"] = store.table("candidates").version - 1
        found["decode_peak_mb"] = _peak_mb()
        found["open_ms"], found["first_commit_ms"], found["commit_ms"] = _store_ms(store)
        started = time.monotonic()
        pipeline.select(store, config)
        found["select_s"] = round(time.monotonic() - started, 1)
        found["select_peak_mb"] = _peak_mb()
        found["after_mb"] = _resident_mb()
    assert store.table("candidates").count_rows() == 3 * segments
    assert store.table("samples").count_rows() == KEPT * segments
    print(json.dumps(found), flush=True)


def _store_ms(store: Store) -> Iterator[int]:
    """The time (ms) to open the candidates' committer, of its first commit, which reads the keys, and of the next."""
    started = time.monotonic()
    committer = Committer(store, "candidates", every=1)
    yield round(1000 * (time.monotonic() - started))
    for unit in ("first", "second"):
        entry = store.write_unit("candidates", unit, [])
        started = time.monotonic()
        committer.add(entry)
        yield round(1000 * (time.monotonic() - started))


def _resident_mb() -> int:
    return psutil.Process().memory_info().rss // 2**20


def _peak_mb() -> int:
    """The most that was resident; getrusage would count what the parent held at the fork."""
    return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) // 2**10


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
