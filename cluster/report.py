"""The demo's report: the dataset's, and what the run folder, the pictures and the journal tell, in one HTML file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import truth
from cluster.pictures import JUDGED, training_sketch
from factory.files import write_atomic
from factory.report import parts, picture, render
from factory.store import Store
from factory.toon import Scene

TEMPLATE = Path(__file__).with_name("demo.html.j2")
SMOOTHING = 0.9  # of the loss curve, exponential

# matplotlib writes colours into the SVG; these stand-ins become the page's own, so that the curve follows its scheme.
_STAND_INS = {"#010203": "var(--ink)", "#040506": "var(--faint)", "#070809": "var(--accent)", "#0a0b0c": "var(--line)"}
_INK, _FAINT, _ACCENT, _LINE = _STAND_INS


def write_report(output: Path, journal: dict[str, Any]) -> Path:
    """Write `output`/report.html about the demo in `output`; return its path."""
    root = output / "dataset"
    store = Store(str(root))
    drawn = truth.scenes(store)
    page = render(
        TEMPLATE,
        **parts(store),
        name="AnimeSketch",
        captions=truth.captions(store, drawn),
        training=training(output / "run"),
        pictures=pictures(output / "images", root),
        verdict=verdict(output / "images", root, drawn),
        judged=JUDGED,
        journal=journal,
    )
    write_atomic(output / "report.html", page)
    return output / "report.html"


def training(run: Path) -> dict[str, Any] | None:
    """Return the run's numbers and its loss curves as SVG; None where there is no metrics file."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    aligned = [(row["alignment_step"], row["alignment_loss"]) for row in rows if "alignment_loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    base = next((row["base_validation_loss"] for row in rows if "base_validation_loss" in row), None)
    speeds = [row["samples_per_second"] for row in rows if row.get("samples_per_second")]
    if not train:
        return None
    numbers: dict[str, str] = {}
    if aligned:
        numbers["alignment steps"] = f"{aligned[-1][0]:,}"
        numbers["alignment loss, last ten"] = f"{_mean(aligned[-10:]):.3f}"
    numbers["training steps"] = f"{train[-1][0]:,}"
    numbers["noise loss, mean"] = f"{_mean(train):.4f}"
    if validation:
        if base is not None:
            numbers["held out, the base alone"] = f"{base:.4f}"
        numbers["held out, last"] = f"{validation[-1][1]:.4f}"
    if speeds:
        numbers["samples per second"] = f"{sorted(speeds)[len(speeds) // 2]:.1f}"
    return {"numbers": numbers, "curve": loss_curves(aligned, train, validation, base), "aligned": bool(aligned)}


Points = Sequence[tuple[int, float]]  # step, loss


def loss_curves(aligned: Points, train: Points, validation: Points, base: float | None) -> str:
    """Return the losses over the steps as an SVG element that takes its colours from the page: left that of the
    alignment, where there was one, and right, or alone, that of the noise, with the held-out one of the base alone."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # here: it takes a second to import
    from matplotlib.figure import Figure

    import matplotlib  # isort: skip

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2 if aligned else 1, squeeze=False)[0]
        if aligned:
            _losses(panels[0], aligned)
            panels[0].set(xlabel="alignment step", ylabel="alignment loss", yscale="log")
        _losses(panels[-1], train)
        panels[-1].set(xlabel="training step", ylabel="noise loss (MSE)")
        if validation:
            style = {"color": _ACCENT, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
            panels[-1].plot(*zip(*validation, strict=True), label="held out", **style)
        if base is not None:
            panels[-1].axhline(base, color=_ACCENT, linewidth=1, linestyle=(0, (4, 3)), label="base alone")
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_LINE)
            axes.grid(axis="y", color=_LINE, linewidth=0.5)
            axes.tick_params(which="both", color=_LINE, labelcolor=_FAINT, length=3)
            axes.xaxis.label.set_color(_FAINT)
            axes.yaxis.label.set_color(_FAINT)
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "columnspacing": 1.2}
            axes.legend(frameon=False, ncols=4, labelcolor=_FAINT, handlelength=1.4, **above)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, own in _STAND_INS.items():
        svg = svg.replace(stand_in, own)
    return svg


def _losses(axes: Any, points: Points) -> None:
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=_FAINT, linewidth=0.7, alpha=0.7, label="each step")
    axes.plot(steps, _smooth(losses), color=_INK, linewidth=1.5, label="smoothed")


def verdict(folder: Path, root: Path, drawn: dict[str, Scene]) -> list[truth.Brought]:
    """Return what the adapter brought through of the sketches in the pictures that are judged."""
    index = folder / "index.json"
    items = json.loads(index.read_text()) if index.is_file() else []
    made = {item["group"]: (folder / item["file"]).read_bytes() for item in items if item["shows"] == JUDGED}
    return truth.pictures(made, {key: training_sketch(root, key) for key in made}, drawn)


def pictures(folder: Path, root: Path) -> list[dict[str, Any]]:
    """Return the generated pictures with what was asked, grouped by held-out sample, each with its sketch."""
    index = folder / "index.json"
    if not index.is_file():
        return []
    groups: dict[str, dict[str, Any]] = {}
    for item in json.loads(index.read_text()):
        group = groups.setdefault(item["group"], {"frame_id": item["group"], "prompt": item["prompt"], "made": []})
        group["made"].append({**item, "picture": picture((folder / item["file"]).read_bytes())})
    for frame_id, group in groups.items():
        group["reference"] = picture(training_sketch(root, frame_id))
    return list(groups.values())


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _smooth(values: Sequence[float]) -> list[float]:
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(average / weight)
    return out
