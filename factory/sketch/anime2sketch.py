"""Anime2Sketch (Xiang et al. 2021, "Adversarial Open Domain Adaptation for Sketch-to-Photo Synthesis"): its generator
in both published layouts, over tiles.

The network normalises each instance, so that a tile's lines follow what else is in it: over a large picture its grid
shows. Here the statistics are pooled over the whole picture, and stay frozen for all tiles. Each of the thirteen rests
on those before it; two sweeps over the picture come near, not all the way (docs/sketch.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory.sketch.converter import Converter
from factory.sketch.generator import SketchGenerator, lines_of, loaded, pixels_of, read_config

CHANNELS = (64, 128, 256, 512, 512, 512, 512, 512)
LAYOUTS = ("default", "improved")


class PooledNorm(nn.Module):
    """Instance normalisation (no affine, as published) whose statistics can be those of many tiles.

    Fresh, a tile is normalised by its own. `pool` begins to count; `freeze` takes what was counted for all that comes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._frozen: tuple[Tensor, Tensor] | None = None  # mean and variance, (1,C,1,1)
        self._counted: list[Tensor] | None = None  # places, sum, sum of squares

    def pool(self) -> None:
        """Count the statistics of the tiles that come next."""
        self._counted = [torch.zeros((), dtype=torch.float64) for _ in range(3)]

    def freeze(self) -> None:
        """Normalise by what was counted from now on."""
        assert self._counted is not None
        places, total, squares = self._counted
        mean = total / places
        self._frozen = (mean.float(), (squares / places - mean**2).clamp(min=0).float())
        self._counted = None

    def thaw(self) -> None:
        """Normalise each tile by its own statistics again."""
        self._frozen = self._counted = None

    def forward(self, x: Tensor) -> Tensor:
        if self._counted is not None:
            wide = x.double()
            seen = (torch.tensor(x[:, 0].numel()), wide.sum((0, 2, 3), True), wide.square().sum((0, 2, 3), True))
            self._counted = [held.to(new.device) + new for held, new in zip(self._counted, seen, strict=True)]
        if self._frozen is None:
            return F.instance_norm(x) if x[0, 0].numel() > 1 else torch.zeros_like(x)
        mean, variance = self._frozen
        return (x - mean) * (variance + 1e-5).rsqrt()


class Smooth(nn.Module):
    """How the improved layout doubles a picture: bilinear, a binomial blur, a convolution, and a pointwise residual."""

    def __init__(self, wide: int, outer: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.kernel: Tensor
        self.register_buffer("kernel", torch.outer(row, row)[None, None] / 16)
        self.conv = nn.Conv2d(wide, outer, 3, padding=1)
        self.mlp = nn.Sequential(nn.Conv2d(outer, 4 * outer, 1), nn.GELU(), nn.Conv2d(4 * outer, outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = self.conv(F.conv2d(x, self.kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]))
        return x + self.mlp(x)


def new_network(layout: str) -> SketchGenerator:
    """Return the generator of a published layout, "default" or "improved", with new weights."""
    options = {"double": Smooth} if layout == "improved" else {}
    return SketchGenerator(CHANNELS, norm=PooledNorm, deepest_norm=lambda _: nn.Identity(), **options)


def published_keys(layout: str) -> dict[str, str]:
    """Return our name of each tensor by the name in the published file."""
    names = {"model.model.0": "first", "model.model.3": "last.1"}
    theirs, ours = "model.model.1", "deeper"
    deepest = len(CHANNELS) - 1
    for depth in range(1, deepest + 1):
        names[f"{theirs}.model.1"] = f"{ours}.down.1"
        names[f"{theirs}.model.{3 if depth == deepest else 5}"] = f"{ours}.up.1"
        theirs, ours = f"{theirs}.model.3", f"{ours}.deeper"
    state = new_meta(layout).state_dict()
    inside = {f"{own}.": f"{published}." for published, own in names.items()}
    keys: dict[str, str] = {}
    for key in state:
        prefix = max((own for own in inside if key.startswith(own)), key=len)
        rest = key.removeprefix(prefix)
        keys[inside[prefix] + ("smooth.kernel" if rest == "kernel" else rest)] = key
    return keys


def new_meta(layout: str) -> SketchGenerator:
    """Return the generator of a layout without memory for its weights."""
    with torch.device("meta"):
        return new_network(layout)


class Anime2Sketch(Converter):
    """The converter `anime2sketch`: every place of a tile depends on all of it a little, so that tiles are blended."""

    stride = 2 ** len(CHANNELS)
    overlap = 256
    sweeps = 2  # the first normalises each piece by itself, the next by what the one before found

    def __init__(self, folder: Path) -> None:
        self._model = _loaded(folder)

    def calibrate(self, tiles: Callable[[], Iterable[np.ndarray]]) -> None:
        for norm in self._norms():
            norm.thaw()
        for _ in range(self.sweeps):
            for norm in self._norms():
                norm.pool()
            for piece in tiles():
                lines_of(self._model, pixels_of(piece[None], self._model))
            for norm in self._norms():
                norm.freeze()

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        return lines_of(self._model, pixels_of(tiles_BHW3, self._model))

    def _norms(self) -> Iterator[PooledNorm]:
        return (module for module in self._model.modules() if isinstance(module, PooledNorm))


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> SketchGenerator:
    return loaded(new_network(read_config(folder, "layout")), folder)
