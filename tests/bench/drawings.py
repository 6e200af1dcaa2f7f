"""A dataset root of drawn line art for the benchmarks of training, and its sketches as folders of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lance

from factory import schema
from factory.picture import encode_png
from factory.sketch.engine import reduced
from factory.toon import caption, draw, random_pose, random_scene

SIZE = (1920, 1080)  # pixels of a film's frame, and of its sketch
SMALL = 1024  # pixels of a training sketch's long side


def write_drawings(root: Path, sketches: Path, small: Path, count: int) -> str:
    """Write `count` drawings to train on; return the root.

    `sketches` gets them as files of the film's size, `small` those that are in the column training_sketch. In both,
    data.json lists {"image_file", "text"}, as IP-Adapter's scripts read it.
    """
    rng, rows, listed = random.Random(0), [], []
    sketches.mkdir(parents=True)
    small.mkdir(parents=True)
    for number in range(count):
        scene = random_scene(rng)
        lines = draw(scene, SIZE, [random_pose(rng) for _ in scene.figures]).lines
        row = {
            "frame_id": f"source-{number:012d}",
            "source_id": "source",
            "training_sketch": encode_png(reduced(lines, SMALL)),
            "caption": caption(scene, rng),
            "keywords": ["anime sketch", "line art"],
            "split": "train",
            "selected": True,
        }
        (sketches / f"{number:06d}.png").write_bytes(encode_png(lines))
        (small / f"{number:06d}.png").write_bytes(row["training_sketch"])
        listed.append({"image_file": f"{number:06d}.png", "text": f"{row['caption']}, anime sketch, line art"})
        rows.append(row)
    for folder in (sketches, small):
        (folder / "data.json").write_text(json.dumps(listed))
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)
