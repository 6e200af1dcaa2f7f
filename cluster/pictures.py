"""The demo's pictures: what is asked of the server, and the asking, over HTTP as any client does it."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.local import CommandFailed, loopback
from factory.caption import sample_text
from factory.files import write_atomic
from factory.store import Store

STEPS = 50  # DDIM, the paper's number
SCALE = 0.5  # the paper's alpha
GUIDANCE = 2.5  # low: SD v1.5's usual 7.5 burns the colours of pictures as small as the demo's
REQUEST_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture asked for. `reference` is the frame_id whose sketch goes with it, None for text alone."""

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
        return f"{self.group}-{self.route}-{'sketch' if self.reference else 'text'}.png"


def requests_for(root: Path, count: int = 4) -> list[Request]:
    """Return what the demo asks: for `count` held-out samples the base with their text alone, the adapter with text and
    sketch, and with the sketch and no more text than the keywords.

    The three share a seed, so that they differ by text and reference alone.
    """
    table = (
        Store(str(root))
        .table("samples")
        .to_table(columns=["frame_id", "source_id", "caption", "keywords"], filter="split = 'validation' and selected")
    )
    rows = sorted(table.to_pylist(), key=lambda row: row["frame_id"])
    if not rows:
        raise CommandFailed(f"{root}/samples.lance holds no sample of the split 'validation', so no reference sketch.")
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    asked = []
    for seed, row in enumerate(chosen, start=1):
        prompt = sample_text(row["caption"], row["keywords"])
        alone = sample_text(None, row["keywords"])
        key = row["frame_id"]
        asked += [
            Request(route="generations", group=key, prompt=prompt, reference=None, seed=seed),
            Request(route="generations", group=key, prompt=prompt, reference=key, seed=seed),
            Request(route="edits", group=key, prompt=alone, reference=key, seed=seed, adapter_scale=1.0),
        ]
    return asked


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
