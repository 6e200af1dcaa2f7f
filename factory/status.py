"""Status: the funnel from sources to samples, counted from the tables, and what is stale in them."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from factory.config import STAGES, FactoryConfig
from factory.settings import NothingThere
from factory.split import COLUMNS, notes
from factory.store import Store

Stale = dict[str, int | None]


def funnel(store: Store) -> dict[str, Any]:
    """Return counts: sources by status, segments, candidates by decision, samples by what they have."""
    columns = ["status", "segment_starts", "duration", "uri", "error"]
    sources = store.table("sources").to_table(columns=columns).to_pylist()
    candidates = store.table("candidates")
    decided = _counts(candidates, "status")
    samples = store.table("samples")
    return {
        "sources": dict(Counter(row["status"] for row in sources)),
        # failed, partial, or pending after an attempt
        "failed_sources": {row["uri"]: row["error"] for row in sources if row["error"]},
        "seconds": sum(row["duration"] or 0 for row in sources),
        "segments": sum(len(row["segment_starts"] or []) for row in sources),
        "candidates": decided.total(),
        "kept": decided["kept"],
        "dropped": dict(_counts(candidates, "reason", "status = 'dropped'").most_common()),
        "failed": decided["failed"],
        "undecided": decided[None],
        "samples": samples.count_rows("selected"),
        "sketched": samples.count_rows("selected and sketch_sha256 is not null"),
        "captioned": samples.count_rows("selected and caption is not null"),
        "splits": dict(sorted(_counts(samples, "split", "selected").items())),
    }


def _counts(table: Any, column: str, rows: str | None = None) -> Counter[str | None]:
    """Return how often each value of `column` is there, in the rows of the filter `rows`."""
    counted = table.to_table(columns=[column], filter=rows)[column].value_counts()
    return Counter({item["values"]: item["counts"] for item in counted.to_pylist()})


def stale(store: Store, config: FactoryConfig) -> Stale:
    """Return per stage how many rows other settings, code or models made than those of `config`; what is not made yet
    is not stale. None for a stage whose model is not there: that can't be told."""
    made = {
        "decode": _counts(store.table("candidates"), "decode_fingerprint"),
        "select": _counts(store.table("candidates"), "select_fingerprint", "status in ('kept', 'dropped')"),
    }
    samples = store.table("samples").to_table(columns=["stages", "keywords"], filter="selected").to_pylist()
    keywords = list(config.caption.keywords)
    for sample in samples:
        if sample["stages"]["caption"] and sample["keywords"] != keywords:
            sample["stages"]["caption"] = "with other keywords"
    for stage in ("sketch", "caption"):
        made[stage] = Counter(sample["stages"][stage] for sample in samples if sample["stages"][stage])
    found: Stale = {}
    for stage in STAGES:
        try:
            found[stage] = made[stage].total() - made[stage][config.fingerprint(stage)]
        except NothingThere:
            found[stage] = None
    return found


def split_notes(store: Store, config: FactoryConfig) -> list[str]:
    """Return what `split.notes` says of the dataset in `store` and the settings of `config`."""
    sources = store.table("sources").to_table(columns=list(COLUMNS)).to_pylist()
    samples = store.table("samples").to_table(columns=["source_id", "split"])
    splits = dict(zip(samples["source_id"].to_pylist(), samples["split"].to_pylist(), strict=True))
    return notes(sources, splits, config.split)


def describe(counts: dict[str, Any]) -> str:
    """Return the funnel as lines of text for a terminal."""
    total = max(counts["candidates"], 1)

    def bar(number: int) -> str:
        return "█" * round(30 * number / total)

    statuses = ", ".join(f"{number} {status}" for status, number in sorted(counts["sources"].items()))
    splits = ", ".join(f"{number} {split}" for split, number in counts["splits"].items())
    rows = [
        ("sources", sum(counts["sources"].values()), f"{statuses}; {counts['seconds']:.0f} s of film"),
        ("segments", counts["segments"], ""),
        ("candidates", counts["candidates"], bar(counts["candidates"])),
        *((f"  {reason}", number, bar(number)) for reason, number in counts["dropped"].items()),
        *([("  failed", counts["failed"], bar(counts["failed"]))] if counts["failed"] else []),
        *([("  undecided", counts["undecided"], bar(counts["undecided"]))] if counts["undecided"] else []),
        ("kept", counts["kept"], bar(counts["kept"])),
        ("samples", counts["samples"], splits),
        ("  sketched", counts["sketched"], ""),
        ("  captioned", counts["captioned"], ""),
    ]
    lines = [f"{name:<14}{number:>7}  {note}".rstrip() for name, number, note in rows]
    lines += [f"{uri}: {error}" for uri, error in counts["failed_sources"].items()]
    return "\n".join(lines)


def describe_stale(rows: Stale, root: str) -> list[str]:
    """Return a line per stage that is stale: how many rows, and the command that mends it."""
    lines = []
    for stage, number in rows.items():
        mend = f"python -m factory {stage} --root {shlex.quote(root)}"
        if stage == "decode":
            mend = "build into a new --root; what is here stays good, but takes no more films"
        if number is None:
            lines.append(f"stale?  {stage}: its model is not there, so nobody can tell. Give one: {mend} --set ...")
        elif number:
            lines.append(f"stale   {stage}: {number} rows by other settings, code or models. Mend: {mend}")
    return lines


def unfinished(counts: dict[str, Any], rows: Stale) -> list[str]:
    """Return the commands, in the order to give them, of which each would do something that is missing or stale."""
    left = {
        "build": counts["sources"].get("pending"),
        "select": counts["undecided"] or rows["select"] or counts["samples"] < counts["kept"],
        "sketch": counts["sketched"] < counts["samples"] or rows["sketch"],
        "caption": counts["captioned"] < counts["samples"] or rows["caption"],
    }
    return [verb for verb, something in left.items() if something]
