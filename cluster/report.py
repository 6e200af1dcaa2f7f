"""The demo's report: one HTML file with its pictures inside, made from the tables, the run folder and the journal."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cluster.pictures import training_sketch
from factory import status
from factory.files import write_atomic
from factory.store import Store

ROWS = 14  # frame | sketch | caption rows
THUMBNAIL = 320  # px, long side of an embedded picture
SMOOTHING = 0.9  # of the loss curve, exponential

# matplotlib writes colours into the SVG; these stand-ins become the page's own, so that the curve follows its scheme.
_STAND_INS = {"#010203": "var(--ink)", "#040506": "var(--faint)", "#070809": "var(--accent)", "#0a0b0c": "var(--line)"}
_INK, _FAINT, _ACCENT, _LINE = _STAND_INS


def write_report(output: Path, journal: dict[str, Any]) -> Path:
    """Write `output`/report.html about the demo in `output`; return its path."""
    root = output / "dataset"
    page = render(
        funnel=funnel(root),
        sources=sources(root),
        rows=sample_rows(root),
        training=training(output / "run"),
        pictures=pictures(output / "images", root),
        journal=journal,
    )
    write_atomic(output / "report.html", page)
    return output / "report.html"


def render(**parts: Any) -> str:
    """Return the page; every text that comes from data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = _clock
    return environment.get_template("report.html.j2").render(**parts)


def funnel(root: Path) -> dict[str, Any]:
    """Return the counts from sources to kept samples, and per reason of dropping: its count and one example picture."""
    store = Store(str(root))
    counts = status.funnel(store)
    columns = ["frame_id", "status", "reason", "score", "threshold", "duplicate_of"]
    rows = store.table("candidates").to_table(columns=columns, with_row_address=True).to_pylist()
    addresses = {row["frame_id"]: row["_rowaddr"] for row in rows}
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] != "kept":
            why = row["reason"] or "no reason recorded"
            if row["status"] != "dropped":  # could not be read, or no selection has decided yet
                why = f"failed, {why}" if row["status"] == "failed" else "undecided"
            by_reason.setdefault(why, []).append(row)
    reasons = []
    for reason, matching in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        example = matching[len(matching) // 2]
        shown = [addresses[key] for key in (example["frame_id"], example["duplicate_of"]) if key in addresses]
        examples = [picture(data, 200) for data in store.read_pictures("candidates", "image", shown) if data]
        reasons.append(
            {
                "reason": reason if matching[0]["status"] == "failed" else reason.replace("_", " "),
                "failed": matching[0]["status"] == "failed",
                "count": len(matching),
                "share": len(matching) / len(rows),
                "examples": examples,  # the dropped frame, and the kept one that it duplicates
                "score": example["score"],
                "threshold": example["threshold"],
            }
        )
    return {
        "sources": sum(counts["sources"].values()),
        "failed_sources": len(counts["failed_sources"]),
        "segments": counts["segments"],
        "candidates": counts["candidates"],
        "kept": counts["kept"],
        "kept_share": counts["kept"] / max(counts["candidates"], 1),
        "splits": counts["splits"],
        "reasons": reasons,
    }


def sources(root: Path) -> list[dict[str, Any]]:
    """Return one entry per source, in order of its file's name, with the number of samples it gave."""
    store = Store(str(root))
    kept = Counter(store.table("samples").to_table(columns=["source_id"], filter="selected").column(0).to_pylist())
    columns = [
        "source_id",
        "uri",
        "codec",
        "width",
        "height",
        "fps",
        "duration",
        "shots",
        "candidates",
        "status",
        "error",
    ]
    rows = store.table("sources").to_table(columns=columns).to_pylist()
    named = ({**row, "name": _name(row["uri"]), "kept": kept[row["source_id"]]} for row in rows)
    return sorted(named, key=lambda row: row["name"])


def sample_rows(root: Path, count: int = ROWS) -> list[dict[str, Any]]:
    """Return `count` selected samples, taken from the sources in turn and spread over each, with frame and sketch.

    They come in the order of the sources: those that gave most first.
    """
    columns = ["frame_id", "source_id", "timestamp", "width", "height", "caption", "caption_by", "keywords", "split"]
    store = Store(str(root))
    found = store.table("sources").to_table(columns=["source_id", "uri"]).to_pylist()
    names = {row["source_id"]: _name(row["uri"]) for row in found}
    rows = store.table("samples").to_table(columns=columns, filter="selected", with_row_address=True).to_pylist()
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (names[row["source_id"]], row["timestamp"])):
        by_source.setdefault(row["source_id"], []).append(row)
    richest = sorted(by_source.values(), key=len, reverse=True)
    chosen = [row for turn in turns(richest) for row in turn][:count]
    chosen.sort(key=lambda row: (-len(by_source[row["source_id"]]), names[row["source_id"]], row["timestamp"]))
    addresses = [row["_rowaddr"] for row in chosen]
    frames = store.read_pictures("samples", "image", addresses)
    sketches = store.read_pictures("samples", "training_sketch", addresses)
    return [
        {
            **row,
            "source": names[row["source_id"]],
            "frame": picture(frame) if frame else None,
            "sketch": picture(sketch) if sketch else None,
        }
        for row, frame, sketch in zip(chosen, frames, sketches, strict=True)
    ]


def turns(groups: Sequence[Sequence[Any]]) -> Iterable[list[Any]]:
    """Yield turns over `groups`: each holds the next item of every group that has one left, distant items first."""
    # 0, 1/2, 1/4, 3/4, 1/8, …: the places' bits reversed; the first place last, since films open on black or a title
    spread = []
    for group in groups:
        places = {i: f"{i * 1024 // len(group):010b}"[::-1] for i in range(len(group))}
        spread.append(sorted(places, key=lambda i, places=places: places[i]))
    spread = [order[1:] + order[:1] for order in spread]
    for turn in range(max(map(len, spread), default=0)):
        yield [group[order[turn]] for group, order in zip(groups, spread, strict=True) if turn < len(order)]


def training(run: Path) -> dict[str, Any] | None:
    """Return the run's numbers and its loss curves as SVG; None where there is no metrics file."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    aligned = [(row["alignment_step"], row["alignment_loss"]) for row in rows if "alignment_loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
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
        numbers["held out, first"] = f"{validation[0][1]:.4f}"
        numbers["held out, last"] = f"{validation[-1][1]:.4f}"
    if speeds:
        numbers["samples per second"] = f"{sorted(speeds)[len(speeds) // 2]:.1f}"
    return {"numbers": numbers, "curve": loss_curves(aligned, train, validation), "aligned": bool(aligned)}


Points = Sequence[tuple[int, float]]  # step, loss


def loss_curves(aligned: Points, train: Points, validation: Points) -> str:
    """Return the losses over the steps as an SVG element that takes its colours from the page: left that of the
    alignment, where there was one, and right, or alone, that of the noise."""
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
            _losses(panels[0], aligned, "alignment")
            panels[0].set(xlabel="alignment step", ylabel="alignment loss", yscale="log")
        _losses(panels[-1], train, "training")
        panels[-1].set(xlabel="training step", ylabel="noise loss (MSE)")
        if validation:
            style = {"color": _ACCENT, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
            panels[-1].plot(*zip(*validation, strict=True), label="held out", **style)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_LINE)
            axes.grid(axis="y", color=_LINE, linewidth=0.5)
            axes.tick_params(which="both", color=_LINE, labelcolor=_FAINT, length=3)
            axes.xaxis.label.set_color(_FAINT)
            axes.yaxis.label.set_color(_FAINT)
            axes.legend(frameon=False, loc="upper right", ncols=3, labelcolor=_FAINT).set_in_layout(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, own in _STAND_INS.items():
        svg = svg.replace(stand_in, own)
    return svg


def _losses(axes: Any, points: Points, name: str) -> None:
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=_FAINT, linewidth=0.7, alpha=0.7, label=f"{name}, each step")
    axes.plot(steps, _smooth(losses), color=_INK, linewidth=1.5, label="smoothed")
    axes.margins(y=0.18)


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


def picture(data: bytes, long_side: int = THUMBNAIL) -> dict[str, Any]:
    """Return an encoded picture, made at most `long_side` px long, as `uri` (data:), `width` and `height`.

    A JPEG, but of pictures as small as the micro base draws: it would smear them.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("L" if opened.mode in ("1", "L", "LA", "I;16") else "RGB")
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(out, kind, quality=82, optimize=True)
    uri = f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height}


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _smooth(values: Sequence[float]) -> list[float]:
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(average / weight)
    return out


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
