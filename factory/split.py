"""Splits: a whole source is for training or held out, never a frame of it."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass

from factory.locations import path_of
from factory.settings import STRICT
from factory.sources import is_picture


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


def split_of(source_id: str, uri: str, config: SplitConfig) -> str:
    """Return "validation" for a source that is held out, else "train"."""
    path = path_of(uri)
    for pattern in config.holdout:
        if any(fnmatch.fnmatchcase(name, pattern) for name in (path.name, path.parent.name, uri)):
            return "validation"
    if is_picture(uri):  # those of one folder often show one scene: they stay together
        source_id = hashlib.sha256(path.parent.name.encode()).hexdigest()
    return "validation" if int(source_id[:8], 16) / 2**32 < config.validation_share else "train"
