"""The sketch network against HED and XDoG: F-score of their lines against the exact ones of held-out drawings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from factory.sketch import tone
from factory.sketch.engine import SketchConfig, sketch
from tests.bench.harness import Comparison
from tests.bench.hed import load_hed
from trainer.micro import lines, measure

COUNT = 40  # drawings
REACHES = (1, 3)  # pixels; with three, edges as thick as HED's are no fault


def sketching(folder: Path) -> list[Comparison]:
    """Return the comparisons, a score for each drawing: ink near true ink, each side at its best level."""
    torch.set_num_threads(2)
    drawn = lines.drawings(folder, "validation", COUNT)
    pairs = [
        (image, true) for image, true in drawn if (true < 128).mean() > 0.005
    ]  # a crop of sky has no lines to find
    hed = load_hed()
    converters: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        name: functools.partial(sketch, config=SketchConfig(converter=name)) for name in ("micro", "xdog")
    }
    converters["hed"] = lambda image: tone.levels(hed.lines(image))
    found = []
    for reach in REACHES:
        scores = {name: measure.sketch_scores(convert, pairs, reach=reach) for name, convert in converters.items()}
        found += [
            Comparison(
                title=f"lines within {reach} px, micro / {peer}",
                unit="F-score",
                ours=scores["micro"],
                peer=scores[peer],
            )
            for peer in ("xdog", "hed")
        ]
    return found
