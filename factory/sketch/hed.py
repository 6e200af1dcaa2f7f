"""HED (Xie and Tu 2015, "Holistically-Nested Edge Detection"), its soft edges drawn as pencil lines.

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

import functools
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory.sketch.converter import Converter
from factory.sketch.generator import loaded

MEAN_BGR = (104.00699, 116.66877, 122.67892)
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions: VGG16
REACH = 114  # pixels around an edge that it can depend on: 98 by VGG16's convolutions, 16 by the enlarging of its sides


class HED(nn.Module):
    """BGR pixels minus their mean (B,3,H,W) -> edge probability (B,1,H,W)."""

    def __init__(self) -> None:
        super().__init__()
        blocks, inner = [], 3
        for outer, count in BLOCKS:
            blocks.append(
                nn.ModuleList([nn.Conv2d(inner if i == 0 else outer, outer, 3, padding=1) for i in range(count)])
            )
            inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.sides = nn.ModuleList([nn.Conv2d(outer, 1, 1) for outer, _ in BLOCKS])
        self.fuse = nn.Conv2d(5, 1, 1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        x, size, found = x_B3HW, x_B3HW.shape[2:], []
        for i, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            x = F.max_pool2d(x, 2, ceil_mode=True) if i else x
            for conv in block:  # type: ignore[attr-defined]
                x = conv(x).relu_()
            found.append(F.interpolate(side(x), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(found, 1)).sigmoid()

    @classmethod
    def from_pretrained(cls, folder: Path) -> HED:
        """Return the network of a folder that `factory.sketch.pretrained.fetch_hed` made, for inference."""
        return loaded(cls(), folder)

    @torch.inference_mode()
    def edges(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        """Return edge probabilities (B,H,W) of RGB uint8 tiles."""
        mean = self.fuse.weight.new_tensor(MEAN_BGR)[:, None, None]
        pixels = torch.from_numpy(tiles_BHW3).to(mean.device).permute(0, 3, 1, 2).flip(1).float() - mean
        return self(pixels.contiguous(memory_format=torch.channels_last))[:, 0].cpu().numpy()


class Pencil(Converter):
    """The converter `hed`: an edge is a soft ridge, which is drawn as the line along its top."""

    stride = 16  # what the deepest block sees as one
    halo = 128  # REACH, and that of the pencil's Gaussian

    def __init__(self, folder: Path) -> None:
        self._model = _loaded(folder)

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        return np.stack([1 - pencil(edges) for edges in self._model.edges(tiles_BHW3)])


def pencil(edges: np.ndarray) -> np.ndarray:
    """Return the strength (0 to 1) of the pencil line at each place of edge probabilities H,W."""
    wide = cv2.GaussianBlur(edges, (0, 0), 3.0, borderType=cv2.BORDER_REFLECT_101)
    return np.clip(2.5 * (edges - wide) + 0.25 * edges, 0, 1)


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> HED:
    return HED.from_pretrained(folder)
