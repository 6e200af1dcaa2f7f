"""The corpus: drawn pictures with their line layers, scenes and captions, the same for the same seed.

A corpus is a folder: `images.npy` uint8 (N,S,S,3), `lines.npy` uint8 (N,S,S), `scenes.jsonl`, one scene a line. It is
drawn in parts by parallel processes, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from factory import toon
from factory.files import locked, new_file, write_atomic
from factory.toon.film import CODE
from factory.toon.traits import HAIR, Figure, Scene

SIDE = 128  # pixels of a stored picture
PART = 1000  # pictures per unit of drawing

# How often each framing is drawn: what is judged (a bust) most, since the time for training is short.
CAMERAS = {"bust": 11, "close-up": 4, "half figure": 3, "full figure": 2}
PAIRS, DARK = 1 / 10, 1 / 16  # share with two figures, and with dim light
WIDE = 1 / 8  # share drawn 16:9 and squeezed to the square, as BLIP sees a film's frame


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; the arrays are mapped, not read."""

    images: np.ndarray  # uint8 (N,S,S,3)
    lines: np.ndarray  # uint8 (N,S,S)
    scenes: list[Scene]
    wide: np.ndarray  # bool (N,): drawn 16:9, squeezed

    def __len__(self) -> int:
        return len(self.scenes)

    def first(self, count: int) -> Corpus:
        """Return its first `count` pictures."""
        return Corpus(self.images[:count], self.lines[:count], self.scenes[:count], self.wide[:count])


def is_held_out(figure: Figure, background: str) -> bool:
    """Return whether this combination of hair colour, hair style and background (a sixteenth) is kept from training."""
    return zlib.crc32(f"{figure.hair}/{figure.hair_style}/{background}".encode()) % 16 == 0


def random_scene(rng: random.Random, *, held_out: bool = False, judged: bool = False) -> Scene:
    """Return a scene of the corpus's mix; `held_out`: of a combination that training never sees; `judged`: one figure,
    bust, by day."""
    while True:
        camera = rng.choices(tuple(CAMERAS), tuple(CAMERAS.values()))[0]
        first = toon.random_figure(rng)
        figures = (first,)
        if rng.random() < PAIRS and not judged:
            figures = (first, toon.random_figure(rng, hair=rng.choice([h for h in HAIR if h != first.hair])))
        lighting = "dark" if rng.random() < DARK and not judged else "day"
        scene = toon.random_scene(rng, figures=figures, lighting=lighting, camera="bust" if judged else camera)
        if any(is_held_out(figure, scene.background) for figure in figures) == held_out:
            return scene


def draw_corpus(folder: Path, name: str, count: int, *, workers: int = 1, **mix: bool) -> Corpus:
    """Draw the corpus `name` of `count` pictures into `folder`, or what is missing of it, and return it.

    The name is the seed: two names share no picture. `mix` is random_scene's. ValueError when the folder holds a corpus
    of another count or mix, or of an older drawing code.
    """
    with locked(folder, wait=True):  # the other one draws the same
        facts = {"name": name, "count": count, "mix": mix, "code": CODE}
        _claim(folder / "facts.json", facts)
        if not (folder / "scenes.jsonl").is_file():
            _draw_missing(folder, name, count, mix, workers)
    scenes, wide = [], []
    for line in (folder / "scenes.jsonl").read_text().splitlines():
        row = json.loads(line)
        wide.append(row.pop("wide"))
        scenes.append(Scene(**row | {"figures": tuple(Figure(**figure) for figure in row["figures"])}))
    images, lines = (np.load(folder / f"{layer}.npy", mmap_mode="r") for layer in ("images", "lines"))
    return Corpus(images, lines, scenes, np.array(wide))


def _claim(path: Path, facts: dict[str, Any]) -> None:
    """Write what is made here, or check that it is the same."""
    held = json.loads(path.read_text()) if path.is_file() else facts
    if held != facts:
        raise ValueError(
            f"{path.parent} holds another corpus: {held}, now {facts}. Remove it, or give another --output."
        )
    write_atomic(path, json.dumps(facts) + "\n")


def _draw_missing(folder: Path, name: str, count: int, mix: dict[str, bool], workers: int) -> None:
    parts = [(folder / f"part-{start:06d}.npz", start, min(PART, count - start)) for start in range(0, count, PART)]
    missing = [part for part in parts if not part[0].is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(missing))), mp_context=context) as pool:
        jobs = [pool.submit(_draw_part, path, name, start, size, mix) for path, start, size in missing]
        for job in jobs:
            print(f"corpus   {name}: {job.result()} of {count} drawn", flush=True)
    _join(folder, [path for path, _, _ in parts], count)


def _draw_part(path: Path, name: str, start: int, count: int, mix: dict[str, bool]) -> int:
    cv2.setNumThreads(1)
    images, lines, scenes = [], [], []
    for i in range(start, start + count):
        rng = random.Random(f"{name}/{i}")
        scene = random_scene(rng, **mix)
        poses = [toon.random_pose(rng) for _ in scene.figures]
        wide = rng.random() < WIDE and not mix.get("judged")
        drawing = toon.draw(scene, (SIDE * 16 // 9, SIDE) if wide else (SIDE, SIDE), poses)
        images.append(cv2.resize(drawing.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        lines.append(cv2.resize(drawing.lines, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        scenes.append(json.dumps(scene.attributes() | {"wide": wide}))
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=np.stack(images), lines=np.stack(lines), scenes=np.array(scenes))
    return start + count


def _join(folder: Path, parts: list[Path], count: int) -> None:
    """Join the parts into the three files, the scenes last: where they are, the corpus is whole."""
    scenes: list[str] = []
    for layer, shape in (("images", (count, SIDE, SIDE, 3)), ("lines", (count, SIDE, SIDE))):
        with new_file(folder / f"{layer}.npy") as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            done = 0
            for part in parts:
                with np.load(part) as held:
                    array[done : done + len(held[layer])] = held[layer]
                    done += len(held[layer])
                    scenes += held["scenes"].tolist() if layer == "lines" else []
            array.flush()
            del array
    with new_file(folder / "scenes.jsonl") as temporary:
        temporary.write_text("\n".join(scenes) + "\n")
    for part in parts:
        part.unlink()
