"""Subtitles, credits and bars: how well the selection finds what is laid over drawn frames, and leaves the others.

`make bench ARGS=text` prints the table of docs/selection.md. Fonts: those that matplotlib and Pillow carry.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factory.bars import find_bars
from factory.picture import decode_image, encode_jpeg
from factory.scores import scores
from factory.selection import SelectionConfig
from factory.toon import draw, random_pose, random_scene
from tests.selecting import select

SEEDS = range(100, 160)
SIZES = ((480, 270), (640, 360), (854, 480), (1280, 720))
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral")
WORDS = ("I", "never", "thought", "you", "would", "come", "back", "Wait!", "tell", "me", "the", "truth", "now?")


def subtitled(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture with one or two outlined lines at its lower edge, white or yellow, 5 to 7 % of its height each."""
    image = Image.fromarray(picture)
    pen, size = ImageDraw.Draw(image), round(image.height * rng.uniform(0.05, 0.07))
    font, colour = _font(rng, size), rng.choice(("white", "white", "#ffe63c"))
    y = round(image.height * (1 - rng.uniform(0.03, 0.06)))
    for _ in range(rng.choice((1, 1, 2))):
        line = _line(rng, 7, lambda text: pen.textlength(text, font) <= 0.9 * image.width)
        y -= round(1.15 * size)
        place = ((image.width - pen.textlength(line, font)) / 2, y)
        pen.text(place, line, colour, font, stroke_width=max(1, size // 12), stroke_fill="black")
    return np.array(image)


def credited(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture, or black, with six or more lines of credits, 4 to 5 % of its height each."""
    image = Image.fromarray(picture if rng.random() < 0.5 else np.zeros_like(picture))
    pen, size = ImageDraw.Draw(image), round(image.height * rng.uniform(0.04, 0.05))
    font = _font(rng, size)
    for i in range(rng.randint(6, 10)):
        line = _line(rng, 4, lambda text: pen.textlength(text, font) <= 0.6 * image.width)
        pen.text((image.width * 0.3, size * (2 + 1.5 * i)), line, "white", font, stroke_width=1, stroke_fill="black")
    return np.array(image)


def letterboxed(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture between bars of 6 to 16 % of the frame's height, at the top and at the bottom."""
    height = len(picture)
    bar = round(height * rng.uniform(0.06, 0.16))
    inner = cv2.resize(picture, (picture.shape[1], height - 2 * bar), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(inner, bar, bar, 0, 0, cv2.BORDER_CONSTANT)


def _font(rng: random.Random, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    name = rng.choice((*FONTS, ""))
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / f"{name}.ttf", size) if name else ImageFont.load_default(size)


def _line(rng: random.Random, words: int, fits: Callable[[str], bool]) -> str:
    said = rng.choices(WORDS, k=words)
    while not fits(" ".join(said)):
        said.pop()
    return " ".join(said)


def text() -> Iterator[str]:
    """Yield the lines of a table: how many frames of each kind were found to have subtitles, credits and bars."""
    cv2.setNumThreads(1)
    kinds = {"drawn": lambda picture, _: picture, "subtitles": subtitled, "credits": credited, "bars": letterboxed}
    found = {kind: {"subtitles": 0, "credits": 0, "bars": 0} for kind in (*kinds, "drawn, dark")}
    for seed in SEEDS:
        rng = random.Random(f"text/{seed}")
        size, pose = rng.choice(SIZES), random_pose(rng)
        lit = draw(random_scene(rng), size, pose).image
        dark = draw(random_scene(rng, lighting="dark"), size, pose).image
        frames = {kind: treat(lit, rng) for kind, treat in kinds.items()} | {"drawn, dark": dark}
        for kind, frame in frames.items():
            image = decode_image(encode_jpeg(frame, rng.randint(60, 95)))
            bars = find_bars(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
            found[kind]["bars"] += any(bars)
            row = {"frame_id": "a", "status": None, "width": size[0], "height": size[1]} | scores(bars.cropped(image))
            for reason, name in (("credits", "max_text_share"), ("subtitles", "max_subtitle_share")):
                alone = dict.fromkeys(SelectionConfig.__dataclass_fields__) | {"duplicate_change": 0}
                rule = SelectionConfig(**(alone | {name: getattr(SelectionConfig(), name)}))
                found[kind][reason] += select([row], rule)["a"]["reason"] == reason
    yield "| frames | number | subtitles found | credits found | bars found |"
    yield "|---|---|---|---|---|"
    for kind, counts in found.items():
        yield f"| {kind} | {len(SEEDS)} | {' | '.join(str(count) for count in counts.values())} |"
