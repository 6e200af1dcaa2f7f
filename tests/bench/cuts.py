"""Our cuts against PySceneDetect's detectors and TransNetV2, as they come and with thresholds tuned alike.

`make bench ARGS=cuts`, or `python -m tests.bench.cuts FOLDER`: what the detectors see of the 800 films is computed
once, in 50 minutes of one core, and kept in the folder; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from factory.cuts import look_at, starts_shot
from factory.video import VideoConfig
from tests.bench.cut_features import features
from tests.bench.cut_films import FPS, KINDS, Boundary

Film = tuple[dict[str, np.ndarray], list[Boundary]]
TOLERANCE = 2  # frames before and after a boundary in which it counts as found: what is drawn is held for two or three
SEEDS = 50  # films of each kind to tune on, 0 to 49, and as many to score, 50 to 99
CACHE = Path("out/bench/cuts")


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A detector: the frames that begin a shot, from a film's features and its own settings."""

    name: str
    find: Callable[..., list[int]]
    grid: dict[str, tuple[float, ...]]  # settings to choose from; it comes with its own defaults


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What was found: boundaries of both sorts, and shots begun where there is none."""

    cuts: int = 0
    cuts_found: int = 0
    fades: int = 0
    fades_found: int = 0
    false: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def cut_scores(self) -> tuple[float, float, float]:
        """Precision, recall and F1 of cuts."""
        return _scores(self.cuts_found, self.false, self.cuts)

    def fade_scores(self) -> tuple[float, float, float]:
        """Precision, recall and F1 of fades and dissolves."""
        return _scores(self.fades_found, self.false, self.fades)

    def all_scores(self) -> tuple[float, float, float]:
        """Precision, recall and F1 of all boundaries."""
        return _scores(self.cuts_found + self.fades_found, self.false, self.cuts + self.fades)


def cuts(folder: Path = CACHE, seeds: int = SEEDS) -> Iterator[str]:
    """Yield the lines of the tables: all detectors over all kinds, then F1 for each kind. Features stay in `folder`."""
    films = {kind: [features(folder, kind, seed) for seed in range(seeds)] for kind in KINDS}
    best = {detector.name: _tuned(detector, [film for kind in KINDS for film in films[kind]]) for detector in DETECTORS}
    films = {kind: [features(folder, kind, seed) for seed in range(SEEDS, SEEDS + seeds)] for kind in KINDS}
    yield "| detector | settings | cuts: precision | recall | F1 | fades: precision | recall | F1 |"
    yield "|---|---|---|---|---|---|---|---|"
    kinds: list[tuple[str, dict[str, Tally]]] = []
    for detector in DETECTORS:
        for settings in ({}, best[detector.name]):
            found = {kind: _tally(detector, settings, films[kind]) for kind in KINDS}
            total = sum(found.values(), Tally())
            words = ", ".join(f"{name} {value:g}" for name, value in settings.items()) or "as it comes"
            yield _row(detector.name, words, *(f"{x:.3f}" for x in (*total.cut_scores(), *total.fade_scores())))
            kinds.append((f"{detector.name}, {'tuned' if settings else 'as it comes'}", found))
    yield ""
    yield _row("F1 of cuts and fades", *KINDS)
    yield "|" + "---|" * (len(KINDS) + 1)
    for name, found in kinds:
        yield _row(name, *(f"{found[kind].all_scores()[2]:.3f}" for kind in KINDS))


def _tuned(detector: Detector, films: list[Film]) -> dict[str, float]:
    """The settings of the grid with the best F1 of all boundaries; of equals the middle one, as far from worse ones."""
    choices = [dict(zip(detector.grid, values, strict=True)) for values in product(*detector.grid.values())]
    scores = [_tally(detector, settings, films).all_scores()[2] for settings in choices]
    equals = [settings for settings, score in zip(choices, scores, strict=True) if score == max(scores)]
    return equals[len(equals) // 2]


def _tally(detector: Detector, settings: dict[str, float], films: list[Film]) -> Tally:
    tally = Tally()
    for found, boundaries in films:
        starts = [start for start in detector.find(found, **settings) if start > 0]
        spans = [range(b.start - TOLERANCE, b.end + TOLERANCE) for b in boundaries]
        hits = [b for b, span in zip(boundaries, spans, strict=True) if any(start in span for start in starts)]
        tally += Tally(
            cuts=sum(not b.gradual for b in boundaries),
            cuts_found=sum(not b.gradual for b in hits),
            fades=sum(b.gradual for b in boundaries),
            fades_found=sum(b.gradual for b in hits),
            false=sum(not any(start in span for span in spans) for start in starts),
        )
    return tally


def _scores(hits: int, false: int, total: int) -> tuple[float, float, float]:
    precision, recall = hits / max(hits + false, 1), hits / max(total, 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(found: dict[str, np.ndarray], **settings: float) -> list[int]:
    config = replace(VideoConfig(), **settings)  # type: ignore[arg-type]
    looks = [look_at(i, i / FPS, thumb, config) for i, thumb in enumerate(found["thumbs"])]
    return [i for i in range(len(looks)) if starts_shot(looks, i, config)]


def _replayed(detector: Any, scores: np.ndarray) -> list[int]:
    """Run PySceneDetect's Content- or AdaptiveDetector on the frame scores that it computed before."""
    detector._calculate_frame_score = lambda timecode, frame_img: scores[timecode.frame_num]
    return _run(detector, [np.empty(0)] * len(scores))


def _run(detector: Any, frames: list[np.ndarray]) -> list[int]:
    from scenedetect import FrameTimecode

    times = [FrameTimecode(i, float(FPS)) for i in range(len(frames))]
    starts = [cut for time, frame in zip(times, frames, strict=True) for cut in detector.process_frame(time, frame)]
    return [cut.frame_num for cut in [*starts, *detector.post_process(times[-1])]]


def _content(found: dict[str, np.ndarray], **settings: float) -> list[int]:
    from scenedetect.detectors import ContentDetector

    return _replayed(ContentDetector(**settings), np.nan_to_num(found["content"]))  # type: ignore[arg-type]


def _adaptive(found: dict[str, np.ndarray], **settings: float) -> list[int]:
    from scenedetect.detectors import AdaptiveDetector

    return _replayed(AdaptiveDetector(**settings), np.nan_to_num(found["content"]))  # type: ignore[arg-type]


def _threshold(found: dict[str, np.ndarray], **settings: float) -> list[int]:
    from scenedetect.detectors import ThresholdDetector

    frames = [np.full((1, 1, 3), level) for level in found["threshold"]]
    return _run(ThresholdDetector(**settings), frames)  # type: ignore[arg-type]


def _histogram(found: dict[str, np.ndarray], threshold: float = 0.20) -> list[int]:
    return _apart(np.flatnonzero(found["histogram"] <= 1 - threshold))


def _hash(found: dict[str, np.ndarray], threshold: float = 0.35) -> list[int]:
    return _apart(np.flatnonzero(found["hash"] >= threshold))


def _apart(frames: np.ndarray, least: int = 15) -> list[int]:
    """Those of `frames` that lie at least `least` behind the film's start and the one before, as these detectors do."""
    kept = [0]
    for frame in frames:
        if frame - kept[-1] >= least:
            kept.append(int(frame))
    return kept[1:]


def _transnetv2(found: dict[str, np.ndarray], threshold: float = 0.5) -> list[int]:
    """The frame behind the middle of each run of frames that the network marks."""
    marked = np.flatnonzero(found["transnetv2"] > threshold)
    runs = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1) if len(marked) else []
    return [int(run[0] + run[-1]) // 2 + 1 for run in runs]


def _steps(*bounds: float, count: int) -> tuple[float, ...]:
    return tuple(float(step) for step in np.linspace(*bounds, count).round(4))


DETECTORS = (
    Detector(
        name="ours",
        find=_ours,
        grid={"adaptive_threshold": (2.0, 2.8, 3.6), "min_change": (0.15, 0.2, 0.25), "dissolve_residual": (0.4, 0.5)},
    ),
    Detector(name="TransNetV2", find=_transnetv2, grid={"threshold": _steps(0.05, 0.9, count=18)}),
    Detector(name="ContentDetector", find=_content, grid={"threshold": _steps(4, 55, count=18)}),
    Detector(
        name="AdaptiveDetector",
        find=_adaptive,
        grid={"adaptive_threshold": _steps(1.5, 4, count=6), "min_content_val": (8.0, 15.0, 22.0)},
    ),
    Detector(name="ThresholdDetector", find=_threshold, grid={"threshold": _steps(2, 53, count=18)}),
    Detector(name="HistogramDetector", find=_histogram, grid={"threshold": _steps(0.05, 0.9, count=18)}),
    Detector(name="HashDetector", find=_hash, grid={"threshold": _steps(0.05, 0.56, count=18)}),
)


if __name__ == "__main__":
    for line in cuts(*map(Path, sys.argv[1:2])):
        print(line, flush=True)
