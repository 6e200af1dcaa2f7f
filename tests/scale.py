"""A driver of many tiny segments: `python -m tests.scale ROOT SEGMENTS` prints what it cost as JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import psutil

from factory import stage
from factory.committer import Committer
from factory.config import micro
from factory.session import ray_session
from factory.store import Store


class WriteSegment:
    """{"segment"} -> three candidates of 20 kB, written as a unit."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = f"u{row['segment']}"
        rows = [
            {"frame_id": f"{unit}-{i}", "source_id": "s", "segment_id": unit, "image": os.urandom(20_000)}
            for i in range(3)
        ]
        return {"entry": json.dumps(self._store.write_unit("candidates", unit, rows))}


def main(root: str, segments: int) -> None:
    store, config = Store(root), micro()
    store.create()
    with ray_session(), store.lock():
        committer = Committer(store, "candidates", every=config.commit_every)
        before = psutil.Process().memory_info().rss
        started = time.monotonic()
        rows = [{"segment": segment, "amount": config.video.segment_seconds} for segment in range(segments)]
        stage.run("decode", "segments", stage.FILM, WriteSegment(store), rows, committer, config)
        seconds = time.monotonic() - started
        after = psutil.Process().memory_info().rss
    started = time.monotonic()
    committer = Committer(store, "candidates", every=1)
    opened = time.monotonic() - started
    entry = store.write_unit("candidates", "last", [])
    started = time.monotonic()
    committer.add(entry)
    found = {
        "segments": segments,
        "commits": store.table("candidates").version - 2,
        "seconds": round(seconds, 1),
        "rss_before_mb": before // 2**20,
        "rss_after_mb": after // 2**20,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10,
        "open_ms": round(1000 * opened),
        "commit_ms": round(1000 * (time.monotonic() - started)),
    }
    assert store.table("candidates").count_rows() == 3 * segments
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
