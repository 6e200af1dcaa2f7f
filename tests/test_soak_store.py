"""The store's long proofs, run by `make soak`: killed workers, flipped bytes, many segments; tables under docs/."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from factory import pipeline
from factory.sources import find_sources
from factory.store import NotFinished, Store
from factory.verify import verify
from tests.killing import runs
from tests.test_factory import contents
from tests.test_kills import replace_task, small_units
from tests.test_soak import write_table
from tests.test_verify import dataset, files_of, flips_found

pytestmark = pytest.mark.soak
REPO = Path(__file__).parent.parent

SEEDS = 8
_POINTS = {
    "DecodeSegment": (
        "at the start",
        "at its first candidate",
        "the decoder, at each attempt",
        "before the ledger",
        "before the answer",
    ),
    "AppendSamples": ("at the start", "before the ledger", "before the answer"),
    "DrawSketches": ("at the start", "mid-unit", "before the answer"),
    "WriteCaptions": ("at the start", "mid-unit", "before the answer"),
}


def test_100_of_100_flipped_bytes_are_found(tmp_path: Path) -> None:
    store = dataset(tmp_path / "root")
    data = files_of(store, ".lance")
    assert flips_found(store, data, 100, seed=1) == 100
    assert flips_found(store, files_of(store, ".blob", ".manifest"), 100, seed=2) == 100


def test_kill_matrix_of_the_workers(ray_session: str, small_dataset: Path, films: Path, tmp_path: Path) -> None:
    """SIGKILL of each kind of task at each point, and of busy Ray workers at seeded random times."""
    expected = contents(small_dataset)
    rows: list[list[object]] = []
    for task, points in _POINTS.items():
        for point in points:
            folder = tmp_path / f"{task}-{points.index(point)}"
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                replace_task(patch, task, point, folder)
                builds = _build_to_the_end(films, folder / "root")
            inputs = runs(folder)
            rows.append([f"{task}, {point}", builds, len(inputs) - len(set(inputs)), _said(folder / "root", expected)])
    for seed in range(SEEDS):
        stop, killed = threading.Event(), []
        killer = threading.Thread(target=_kill_a_busy_worker, args=(random.Random(seed), stop, killed))
        killer.start()
        builds = _build_to_the_end(films, tmp_path / f"seed{seed}")
        stop.set()
        killer.join()
        assert killed, f"seed {seed}: no worker was seen"
        rows.append([f"seed {seed}: {killed[0]}", builds, "", _said(tmp_path / f"seed{seed}", expected)])
    title = "Kill matrix: SIGKILL of one worker"
    write_table("kill-matrix-workers", title, ["who and when", "builds", "units run again", "tables at the end"], rows)
    assert len(rows) >= 20
    assert {row[3] for row in rows} == {"equal to the undisturbed run's"}
    assert all(row[2] in (1, "") for row in rows)


def _build_to_the_end(films: Path, root: Path) -> int:
    """Build until no source is unfinished; return how often that took."""
    store = Store(str(root))
    for builds in (1, 2, 3):
        with contextlib.suppress(NotFinished):
            pipeline.build(store, find_sources([str(films)]), small_units())
            return builds
    raise AssertionError(f"{root} is not finished after three builds")


def _said(root: Path, expected: dict) -> str:
    whole = contents(root) == expected and not verify(Store(str(root))).damaged
    return "equal to the undisturbed run's" if whole else "DIFFERENT"


def _kill_a_busy_worker(rng: random.Random, stop: threading.Event, killed: list[str]) -> None:
    """Wait a random time, then SIGKILL the first Ray worker of this session that is seen to run one of our tasks."""
    time.sleep(rng.uniform(0, 4))
    while not stop.wait(0.005):
        for process in psutil.Process().children(recursive=True):
            try:
                if (title := process.cmdline()) and title[0].startswith("ray::Map("):
                    process.kill()
                    killed.append(title[0])
                    return
            except psutil.Error:
                continue


_SCALE = {
    "segments": "segments",
    "commits": "commits",
    "decode_s": "s to decode",
    "select_s": "s to select",
    "before_mb": "MB before",
    "decode_peak_mb": "peak MB, decode",
    "select_peak_mb": "peak MB, select",
    "after_mb": "MB after",
    "open_ms": "ms to open",
    "first_commit_ms": "ms of the first commit",
    "commit_ms": "ms of a commit",
}


def test_many_segments(ray_session: str, tmp_path: Path) -> None:
    """Memory of the driver, and the time to decode, select, open and commit, at 10, 100 and 1,000 tiny segments."""
    found: list[dict[str, float]] = []
    for segments in (10, 100, 1000):
        driver = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.scale", str(tmp_path / str(segments)), str(segments)],
            cwd=REPO,
            env={**os.environ, "RAY_ADDRESS": ray_session},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(json.loads(driver.stdout.splitlines()[-1]))
    title = "Driver: memory (resident), and time of the store, by segments of a build of three candidates each"
    write_table("scale", title, list(_SCALE.values()), [[row[name] for name in _SCALE] for row in found])
    small, _, large = found
    assert large["decode_peak_mb"] < 1.2 * small["decode_peak_mb"]
    # A selection reads all fragments, of which Lance holds some 0.13 MB each; a candidate takes 6 kB.
    assert large["select_peak_mb"] < small["select_peak_mb"] + 0.2 * large["segments"]
    assert large["commit_ms"] < 5 * small["commit_ms"] + 50
