"""A dataset root of drawn line art for the benchmarks of training, and the same pictures as a folder of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lance

from factory import schema
from factory.picture import encode_png
from factory.toon import caption, draw, random_pose, random_scene

SIZE = (1024, 576)  # pixels: a training sketch of a 16:9 film


def write_drawings(root: Path, files: Path, count: int) -> str:
    """Write `count` drawings to train on; return the root. `files` gets the same PNGs, and data.json with their texts:
    {"image_file", "text"}, as IP-Adapter's scripts read it."""
    files.mkdir(parents=True)
    rng, rows, listed = random.Random(0), [], []
    for number in range(count):
        scene = random_scene(rng)
        picture = encode_png(draw(scene, SIZE, [random_pose(rng) for _ in scene.figures]).lines)
        row = {
            "frame_id": f"source-{number:012d}",
            "source_id": "source",
            "training_sketch": picture,
            "caption": caption(scene, rng),
            "keywords": ["anime sketch", "line art"],
            "split": "train",
            "selected": True,
        }
        (files / f"{number:06d}.png").write_bytes(picture)
        listed.append({"image_file": f"{number:06d}.png", "text": f"{row['caption']}, anime sketch, line art"})
        rows.append(row)
    (files / "data.json").write_text(json.dumps(listed))
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)
