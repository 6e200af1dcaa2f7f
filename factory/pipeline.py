"""The stages, each on one screen: decode, select, sketch, caption. Ray Data runs them; one committer publishes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

from factory import schema, selection, tasks
from factory.config import FactoryConfig
from factory.sources import FACTS, segments_of
from factory.stage import Progress, Row, run, run_tasks, update
from factory.store import Committer, NotFinished, Store, check_keys


def build(store: Store, paths: list[str], config: FactoryConfig) -> set[str]:
    """Run all stages over the films at `paths`, in a locked root; return their source_ids.

    What an earlier run committed is not done again.
    """
    store.create()
    sources = decode(store, paths, config)
    select(store, config)
    sketch(store, config)
    caption(store, config)
    for name in schema.TABLES:
        check_keys(store, name)
    return sources


def decode(store: Store, paths: list[str], config: FactoryConfig) -> set[str]:
    """Find, describe and decode the films at `paths` into the candidates table; return their source_ids.

    A segment whose worker died or was too slow is not committed: the next run tries it again.
    """
    built = add_sources(store, paths, config)
    committer = Committer(store, "candidates", every=config.commit_every)
    _refuse_other_settings(store, config)
    known = store.table("sources").to_table().to_pylist()
    open_sources = [row for row in known if row["source_id"] in built or row["status"] == "pending"]
    segments = [segment for row in open_sources for segment in segments_of(row)]
    missing = [asdict(segment) for segment in segments if segment.segment_id not in committer.done]
    failures = run("decode", "segments", tasks.DecodeSegment(store, config), missing, committer, config)
    close_sources(store, committer.done, {failure["source_id"]: failure["error"] for failure in failures})
    return built


def add_sources(store: Store, paths: list[str], config: FactoryConfig) -> set[str]:
    """Describe the files at `paths` (hash, container facts), append the new ones to the sources table.

    Return their source_ids. The same bytes under two names are one source; a known one that was moved gets its new
    path, one that could not be opened is looked at again.
    """
    committer = Committer(store, "sources", every=1)
    known = {row["source_id"]: row for row in store.table("sources").to_table(with_row_address=True).to_pylist()}
    found: dict[str, Row] = {}
    progress = Progress("sources", "files", len(paths))
    for row in run_tasks(tasks.DescribeSource(config), [{"uri": path} for path in paths], config):
        described = json.loads(row["json"])
        first = found.setdefault(described["source_id"], described)
        first["uri"] = min(first["uri"], described["uri"])
        progress.step()
    new = [found[key] for key in sorted(found.keys() - known.keys())]
    if new:
        committer.add(store.write_unit("sources", tasks.unit("sources", [row["source_id"] for row in new]), new))
    columns = ("uri", "collection", "error", *FACTS)
    changed = []
    for key in sorted(found.keys() & known.keys()):
        old, now = known[key], found[key]
        opened = old["segment_starts"] is not None  # its segments stay as they were first cut
        if (opened and old["uri"] in paths) or (not opened and now["status"] == "failed"):
            continue
        facts = {name: (old if opened else now).get(name) for name in columns}
        moved = {"uri": now["uri"], "collection": now["collection"]}
        changed.append({"source_id": key, "_rowaddr": old["_rowaddr"], **facts, **moved})
    update(store, "sources", changed)
    return set(found)


def close_sources(store: Store, done: set[str], errors: dict[str, str]) -> None:
    """Write status, error and counts of each source from its candidates, and from this run's `errors` by source_id."""
    columns = ["source_id", "status", "reason", "shot", "timestamp"]
    rows = store.table("candidates").to_table(columns=columns).to_pylist()
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source[row["source_id"]].append(row)
    changed = []
    for source in store.table("sources").to_table(with_row_address=True).to_pylist():
        key = source["source_id"]
        if not source["segment_starts"]:
            continue  # it never opened; its error says why
        good = [row for row in by_source[key] if row["status"] != "failed"]
        failed = [row for row in by_source[key] if row["status"] == "failed"]
        reasons = [f"after {row['timestamp']:.2f} s, {row['reason']}" for row in failed]
        reasons += [errors[key]] if key in errors else []
        missing = any(segment.segment_id not in done for segment in segments_of(source))
        facts = {
            "status": ("partial" if good else "failed") if reasons else "pending" if missing else "ok",
            "error": reasons[0] if reasons else None,
            "shots": len({row["shot"] for row in good}),
            "candidates": len(good),
        }
        if any(source[name] != value for name, value in facts.items()):
            changed.append({"source_id": key, "_rowaddr": source["_rowaddr"], **facts})
    update(store, "sources", changed)


def select(store: Store, config: FactoryConfig) -> None:
    """Decide every candidate from its stored scores; append newly kept frames to the samples, update `selected`."""
    states = store.table("sources").to_table(columns=["status"])["status"].to_pylist()
    if "pending" in states:
        raise NotFinished(
            f"{states.count('pending')} source(s) are not decoded to their end. Run the same build again."
        )
    fingerprint = config.fingerprints()["select"]
    names = [*selection.COLUMNS, "source_id", "reason", "score", "threshold", "duplicate_of", "select_fingerprint"]
    candidates = store.table("candidates").to_table(columns=names, with_row_address=True).to_pylist()
    decisions = selection.select(candidates, config.selection)
    changed = []
    for row in candidates:
        if row["frame_id"] in decisions:
            new = decisions[row["frame_id"]] | {"select_fingerprint": fingerprint}
            if any(row[name] != value for name, value in new.items()):
                changed.append({"frame_id": row["frame_id"], "_rowaddr": row["_rowaddr"], **new})
    # One transaction: a selection is complete or it never was, so "kept by an earlier one" survives a crash.
    update(store, "candidates", changed)
    print(f"select   {len(changed)} of {len(candidates)} candidates decided anew", flush=True)

    kept = {frame: row for frame, row in decisions.items() if row["status"] == "kept"}
    committer = Committer(store, "samples", every=config.commit_every)
    columns = ["frame_id", "source_id", "selected", "split"]
    samples = store.table("samples").to_table(columns=columns, with_row_address=True).to_pylist()
    flips = [row for row in samples if row["selected"] != (row["frame_id"] in kept)]
    names = ("frame_id", "_rowaddr")
    update(store, "samples", [{name: row[name] for name in names} | {"selected": not row["selected"]} for row in flips])
    present = {row["frame_id"] for row in samples}
    new = sorted((row["frame_id"], row["_rowaddr"]) for row in candidates if row["frame_id"] in kept.keys() - present)
    units = [new[i : i + config.samples_per_unit] for i in range(0, len(new), config.samples_per_unit)]
    rows = [{"addresses": [address for _, address in unit]} for unit in units]
    splits = {row["source_id"]: row["split"] for row in samples}  # a source keeps its split: frames never leak
    run("samples", "units of samples", tasks.AppendSamples(store, config, splits), rows, committer, config)


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
    run(stage, "units of samples", task, rows, committer, config)


def _refuse_other_settings(store: Store, config: FactoryConfig) -> None:
    present = store.table("candidates").to_table(columns=["decode_fingerprint"])["decode_fingerprint"].unique()
    others = set(present.to_pylist()) - {config.fingerprints()["decode"]}
    if others:
        raise ValueError(
            f"Dataset {store.root} was decoded with other video settings or another version (fingerprint "
            f"{others.pop()}, now {config.fingerprints()['decode']}). Use those settings, or a new --root."
        )
