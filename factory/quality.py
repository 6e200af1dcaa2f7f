"""Quality: scores of a frame, and the selection that keeps, drops and says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from factory.settings import STRICT

VERSION = "1"  # raised when the same candidates would be selected otherwise
_SIDE = 360  # short side at which frames are compared, so that scores do not depend on resolution


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Thresholds of the selection; change them and run `python -m factory select`: nothing is decoded again."""

    __pydantic_config__ = STRICT

    # Least short side of a frame (pixels).
    min_short_side: int = 256
    # Least sharpness (variance of the Laplacian at a short side of 360); 0 keeps blurred frames.
    min_sharpness: float = 30.0
    # Brightness (mean luma, 0 to 1) must lie between these.
    min_brightness: float = 0.04
    max_brightness: float = 0.98
    # Least standard deviation of luma (0 to 0.5): flat frames and title cards lie below.
    min_contrast: float = 0.04
    # Near-duplicates, first step: at most this many of the 64 hash bits differ.
    duplicate_hash_bits: int = 10
    # Near-duplicates, second step: cosine similarity of the colour layout is at least this.
    duplicate_similarity: float = 0.995


def reduced(image: np.ndarray) -> np.ndarray:
    """Return the uint8 image H,W,3 at a short side of at most 360 pixels."""
    factor = _SIDE / min(image.shape[:2])
    if factor >= 1:
        return image
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def sharpness(grey: np.ndarray) -> float:
    """Return the variance of the Laplacian of the uint8 image H,W: the higher, the sharper."""
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def scores(image: np.ndarray) -> dict[str, Any]:
    """Return the columns of scores, with phash and embedding, of the RGB uint8 image H,W,3."""
    small = reduced(image)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return {
        "sharpness": sharpness(grey),
        "brightness": float(grey.mean()) / 255,
        "contrast": float(grey.std()) / 255,
        "entropy": float(-(share * np.log2(share)).sum()),
        "phash": phash(grey),
        "embedding": layout(small),
    }


def phash(grey: np.ndarray) -> int:
    """Return the 64-bit perceptual hash of the uint8 image H,W as a signed integer.

    Signs of the 8x8 lowest frequencies of a 32x32 DCT against their median, the constant left out of the median
    (Zauner 2010, section 3.2.1).
    """
    spectrum = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8].ravel()
    bits = spectrum > np.median(spectrum[1:])
    return int(np.packbits(bits).view(">i8")[0])


def layout(image: np.ndarray) -> list[float]:
    """Return the colour layout of the RGB uint8 image: 8x8 mean colours as a unit vector of 192 numbers."""
    cells = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float64).ravel() + 1.0
    return (cells / np.linalg.norm(cells)).tolist()


def select(candidates: list[dict[str, Any]], config: SelectionConfig) -> dict[str, dict[str, Any]]:
    """Return by frame_id: status, reason, score, threshold, duplicate_of of the candidates that are not failed.

    Each row has frame_id, status, width, height, sharpness, brightness, contrast, phash and embedding. Frames that an
    earlier completed selection kept come first, then the sharper, then by frame_id, so that order does not matter.
    """
    usable = [row for row in candidates if row["status"] != "failed"]
    usable.sort(key=lambda row: (row["status"] != "kept", -row["sharpness"], row["frame_id"]))
    hashes = np.empty(len(usable), np.uint64)
    layouts = np.empty((len(usable), 192), np.float32)
    kept: list[str] = []
    decisions: dict[str, dict[str, Any]] = {}
    for row in usable:
        decision = _below_threshold(row, config)
        if decision is None:
            count = len(kept)
            distance = np.bitwise_count(hashes[:count] ^ np.int64(row["phash"]).view(np.uint64))
            near = np.flatnonzero(distance <= config.duplicate_hash_bits)
            similarity = layouts[near] @ np.asarray(row["embedding"], np.float32)
            same = near[similarity >= config.duplicate_similarity]
            if len(same):
                best = int(similarity.argmax())
                decision = _decided(
                    "dropped", "duplicate", float(similarity[best]), config.duplicate_similarity, kept[near[best]]
                )
            else:
                hashes[count] = np.int64(row["phash"]).view(np.uint64)
                layouts[count] = row["embedding"]
                kept.append(row["frame_id"])
                decision = _decided("kept", None, row["sharpness"], config.min_sharpness)
        decisions[row["frame_id"]] = decision
    return decisions


def _below_threshold(row: dict[str, Any], config: SelectionConfig) -> dict[str, Any] | None:
    short = min(row["width"], row["height"])
    if short < config.min_short_side:
        return _decided("dropped", "too_small", short, config.min_short_side)
    if row["brightness"] < config.min_brightness:
        return _decided("dropped", "too_dark", row["brightness"], config.min_brightness)
    if row["brightness"] > config.max_brightness:
        return _decided("dropped", "too_bright", row["brightness"], config.max_brightness)
    if row["contrast"] < config.min_contrast:
        return _decided("dropped", "flat", row["contrast"], config.min_contrast)
    if row["sharpness"] < config.min_sharpness:
        return _decided("dropped", "blurred", row["sharpness"], config.min_sharpness)
    return None


def _decided(
    status: str, reason: str | None, score: float, threshold: float, duplicate_of: str | None = None
) -> dict[str, Any]:
    return {
        "status": status,
        "reason": reason,
        "score": float(np.float32(score)),  # as the table stores it, so that an equal decision compares equal
        "threshold": float(np.float32(threshold)),
        "duplicate_of": duplicate_of,
    }
