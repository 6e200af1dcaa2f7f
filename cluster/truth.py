"""What the edit lists of drawn clips know of a dataset's samples, and what of it captions and pictures get right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from factory.store import Store
from factory.toon import Figure, Scene
from factory.toon.video import truth_path
from trainer.base import WEIGHTS
from trainer.micro.attributes import SHOWN_BY_LINES, VALUES, rights


def scenes(store: Store) -> dict[str, Scene]:
    """Return what is drawn in each selected sample of a drawn clip, by frame_id."""
    uris = store.table("sources").to_table(columns=["source_id", "uri"]).to_pylist()
    truths = {row["source_id"]: truth_path(row["uri"]) for row in uris}
    lists = {source: json.loads(path.read_text()) for source, path in truths.items() if path.is_file()}
    columns = ["frame_id", "source_id", "timestamp"]
    found = {}
    for row in store.table("samples").to_table(columns=columns, filter="selected").to_pylist():
        clip = lists.get(row["source_id"])
        if clip is not None:
            frame = round(row["timestamp"] * clip["fps"])
            (shot,) = (shot for shot in clip["shots"] if shot["start"] <= frame < shot["end"])
            figures = tuple(Figure(**figure) for figure in shot["scene"]["figures"])
            found[row["frame_id"]] = Scene(**(shot["scene"] | {"figures": figures}))
    return found


def captions(store: Store, drawn: dict[str, Scene]) -> list[tuple[str, int, int]]:
    """Return of `drawn` samples of one figure, and of two, how many captions are right in everything, of how many."""
    rows = store.table("samples").to_table(columns=["frame_id", "caption"], filter="selected").to_pylist()
    said = {row["frame_id"]: row["caption"] or "" for row in rows}
    counts = []
    for number, name in ((1, "one figure"), (2, "two figures")):
        right = [
            all(right for _, right in rights(scene, said[key]))
            for key, scene in drawn.items()
            if len(scene.figures) == number
        ]
        if right:
            counts.append((name, sum(right), len(right)))
    return counts


def pictures(files: dict[str, Path], drawn: dict[str, Scene]) -> list[tuple[str, int, int, float]]:
    """Return how many of the pictures in `files` (by frame_id) show what their sketch shows, as the probe sees it.

    Per attribute that lines show: its name, the number of such pictures, that of all of them, and the chance of one.
    """
    import torch  # here: it takes seconds to import

    from trainer.micro.probe import Probe, judge

    keys = [key for key in files if key in drawn]
    if not keys:
        return []
    pixels = torch.from_numpy(np.stack([_pixels(files[key]) for key in keys])).permute(0, 3, 1, 2) / 127.5 - 1
    hits = judge(Probe.from_pretrained(WEIGHTS / "judge/probe"), pixels, [drawn[key] for key in keys])
    return [(name, int(hits[name].sum()), len(keys), 1 / len(VALUES[name])) for name in SHOWN_BY_LINES]


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
