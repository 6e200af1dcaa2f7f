"""What a worker does with one unit of work: a small row in, a small row out; pictures go straight to the table."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import cv2
import numpy as np

from factory import caption as captions
from factory import schema, split, worker
from factory.candidates import failed_candidate
from factory.config import FactoryConfig
from factory.fetch import check_unchanged, on_disk, unread
from factory.locations import stamp
from factory.picture import decode_image, encode_jpeg, encode_png
from factory.sketch import engine
from factory.sources import READ_BYTES_PER_SECOND, identify, unopened
from factory.store import DamagedData, Store
from factory.timeline import timeline_of
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
        sources = [self._known_source(uri) or identify(uri) for uri in row["uris"]]
        self._probe([source for source in sources if "size_bytes" in source and "error" not in source])
        return {"json": json.dumps(sources)}

    def _known_source(self, uri: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError):  # then it is described, as what cannot be read
            source_id = self._known.get((uri, *stamp(uri)))
            if source_id is not None:
                return {"source_id": source_id, "uri": uri}
        return None

    def _probe(self, sources: list[dict[str, Any]]) -> None:
        """Add to each of `sources` what is in its file; one that the machine failed is pending, to be tried again."""
        config = self._config.video
        answers = worker.run_for_each(
            "factory.sources:probe_sources",
            [source["uri"] for source in sources],
            config,
            deadline_seconds=config.deadline_seconds,
            seconds=[source["size_bytes"] / READ_BYTES_PER_SECOND for source in sources],
            memory_limit_mb=config.memory_limit_mb,
        )
        for source, answer in zip(sources, answers, strict=True):
            if isinstance(answer, worker.WorkerLost):
                answer = {"status": "pending", "error": f"probe: {answer}"}
            elif isinstance(answer, worker.WorkerFailed):
                answer = unopened(source["uri"], answer)
            source |= answer


class DecodeSegment:
    """A segment -> its candidates, written as a unit. Raw frames never leave the worker."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprint("decode")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segment = Segment(**row)
        answer: dict[str, Any] = {}
        for _ in range(worker.ATTEMPTS):
            try:
                with on_disk(segment, self._config.video) as here:
                    answer = self._write(here)
                break
            except (OSError, worker.WorkerLost) as error:
                answer = unread(segment, error)
                if answer["status"] == "failed":
                    break
        return {"entry": json.dumps(answer)}

    def _write(self, segment: Segment) -> dict[str, Any]:
        """Write the segment's candidates, as they come, and return their entry.

        The last one is failed where the segment can't be read to its end; the only one where the limits forbade that,
        for how far it came is chance then. WorkerLost where the machine did; SourceChanged where the file was changed
        meanwhile: of that nothing is written.
        """
        with contextlib.suppress(worker.WorkerFailed):
            return self._write_unit(segment, segment.segment_id, self._rows(segment, in_order=False))
        try:  # once more, by the decoder that gives all that comes before the failure
            return self._write_unit(segment, segment.segment_id, self._rows_before_failure(segment))
        except worker.WorkerEnded as error:
            limits = self._config.video.limits
            failed = failed_candidate(segment, segment.start, str(error), limits)
            rows = [failed | {"decode_fingerprint": self._fingerprint}]
            return self._write_unit(segment, segment.within(limits), rows)

    def _write_unit(self, segment: Segment, unit: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        def of_one_file() -> Iterator[dict[str, Any]]:
            yield from rows
            check_unchanged(segment)  # before the ledger has them: what it has is published

        return self._store.write_unit("candidates", unit, of_one_file())

    def _rows_before_failure(self, segment: Segment) -> Iterator[dict[str, Any]]:
        after = segment.start
        try:
            for row in self._rows(segment, in_order=True):
                yield row
                after = row["shot_end"]
        except worker.WorkerEnded:
            raise
        except worker.WorkerFailed as error:
            yield failed_candidate(segment, after, str(error)) | {"decode_fingerprint": self._fingerprint}

    def _rows(self, segment: Segment, *, in_order: bool) -> Iterator[dict[str, Any]]:
        config = self._config.video
        deadline = config.deadline_seconds + config.deadline_per_second * (segment.end - segment.start)
        timeline = timeline_of(segment, config)  # the deadline begins when it is there
        frames = ("factory.candidates:candidate_frames", segment, config, in_order, timeline)
        limits = {"deadline_seconds": deadline, "memory_limit_mb": config.memory_limit_mb}
        for candidate in worker.run_killable(*frames, **limits):
            yield candidate | {"decode_fingerprint": self._fingerprint}


class DecodePictures:
    """Segments that are one still picture each -> their candidates, written as one unit."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprint("decode")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segments = [Segment(**segment) for segment in row["segments"]]
        config = self._config.video
        answers = worker.run_for_each(
            "factory.candidates:picture_candidates",
            segments,
            config,
            deadline_seconds=config.deadline_seconds,
            seconds=[config.deadline_per_second] * len(segments),
            memory_limit_mb=config.memory_limit_mb,
        )
        told = [self._told(*pair) for pair in zip(segments, answers, strict=True)]
        rows = [row | {"decode_fingerprint": self._fingerprint} for row in told if "error" not in row]
        parts = [row["segment_id"] for row in rows]
        entry = self._store.write_unit("candidates", unit("pictures", parts), rows, parts) if rows else {}
        return {"entry": json.dumps(entry | {"unread": [row for row in told if "error" in row]})}

    def _told(self, segment: Segment, answer: dict[str, Any] | Exception) -> dict[str, Any]:
        """Return the row of a picture, or what fetch.unread tells of it."""
        if isinstance(answer, worker.WorkerFailed):
            limits = self._config.video.limits if isinstance(answer, worker.WorkerEnded) else ""
            return failed_candidate(segment, 0.0, str(answer), limits)
        return unread(segment, answer) if isinstance(answer, Exception) else answer


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
        sources = self._store.table("sources").to_table(columns=list(split.COLUMNS)).to_pylist()
        named = {source["source_id"]: source for source in sources}
        rows, damaged = [], []
        for address, candidate in zip(addresses, candidates, strict=True):
            try:
                picture = _picture(self._store, "candidates", address, candidate)
            except DamagedData as error:
                damaged.append({"error": str(error)})
                continue
            stages = {"decode": candidate.pop("decode_fingerprint"), "select": self._fingerprint}
            source = candidate["source_id"]
            rows.append(
                candidate
                | {"image": picture, "selected": True, "review": "pending", "stages": stages}
                | {"split": self._splits.get(source) or split.split_of(named[source], self._config.split)}
            )
        name = unit("samples", [row["frame_id"] for row in rows])
        entry = self._store.write_unit("samples", name, rows) if rows else {}
        return {"entry": json.dumps(entry | {"unread": damaged})}


class DrawSketches:
    """Samples of one fragment -> their sketch columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprint("sketch")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        _one_thread()
        rows, damaged = [], []
        for sample, image in _pictures(self._store, task, damaged):
            lines, tone = engine.draw(image, self._config.sketch)
            png = encode_png(lines)
            small = engine.reduced(lines, _TRAINING_SIDE)
            rows.append(
                {
                    "frame_id": sample["frame_id"],
                    "sketch": png,
                    "sketch_width": lines.shape[1],
                    "sketch_height": lines.shape[0],
                    "sketch_sha256": hashlib.sha256(png).hexdigest(),
                    "ink_ratio": tone.ink_ratio,
                    "tone": asdict(tone),
                    "training_sketch": encode_png(small) if small is not lines else png,
                    "thumbnail": _thumbnail(image, lines),
                    "stages": sample["stages"] | {"sketch": self._fingerprint},
                }
            )
        return _updated(self._store, task, rows, damaged)


class WriteCaptions:
    """Samples of one fragment -> their caption columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprint("caption")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        _one_thread()
        captioner = captions.Captioner(self._config.caption.model)
        damaged: list[dict[str, Any]] = []
        rows = [
            {
                "frame_id": sample["frame_id"],
                "caption": captioner(image),
                "caption_by": captioner.id,
                "keywords": list(self._config.caption.keywords),
                "stages": sample["stages"] | {"caption": self._fingerprint},
            }
            for sample, image in _pictures(self._store, task, damaged)
        ]
        return _updated(self._store, task, rows, damaged)


def _updated(
    store: Store, task: dict[str, Any], rows: list[dict[str, Any]], damaged: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the new columns of a task's samples, and return the answer: its entry, and what is damaged."""
    entry = store.write_updates("samples", int(task["fragment"]), rows) if rows else {}
    return {"entry": json.dumps(entry | {"unread": damaged})}


def _one_thread() -> None:
    """Let networks and OpenCV compute on one thread: sums differ with their number, which follows num_cpus."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _pictures(
    store: Store, task: dict[str, Any], damaged: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield (row, RGB image) for the samples of a task, one picture in memory at a time.

    What is damaged is left out, and appended to `damaged` with the reason.
    """
    addresses = [int(address) for address in task["addresses"]]
    samples = store.rows_at("samples", addresses, ["frame_id", "image_sha256", "stages"])
    for address, sample in zip(addresses, samples, strict=True):
        try:
            picture = _picture(store, "samples", address, sample)
        except DamagedData as error:
            damaged.append({"error": str(error)})
        else:
            yield sample, decode_image(picture)


def _picture(store: Store, name: str, address: int, row: dict[str, Any]) -> bytes:
    """Return the encoded image of a row of table `name`. DamagedData when it is gone or not what the row says."""
    what = f"image of {row['frame_id']} in {name}"
    try:
        (data,) = store.read_pictures(name, "image", [address])
    except (OSError, ValueError) as error:
        raise DamagedData(f"The {what} cannot be read: {error}") from error
    if data is None or hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        raise DamagedData(f"The {what} does not match its sha256: the table's files were changed or damaged.")
    return data


def unit(kind: str, keys: list[str]) -> str:
    """Return the name of the unit of work that writes the rows `keys`."""
    return f"{kind}-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:24]}"


def _thumbnail(image: np.ndarray, lines: np.ndarray) -> bytes:
    def at_height(picture: np.ndarray) -> np.ndarray:
        width = max(1, round(picture.shape[1] * _THUMBNAIL_HEIGHT / picture.shape[0]))
        return cv2.resize(picture, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)

    pair = cv2.hconcat([at_height(image), cv2.cvtColor(at_height(lines), cv2.COLOR_GRAY2RGB)])
    return encode_jpeg(pair, 88)
