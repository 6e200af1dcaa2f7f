"""FactoryConfig and its presets: paths, sizes and numbers, nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from factory import caption, scores, selection, video
from factory.caption import CaptionConfig
from factory.selection import SelectionConfig
from factory.settings import STRICT
from factory.sketch import engine
from factory.sketch.engine import SketchConfig
from factory.split import SplitConfig
from factory.video import VideoConfig


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

    def __post_init__(self) -> None:
        for name in ("commit_every", "samples_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def fingerprints(self) -> dict[str, str]:
        """Return each stage's fingerprint: 16 hex digits over its code version, models and part of the settings.

        FileNotFoundError when a model is not there.
        """
        found = {name: value for name, value in asdict(self.video).items() if name not in video.RUNTIME_ONLY}
        parts = {
            "decode": (video.VERSION, scores.VERSION, found),
            "select": (selection.VERSION, asdict(self.selection)),
            "sketch": (engine.VERSION, engine.converter_id(self.sketch), asdict(self.sketch)),
            "caption": (caption.VERSION, asdict(self.caption) | {"model": caption.caption_by(self.caption.model)}),
        }
        return {
            stage: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
            for stage, part in parts.items()
        }


def micro() -> FactoryConfig:
    """The embedded default: small films, sketches at the frame's own size by the shipped network."""
    return FactoryConfig(sketch=SketchConfig(converter="micro"))


def paper() -> FactoryConfig:
    """The paper's numbers: at least 1080 lines, sketches of 10240 x 10240."""
    return FactoryConfig(
        selection=SelectionConfig(min_short_side=1080),
        sketch=SketchConfig(size=10240, square=True),
        caption=CaptionConfig(model=caption.RULE),  # the shipped captioner knows nothing but drawn footage
        samples_per_unit=4,
    )


PRESETS = {"micro": micro, "paper": paper}
