"""The corpus as tensors: pictures of 64 x 64 as the base sees them, colour and line layer in turn."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from trainer.micro.corpus import Corpus

SIDE = 64  # pixels: the base's native size
LINES = 0.3  # share of line layers among the pictures that are drawn


class Pictures:
    """All pictures of a corpus at 64 x 64 in memory: images (N,64,64,3) and lines (N,64,64), uint8; and their scenes.

    One that was drawn wide is shown whole between white bars, as the trainer fits a film's frame into its square.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.images = np.empty((len(corpus), SIDE, SIDE, 3), np.uint8)
        self.lines = np.empty((len(corpus), SIDE, SIDE), np.uint8)
        self.scenes, self.wide = corpus.scenes, corpus.wide
        for layer, stored in ((self.images, corpus.images), (self.lines, corpus.lines)):
            for i in range(len(corpus)):
                if corpus.wide[i]:
                    layer[i] = 255
                    layer[i, 14:50] = cv2.resize(stored[i], (SIDE, 36), interpolation=cv2.INTER_AREA)
                else:
                    layer[i] = cv2.resize(stored[i], (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, lines: np.ndarray) -> Tensor:
        """Return pixels (B,3,64,64) in [-1,1]: the line layer where `lines` (B,) is true, else the colour picture."""
        chosen = np.where(lines[:, None, None, None], self.lines[indices][..., None], self.images[indices])
        return torch.from_numpy(chosen.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def draw(self, rng: np.random.Generator, count: int) -> Tensor:
        """Return `count` random pictures as `read` does, a share of them line layers, half of all mirrored."""
        pixels = self.read(rng.integers(len(self), size=count), rng.random(count) < LINES)
        mirrored = torch.from_numpy(rng.random(count) < 0.5)
        pixels[mirrored] = pixels[mirrored].flip(3)
        return pixels

    def first(self, count: int, *, lines: bool) -> Tensor:
        """Return the first `count` pictures, all of one kind."""
        return self.read(np.arange(count), np.full(count, lines))
