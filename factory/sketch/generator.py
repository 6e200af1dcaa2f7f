"""The U-Net generator of pix2pix (Isola et al. 2017), the kind that Anime2Sketch is: RGB in, lines out.

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Block(nn.Module):
    """One level: halve, go deeper, double; its input is concatenated to what comes back."""

    def __init__(self, outer: int, inner: int, deeper: nn.Module | None) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1), nn.BatchNorm2d(inner))
        self.deeper = deeper
        wide = inner if deeper is None else 2 * inner
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(wide, outer, 4, 2, 1), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(x)
        if self.deeper is not None:
            inner = self.deeper(inner)
        return torch.cat([x, self.up(inner)], 1)


class SketchGenerator(nn.Module):
    """Pixels (B,3,H,W) in [-1,1] -> lines (B,1,H,W) in [-1,1], ink -1; H and W are multiples of `stride`.

    Normalisation is by batch statistics that are frozen after training: unlike with instance normalisation, what a tile
    becomes does not depend on the rest of it beyond `reach` pixels.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        """`channels` from the widest picture to the deepest level: each level halves the picture."""
        super().__init__()
        self.channels = tuple(channels)
        deeper: nn.Module | None = None
        for outer, inner in reversed(list(itertools.pairwise(channels))):
            deeper = Block(outer, inner, deeper)
        self.first = nn.Conv2d(3, channels[0], 4, 2, 1)
        self.deeper = cast(nn.Module, deeper)
        self.last = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * channels[0], 1, 4, 2, 1), nn.Tanh())

    @property
    def stride(self) -> int:
        """Pixels that the deepest level sees as one: sides, and the places of tiles, are multiples of it."""
        return 2 ** len(self.channels)

    @property
    def reach(self) -> int:
        """Pixels around an output pixel that it can depend on."""
        return 3 * self.stride

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return self.last(self.deeper(self.first(x_B3HW)))

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, in the model's own precision."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"channels": self.channels}) + "\n")
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> SketchGenerator:
        """Return the generator of a folder that `save_pretrained` wrote, in single precision, for inference."""
        model = cls(tuple(json.loads((folder / "config.json").read_text())["channels"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval().requires_grad_(False)


class Generator:
    """The converter: RGB to lines by a trained generator."""

    def __init__(self, folder: Path) -> None:
        self._model = _loaded(folder)
        self.halo = self._model.reach  # a multiple of the stride: tiles of a multiple of it lie on the network's grid

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        """Return lines H,W float32 in [0, 1], ink 0 on paper 1, of the RGB uint8 `tile` H,W,3."""
        height, width, stride = *tile.shape[:2], self._model.stride
        whole = cv2.copyMakeBorder(tile, 0, -height % stride, 0, -width % stride, cv2.BORDER_REFLECT_101)
        with torch.inference_mode():
            pixels = torch.from_numpy(whole).permute(2, 0, 1)[None].float() / 127.5 - 1
            lines = self._model(pixels)[0, 0, :height, :width]
        return (lines.numpy() + 1) / 2


@functools.lru_cache(maxsize=1)  # a worker converts many pictures
def _loaded(folder: Path) -> SketchGenerator:
    return SketchGenerator.from_pretrained(folder)
