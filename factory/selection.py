"""Selection: keeps candidates or drops them, and says why, from their stored scores alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

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
_DUPLICATE, _KEPT = len(_RULES), len(_RULES) + 1


def select(candidates: pa.Table, config: SelectionConfig) -> pa.Table:
    """Return status, reason, score, threshold and duplicate_of of the candidates, row by row, as their table has them.

    `candidates` has COLUMNS and no failed ones. Frames that an earlier completed selection kept come first, then the
    sharper, then by frame_id, so that order does not matter. A frame is compared with all that were kept before it: the
    last one, those of its source, and those of the whole dataset.
    """
    scores = {name: _numbers(candidates[name]) for name in ("width", "height", *(rule[1] for rule in _RULES[1:]))}
    scores["short_side"] = np.minimum(scores["width"], scores["height"])
    rules = np.full(len(candidates), _KEPT)
    score = scores["sharpness"].copy()
    threshold = np.full(len(candidates), np.nan if config.min_sharpness is None else config.min_sharpness)
    for rule, (_, name, limit_name) in reversed(list(enumerate(_RULES))):  # the first that is broken stays
        limit = getattr(config, limit_name)
        if limit is not None:
            broken = scores[name] < limit if limit_name.startswith("min_") else scores[name] > limit
            rules[broken], score[broken], threshold[broken] = rule, scores[name][broken], limit
    originals = np.full(len(candidates), -1)
    if config.duplicate_hash_bits is not None:
        kept = _Kept(candidates, scores["contrast"] < _FLAT)
        for row in _ranked(candidates, scores["sharpness"]):
            if rules[row] == _KEPT:
                change, original = kept.nearest(row, config.duplicate_hash_bits)
                if change <= config.duplicate_change:
                    rules[row], score[row], threshold[row] = _DUPLICATE, change, config.duplicate_change
                    originals[row] = original
                else:
                    kept.add(row)
    return pa.table(
        {
            "status": pa.array(np.array(["dropped", "kept"])[(rules == _KEPT).astype(int)], pa.string()),
            "reason": pa.array([*(rule[0] for rule in _RULES), "duplicate", None], pa.string()).take(pa.array(rules)),
            "score": pa.array(score.astype(np.float32)),
            "threshold": pa.array(threshold.astype(np.float32), mask=np.isnan(threshold)),
            "duplicate_of": candidates["frame_id"].take(pa.array(originals, mask=originals < 0)),
        }
    )


def changed(present: pa.Table, decided: pa.Table) -> pa.Table:
    """Return the rows of `decided` that differ in some column from the row of `present` at the same place."""
    differs = np.zeros(len(decided), bool)
    for name in decided.column_names:
        differs |= _objects(present[name]) != _objects(decided[name])
    return decided.filter(pa.array(differs))


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), object)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers as float64."""
    if column.null_count:
        raise ValueError(f"{column.null_count} candidate(s) have no score. Build into a new --root.")
    return column.to_numpy().astype(np.float64)


def _ranked(candidates: pa.Table, sharpness: np.ndarray) -> np.ndarray:
    """Return the places of the candidates in the order in which they are decided."""
    kept = _objects(candidates["status"]) == "kept"
    return np.lexsort((np.array(candidates["frame_id"].to_pylist()), -sharpness, ~kept))


class _Kept:
    """The frames kept so far, by their places among the candidates, and the search among them."""

    def __init__(self, candidates: pa.Table, flat: np.ndarray) -> None:
        self._signatures = candidates["signature"]
        self._all_hashes, self._all_flat = candidates["phash"].to_numpy().view(np.uint64), flat
        self._count = 0
        self._places = np.empty(len(candidates), np.int64)
        self._hashes = np.empty(len(candidates), np.uint64)
        self._flat = np.empty(len(candidates), bool)

    def add(self, place: int) -> None:
        """Add the candidate at `place`."""
        self._places[self._count] = place
        self._hashes[self._count], self._flat[self._count] = self._all_hashes[place], self._all_flat[place]
        self._count += 1

    def nearest(self, place: int, bits: int) -> tuple[float, int]:
        """Return the least changed share (0 to 1) to a kept frame whose hash is within `bits`, and its place.

        A flat frame is compared with all flat ones, whatever their hash. None near: 2.
        """
        if self._all_flat[place]:
            near = np.flatnonzero(self._flat[: self._count])
        else:
            near = np.flatnonzero(np.bitwise_count(self._hashes[: self._count] ^ self._all_hashes[place]) <= bits)
        best = 2.0, -1
        for start in range(0, len(near), _BATCH):
            batch = self._places[near[start : start + _BATCH]]
            signatures = [self._signatures[int(other)].as_py() for other in batch]
            change = changed_share(self._signatures[place].as_py(), signatures)
            least = int(change.argmin())
            if change[least] < best[0]:
                best = float(change[least]), int(batch[least])
        return best
