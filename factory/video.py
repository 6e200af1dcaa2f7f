"""What a film is cut into, and the settings of how: segments, shots, frames."""

from __future__ import annotations

from dataclasses import dataclass

from factory.settings import STRICT

VERSION = "4"  # raised when the same file would give other candidates
# Settings that change how the work is done, not what comes out of it.
RUNTIME_ONLY = (
    "segment_seconds",
    "decode_threads",
    "deadline_seconds",
    "deadline_per_second",
    "memory_limit_mb",
    "cache_folder",
    "cache_gigabytes",
    "pictures_per_unit",
)
REMUX = "Rewrite the container without encoding again: ffmpeg -i IN -c copy -fflags +genpts OUT.mkv"


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How films are cut into segments and shots, and how frames are encoded."""

    __pydantic_config__ = STRICT

    # Length of a segment, the unit of work, retry and commit (s); borders lie on key frames.
    segment_seconds: float = 300.0
    # Decoded before a segment's start, so that a cut near the border is seen as in the whole film (s).
    overlap_seconds: float = 2.0
    # A shot is read at most this far; a longer one is judged by this much of it (s).
    max_shot_seconds: float = 60.0
    # A shot is at least this long (s).
    min_shot_seconds: float = 0.4
    # PySceneDetect's AdaptiveDetector: how far a frame's change must stand out from its neighbours'.
    adaptive_threshold: float = 3.0
    # ... and its least change, in mean HSV levels (0 to 255).
    min_content_val: float = 15.0
    # A cut is none when the frames on both sides correlate this much (-1 to 1): a fade or a flash of one picture.
    same_picture: float = 0.9
    # Frames with a mean luma below this (0 to 1) are black: they end a shot and are never chosen.
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
    # Memory that a segment's process may hold before it is ended (MB).
    memory_limit_mb: int = 4000
    # Where a node keeps films that it fetched from an object store; "" is a folder among the system's temporary ones.
    cache_folder: str = ""
    # At most this much is kept there: it must hold the largest film, better one for each task that runs at once.
    cache_gigabytes: float = 50.0
    # Still pictures per unit of work.
    pictures_per_unit: int = 64

    def __post_init__(self) -> None:
        positive = ("segment_seconds", "max_shot_seconds", "min_shot_seconds", "deadline_seconds", "memory_limit_mb")
        for name in (*positive, "cache_gigabytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"video.{name} must be above 0, got {getattr(self, name)}.")
        if self.pictures_per_unit < 1:
            raise ValueError(f"video.pictures_per_unit must be at least 1, got {self.pictures_per_unit}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"video.jpeg_quality must lie in 1 to 100, got {self.jpeg_quality}.")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a film: it owns the shots that start in [start, end) seconds of stream time."""

    source_id: str
    uri: str
    start: float
    end: float
    modified_ns: int  # of the file when it was hashed

    @property
    def segment_id(self) -> str:
        """The segment's key: `<source_id[:16]>@<start>-<end>` in microseconds."""
        return f"{self.source_id[:16]}@{round(self.start * 1e6)}-{round(self.end * 1e6)}"
