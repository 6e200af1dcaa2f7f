"""Splits: a whole source is for training or held out, never a frame of it."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from factory.locations import path_of
from factory.settings import STRICT
from factory.sources import is_picture

COLUMNS = ("source_id", "uri", "other_uris")  # of the sources table, that decide a split
_SAID = 3  # sources, by name


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which sources are held out for validation. A source keeps the split of its first samples."""

    __pydantic_config__ = STRICT

    # Names of files or of their folders that are held out; globs such as "*-ep12.mkv" work.
    holdout: tuple[str, ...] = ()
    # Share of the other sources that is held out, chosen by their hash: it stays the same when sources are added.
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"split.validation_share must lie in [0, 1), got {self.validation_share}.")


def split_of(source: Mapping[str, Any], config: SplitConfig) -> str:
    """Return "validation" for a source (its COLUMNS) that is held out by any of its names, else "train"."""
    if any(_holds_out(pattern, source) for pattern in config.holdout):
        return "validation"
    key = source["source_id"]
    if is_picture(source["uri"]):  # those of one folder often show one scene: they stay together
        key = hashlib.sha256(path_of(source["uri"]).parent.name.encode()).hexdigest()
    return "validation" if int(key[:8], 16) / 2**32 < config.validation_share else "train"


def _holds_out(pattern: str, source: Mapping[str, Any]) -> bool:
    for uri in (source["uri"], *(source["other_uris"] or ())):
        path = path_of(uri)
        if any(fnmatch.fnmatchcase(name, pattern) for name in (path.name, path.parent.name, uri)):
            return True
    return False


def _called(source: Mapping[str, Any]) -> str:
    """Return the names of a source's file, in words."""
    name, *others = (path_of(uri).name for uri in (source["uri"], *(source["other_uris"] or ())))
    others = sorted({*others} - {name})
    return f"{name} (also {', '.join(others)})" if others else name


def notes(sources: Iterable[Mapping[str, Any]], splits: Mapping[str, str], config: SplitConfig) -> list[str]:
    """Return what a user would not see in the samples: patterns that hold nothing out, and sources that stay as they
    are although `config` says otherwise. `splits` are those of the sources that have samples, by source_id."""
    sources = [source for source in sources if source["source_id"] in splits]
    unused = [pattern for pattern in config.holdout if not any(_holds_out(pattern, source) for source in sources)]
    said = [
        f"{pattern!r} of split.holdout holds nothing out: no source of that name has samples"
        for pattern in (unused if sources else ())
    ]
    for kept, wanted in (("train", "validation"), ("validation", "train")):
        staying = [
            _called(source)
            for source in sources
            if splits[source["source_id"]] == kept
            and split_of(source, config) == wanted
            # the share of pictures goes by their folder's name: one that was renamed is no change of the settings
            and not (is_picture(source["uri"]) and source["other_uris"] and wanted == "train")
        ]
        if staying:
            names = ", ".join(sorted(staying)[:_SAID]) + (", ..." if len(staying) > _SAID else "")
            said.append(
                f"{len(staying)} source(s) stay in {kept}, though these settings would have them in {wanted}: {names}. "
                "A model may have been trained with them; for another split build into a new --root"
            )
    return said
