"""Drawn films for the cut benchmark, in memory: one kind of difficulty each, with the truth about every boundary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from factory.toon import EditList, drawings, plan_clip
from factory.toon.video import finished

SIZE = (160, 90)  # pixels
FPS = 24
DISSOLVE = 12  # frames
KINDS = ("plain", "flashes", "pans", "held poses", "grain", "letterbox", "dark", "white fades and dissolves")


@dataclass(frozen=True)
class Boundary:
    """Where a shot follows another: a cut at frame `start`, or a fade or dissolve over the frames [start, end)."""

    start: int
    end: int

    @property
    def gradual(self) -> bool:
        """Whether it is a fade or a dissolve."""
        return self.end > self.start + 1


def draw_film(kind: str, seed: int) -> tuple[list[np.ndarray], list[Boundary]]:
    """Return the frames (90,160,3 uint8 RGB, 24 a second) of the film of six shots, and its boundaries in order."""
    film = _plan(kind, seed)
    frames = list(_pan(film) if kind == "pans" else _frames(film, white=kind == KINDS[-1]))
    boundaries = []
    for index, shot in enumerate(film.shots[1:]):
        half = film.fade_frames if shot.transition == "fade" else 0
        if not half and kind == KINDS[-1] and index % 2:
            half = DISSOLVE // 2
            _dissolve(frames, shot.start, half)
        boundaries.append(Boundary(shot.start - half, shot.start + max(half, 1)))
    return frames, boundaries


def _plan(kind: str, seed: int) -> EditList:
    film = plan_clip(
        seed,
        shots=6,
        fps=FPS,
        size=(2 * SIZE[0], SIZE[1]) if kind == "pans" else SIZE,
        flashes=2 if kind == "flashes" else 0,
        letterbox=2.39 if kind == "letterbox" else None,
        grain=8.0 if kind == "grain" else 0.0,
    )
    shots = film.shots
    if kind == "held poses":
        actions = ("turn", "wave", "sway")
        shots = tuple(replace(shot, hold=3, action=actions[shot.seed % len(actions)]) for shot in shots)
    if kind == "dark":
        shots = tuple(replace(shot, scene=replace(shot.scene, lighting="dark")) for shot in shots)
    return replace(film, shots=shots)


def _frames(film: EditList, *, white: bool = False) -> Iterator[np.ndarray]:
    """Yield the frames; with `white`, fades go through white."""
    for drawing, first, lights in drawings(film):
        for held, light in enumerate(lights):
            yield finished(drawing.image, 2 - light if white and light < 1 else light, film, first + held)


def _pan(film: EditList) -> Iterator[np.ndarray]:
    """Yield the left or right half of a film of twice the width, moved across it within each shot."""
    frames = _frames(film)
    for shot in film.shots:
        places = np.linspace(0, SIZE[0], shot.end - shot.start).round().astype(int)
        for place in places if shot.seed % 2 else places[::-1]:
            yield np.ascontiguousarray(next(frames)[:, place : place + SIZE[0]])


def _dissolve(frames: list[np.ndarray], at: int, half: int) -> None:
    """Mix the last frame before `at` into the first one from there, over `half` frames on both sides, in place."""
    last, first = frames[at - 1], frames[at]
    for frame in range(at - half, at + half):
        share = (frame - at + half + 0.5) / (2 * half)
        before, after = (frames[frame], first) if frame < at else (last, frames[frame])
        frames[frame] = (before * (1 - share) + after * share).round().astype(np.uint8)
