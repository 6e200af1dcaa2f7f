"""A dataset root of drawn line art for the benchmarks of training, and its sketches as folders of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from factory.picture import encode_png
from factory.toon import caption, draw, random_pose, random_scene
from tests.lines import sample_row, write_samples

WIDTHS = (1024, 1920, 3840)  # pixels of a sketch in 16:9: the training sketch, and those of two films


def write_drawings(root: Path, folder: Path, count: int) -> str:
    """Write `count` drawings to train on; return the root.

    `folder`/WIDTH has the same drawings as files, for each of WIDTHS, and data.json that lists them as IP-Adapter's
    scripts read it: {"image_file", "text"}.
    """
    rng, rows, listed = random.Random(0), [], []
    for width in WIDTHS:
        (folder / str(width)).mkdir(parents=True)
    for number in range(count):
        scene = random_scene(rng)
        poses = [random_pose(rng) for _ in scene.figures]
        name = f"{number:06d}.png"
        for width in WIDTHS:
            lines = draw(scene, (width, width * 9 // 16), poses).lines
            (folder / str(width) / name).write_bytes(encode_png(lines))
        text = caption(scene, rng)
        rows.append(sample_row(number, (folder / str(WIDTHS[0]) / name).read_bytes(), text, "train"))
        listed.append({"image_file": name, "text": f"{text}, anime sketch, line art"})
    for width in WIDTHS:
        (folder / str(width) / "data.json").write_text(json.dumps(listed))
    return write_samples(root, rows)
