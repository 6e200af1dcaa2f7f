"""The decode stage on Ray, on all cores, against plain processes that do the same work and write it to one table."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance

from factory import pipeline, schema
from factory.candidates import candidate_frames
from factory.config import micro
from factory.session import ray_session
from factory.sources import describe_source, segments_of
from factory.store import Store
from factory.video import Segment
from tests.bench.films import FPS, drawn, frames_of
from tests.bench.harness import Comparison, compare

CORES = os.cpu_count() or 1
FILMS = 4
_CONFIG = micro()


def cores(folder: Path) -> list[Comparison]:
    """Return the comparisons: a season of short films, and one long film. Ray and the processes are there before."""
    short = [drawn(seed, shots=20, size=(1280, 720), gop=2 * FPS, times=6) for seed in range(20, 20 + FILMS)]
    long = drawn(7, shots=98, size=(640, 360), gop=2 * FPS, times=4)
    little = [drawn(seed, shots=6, size=(640, 360), gop=2 * FPS) for seed in range(2 * CORES)]
    roots = (folder / str(number) for number in itertools.count())
    with ray_session(CORES), multiprocessing.get_context("spawn").Pool(CORES) as pool:

        def ours(films: list[Path]) -> Callable[[], int]:
            return lambda: _on_ray(films, next(roots))

        def plain(films: list[Path], parts: int = 1) -> Callable[[], int]:
            return lambda: _in_pool(pool, films, parts, next(roots))

        ours(little)()  # Ray's workers and the pool's have imported what they need
        plain(little)()
        return [
            compare(
                f"Ray / pool of {CORES} processes, {FILMS} films of 3 min, 720p",
                "frames/s",
                ours(short),
                plain(short),
                rounds=3,
                warm_up=False,
            ),
            compare(
                f"Ray / {CORES} processes with a part each, a film of {frames_of(long) / FPS / 60:.0f} min, 360p",
                "frames/s",
                ours([long]),
                plain([long], CORES),
                rounds=3,
                warm_up=False,
            ),
        ]


def _on_ray(films: list[Path], root: Path) -> int:
    """Run the factory's decode stage into a new root, as `python -m factory build` does; return the frames covered."""
    store = Store(str(root))
    store.create()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        pipeline.decode(store, [str(film) for film in films], _CONFIG)
    return _covered(films, store.uri("candidates"))


def _in_pool(pool: Any, films: list[Path], parts: int, root: Path) -> int:
    """Do the same with a pool of processes, each film in `parts`; this process writes the rows to a new table."""
    uri = str(root / "candidates.lance")
    for rows in pool.imap_unordered(_rows, list(_pieces(films, parts))):
        table = schema.to_table("candidates", rows)
        lance.write_dataset(table, uri, mode="append", data_storage_version=schema.STORAGE_VERSION)
    return _covered(films, uri)


def _pieces(films: Iterable[Path], parts: int) -> Iterator[Segment | Path]:
    """Yield the films whole, to be described by the process that takes them, or segments of equal length."""
    for film in films:
        if parts == 1:
            yield film
            continue
        source = describe_source(str(film), _CONFIG.video)
        length = source["duration"] / parts
        whole = replace(segments_of(source)[0], end=source["duration"] + 1.0)
        for part in range(parts):
            end = whole.end if part == parts - 1 else (part + 1) * length
            yield replace(whole, start=part * length, end=end)


def _rows(piece: Segment | Path) -> list[dict[str, Any]]:
    config = _CONFIG.video
    segments = [piece] if isinstance(piece, Segment) else segments_of(describe_source(str(piece), config))
    return [row for segment in segments for row in candidate_frames(segment, config)]


_found: dict[tuple[Path, ...], list[str]] = {}


def _covered(films: list[Path], uri: str) -> int:
    """Return the number of frames of `films`. The table at `uri` must hold the same pictures in each run."""
    pictures = sorted(lance.dataset(uri).to_table(columns=["image_sha256"])["image_sha256"].to_pylist())
    assert pictures == _found.setdefault(tuple(films), pictures)
    return sum(frames_of(film) for film in films)
