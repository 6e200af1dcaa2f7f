"""The stages, each on one screen: decode, select, sketch, caption. Ray Data runs them; one committer publishes."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc

from factory import metrics, schema, selection, status, tasks
from factory.committer import Committer, check_keys
from factory.config import GROUPS, FactoryConfig
from factory.intake import add_sources, record_rights
from factory.rights import RightsFile
from factory.settings import UsageError, changes, from_dict
from factory.sources import is_picture, segments_of
from factory.stage import FILM, PICTURES, Row, in_lots, run, update
from factory.store import NotFinished, Store
from factory.video import Segment

_PIXELS_PER_UNIT = 192_000_000  # of still pictures, which a worker holds encoded until they are written: some 200 MB


def build(store: Store, paths: list[str], config: FactoryConfig, rights: RightsFile | None = None) -> set[str]:
    """Run all stages over the films at `paths`, in a locked root; return their source_ids.

    What an earlier run committed is not done again. NothingThere, before anything is read or kept, where the model of a
    stage is missing.
    """
    for stage in GROUPS:
        config.fingerprint(stage)
    store.create()
    sources = decode(store, paths, config)
    if rights is not None:
        record_rights(store, rights)
    select(store, config)
    sketch(store, config)
    caption(store, config)
    for name in schema.TABLES:
        check_keys(store, name)
    return sources


def decode(store: Store, paths: list[str], config: FactoryConfig) -> set[str]:
    """Find, describe and decode the films at `paths` into the candidates table; return their source_ids.

    A segment that the machine failed is not committed, and its source stays pending: the next run tries it again. So it
    does with one that could not be decoded within the limits, once these are other ones.
    """
    committer = Committer(store, "candidates", every=config.commit_every)
    _refuse_other_settings(store, config)
    built = add_sources(store, paths, config)
    store.keep_settings(asdict(config))
    limits = config.video.limits
    known = store.table("sources").to_table(with_row_address=True).to_pylist()
    open_sources = [row for row in known if row["source_id"] in built or row["status"] == "pending"]
    segments = [segment for row in open_sources for segment in segments_of(row)]
    missing = [segment for segment in segments if not segment.is_done(committer.done, limits)]
    _reopen(store, known, {segment.source_id for segment in missing})
    ends = {row["source_id"]: row["duration"] for row in known}
    films = [
        asdict(segment) | {"amount": min(segment.end, ends[segment.source_id]) - segment.start}
        for segment in missing
        if not is_picture(segment.uri)
    ]
    failures = run("decode", "segments", FILM, tasks.DecodeSegment(store, config), films, committer, config)
    pictures = [asdict(segment) for segment in missing if is_picture(segment.uri)]
    if pictures:
        pixels = {row["source_id"]: row["width"] * row["height"] for row in open_sources if row["segment_starts"]}
        lots = _picture_lots(pictures, pixels, config.video.pictures_per_unit)
        units = [{"segments": lot, "amount": len(lot)} for lot in lots]
        task = tasks.DecodePictures(store, config)
        failures += run("pictures", "units of pictures", PICTURES, task, units, committer, config)
    _forget_other_limits(store, segments, committer.done, limits)
    close_sources(store, committer.done, limits, failures)
    return built


def _picture_lots(pictures: list[Row], pixels: dict[str, int], at_most: int) -> list[list[Row]]:
    """Return `pictures` in lists of `at_most`, and of no more pixels than a worker may hold."""
    lots: list[list[Row]] = []
    room = 0
    for picture in pictures:
        size = pixels[picture["source_id"]]
        if not lots or size > room or len(lots[-1]) == at_most:
            lots.append([])
            room = _PIXELS_PER_UNIT
        lots[-1].append(picture)
        room -= size
    return lots


def _reopen(store: Store, known: list[Row], source_ids: set[str]) -> None:
    """Make these sources pending: until they are closed, nothing is selected without them."""
    shut = [row for row in known if row["source_id"] in source_ids and row["status"] != "pending"]
    update(store, "sources", [{n: row[n] for n in ("source_id", "_rowaddr")} | {"status": "pending"} for row in shut])


def _forget_other_limits(store: Store, segments: list[Segment], done: set[str], limits: str) -> None:
    """Remove the rows which say that a segment could not be decoded within other limits, where it was tried again."""
    columns = ["frame_id", "segment_id"]
    failed = store.table("candidates").to_table(columns=columns, filter="status = 'failed'").to_pylist()
    present = {row["segment_id"] for row in failed}
    tried = {s.segment_id: s.within(limits) for s in segments if s.segment_id in done or s.within(limits) in present}
    old: set[str] = set()
    for row in failed:
        segment_id, within, _ = row["segment_id"].partition(Segment.WITHIN)
        if within and segment_id in tried and (segment_id in done or row["segment_id"] != tried[segment_id]):
            old.add(row["frame_id"])
    store.remove("candidates", old)


def close_sources(store: Store, done: set[str], limits: str, failures: list[Row]) -> None:
    """Write status, error and counts of each source from its candidates, and from what this run could not read.

    A source is pending where only the machine was at fault: then it is tried again before anything is selected.
    """
    unread = {row["source_id"]: row for row in sorted(failures, key=lambda row: row["status"] == "pending")}
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
        failed.sort(key=lambda row: row["timestamp"])
        reasons = [f"after {row['timestamp']:.2f} s, {row['reason']}" for row in failed]
        reasons += [unread[key]["error"]] if key in unread else []
        missing = any(not segment.is_done(done, limits) for segment in segments_of(source))
        if missing and key not in unread:
            continue  # this run did not try it: what an earlier one said of it stands
        pending = key in unread and unread[key]["status"] == "pending"
        status = ("partial" if good else "failed") if reasons else "ok"
        facts = {
            "status": "pending" if pending else status,
            "error": unread[key]["error"] if pending else reasons[0] if reasons else None,
            "shots": len({row["shot"] for row in good}),
            "candidates": len(good),
        }
        if any(source[name] != value for name, value in facts.items()):
            changed.append({"source_id": key, "_rowaddr": source["_rowaddr"], **facts})
            if facts["status"] in ("partial", "failed"):
                metrics.count("failures", stage="decode", kind=facts["status"])
    update(store, "sources", changed)


def select(store: Store, config: FactoryConfig) -> None:
    """Decide every candidate from its stored scores; append newly kept frames to the samples, update `selected`."""
    pending = store.table("sources").to_table(columns=["uri", "error"], filter="status = 'pending'").to_pylist()
    if pending:
        told = "".join(f"\n  {row['uri']}: {row['error']}" for row in pending if row["error"])
        raise NotFinished(f"{len(pending)} source(s) are not decoded to their end. Run the same build again.{told}")
    _keep_settings(store, config, "select")
    fingerprint = config.fingerprint("select")
    columns = [*selection.COLUMNS, "reason", "score", "threshold", "duplicate_of", "select_fingerprint"]
    usable = "status IS NULL OR status != 'failed'"
    candidates = store.table("candidates").to_table(columns=columns, filter=usable, with_row_address=True)
    decided = selection.select(candidates, config.selection)
    decided = decided.append_column("select_fingerprint", pa.array([fingerprint] * len(decided), pa.string()))
    for name in ("frame_id", "_rowaddr"):
        decided = decided.append_column(name, candidates[name])
    changed = selection.changed(candidates, decided).to_pylist()
    del candidates  # it holds 3 kB of each
    # One transaction: a selection is complete or it never was, so "kept by an earlier one" survives a crash.
    update(store, "candidates", changed)
    metrics.count("rows", len(changed), stage="select")
    print(f"select   {len(changed)} of {len(decided)} candidates decided anew", flush=True)

    rows = decided.filter(pc.field("status") == "kept").select(["frame_id", "_rowaddr"])
    kept = dict(zip(*(column.to_pylist() for column in rows.columns), strict=True))
    committer = Committer(store, "samples", every=config.commit_every)
    columns = ["frame_id", "source_id", "selected", "split"]
    samples = store.table("samples").to_table(columns=columns, with_row_address=True).to_pylist()
    flips = [row for row in samples if row["selected"] != (row["frame_id"] in kept)]
    names = ("frame_id", "_rowaddr")
    update(store, "samples", [{name: row[name] for name in names} | {"selected": not row["selected"]} for row in flips])
    present = {row["frame_id"] for row in samples}
    new = sorted((frame, address) for frame, address in kept.items() if frame not in present)
    rows = [
        {"addresses": [address for _, address in unit], "amount": len(unit)}
        for unit in in_lots(new, config.samples_per_unit)
    ]
    splits = {row["source_id"]: row["split"] for row in samples}  # a source keeps its split: frames never leak
    task = tasks.AppendSamples(store, config, splits)
    _tell_damage(store, run("samples", "units of samples", PICTURES, task, rows, committer, config))
    for note in status.split_notes(store, config):
        print(f"split    {note}", flush=True)


def sketch(store: Store, config: FactoryConfig) -> None:
    """Draw the sketch of every selected sample that has none, or one by another converter or configuration."""
    _update_samples(store, config, "sketch", tasks.DrawSketches(store, config))


def caption(store: Store, config: FactoryConfig) -> None:
    """Write the caption of every selected sample that has none, or one by another rule or configuration.

    Of those that have theirs, the keywords alone are written where the settings have others.
    """
    keywords = list(config.caption.keywords)
    told = store.table("samples").to_table(
        columns=["frame_id", "keywords"], filter="selected and caption is not null", with_row_address=True
    )
    others = [row | {"keywords": keywords} for row in told.to_pylist() if row["keywords"] != keywords]
    _keep_settings(store, config, "caption")
    update(store, "samples", others)
    _update_samples(store, config, "caption", tasks.WriteCaptions(store, config))


def _update_samples(store: Store, config: FactoryConfig, stage: str, task: Callable[[dict], dict]) -> None:
    """Run `task` over the selected samples whose fingerprint of `stage` is another, a fragment at a time.

    A sample whose picture is damaged stays as it was, and so is missing or stale; the others go on.
    """
    _keep_settings(store, config, stage)
    fingerprint = config.fingerprint(stage)
    samples = store.table("samples").to_table(columns=["stages"], filter="selected", with_row_address=True).to_pylist()
    stale: dict[int, list[int]] = defaultdict(list)
    for row in samples:
        if (row["stages"] or {}).get(stage) != fingerprint:
            stale[row["_rowaddr"] >> 32].append(row["_rowaddr"])
    rows = [
        {"fragment": fragment, "addresses": sorted(addresses), "amount": len(addresses)}
        for fragment, addresses in sorted(stale.items())
    ]
    committer = Committer(store, "samples", every=config.commit_every)
    _tell_damage(store, run(stage, "units of samples", PICTURES, task, rows, committer, config))


def _tell_damage(store: Store, failures: list[Row]) -> None:
    """Print on standard error which pictures were damaged, and what to do."""
    for failure in failures:
        print(f"factory: {failure['error']}", file=sys.stderr)
    if failures:
        print(
            f"factory: {len(failures)} damaged picture(s) were left out. See which files it is: python -m factory "
            f"verify --root {shlex.quote(str(store.root))}. Restore them from a copy and run this again, or build into "
            "a new root.",
            file=sys.stderr,
        )


def _keep_settings(store: Store, config: FactoryConfig, stage: str) -> None:
    """Keep the settings of `stage`, and of the others what was kept: they were not run with these.

    NothingThere, and nothing is kept, where the stage's model is missing.
    """
    config.fingerprint(stage)
    now = asdict(config)
    try:
        kept = asdict(from_dict(FactoryConfig, store.settings() or now))
    except UsageError:  # another version's
        kept = now
    others = {group: kept[group] for other, groups in GROUPS.items() if other != stage for group in groups}
    store.keep_settings(now | others)


def _refuse_other_settings(store: Store, config: FactoryConfig) -> None:
    present = store.table("candidates").to_table(columns=["decode_fingerprint"])["decode_fingerprint"].unique()
    others = set(present.to_pylist()) - {config.fingerprint("decode")}
    if others:
        raise UsageError(f"Dataset {store.root} was decoded {_how(store, config, others)}")


def _how(store: Store, config: FactoryConfig, present: set[str]) -> str:
    """Return how the candidates, of the fingerprints `present`, were decoded, and what to give for it."""
    other_version = "by another version. Use that one, or a new --root."
    try:
        kept = from_dict(FactoryConfig, store.settings() or {})
    except UsageError:
        return other_version
    if kept.fingerprint("decode") not in present:
        return other_version
    before, now = kept.video.decides(), config.video.decides()
    differing = [
        shlex.quote(f"--set=video.{change}")
        for change in changes(kept.video, config.video)
        if before.get(name := change.partition("=")[0]) != now.get(name)
    ]
    return f"with other video settings. Take a new --root, or give {' '.join(differing)}"
