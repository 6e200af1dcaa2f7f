"""The long proof of the tile engine: what the largest sketch takes of memory, read from outside."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import pytest
from safetensors.torch import save_file

from factory.sketch.hed import HED
from factory.toon import draw, random_scene
from tests.bench.large import measured

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(("converter", "most"), [("xdog", 1.0e9), ("micro", 2.0e9), ("hed", 2.0e9)])
def test_the_largest_sketch_fits_into_memory(converter: str, most: float, tmp_path: Path) -> None:
    frame = tmp_path / "frame.png"
    cv2.imwrite(str(frame), draw(random_scene(random.Random(7)), (3840, 2160)).image[..., ::-1])
    network = []
    if converter == "hed":  # memory does not hang on the weights
        save_file(HED().state_dict(), tmp_path / "model.safetensors")
        network = ["--set", f"sketch.model={tmp_path}"]
    lines = tmp_path / "lines.png"
    _, peak = measured(frame, lines, "--converter", converter, "--size", "10240", *network)
    assert cv2.imread(str(lines), cv2.IMREAD_UNCHANGED).shape == (5760, 10240)
    assert peak <= most
