"""The stages, each on one screen: decode, select, sketch, caption. Ray Data runs them; one committer publishes."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import cv2

from factory import caption as captions
from factory import quality, schema, video, worker
from factory.config import FactoryConfig
from factory.sketch import engine, tone
from factory.split import split_of
from factory.store import Committer, DamagedData, Store, check_keys
from factory.video import Segment

_TRAINING_SIDE = 1024  # long side of training_sketch, pixels
_THUMBNAIL_HEIGHT = 180  # pixels


def build(store: Store, sources: list[str], config: FactoryConfig) -> None:
    """Run all stages over `sources` (paths): what an earlier run committed is not done again."""
    with store.lock():
        store.create()
        decode(store, sources, config)
        select(store, config)
        sketch(store, config)
        caption(store, config)
        for name in schema.TABLES:
            check_keys(store, name)


def decode(store: Store, paths: list[str], config: FactoryConfig) -> None:
    """Find, describe and decode sources into the candidates table."""
    add_sources(store, paths, config)
    committer = Committer(store, "candidates", every=config.commit_every)
    committer.flush()
    _refuse_other_settings(store, config)
    known = store.table("sources").to_table().to_pylist()
    segments = [s for source in known if source["status"] != "failed" for s in video.segments_of(source)]
    missing = [segment for segment in segments if segment.segment_id not in committer.done]
    _run("decode", "segments", _DecodeSegment(store, config), [asdict(s) for s in missing], committer, config)
    _close_sources(store, config)


def add_sources(store: Store, paths: list[str], config: FactoryConfig) -> None:
    """Describe the files at `paths` (hash, container facts) and append those that are new to the sources table."""
    committer = Committer(store, "sources", every=1)
    committer.flush()
    known = set(store.table("sources").to_table(columns=["source_id"])["source_id"].to_pylist())
    rows: dict[str, dict[str, Any]] = {}
    progress = Progress("sources", "files", len(paths))
    for row in _map(_DescribeSource(config), [{"uri": path} for path in paths], config):
        described = json.loads(row["json"])
        progress.step()
        if described["source_id"] not in known:
            first = rows.setdefault(described["source_id"], described)
            first["uri"] = min(first["uri"], described["uri"])  # the same bytes under two names are one source
    progress.close()
    if rows:
        new = [rows[key] for key in sorted(rows)]
        committer.add(store.write_unit("sources", _unit("sources", sorted(rows)), new))


def select(store: Store, config: FactoryConfig) -> None:
    """Decide every candidate from its stored scores; append newly kept frames to the samples, update `selected`."""
    fingerprint = config.fingerprints()["select"]
    names = ["frame_id", "source_id", "status", "reason", "score", "threshold", "duplicate_of", "select_fingerprint"]
    names += ["width", "height", "sharpness", "brightness", "contrast", "phash", "embedding"]
    candidates = store.table("candidates").to_table(columns=names, with_row_address=True).to_pylist()
    decisions = quality.select(candidates, config.selection)
    changed = []
    for row in candidates:
        if row["frame_id"] in decisions:
            new = decisions[row["frame_id"]] | {"select_fingerprint": fingerprint}
            if any(row[name] != value for name, value in new.items()):
                changed.append({"frame_id": row["frame_id"], "_rowaddr": row["_rowaddr"], **new})
    # One transaction: a selection is complete or it never was, so "kept by an earlier one" survives a crash.
    _update(store, "candidates", changed)

    kept = {frame: row for frame, row in decisions.items() if row["status"] == "kept"}
    committer = Committer(store, "samples", every=config.commit_every)
    committer.flush()
    samples = store.table("samples").to_table(columns=["frame_id", "selected"], with_row_address=True).to_pylist()
    flips = [dict(row, selected=not row["selected"]) for row in samples if row["selected"] != (row["frame_id"] in kept)]
    _update(store, "samples", flips)
    present = {row["frame_id"] for row in samples}
    new = sorted((row["frame_id"], row["_rowaddr"]) for row in candidates if row["frame_id"] in kept.keys() - present)
    units = [new[i : i + config.samples_per_unit] for i in range(0, len(new), config.samples_per_unit)]
    tasks = [{"addresses": [address for _, address in unit]} for unit in units]
    _run("select", "units of samples", _AppendSamples(store, config), tasks, committer, config)


def sketch(store: Store, config: FactoryConfig) -> None:
    """Draw the sketch of every selected sample that has none, or one by another converter or configuration."""
    _update_samples(store, config, "sketch", _DrawSketches(store, config))


def caption(store: Store, config: FactoryConfig) -> None:
    """Write the caption of every selected sample that has none, or one by another rule or configuration."""
    _update_samples(store, config, "caption", _WriteCaptions(store, config))


class _DescribeSource:
    """{"uri"} -> the sources row, as JSON."""

    def __init__(self, config: FactoryConfig) -> None:
        self._config = config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"json": json.dumps(video.describe_source(row["uri"], self._config.video))}


class _DecodeSegment:
    """A segment -> its candidates, written as a unit. Raw frames never leave the worker."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config = store, config
        self._fingerprint = config.fingerprints()["decode"]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        segment, limits = Segment(**row), self._config.video
        deadline = limits.deadline_seconds + limits.deadline_per_second * (segment.end - segment.start)
        rows: list[dict[str, Any]] = []
        try:
            for candidate in worker.run_killable(
                "factory.video:candidate_frames", segment, limits, deadline_seconds=deadline
            ):
                rows.append(candidate | {"decode_fingerprint": self._fingerprint})
        except worker.WorkerFailed as error:
            rows.append(self._failed(segment, rows, str(error)))
        entry = self._store.write_unit("candidates", segment.segment_id, rows)
        return {"entry": json.dumps(entry)}

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


class _AppendSamples:
    """Addresses of kept candidates -> their samples rows, written as a unit: pictures and scores are copied once."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprints = store, config, config.fingerprints()

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
            stages = {"decode": candidate.pop("decode_fingerprint"), "select": self._fingerprints["select"]}
            source = candidate["source_id"]
            rows.append(
                candidate
                | {"image": picture, "selected": True, "review": "pending", "stages": stages}
                | {"split": split_of(source, uri_of[source], self._config.split)}
            )
        unit = _unit("samples", [row["frame_id"] for row in rows])
        return {"entry": json.dumps(self._store.write_unit("samples", unit, rows))}


class _DrawSketches:
    """Samples of one fragment -> their sketch columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprints()["sketch"]

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


class _WriteCaptions:
    """Samples of one fragment -> their caption columns."""

    def __init__(self, store: Store, config: FactoryConfig) -> None:
        self._store, self._config, self._fingerprint = store, config, config.fingerprints()["caption"]

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {
                "frame_id": sample["frame_id"],
                "caption": captions.colour_caption(image),
                "caption_by": captions.RULE,
                "keywords": list(self._config.caption.keywords),
                "stages": sample["stages"] | {"caption": self._fingerprint},
            }
            for sample, image in _pictures(self._store, task)
        ]
        return {"entry": json.dumps(self._store.write_updates("samples", int(task["fragment"]), rows))}


def _pictures(store: Store, task: dict[str, Any]) -> Iterable[tuple[dict[str, Any], Any]]:
    """Yield (row, RGB image) for the samples of a task, one picture in memory at a time."""
    addresses = [int(address) for address in task["addresses"]]
    samples = store.rows_at("samples", addresses, ["frame_id", "image_sha256", "stages"])
    for address, sample in zip(addresses, samples, strict=True):
        data = store.read_pictures("samples", "image", [address])[0]
        _check(data, sample["image_sha256"], f"image of sample {sample['frame_id']}")
        yield sample, video.decode_image(data or b"")


def _check(data: bytes | None, sha256: str, what: str) -> None:
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedData(f"The {what} does not match its sha256: the table's files were changed or damaged.")


def _update_samples(store: Store, config: FactoryConfig, stage: str, task: Callable[[dict], dict]) -> None:
    """Run `task` over the selected samples whose fingerprint of `stage` is not the present one, a fragment at a time."""
    fingerprint = config.fingerprints()[stage]
    rows = store.table("samples").to_table(columns=["stages"], filter="selected", with_row_address=True).to_pylist()
    stale: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        if (row["stages"] or {}).get(stage) != fingerprint:
            stale[row["_rowaddr"] >> 32].append(row["_rowaddr"])
    tasks = [{"fragment": fragment, "addresses": sorted(addresses)} for fragment, addresses in sorted(stale.items())]
    committer = Committer(store, "samples", every=config.commit_every)
    _run(stage, "units of samples", task, tasks, committer, config)


def _update(store: Store, name: str, rows: list[dict[str, Any]]) -> None:
    """Change columns of rows (with `_rowaddr`) of table `name` in one transaction."""
    fragments: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        fragments[row["_rowaddr"] >> 32].append({key: value for key, value in row.items() if key != "_rowaddr"})
    committer = Committer(store, name, every=len(fragments) + 1)
    for fragment, changed in sorted(fragments.items()):
        committer.add(store.write_updates(name, fragment, changed))
    committer.flush()


def _close_sources(store: Store, config: FactoryConfig) -> None:
    """Write status, error and counts of each source from its candidates."""
    rows = store.table("candidates").to_table(columns=["source_id", "status", "reason", "shot"]).to_pylist()
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_source[row["source_id"]].append(row)
    changed = []
    sources = store.table("sources").to_table(with_row_address=True).to_pylist()
    for source in sources:
        if source["segment_starts"] is None:
            continue  # it never opened; its error says why
        found = by_source[source["source_id"]]
        errors = [row["reason"] for row in found if row["status"] == "failed"]
        good = [row for row in found if row["status"] != "failed"]
        facts = {
            "status": "ok" if not errors else "partial" if good else "failed",
            "error": errors[0] if errors else None,
            "shots": len({row["shot"] for row in good}),
            "candidates": len(good),
        }
        if any(source[name] != value for name, value in facts.items()):
            changed.append({"source_id": source["source_id"], "_rowaddr": source["_rowaddr"], **facts})
    _update(store, "sources", changed)


def _refuse_other_settings(store: Store, config: FactoryConfig) -> None:
    present = store.table("candidates").to_table(columns=["decode_fingerprint"])["decode_fingerprint"].unique()
    others = set(present.to_pylist()) - {config.fingerprints()["decode"]}
    if others:
        raise ValueError(
            f"Dataset {store.root} was decoded with other video settings or another version (fingerprint "
            f"{others.pop()}, now {config.fingerprints()['decode']}). Use those settings, or a new --root."
        )


def _run(
    stage: str, noun: str, task: Callable, rows: list[dict[str, Any]], committer: Committer, config: FactoryConfig
) -> None:
    """Run `task` over `rows` with Ray Data and hand each entry to the committer as it comes."""
    progress = Progress(stage, noun, len(rows))
    for row in _map(task, rows, config):
        entry = json.loads(row["entry"])
        committer.add(entry)
        progress.step(entry["rows"])
    committer.flush()
    progress.close()


def _map(task: Callable, rows: list[dict[str, Any]], config: FactoryConfig) -> Iterable[dict[str, Any]]:
    """Yield task(row) for all rows, one Ray task each, as they are done."""
    import ray.data

    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages print their own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(task, num_cpus=config.num_cpus)
    yield from data.iter_rows()


class Progress:
    """Lines of progress on standard output, at most one every two seconds."""

    def __init__(self, stage: str, noun: str, total: int) -> None:
        self._stage, self._noun, self._total = stage, noun, total
        self._done = self._rows = 0
        self._start = self._said = time.monotonic()
        if total == 0:
            print(f"{stage:<8} nothing to do", flush=True)

    def step(self, rows: int = 0) -> None:
        """Count one unit done, with so many rows."""
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        if now - self._said > 2 or self._done == self._total:
            self._said = now
            spent = now - self._start
            left = spent / self._done * (self._total - self._done)
            rows_said = f"  {self._rows} rows" if self._rows else ""
            print(
                f"{self._stage:<8} {self._done}/{self._total} {self._noun}{rows_said}  {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )

    def close(self) -> None:
        """Say nothing more: the last step has been printed."""


def _unit(kind: str, keys: list[str]) -> str:
    return f"{kind}-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:24]}"


def _png(picture: Any) -> bytes:
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise RuntimeError("a sketch could not be encoded as PNG")
    return data.tobytes()


def _thumbnail(image: Any, lines: Any) -> bytes:
    def at_height(picture: Any) -> Any:
        width = max(1, round(picture.shape[1] * _THUMBNAIL_HEIGHT / picture.shape[0]))
        return cv2.resize(picture, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)

    pair = cv2.hconcat([at_height(image), cv2.cvtColor(at_height(lines), cv2.COLOR_GRAY2RGB)])
    return video.encode_jpeg(pair, 88)
