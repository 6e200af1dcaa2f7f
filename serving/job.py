"""What is asked of a worker and what it answers: plain values, which travel between the ingress and the replicas."""

from __future__ import annotations

from dataclasses import dataclass

from serving.adapters import Served
from serving.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe and how its pictures are to be delivered."""

    recipe: Recipe
    # the file of its reference, decoded where it is drawn: 57 kB can be 48 MB of pixels
    reference: bytes | None = None
    # the adapter of the folder that draws it; None = the server's own
    adapter: Served | None = None
    output_format: str = "png"
    output_compression: int = 100
    # previews per picture
    partial_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Started:
    """First event of a job: it is accepted, and will be drawn."""

    # what the caller should know about the request, in words
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file: a preview when `partial` says which one (from 0), or the result."""

    data: bytes
    seed: int
    partial: int | None = None
    # of a result: its steps; its share of the steps that drew it, 1 / N of one that drew N; and of their seconds
    steps: int = 0
    share: float = 0.0
    seconds: float = 0.0


Event = Started | Picture


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a server is: fixed as long as it runs."""

    model: str
    base: str
    base_weights_hash: str
    # pixels
    native_size: tuple[int, int]
    size_multiple: int
    # random weights: pictures are noise, everything else is real
    random_weights: bool
    # steps of a picture of the native size that a replica takes in a second, as measured at its start; 0 = unknown
    steps_per_second: float = 0.0


class SamplerStopped(Exception):
    """Nothing is drawn here: the thread that draws has ended by a fault of its own, hangs, or can't draw a canary."""
