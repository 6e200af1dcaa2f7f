"""Pictures of the making: sheets of samples, and curves."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from factory.files import new_file


def write_sheet(pictures_B3HW: Tensor, path: Path, columns: int = 12, zoom: int = 2) -> None:
    """Write pictures in [-1,1] as one PNG, `columns` in a row, enlarged; an unfinished row is filled with white."""
    cells = _as_bytes(pictures_B3HW)
    missing = np.full((-len(cells) % columns, *cells.shape[1:]), 255, np.uint8)
    cells = np.concatenate([cells, missing])
    rows = [np.hstack(list(cells[i : i + columns])) for i in range(0, len(cells), columns)]
    whole = cv2.resize(np.vstack(rows), None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    _, data = cv2.imencode(".png", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR))
    with new_file(path) as aside:
        aside.write_bytes(data.tobytes())


def as_images(pictures_B3HW: Tensor) -> list[Image.Image]:
    """Return pictures in [-1,1] as PIL's."""
    return [Image.fromarray(cell) for cell in _as_bytes(pictures_B3HW)]


def _as_bytes(pictures_B3HW: Tensor) -> np.ndarray:
    return (pictures_B3HW.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)


def write_curve(curve: Path, path: Path) -> None:
    """Write what a stage's `curve.jsonl` holds as one SVG, a panel for each number over the steps."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # here: it takes a second to import
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("step", "seconds")]
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    with new_file(path) as aside:
        figure.savefig(aside, format="svg")
