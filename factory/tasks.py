"""What a worker does with one unit of work: a small row in, a small row out; pictures go straight to the table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from factory import caption as captions
from factory import schema, worker
from factory.config import FactoryConfig
from factory.picture import decode_image, encode_jpeg
from factory.sketch import engine, tone
from factory.sources import describe_source
from factory.split import split_of
from factory.store import DamagedData, Store
from factory.video import Segment

_TRAINING_SIDE = 1024  # long side of training_sketch, pixels
_THUMBNAIL_HEIGHT = 180  # pixels


class DescribeSource:
    """{"uri"} -> the sources row, as JSON."""

    def __init__(self, config: FactoryConfig) -> None:
        self._config = config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"json": json.dumps(describe_source(row["uri"], self._config.video))}


class DecodeSegment:
    """A segment -> its candidates, written as a unit. Raw frames never leave the worker."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprint("decode")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segment, limits = Segment(**row), self._config.video
        deadline = limits.deadline_seconds + limits.deadline_per_second * (segment.end - segment.start)
        rows: list[dict[str, Any]] = []
        if not os.path.exists(segment.uri):
            error = f"decode: {segment.uri} is gone. Build again with the path where it is now."
            return {"entry": json.dumps({"error": error, "source_id": segment.source_id})}
        try:
            failure = self._decode(segment, deadline, rows, "decord")
        except worker.WorkerEnded as error:
            return {"entry": json.dumps({"error": f"decode: {error}", "source_id": segment.source_id})}
        if failure:  # once more, with the decoder that gives all that comes before it
            again: list[dict[str, Any]] = []
            with contextlib.suppress(worker.WorkerEnded):
                failure = self._decode(segment, deadline, again, "av")
                rows = again
        if failure:
            rows.append(self._failed(segment, rows, failure))
        entry = self._store.write_unit("candidates", segment.segment_id, rows)
        return {"entry": json.dumps(entry)}

    def _decode(self, segment: Segment, deadline: float, rows: list[dict[str, Any]], decoder: str) -> str:
        """Append the segment's candidates to `rows`; return why it can't be read to its end, or nothing."""
        frames = ("factory.candidates:candidate_frames", segment, self._config.video, decoder)
        limits = {"deadline_seconds": deadline, "memory_limit_mb": self._config.video.memory_limit_mb}
        try:
            for candidate in worker.run_killable(*frames, **limits):
                rows.append(candidate | {"decode_fingerprint": self._fingerprint})
        except worker.WorkerEnded:
            raise
        except worker.WorkerFailed as error:
            return str(error)
        return ""

    def _failed(self, segment: Segment, rows: list[dict[str, Any]], reason: str) -> dict[str, Any]:
        """The row that says from where on the segment could not be read."""
        after = rows[-1]["shot_end"] if rows else segment.start
        return {
            # a microsecond later: no frame has this time stamp
            "frame_id": schema.frame_id(segment.source_id, after + 1e-6),
            "source_id": segment.source_id,
            "segment_id": segment.segment_id,
            "timestamp": after,
            "status": "failed",
            "reason": f"decode: {reason}",
            "decode_fingerprint": self._fingerprint,
        }


class AppendSamples:
    """Addresses of kept candidates -> their samples rows, written as a unit: pictures and scores are copied once."""

    def __init__(self, store: Store, config: FactoryConfig, splits: dict[str, str]) -> None:
        """Take the `splits` that sources have already, by source_id; the configuration decides for the others."""
        self._store, self._config, self._splits = store, config, splits
        self._fingerprint = config.fingerprint("select")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        addresses = [int(address) for address in row["addresses"]]
        copied = [f.name for f in schema.CANDIDATES if f.name in schema.SAMPLES.names and f.name != "image"]
        candidates = self._store.rows_at("candidates", addresses, [*copied, "decode_fingerprint"])
        pictures = self._store.read_pictures("candidates", "image", addresses)
        uris = self._store.table("sources").to_table(columns=["source_id", "uri"]).to_pylist()
        uri_of = {source["source_id"]: source["uri"] for source in uris}
        rows = []
        for candidate, picture in zip(candidates, pictures, strict=True):
            _check(picture, candidate["image_sha256"], f"image of candidate {candidate['frame_id']}")
            stages = {"decode": candidate.pop("decode_fingerprint"), "select": self._fingerprint}
            source = candidate["source_id"]
            rows.append(
                candidate
                | {"image": picture, "selected": True, "review": "pending", "stages": stages}
                | {"split": self._splits.get(source) or split_of(source, uri_of[source], self._config.split)}
            )
        name = unit("samples", [row["frame_id"] for row in rows])
        return {"entry": json.dumps(self._store.write_unit("samples", name, rows))}


class DrawSketches:
    """Samples of one fragment -> their sketch columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprint("sketch")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        cv2.setNumThreads(1)
        rows = []
        for sample, image in _pictures(self._store, task):
            lines = engine.sketch(image, self._config.sketch)
            png = _png(lines)
            small = engine.reduced(lines, _TRAINING_SIDE)
            rows.append(
                {
                    "frame_id": sample["frame_id"],
                    "sketch": png,
                    "sketch_width": lines.shape[1],
                    "sketch_height": lines.shape[0],
                    "sketch_sha256": hashlib.sha256(png).hexdigest(),
                    "ink_ratio": tone.ink_ratio(lines),
                    "training_sketch": _png(small) if small is not lines else png,
                    "thumbnail": _thumbnail(image, lines),
                    "stages": sample["stages"] | {"sketch": self._fingerprint},
                }
            )
        return {"entry": json.dumps(self._store.write_updates("samples", int(task["fragment"]), rows))}


class WriteCaptions:
    """Samples of one fragment -> their caption columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprint("caption")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        captioner = captions.Captioner(self._config.caption.model)
        rows = [
            {
                "frame_id": sample["frame_id"],
                "caption": captioner(image),
                "caption_by": captioner.id,
                "keywords": list(self._config.caption.keywords),
                "stages": sample["stages"] | {"caption": self._fingerprint},
            }
            for sample, image in _pictures(self._store, task)
        ]
        return {"entry": json.dumps(self._store.write_updates("samples", int(task["fragment"]), rows))}


def _pictures(store: Store, task: dict[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield (row, RGB image) for the samples of a task, one picture in memory at a time."""
    addresses = [int(address) for address in task["addresses"]]
    samples = store.rows_at("samples", addresses, ["frame_id", "image_sha256", "stages"])
    for address, sample in zip(addresses, samples, strict=True):
        data = store.read_pictures("samples", "image", [address])[0]
        _check(data, sample["image_sha256"], f"image of sample {sample['frame_id']}")
        yield sample, decode_image(data or b"")


def _check(data: bytes | None, sha256: str, what: str) -> None:
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedData(f"The {what} does not match its sha256: the table's files were changed or damaged.")


def unit(kind: str, keys: list[str]) -> str:
    """Return the name of the unit of work that writes the rows `keys`."""
    return f"{kind}-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:24]}"


def _png(picture: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise RuntimeError("a sketch could not be encoded as PNG")
    return data.tobytes()


def _thumbnail(image: np.ndarray, lines: np.ndarray) -> bytes:
    def at_height(picture: np.ndarray) -> np.ndarray:
        width = max(1, round(picture.shape[1] * _THUMBNAIL_HEIGHT / picture.shape[0]))
        return cv2.resize(picture, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)

    pair = cv2.hconcat([at_height(image), cv2.cvtColor(at_height(lines), cv2.COLOR_GRAY2RGB)])
    return encode_jpeg(pair, 88)
