"""The stages, each on one screen: decode, select, sketch, caption. Ray Data runs them; one committer publishes."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from factory import quality, schema, tasks, video
from factory.config import FactoryConfig
from factory.progress import Progress
from factory.store import Committer, Store, check_keys


def build(store: Store, sources: list[str], config: FactoryConfig) -> None:
    """Run all stages over `sources` (paths), in a locked root: what an earlier run committed is not done again."""
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
    _run("decode", "segments", tasks.DecodeSegment(store, config), [asdict(s) for s in missing], committer, config)
    _close_sources(store, config)


def add_sources(store: Store, paths: list[str], config: FactoryConfig) -> None:
    """Describe the files at `paths` (hash, container facts) and append those that are new to the sources table."""
    committer = Committer(store, "sources", every=1)
    committer.flush()
    known = set(store.table("sources").to_table(columns=["source_id"])["source_id"].to_pylist())
    rows: dict[str, dict[str, Any]] = {}
    progress = Progress("sources", "files", len(paths))
    for row in _map(tasks.DescribeSource(config), [{"uri": path} for path in paths], config):
        described = json.loads(row["json"])
        progress.step()
        if described["source_id"] not in known:
            first = rows.setdefault(described["source_id"], described)
            first["uri"] = min(first["uri"], described["uri"])  # the same bytes under two names are one source
    if rows:
        new = [rows[key] for key in sorted(rows)]
        committer.add(store.write_unit("sources", tasks.unit("sources", sorted(rows)), new))


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
    rows = [{"addresses": [address for _, address in unit]} for unit in units]
    _run("select", "units of samples", tasks.AppendSamples(store, config), rows, committer, config)


def sketch(store: Store, config: FactoryConfig) -> None:
    """Draw the sketch of every selected sample that has none, or one by another converter or configuration."""
    _update_samples(store, config, "sketch", tasks.DrawSketches(store, config))


def caption(store: Store, config: FactoryConfig) -> None:
    """Write the caption of every selected sample that has none, or one by another rule or configuration."""
    _update_samples(store, config, "caption", tasks.WriteCaptions(store, config))


def _update_samples(store: Store, config: FactoryConfig, stage: str, task: Callable[[dict], dict]) -> None:
    """Run `task` over the selected samples whose fingerprint of `stage` is another, a fragment at a time."""
    fingerprint = config.fingerprints()[stage]
    samples = store.table("samples").to_table(columns=["stages"], filter="selected", with_row_address=True).to_pylist()
    stale: dict[int, list[int]] = defaultdict(list)
    for row in samples:
        if (row["stages"] or {}).get(stage) != fingerprint:
            stale[row["_rowaddr"] >> 32].append(row["_rowaddr"])
    rows = [{"fragment": fragment, "addresses": sorted(addresses)} for fragment, addresses in sorted(stale.items())]
    committer = Committer(store, "samples", every=config.commit_every)
    _run(stage, "units of samples", task, rows, committer, config)


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
