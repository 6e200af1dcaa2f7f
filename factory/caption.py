"""Captions: what a frame shows in words, and the keywords of its style."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from factory.models import files_hash, find_model, model_id
from factory.settings import STRICT

VERSION = "2"  # raised when the same frame would be described otherwise
RULE = "rule:colours-1"  # a model's id, and what `caption_by` records, for no model at all: `colour_caption`
MAX_TOKENS = 75

# Names and their sRGB centres; a pixel takes the nearest in CIE Lab.
_COLOURS = {
    "black": (16, 16, 20),
    "grey": (128, 128, 128),
    "white": (244, 244, 240),
    "red": (200, 40, 40),
    "orange": (240, 140, 50),
    "yellow": (245, 220, 90),
    "green": (70, 150, 70),
    "teal": (60, 160, 160),
    "blue": (60, 100, 200),
    "light blue": (150, 205, 240),
    "navy": (28, 32, 80),
    "purple": (130, 80, 170),
    "pink": (245, 160, 190),
    "brown": (115, 75, 45),
    "peach": (250, 220, 196),
}


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How a frame is described."""

    __pydantic_config__ = STRICT

    # The captioner, a BLIP: a shipped id, or an absolute folder; "rule:colours-1" names light and colours only.
    model: str = "animesketch/captioner"
    # Appended to the caption wherever a sample's text is used: "{caption}, {keywords}".
    keywords: tuple[str, ...] = ("anime sketch", "line art")

    def decides(self) -> dict[str, Any]:
        """Return what a caption depends on: the model's name and files. Keywords are a column of their own."""
        files = None if self.model == RULE else files_hash(self.model)
        return {"model": caption_by(self.model), "files": files}


def spoken(decoded: str) -> str:
    """Return what BERT's tokenizer decoded, its compound words, such as cat-ear, put together again."""
    return re.sub(r"(?<=\w) - (?=\w)", "-", decoded.strip())


def caption_by(model: str) -> str:
    """Return what `caption_by` records for a `caption.model`. NothingThere where there is no such folder."""
    return RULE if model == RULE else model_id(model)


class Captioner:
    """Frames to sentences; loads its model when made."""

    def __init__(self, model: str) -> None:
        """Load the BLIP `model`, or none for the rule. NothingThere where there is no such folder."""
        self.id = caption_by(model)
        self._blip = None if model == RULE else _loaded(str(find_model(model)))

    def __call__(self, image: np.ndarray) -> str:
        """Return a sentence for the RGB uint8 image H,W,3: greedy and one picture at a time, so always the same one."""
        if self._blip is None:
            return colour_caption(image)
        blip, processor = self._blip
        import torch

        pixels = processor.image_processor(images=image, return_tensors="pt").pixel_values
        with torch.inference_mode():
            ids = blip.generate(pixel_values=pixels, max_new_tokens=MAX_TOKENS, num_beams=1, do_sample=False)
        return spoken(processor.decode(ids[0], skip_special_tokens=True))


@functools.lru_cache(maxsize=1)  # a worker describes many pictures
def _loaded(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import BlipForConditionalGeneration, BlipProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # in a job's log each of its steps is a line
    blip = BlipForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return blip.eval(), BlipProcessor.from_pretrained(folder, local_files_only=True)


def sample_text(caption: str | None, keywords: Sequence[str] | None) -> str:
    """Return the text of a sample, "{caption}, {keywords}", wherever it is used; empty parts are left out."""
    return ", ".join(part for part in (caption, *(keywords or ())) if part)


def colour_caption(image: np.ndarray) -> str:
    """Return a sentence of what is measured in the RGB uint8 image H,W,3: light, and the colours that cover most of it.

    A plain rule, not a model: it says nothing about who or what is to be seen.
    """
    small = cv2.resize(image, (64, 36), interpolation=cv2.INTER_AREA)
    lightness = float(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).mean()) / 255
    light = "dark" if lightness < 0.3 else "bright" if lightness > 0.65 else "evenly lit"
    names = _dominant(small)
    tones = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    place = _dominant(small[:12])[0]
    return f"{'an' if light[0] == 'e' else 'a'} {light} drawing in {tones}, {place} at the top"


def _dominant(image: np.ndarray) -> list[str]:
    """Return one to three colour names, the widest first; all but the first cover an eighth of the image."""
    centres = np.array(list(_COLOURS.values()), np.float32)[None] / 255
    palette = cv2.cvtColor(centres, cv2.COLOR_RGB2LAB)[0]
    pixels = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 1, 3)
    nearest = np.linalg.norm(pixels - palette, axis=2).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(_COLOURS))
    names = list(_COLOURS)
    order = np.argsort(-counts, kind="stable")[:3]
    return [names[i] for i in order if i == order[0] or counts[i] >= len(nearest) / 8]
