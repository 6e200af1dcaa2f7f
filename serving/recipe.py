"""What a picture is asked by."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

from PIL import Image

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a picture, apart from the models. The same recipe gives the same picture."""

    prompt: str
    # what the unconditional half of the guidance is told
    negative_prompt: str = ""
    # the sketch whose style and content guide the picture; None = text alone, which is the base model itself
    reference: Image.Image | None = None
    # DDIM steps, 1 to 999
    num_inference_steps: int = 50
    # eps = eps_u + guidance_scale (eps_c - eps_u); 1 leaves the unconditional half out
    guidance_scale: float = 7.5
    # the paper's alpha: weight of the image branch in every cross-attention
    adapter_scale: float = 0.5
    # picture i draws its noise from seed + i
    seed: int = 0
    # width and height in pixels, multiples of the VAE's factor; None = the base's native size
    size: tuple[int, int] | None = None
    # number of pictures
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 999:
            raise ValueError(f"num_inference_steps must be from 1 to 999, got {self.num_inference_steps}.")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}.")
        if not 0 <= self.seed <= MAX_SEED - self.n + 1:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - self.n + 1} for n = {self.n}, got {self.seed}.")
        for name in ("guidance_scale", "adapter_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")

    @functools.cached_property
    def reference_sha256(self) -> str | None:
        """The sha256 of the reference's bytes as RGB: with its size, what tells one from another."""
        return None if self.reference is None else hashlib.sha256(self.reference.convert("RGB").tobytes()).hexdigest()
