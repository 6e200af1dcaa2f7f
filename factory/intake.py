"""Intake: what is found at the paths that are given becomes rows of the sources table, and whose they are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection

from factory import metrics, tasks
from factory.committer import Committer
from factory.config import FactoryConfig
from factory.rights import RightsFile
from factory.sources import FACTS, is_picture, unread_id
from factory.stage import Progress, Row, in_lots, run_tasks, update
from factory.store import NotFinished, Store

_PLACE = ("uri", "collection", "modified_ns")  # columns of a source that a move changes
_FOUND = ("other_uris", *_PLACE, "error", *FACTS)  # those that finding and opening it decides
_UNITS_PER_LOT = 128  # units of files that are described before their sources are committed


def add_sources(store: Store, paths: list[str], config: FactoryConfig) -> set[str]:
    """Describe the files at `paths` (hash, container facts), append the new ones to the sources table.

    Return their source_ids. The same bytes under two names are one source; a known one that was moved gets its new
    path, one that could not be opened is looked at again, one that did not change is not read. A pending one that the
    machine did not open is looked at also where it is not among `paths`, and failed when it is gone or another file.
    New ones are committed by the lot: a crash costs the last one.
    """
    committer, known = Committer(store, "sources", every=1), _known_sources(store)
    unopened = [row for row in known.values() if row["segment_starts"] is None and row["status"] == "pending"]
    given, waiting = set(paths), {row["uri"]: row["source_id"] for row in unopened}
    looked_at = sorted(given | waiting.keys())
    films = [[path] for path in looked_at if not is_picture(path)]
    pictures = in_lots([path for path in looked_at if is_picture(path)], config.video.pictures_per_unit)
    units = [{"uris": uris} for uris in (*films, *pictures)]
    progress = Progress("sources", "units of files", len(units))
    opened = [row for row in known.values() if row["segment_starts"] is not None]
    task = tasks.DescribeSources(config, opened)
    answers: dict[str, Row] = {}
    asked: list[Row] = []
    unanswered: list[NotFinished] = []

    def rank(row: Row) -> tuple[bool, str]:
        """Of the names of one source, that which it has already goes before the first in the alphabet."""
        return row["uri"] != known.get(row["source_id"], row)["uri"], row["uri"]

    for lot in in_lots(units, _UNITS_PER_LOT):
        try:
            for answer in run_tasks("sources", task, lot, config):
                answers |= {row["uri"]: row for row in json.loads(answer["json"])}
                progress.step()
        except NotFinished as error:
            unanswered.append(error)
        asked = [
            row for uri, row in answers.items() if uri in given or waiting[uri] in (row["source_id"], unread_id(uri))
        ]
        _append_sources(store, committer, sorted(asked, key=rank), known.keys())
        known = _known_sources(store)
    if unanswered:
        raise unanswered[0]
    found = {row["source_id"]: row for row in sorted(asked, key=rank, reverse=True)}
    uris = _uris(asked)
    changed = []
    for key in sorted(found.keys() & known.keys()):
        old, now = known[key], found[key]
        names = ["other_uris"]
        if "status" in now:  # else the file is as it was
            names += _PLACE
            if old["segment_starts"] is None:  # its segments stay as they were first cut
                names += ["error", *FACTS]
        kept = {uri for uri in old["other_uris"] or () if uri not in answers or answers[uri]["source_id"] == key}
        now["other_uris"] = sorted((uris[key] | kept) - {now["uri"]})
        if any(old[name] != now.get(name) for name in names):
            facts = {name: old[name] for name in _FOUND} | {name: now.get(name) for name in names}
            changed.append({"source_id": key, "_rowaddr": old["_rowaddr"], **facts})
    hashed = [row for row in unopened if row["source_id"] != unread_id(row["uri"])]
    changed += [_lost(row, answers[row["uri"]]) for row in hashed if row["source_id"] not in found]
    update(store, "sources", changed)
    read = {unread_id(uri) for uri in answers} - found.keys()
    store.remove("sources", read & known.keys())  # they said that the file at this place could not be read
    return {row["source_id"] for row in asked if row["uri"] in given}


def _uris(rows: list[Row]) -> dict[str, set[str]]:
    """Return by source_id the places at which `rows` found it."""
    uris: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        uris[row["source_id"]].add(row["uri"])
    return uris


def _known_sources(store: Store) -> dict[str, Row]:
    rows = store.table("sources").to_table(with_row_address=True).to_pylist()
    return {row["source_id"]: row for row in rows}


def _append_sources(store: Store, committer: Committer, rows: list[Row], known: Collection[str]) -> None:
    """Append to the sources table those of `rows` that are not `known`; of two names of one source the first."""
    first = {row["source_id"]: row for row in reversed(rows)}
    uris = _uris(rows)
    new = []
    for key in sorted(first.keys() - set(known)):
        new.append(first[key] | {"other_uris": sorted(uris[key] - {first[key]["uri"]})})
    metrics.count("failures", sum(row["status"] == "failed" for row in new), stage="sources", kind="unopened")
    if new:
        # named by the version too: a source that was removed may come again
        version = store.table("sources").version
        unit = tasks.unit(f"sources-{version}", [row["source_id"] for row in new])
        committer.add(store.write_unit("sources", unit, new))


def _lost(source: Row, now: Row) -> Row:
    """Return the change of a source where `now`, which is not it, is what is found at its place.

    It is failed, or pending still where the machine could not look.
    """
    unread = now["source_id"] == unread_id(source["uri"])
    error = now["error"] if unread else "it was replaced by another file before it could be opened"
    status = now["status"] if unread else "failed"
    facts = {name: source[name] for name in ("source_id", "_rowaddr", *_FOUND)}
    return facts | {"status": status, "error": error}


def record_rights(store: Store, rights: RightsFile) -> None:
    """Write whose they are into all sources that the file names; the others stay as they are."""
    sources = store.table("sources").to_table(with_row_address=True).to_pylist()
    changed = []
    for source in sources:
        columns = rights.rights_of(source["uri"])
        if columns is not None and any(source[name] != value for name, value in columns.items()):
            changed.append({"source_id": source["source_id"], "_rowaddr": source["_rowaddr"], **columns})
    update(store, "sources", changed)
    print(f"rights   {len(changed)} of {len(sources)} sources changed", flush=True)
    for pattern in rights.unused([source["uri"] for source in sources]):
        print(f"rights   {pattern!r} names no source", flush=True)
