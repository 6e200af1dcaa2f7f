"""The U-Net generator of pix2pix (Isola et al. 2017), the kind that Anime2Sketch is: RGB in, lines out.

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from factory.files import SUMS, DamagedFolder, check_sealed
from factory.settings import UsageError
from factory.sketch.converter import Converter

M = TypeVar("M", bound=nn.Module)
Layer = Callable[[int], nn.Module]  # of so many channels
Doubling = Callable[[int, int], nn.Module]  # from so many channels to so many, at twice the size


def transposed(wide: int, outer: int) -> nn.Module:
    """Return pix2pix's way to double a picture."""
    return nn.ConvTranspose2d(wide, outer, 4, 2, 1)


class Block(nn.Module):
    """One level: halve, go deeper, double; its input is concatenated to what comes back."""

    def __init__(
        self, outer: int, inner: int, deeper: nn.Module | None, norm: Layer, deepest_norm: Layer, double: Doubling
    ) -> None:
        super().__init__()
        halve = nn.Conv2d(outer, inner, 4, 2, 1)
        self.down = nn.Sequential(nn.LeakyReLU(0.2), halve, (norm if deeper else deepest_norm)(inner))
        self.deeper = deeper
        wide = inner if deeper is None else 2 * inner
        self.up = nn.Sequential(nn.ReLU(), (double if deeper else transposed)(wide, outer), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(x)
        if self.deeper is not None:
            inner = self.deeper(inner)
        return torch.cat([x, self.up(inner)], 1)


class SketchGenerator(nn.Module):
    """Pixels (B,3,H,W) in [-1,1] -> lines (B,1,H,W) in [-1,1], ink -1; H and W are multiples of `stride`.

    As it is made without options, normalisation is by batch statistics that are frozen after training: unlike with
    instance normalisation, what a tile becomes does not depend on the rest of it beyond `reach` pixels.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        norm: Layer = nn.BatchNorm2d,
        deepest_norm: Layer = nn.BatchNorm2d,
        double: Doubling = transposed,
    ) -> None:
        """`channels` from the widest picture to the deepest level: each level halves the picture."""
        super().__init__()
        self.channels = tuple(channels)
        deeper: nn.Module | None = None
        for outer, inner in reversed(list(itertools.pairwise(channels))):
            deeper = Block(outer, inner, deeper, norm, deepest_norm, double)
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
        return loaded(cls(tuple(read_config(folder, "channels"))), folder)


class Generator(Converter):
    """The converter `micro`: RGB to lines by a trained generator with frozen statistics."""

    def __init__(self, folder: Path) -> None:
        self._model = _loaded(folder)
        self.halo, self.stride = self._model.reach, self._model.stride

    def __call__(self, tiles_BHW3: np.ndarray) -> np.ndarray:
        return lines_of(self._model, pixels_of(tiles_BHW3, self._model))


def loaded(model: M, folder: Path) -> M:
    """Return `model` with the weights in `folder`, for inference: in single precision, laid out by channel last, on the
    GPU if this process has one. UsageError where the weights are damaged, or another network's.
    """
    try:
        if (folder / SUMS).is_file():
            check_sealed(folder)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except DamagedFolder as error:
        raise UsageError(f"{error} Get the network again (python -m factory weights --help).") from None
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"{folder} holds no weights of this converter: {why}") from None
    model = model.float().eval().requires_grad_(False).to(device())
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def device() -> str:
    """Return where networks run: on the GPU, if there is one; in a task of Ray's, if the task asked for one."""
    if not torch.cuda.is_available():
        return "cpu"
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().get_task_id() and not ray.get_gpu_ids():
        return "cpu"
    torch.backends.cudnn.allow_tf32 = False  # tiles of other shapes would differ by more than a rounding
    return "cuda"


def read_config(folder: Path, key: str) -> Any:
    """Return a value of a network's config.json. UsageError where it isn't there."""
    try:
        return json.loads((folder / "config.json").read_text())[key]
    except (OSError, ValueError, KeyError):
        raise UsageError(f"{folder} is no network of this converter: its config.json tells no {key}.") from None


def pixels_of(tiles_BHW3: np.ndarray, model: nn.Module) -> Tensor:
    """Return tiles as pixels (B,3,H,W) in [-1, 1], where the model is."""
    tiles = torch.from_numpy(tiles_BHW3).to(next(model.parameters()).device)
    return tiles.permute(0, 3, 1, 2).float() / 127.5 - 1  # stays channels last: no copy


@torch.inference_mode()
def lines_of(model: nn.Module, pixels_B3HW: Tensor) -> np.ndarray:
    """Return a generator's lines (B,H,W), float32 in [0, 1]."""
    return (model(pixels_B3HW)[:, 0].cpu().numpy() + 1) / 2


@functools.lru_cache(maxsize=1)  # a worker converts many pictures
def _loaded(folder: Path) -> SketchGenerator:
    return SketchGenerator.from_pretrained(folder)
