"""The report of a dataset: one HTML file with its pictures inside, made from the tables."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from PIL import Image

from factory import status
from factory.config import FactoryConfig
from factory.files import write_atomic
from factory.models import HOW_TO_GET, OWNER
from factory.picture import decode_image
from factory.settings import from_dict
from factory.sketch import sheet
from factory.stage import clock
from factory.store import DamagedData, Store
from factory.verify import HASHES

TEMPLATE = Path(__file__).with_name("report.html.j2")
SAMPLES = 14  # frame | sketch | caption rows
REASONS = 30  # the commonest; errors of decoders are many
SOURCES = 200
CROPS = 3  # samples on the contact sheet
CROP = 280  # px, side of what is shown of each
THUMBNAIL = 320  # px, long side of an embedded picture


def write_report(store: Store, output: Path) -> Path:
    """Write the report of the dataset in `store` to the file `output`; return its path."""
    write_atomic(output, render(TEMPLATE, name=store.root.name, **parts(store)))
    return output


def parts(store: Store) -> dict[str, Any]:
    """Return what the page tells of the dataset in `store`: `funnel`, `sources`, `samples` and `sheet`."""
    return {
        "funnel": funnel(store),
        "sources": sources(store),
        "samples": sample_rows(store),
        "sheet": contact_sheet(store),
    }


def render(template: Path, **told: Any) -> str:
    """Return the page of `template`, which may extend this module's; every text that comes from data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = clock
    return environment.get_template(template.name).render(**told)


def funnel(store: Store) -> dict[str, Any]:
    """Return the counts from sources to kept samples, and per reason of dropping: its count and one example picture."""
    counts = status.funnel(store)
    columns = ["frame_id", "status", "reason", "score", "threshold", "duplicate_of"]
    rows = store.table("candidates").to_table(
        columns=columns, filter="status is null or status != 'kept'", with_row_address=True
    )
    grouped = _by_reason(rows)
    return {
        "sources": sum(counts["sources"].values()),
        "failed_sources": len(counts["failed_sources"]),
        "segments": counts["segments"],
        "candidates": counts["candidates"],
        "kept": counts["kept"],
        "kept_share": counts["kept"] / max(counts["candidates"], 1),
        "samples": counts["samples"],
        "splits": counts["splits"],
        "reasons": [_reason(store, rows, places, counts["candidates"]) for places in grouped[:REASONS]],
        "more_reasons": max(len(grouped) - REASONS, 0),
    }


def _by_reason(rows: pa.Table) -> list[list[int]]:
    """Return the places of `rows` by status and reason, the commonest first."""
    groups: dict[tuple[str | None, str | None], list[int]] = defaultdict(list)
    for place, key in enumerate(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True)):
        groups[key].append(place)
    return sorted(groups.values(), key=len, reverse=True)


def _reason(store: Store, rows: pa.Table, places: list[int], candidates: int) -> dict[str, Any]:
    """Return what is told of the `places` of `rows`, which share status and reason, out of so many candidates."""
    (example,) = rows.slice(places[len(places) // 2], 1).to_pylist()
    failed = example["status"] == "failed"
    why = example["reason"] or "no reason recorded"
    shown = [example["_rowaddr"], *_addresses(store, example["duplicate_of"])]
    return {
        "reason": f"failed, {why}" if failed else why.replace("_", " ") if example["status"] else "undecided",
        "failed": failed,
        "count": len(places),
        "share": len(places) / candidates,
        # the dropped frame, and the kept one that it duplicates
        "examples": [image for image in pictures(store, "candidates", "image", shown, 200) if image],
        "score": example["score"],
        "threshold": example["threshold"],
    }


def _addresses(store: Store, frame_id: str | None) -> list[int]:
    if frame_id is None:
        return []
    found = store.table("candidates").to_table(
        columns=["frame_id"], filter=f"frame_id = '{frame_id}'", with_row_address=True
    )
    return found["_rowaddr"].to_pylist()


def sources(store: Store) -> dict[str, Any]:
    """Return the first sources by their files' names as `shown`, with the number of samples each gave, and how many
    `more` there are; where these are too many to show, those that failed go first."""
    kept = Counter(store.table("samples").to_table(columns=["source_id"], filter="selected")["source_id"].to_pylist())
    columns = ["source_id", "uri", "codec", "width", "height", "fps", "duration", "shots", "candidates"]
    rows = store.table("sources").to_table(columns=[*columns, "status", "error"]).to_pylist()
    named = [{**row, "name": _name(row["uri"]), "kept": kept[row["source_id"]]} for row in rows]
    named.sort(key=lambda row: (len(rows) > SOURCES and row["status"] == "ok", row["name"]))
    return {"shown": named[:SOURCES], "more": max(len(named) - SOURCES, 0)}


def sample_rows(store: Store, count: int = SAMPLES) -> list[dict[str, Any]]:
    """Return `count` selected samples, taken from the sources in turn and spread over each, with frame and sketch.

    They come in the order of the sources: those that gave most first.
    """
    chosen = _spread(store, count)
    addresses = [row["_rowaddr"] for row in chosen]
    columns = ["timestamp", "width", "height", "caption", "caption_by", "keywords", "split"]
    rows = store.rows_at("samples", addresses, columns)
    frames = pictures(store, "samples", "image", addresses)
    sketches = pictures(store, "samples", "training_sketch", addresses)
    return [
        {**row, "source": place["source"], "frame": frame, "sketch": sketch}
        for row, place, frame, sketch in zip(rows, chosen, frames, sketches, strict=True)
    ]


def _spread(store: Store, count: int) -> list[dict[str, Any]]:
    """Return `source` (its name), `timestamp` and `_rowaddr` of `count` selected samples, from the sources in turn."""
    found = store.table("sources").to_table(columns=["source_id", "uri"]).to_pylist()
    names = {row["source_id"]: _name(row["uri"]) for row in found}
    places = store.table("samples").to_table(
        columns=["source_id", "timestamp"], filter="selected", with_row_address=True
    )
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(places.to_pylist(), key=lambda row: (names[row["source_id"]], row["timestamp"])):
        by_source.setdefault(row["source_id"], []).append(row | {"source": names[row["source_id"]]})
    ranked = sorted(by_source.values(), key=len, reverse=True)
    asked = ranked if len(ranked) <= count else [*ranked[: count - 1], ranked[-1]]  # that which gave least, too
    chosen = [row for turn in turns(asked) for row in turn][:count]
    return sorted(chosen, key=lambda row: (-len(by_source[row["source_id"]]), row["source"], row["timestamp"]))


def contact_sheet(store: Store, count: int = CROPS) -> dict[str, Any]:
    """Return `crops` of so many samples: `source`, `timestamp`, and `pictures` of one place pixel by pixel, as `frame`
    and by each converter that is on this machine; and how to get one `more`."""
    config = from_dict(FactoryConfig, store.settings() or {}).sketch
    configs = sheet.variants(config)
    shown = []
    for row in _spread(store, count):
        (frame,) = pictures(store, "samples", "image", [row["_rowaddr"]])
        (data,) = store.read_pictures("samples", "image", [row["_rowaddr"]]) if frame and "uri" in frame else (None,)
        if data is None:
            continue  # its damage is told where the sample is
        image = decode_image(data)
        crops = sheet.crops(image, sheet.busiest(image, config, CROP), configs)
        shown.append(row | {"pictures": {name: encoded(Image.fromarray(crop), "png") for name, crop in crops.items()}})
    return {"crops": shown, "more": None if "hed" in configs else HOW_TO_GET[f"{OWNER}hed"]}


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


def pictures(
    store: Store, name: str, column: str, addresses: list[int], long_side: int = THUMBNAIL
) -> list[dict[str, Any] | None]:
    """Return the pictures of `column` at row `addresses` as `picture` gives them; None where there is none.

    One that is damaged, or whose file is gone, is {"damaged": why}: the page says so in its place.
    """
    digest = HASHES.get(column)
    rows = store.rows_at(name, addresses, [digest] if digest else [])
    shown: list[dict[str, Any] | None] = []
    for address, row in zip(addresses, rows, strict=True):
        try:
            (data,) = store.read_pictures(name, column, [address])
            if data and digest and hashlib.sha256(data).hexdigest() != row[digest]:
                raise DamagedData("it does not match its sha256")
            shown.append(picture(data, long_side) if data else None)
        except Exception as error:  # Pillow's readers raise what they please, such as SyntaxError
            shown.append({"damaged": str(error)})
    return shown


def picture(data: bytes, long_side: int = THUMBNAIL) -> dict[str, Any]:
    """Return an encoded picture, made at most `long_side` px long, as `uri` (data:), `width` and `height`.

    A JPEG, but of pictures as small as the micro base draws: it would smear them.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("L" if opened.mode in ("1", "L", "LA", "I;16") else "RGB")
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    return encoded(image, "png" if max(image.size) <= 128 else "jpeg")


def encoded(image: Image.Image, kind: str) -> dict[str, Any]:
    """Return a picture as it is, as `picture` does, as a "png" or "jpeg"."""
    out = io.BytesIO()
    image.save(out, kind, quality=82, optimize=True)
    uri = f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height}


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]
