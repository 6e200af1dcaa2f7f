"""FactoryConfig and its presets: paths, sizes and numbers, nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from factory import caption, scores, selection, video
from factory.caption import CaptionConfig
from factory.selection import SelectionConfig
from factory.settings import STRICT
from factory.sketch import engine
from factory.sketch.engine import SketchConfig
from factory.split import SplitConfig
from factory.video import VideoConfig

# The groups of settings that decide each stage's results.
GROUPS = {"decode": ("video",), "select": ("selection", "split"), "sketch": ("sketch",), "caption": ("caption",)}
STAGES = tuple(GROUPS)


@dataclass(frozen=True, kw_only=True)
class FactoryConfig:
    """Everything that decides what the factory makes of a film."""

    __pydantic_config__ = STRICT

    # Films to segments, shots and frames.
    video: VideoConfig = field(default_factory=VideoConfig)
    # Which frames are kept.
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    # Frames to lines.
    sketch: SketchConfig = field(default_factory=SketchConfig)
    # Frames to words.
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    # Which sources are held out.
    split: SplitConfig = field(default_factory=SplitConfig)
    # Units of work per commit: a crash costs at most these, plus one unit per worker.
    commit_every: int = 8
    # Samples per unit of work after selection.
    samples_per_unit: int = 16
    # Logical CPUs that a task asks Ray for.
    num_cpus: float = 1.0
    # GPUs that a task of the sketch stage asks Ray for; its network then runs on one. 0: on the CPU.
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("commit_every", "samples_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_gpus < 0:
            raise ValueError(f"num_gpus must not be negative, got {self.num_gpus}.")
        if self.num_cpus <= 0:
            raise ValueError(f"num_cpus must be above 0, got {self.num_cpus}.")

    def fingerprint(self, stage: str) -> str:
        """Return a stage's fingerprint: 16 hex digits over its code version, model and part of the settings.

        NothingThere when the stage's model is not there.
        """
        return hashlib.sha256(json.dumps(self._decides(stage), sort_keys=True).encode()).hexdigest()[:16]

    def _decides(self, stage: str) -> Any:
        """What decides a stage's results, as JSON values; of a model that is its files' hash, not the path."""
        if stage == "decode":
            return (video.VERSION, scores.VERSION, self.video.decides())
        if stage == "select":
            return (selection.VERSION, self.selection.decides())
        if stage == "sketch":
            return (engine.VERSION, self.sketch.decides())
        if stage == "caption":
            return (caption.VERSION, self.caption.decides())
        raise ValueError(f"No stage {stage!r}. Stages: {', '.join(STAGES)}.")


def micro() -> FactoryConfig:
    """The embedded default: small films, sketches at the frame's own size by the shipped network."""
    return FactoryConfig(sketch=SketchConfig(converter="micro"))


def paper() -> FactoryConfig:
    """The paper's numbers: at least 1080 lines, sketches of 10240 x 10240."""
    return FactoryConfig(
        selection=SelectionConfig(min_short_side=1080),
        sketch=SketchConfig(size=10240, square="pad"),
        caption=CaptionConfig(model=caption.RULE),  # the shipped captioner knows nothing but drawn footage
        samples_per_unit=4,
    )


PRESETS = {"micro": micro, "paper": paper}
