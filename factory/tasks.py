"""What a worker does with one unit of work: a small row in, a small row out; pictures go straight to the table."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from factory import caption as captions
from factory import schema, worker
from factory.candidates import failed_candidate
from factory.config import FactoryConfig
from factory.fetch import on_disk
from factory.locations import stamp
from factory.picture import decode_image, encode_jpeg
from factory.sketch import engine, tone
from factory.sources import describe_source
from factory.split import split_of
from factory.store import DamagedData, Store
from factory.video import Segment

_TRAINING_SIDE = 1024  # long side of training_sketch, pixels
_THUMBNAIL_HEIGHT = 180  # pixels


class DescribeSources:
    """{"uris"} -> their sources rows, as JSON. Of a known one that did not change, its source_id and uri alone."""

    def __init__(self, config: FactoryConfig, known: list[dict[str, Any]]) -> None:
        """Take the rows of `known` sources: what still has their size and time of change is not read again."""
        self._config = config
        self._known = {(row["uri"], row["size_bytes"], row["modified_ns"]): row["source_id"] for row in known}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"json": json.dumps([self._describe(uri) for uri in row["uris"]])}

    def _describe(self, uri: str) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # then it is described, as what cannot be read
            source_id = self._known.get((uri, *stamp(uri)))
            if source_id is not None:
                return {"source_id": source_id, "uri": uri}
        return describe_source(uri, self._config.video)


class DecodeSegment:
    """A segment -> its candidates, written as a unit. Raw frames never leave the worker."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprint("decode")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segment = Segment(**row)
        try:
            with on_disk(segment, self._config.video) as path:
                rows = self._candidates(replace(segment, uri=path))
        except (OSError, worker.WorkerEnded) as error:
            reason = f"decode: {error.strerror or error}" if isinstance(error, OSError) else f"decode: {error}"
            return {"entry": json.dumps({"error": reason, "source_id": segment.source_id})}
        entry = self._store.write_unit("candidates", segment.segment_id, rows)
        return {"entry": json.dumps(entry)}

    def _candidates(self, segment: Segment) -> list[dict[str, Any]]:
        """Return the segment's candidates, the last one failed where it can't be read to its end."""
        limits = self._config.video
        deadline = limits.deadline_seconds + limits.deadline_per_second * (segment.end - segment.start)
        rows: list[dict[str, Any]] = []
        failure = self._decode(segment, deadline, rows, "decord")
        if failure:  # once more, with the decoder that gives all that comes before it
            rows = []
            failure = self._decode(segment, deadline, rows, "av")
        if failure:
            after = rows[-1]["shot_end"] if rows else segment.start
            rows.append(failed_candidate(segment, after, failure))
        return [row | {"decode_fingerprint": self._fingerprint} for row in rows]

    def _decode(self, segment: Segment, deadline: float, rows: list[dict[str, Any]], decoder: str) -> str:
        """Append the segment's candidates to `rows`; return why it can't be read to its end, or nothing."""
        frames = ("factory.candidates:candidate_frames", segment, self._config.video, decoder)
        limits = {"deadline_seconds": deadline, "memory_limit_mb": self._config.video.memory_limit_mb}
        try:
            for candidate in worker.run_killable(*frames, **limits):
                rows.append(candidate)
        except worker.WorkerEnded:
            raise
        except worker.WorkerFailed as error:
            return str(error)
        return ""


class DecodePictures:
    """Segments that are one still picture each -> their candidates, written as one unit."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprint("decode")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segments = [Segment(**segment) for segment in row["segments"]]
        answers: list[dict[str, Any]] = []
        while len(answers) < len(segments):
            failure = self._decode(segments[len(answers) :], answers)
            if failure:  # once more, alone: was it this picture, or the machine?
                alone = segments[len(answers)]
                again = self._decode([alone], answers)
                answers += [failed_candidate(alone, 0.0, again)] if again else []
        rows = [answer | {"decode_fingerprint": self._fingerprint} for answer in answers if "error" not in answer]
        parts = [row["segment_id"] for row in rows]
        entry = self._store.write_unit("candidates", unit("pictures", parts), rows, parts)
        return {"entry": json.dumps(entry | {"unread": [answer for answer in answers if "error" in answer]})}

    def _decode(self, segments: list[Segment], answers: list[dict[str, Any]]) -> str:
        """Append to `answers` one per segment; return why the process ended before the next one, or nothing."""
        config = self._config.video
        pictures = ("factory.candidates:picture_candidates", segments, config)
        deadline = config.deadline_seconds + config.deadline_per_second * len(segments)
        limits = {"deadline_seconds": deadline, "memory_limit_mb": config.memory_limit_mb}
        try:
            for answer in worker.run_killable(*pictures, **limits):
                answers.append(answer)
        except worker.WorkerFailed as error:
            return str(error)
        return ""


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
        _one_thread()
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
        _one_thread()
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


def _one_thread() -> None:
    """Let networks and OpenCV compute on one thread: sums differ with their number, which follows num_cpus."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


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
