"""A dataset of a few line drawings for tests of training, and the files of a folder."""

from __future__ import annotations

from pathlib import Path

import cv2
import lance
import numpy as np

from factory import schema


def sample_row(number: int, sketch: bytes, caption: str, split: str, **more: object) -> dict[str, object]:
    """A selected row of samples: a line drawing with its text."""
    return {
        "frame_id": f"source-{number:012d}",
        "source_id": "source",
        "training_sketch": sketch,
        "caption": caption,
        "keywords": ["anime sketch", "line art"],
        "split": split,
        "selected": True,
        **more,
    }


def write_samples(root: Path, rows: list[dict[str, object]]) -> str:
    """Write a dataset root of such rows; return it."""
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)


def write_lines(root: Path) -> str:
    """Write and return a dataset root with ten drawings to train on, eight of them accepted, and three held out."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(13):
        width, height = [(96, 72), (72, 96), (80, 80)][number % 3]
        picture = np.full((height, width), 255, np.uint8)
        for points in rng.integers(0, 72, (6, 3, 2)).astype(np.int32):
            cv2.polylines(picture, [points], False, 0, 2, cv2.LINE_AA)
        sketch, colour = (
            cv2.imencode(".png", layer)[1].tobytes()
            for layer in (picture, cv2.applyColorMap(picture, cv2.COLORMAP_OCEAN))
        )
        split, review = "train" if number < 10 else "validation", "accepted" if number % 5 else "pending"
        rows.append(sample_row(number, sketch, f"drawing {number}", split, image=colour, review=review))
    return write_samples(root, rows)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
