"""A dataset root of drawn line art for the benchmarks of training, and its sketches as folders of files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lance

from factory import schema
from factory.picture import encode_png
from factory.toon import caption, draw, random_pose, random_scene

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
        row = {
            "frame_id": f"source-{number:012d}",
            "source_id": "source",
            "training_sketch": (folder / str(WIDTHS[0]) / name).read_bytes(),
            "caption": caption(scene, rng),
            "keywords": ["anime sketch", "line art"],
            "split": "train",
            "selected": True,
        }
        rows.append(row)
        listed.append({"image_file": name, "text": f"{row['caption']}, anime sketch, line art"})
    for width in WIDTHS:
        (folder / str(width) / "data.json").write_text(json.dumps(listed))
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)
