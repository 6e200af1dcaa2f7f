"""Status: the funnel from sources to samples, counted from the tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from factory.store import Store


def funnel(store: Store) -> dict[str, Any]:
    """Return counts: sources by status, segments, candidates by decision, samples by what they have."""
    sources = (
        store.table("sources").to_table(columns=["status", "segment_starts", "duration", "uri", "error"]).to_pylist()
    )
    candidates = store.table("candidates").to_table(columns=["status", "reason"]).to_pylist()
    samples = (
        store.table("samples")
        .to_table(columns=["selected", "split", "sketch_sha256", "caption", "review"], filter="selected")
        .to_pylist()
    )
    return {
        "sources": dict(Counter(row["status"] for row in sources)),
        "failed_sources": {row["uri"]: row["error"] for row in sources if row["status"] in ("failed", "partial")},
        "seconds": sum(row["duration"] or 0 for row in sources),
        "segments": sum(len(row["segment_starts"] or []) for row in sources),
        "candidates": len(candidates),
        "kept": sum(row["status"] == "kept" for row in candidates),
        "dropped": dict(Counter(row["reason"] for row in candidates if row["status"] == "dropped").most_common()),
        "failed": sum(row["status"] == "failed" for row in candidates),
        "undecided": sum(row["status"] is None for row in candidates),
        "samples": len(samples),
        "sketched": sum(row["sketch_sha256"] is not None for row in samples),
        "captioned": sum(row["caption"] is not None for row in samples),
        "splits": dict(sorted(Counter(row["split"] for row in samples).items())),
    }


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


def next_verb(counts: dict[str, Any]) -> str | None:
    """Return the command that does what is still to be done first, or None when nothing is."""
    if counts["sources"].get("pending"):
        return "build"
    if counts["undecided"]:
        return "select"
    if counts["sketched"] < counts["samples"]:
        return "sketch"
    return "caption" if counts["captioned"] < counts["samples"] else None
