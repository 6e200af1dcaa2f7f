"""What the edit lists of drawn clips know of a dataset's samples, and what of it captions and pictures get right."""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factory.store import Store
from factory.toon import Figure, Scene
from factory.toon.video import truth_path
from trainer.base import WEIGHTS
from trainer.micro.attributes import SHOWN_BY_LINES, VALUES, labels, rights


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


class Told(NamedTuple):
    """How much of the captions of some samples is right."""

    samples: str  # which
    count: int
    right: int  # captions that are right in everything
    attributes: float  # share of all attributes that are named rightly


def captions(store: Store, drawn: dict[str, Scene]) -> list[Told]:
    """Return how much is right in the captions of the `drawn` samples, by how large their figures are."""
    rows = store.table("samples").to_table(columns=["frame_id", "caption"], filter="selected").to_pylist()
    said = {row["frame_id"]: row["caption"] or "" for row in rows}
    told = []
    for name in ("one near figure", "one full figure", "two figures"):
        found = [
            [right for _, right in rights(scene, said[key])] for key, scene in drawn.items() if _group(scene) == name
        ]
        if found:
            every = [right for answers in found for right in answers]
            told.append(Told(name, len(found), sum(map(all, found)), sum(every) / len(every)))
    return told


def _group(scene: Scene) -> str:
    if len(scene.figures) == 2:
        return "two figures"
    return "one full figure" if scene.camera == "full figure" else "one near figure"


class Brought(NamedTuple):
    """How many of the judged pictures show of one attribute what their sketch shows."""

    attribute: str
    right: int
    pictures: int
    by_chance: float  # the same of pictures laid beside other sketches than their own, in the mean
    in_sketches: int  # the same of the sketches themselves: what the judge can see


def pictures(made: dict[str, bytes], sketches: dict[str, bytes], drawn: dict[str, Scene]) -> list[Brought]:
    """Return, per attribute that lines show, what the probe sees in pictures and sketches (encoded, by frame_id)."""
    import torch  # here: it takes seconds to import

    from trainer.micro.probe import Probe, seen

    keys = [key for key in made if key in drawn]
    if not keys:
        return []
    probe = Probe.from_pretrained(WEIGHTS / "judge/probe")
    truth = torch.tensor([labels(drawn[key]) for key in keys])
    found, ceiling = (seen(probe, _pixels([encoded[key] for key in keys])) for encoded in (made, sketches))
    answers = []
    for name in SHOWN_BY_LINES:
        true = truth[:, list(VALUES).index(name)]
        hits = found[name][:, None] == true
        right, others = int(hits.diagonal().sum()), int(hits.sum() - hits.diagonal().sum())
        by_chance = others / max(len(keys) - 1, 1)
        answers.append(Brought(name, right, len(keys), by_chance, int((ceiling[name] == true).sum())))
    return answers


def _pixels(encoded: list[bytes]) -> Any:
    """Return encoded pictures as the probe reads them: (B,3,64,64) in [-1,1], squeezed to the square."""
    import torch

    from trainer.micro.pictures import SIDE

    arrays = []
    for data in encoded:
        with Image.open(io.BytesIO(data)) as image:
            arrays.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
