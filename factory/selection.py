"""Selection: keeps candidates or drops them, and says why, from their stored scores alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from factory.settings import STRICT
from factory.signature import changed_share

VERSION = "2"  # raised when the same candidates would be selected otherwise
COLUMNS = (  # of the candidates table, that a selection reads
    "frame_id",
    "status",
    "width",
    "height",
    "sharpness",
    "brightness",
    "contrast",
    "entropy",
    "text_share",
    "subtitle_share",
    "phash",
    "signature",
)
_FLAT = 0.04  # contrast below which a hash is made of noise
_BATCH = 512  # pictures compared at once: some 40 MB


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Thresholds of the selection; change them and run `python -m factory select`: nothing is decoded again.

    `null` switches a threshold off: --set selection.min_sharpness=null.
    """

    __pydantic_config__ = STRICT

    # Least short side of a frame (pixels).
    min_short_side: int | None = 256
    # Most of the picture that text above its lower quarter covers (0 to 1): credits and title cards lie above.
    max_text_share: float | None = 0.02
    # Most of the picture that text in its lower quarter covers (0 to 1): subtitles lie above.
    max_subtitle_share: float | None = 0.003
    # Brightness (mean luma, 0 to 1) must lie between these: black and white frames lie outside.
    min_brightness: float | None = 0.04
    max_brightness: float | None = 0.98
    # Least standard deviation of luma (0 to 0.5): flat frames lie below.
    min_contrast: float | None = 0.04
    # Least entropy of the luma histogram (0 to 8 bits): frames of hardly more than two tones lie below.
    min_entropy: float | None = 1.5
    # Least sharpness (variance of the Laplacian at a short side of 360).
    min_sharpness: float | None = 30.0
    # Near-duplicates, first step: at most this many of the 64 hash bits differ. null keeps duplicates.
    duplicate_hash_bits: int | None = 10
    # Near-duplicates, second step: at most this share of the picture (0 to 1) has changed. An eye or a mouth of a small
    # figure lies below, another expression of a near one above.
    duplicate_change: float = 0.004

    def __post_init__(self) -> None:
        for name in ("max_text_share", "max_subtitle_share", "min_brightness", "max_brightness", "duplicate_change"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"selection.{name} must lie in 0 to 1, got {value}.")
        if self.duplicate_hash_bits is not None and not 0 <= self.duplicate_hash_bits <= 64:
            raise ValueError(f"selection.duplicate_hash_bits must lie in 0 to 64, got {self.duplicate_hash_bits}.")

    def decides(self) -> dict[str, Any]:
        """Return the settings that decide, by name: a duplicate's change only where duplicates are looked for."""
        found = asdict(self)
        if self.duplicate_hash_bits is None:
            del found["duplicate_change"]
        return found


# Reason, score and threshold of each rule, in the order in which they are asked.
_RULES = (
    ("too_small", "short_side", "min_short_side"),
    ("credits", "text_share", "max_text_share"),
    ("subtitles", "subtitle_share", "max_subtitle_share"),
    ("too_dark", "brightness", "min_brightness"),
    ("too_bright", "brightness", "max_brightness"),
    ("flat", "contrast", "min_contrast"),
    ("few_tones", "entropy", "min_entropy"),
    ("blurred", "sharpness", "min_sharpness"),
)


def select(candidates: list[dict[str, Any]], config: SelectionConfig) -> dict[str, dict[str, Any]]:
    """Return by frame_id: status, reason, score, threshold, duplicate_of of the candidates that are not failed.

    Each row has COLUMNS. Frames that an earlier completed selection kept come first, then the sharper, then by
    frame_id, so that order does not matter. A frame is compared with all that were kept before it: the last one, those
    of its source, and those of the whole dataset.
    """
    usable = [row for row in candidates if row["status"] != "failed"]
    usable.sort(key=lambda row: (row["status"] != "kept", -row["sharpness"], row["frame_id"]))
    kept = _Kept(len(usable))
    decisions: dict[str, dict[str, Any]] = {}
    for row in usable:
        decision = _broken_rule(row, config) or _duplicate(row, kept, config)
        if decision is None:
            kept.add(row)
            decision = _decided("kept", None, row["sharpness"], config.min_sharpness)
        decisions[row["frame_id"]] = decision
    return decisions


def _broken_rule(row: dict[str, Any], config: SelectionConfig) -> dict[str, Any] | None:
    found = row | {"short_side": min(row["width"], row["height"])}
    for reason, score, name in _RULES:
        value, threshold = found[score], getattr(config, name)
        if threshold is not None and (value < threshold if name.startswith("min_") else value > threshold):
            return _decided("dropped", reason, value, threshold)
    return None


def _duplicate(row: dict[str, Any], kept: _Kept, config: SelectionConfig) -> dict[str, Any] | None:
    if config.duplicate_hash_bits is None:
        return None
    change, original = kept.nearest(row, config.duplicate_hash_bits)
    if change > config.duplicate_change:
        return None
    return _decided("dropped", "duplicate", change, config.duplicate_change, original)


class _Kept:
    """The frames kept so far, and the search among them."""

    def __init__(self, most: int) -> None:
        self._rows: list[dict[str, Any]] = []
        self._hashes = np.empty(most, np.uint64)
        self._flat = np.empty(most, bool)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of COLUMNS."""
        self._hashes[len(self._rows)] = _bits(row)
        self._flat[len(self._rows)] = row["contrast"] < _FLAT
        self._rows.append(row)

    def nearest(self, row: dict[str, Any], bits: int) -> tuple[float, str]:
        """Return the least changed share (0 to 1) to a kept frame whose hash is within `bits`, and its frame_id.

        A flat frame is compared with all flat ones, whatever their hash. None near: 2.
        """
        count = len(self._rows)
        if row["contrast"] < _FLAT:
            near = np.flatnonzero(self._flat[:count])
        else:
            near = np.flatnonzero(np.bitwise_count(self._hashes[:count] ^ _bits(row)) <= bits)
        best = 2.0, ""
        for start in range(0, len(near), _BATCH):
            batch = [self._rows[i] for i in near[start : start + _BATCH]]
            change = changed_share(row["signature"], [other["signature"] for other in batch])
            least = int(change.argmin())
            if change[least] < best[0]:
                best = float(change[least]), batch[least]["frame_id"]
        return best


def _bits(row: dict[str, Any]) -> np.uint64:
    return np.int64(row["phash"]).view(np.uint64)


def _decided(
    status: str, reason: str | None, score: float, threshold: float | None, duplicate_of: str | None = None
) -> dict[str, Any]:
    return {
        "status": status,
        "reason": reason,
        "score": float(np.float32(score)),  # as the table stores it, so that an equal decision compares equal
        "threshold": None if threshold is None else float(np.float32(threshold)),
        "duplicate_of": duplicate_of,
    }
