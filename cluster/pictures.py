"""The demo's pictures: what is asked of the server, and the asking, over HTTP as any client does it."""

from __future__ import annotations

import base64
import functools
import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import truth
from cluster.local import CommandFailed, loopback
from factory.caption import sample_text
from factory.files import write_atomic
from factory.store import Store
from factory.toon import Scene
from trainer.base import GUIDANCE

STEPS = 50  # DDIM, the paper's number
SCALE = 0.5  # the paper's alpha
REQUEST_TIMEOUT_S = 900
JUDGED = "adapter: keywords, sketch"  # what is shown by the pictures that the report's verdict rests on
NEAR = ("close-up", "bust")  # framings in which a face is large enough for a picture of 64 px


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture asked for. `reference` is the frame_id whose sketch goes with it, None for text alone."""

    shows: str  # what is to be seen in it, as the report says it
    route: str  # generations or edits
    group: str  # frame_id of the held-out sample that the report shows it beside
    prompt: str
    reference: str | None
    seed: int
    num_inference_steps: int = STEPS
    adapter_scale: float = SCALE
    guidance_scale: float = GUIDANCE

    @property
    def name(self) -> str:
        return f"{self.group}-{re.sub('[^a-z]+', '-', self.shows)}.png"


def requests_for(root: Path, clips: Sequence[str], count: int = 4, judged: int = 24) -> list[Request]:
    """Return what the demo asks of the samples of the drawn `clips` (names of files), none of which was in training.

    For `count` of them the base with their caption; base and adapter with the keywords of line art, the adapter with
    the sketch too; the same with caption and keywords. For up to `judged` in all the adapter with keywords and sketch,
    which are judged. The pictures of one sample share a seed.
    """
    store = Store(str(root))
    sources = store.table("sources").to_table(columns=["source_id", "uri"]).to_pylist()
    held = {row["source_id"] for row in sources if Path(row["uri"]).name in clips}
    drawn = truth.scenes(store)
    columns = ["frame_id", "source_id", "caption", "keywords"]
    rows = store.table("samples").to_table(columns=columns, filter="split = 'validation' and selected").to_pylist()
    rows = sorted((row for row in rows if row["source_id"] in held), key=lambda row: row["frame_id"])
    if not rows:
        raise CommandFailed(f"{root}/samples.lance holds no sample of {', '.join(clips)}, so no reference sketch.")
    asked = []
    near = [row for row in rows if _shows_a_face(drawn[row["frame_id"]])] or rows
    for seed, row in enumerate(_unlike(near, judged), start=1):
        key, caption, keywords = row["frame_id"], row["caption"] or "", row["keywords"]
        text, alone = sample_text(caption, keywords), sample_text(None, keywords)
        base = functools.partial(Request, group=key, route="generations", reference=None, seed=seed)
        adapter = functools.partial(Request, group=key, reference=key, seed=seed)
        with_sketch = adapter(shows=JUDGED, route="edits", prompt=alone, adapter_scale=1.0)
        if seed > count:
            asked.append(with_sketch)
            continue
        asked += [
            base(shows="base: the caption", prompt=caption),
            base(shows="base: keywords alone", prompt=alone),
            with_sketch,
            base(shows="base: caption, keywords", prompt=text),
            adapter(shows="adapter: caption, keywords, sketch", route="generations", prompt=text),
        ]
    return asked


def _shows_a_face(scene: Scene) -> bool:
    return scene.camera in NEAR and len(scene.figures) == 1 and scene.lighting == "day"


def _unlike(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return `count` of the rows, the first and then always the one whose caption shares least with those chosen."""
    words = [set((row["caption"] or "").split()) for row in rows]
    shared = [[len(one & other) / max(len(one | other), 1) for other in words] for one in words]
    chosen = [0]
    while len(chosen) < min(count, len(rows)):
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(min(left, key=lambda i: max(shared[i][j] for j in chosen)))
    return [rows[i] for i in chosen]


def training_sketch(root: Path, frame_id: str) -> bytes:
    """Return one sample's `training_sketch`, a PNG."""
    store = Store(str(root))
    found = store.table("samples").to_table(
        columns=["frame_id"], filter=f"frame_id = '{frame_id}'", with_row_address=True
    )
    (data,) = store.read_pictures("samples", "training_sketch", found["_rowaddr"].to_pylist())
    assert data is not None
    return data


def ask(url: str, root: Path, asked: list[Request], folder: Path) -> Iterator[Request]:
    """Ask the server at `url` for each picture, write it into `folder`, yield its request; last, write index.json."""
    index = []
    for request in asked:
        sketch = training_sketch(root, request.reference) if request.reference else None
        reply = _post(f"{url}/v1/images/{request.route}", request, sketch)
        item = reply["data"][0]
        write_atomic(folder / request.name, base64.b64decode(item["b64_json"]))
        index.append({"file": request.name, **asdict(request), "seed": item["seed"]})
        yield request
    write_atomic(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _post(url: str, request: Request, sketch: bytes | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "adapter_scale": request.adapter_scale,
        "guidance_scale": request.guidance_scale,
    }
    if request.route == "edits":
        body, kind = _multipart(fields, sketch or b"")
    else:
        if sketch is not None:
            fields["image"] = base64.b64encode(sketch).decode()
        body, kind = json.dumps(fields).encode(), "application/json"
    try:
        with loopback.open(
            urllib.request.Request(url, data=body, headers={"Content-Type": kind}), timeout=REQUEST_TIMEOUT_S
        ) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:1000]
        raise CommandFailed(f"POST {url} was answered {error.code}.\n    {told}") from None
    except OSError as error:
        raise CommandFailed(f"POST {url} got no answer: {error}.") from None


def _multipart(fields: dict[str, Any], image: bytes) -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    parts.append(f'{head}"image"; filename="sketch.png"\r\nContent-Type: image/png\r\n\r\n'.encode() + image + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"
