"""Synthetic adapter files in exactly the layout of the published ones, of SD v1.5's size or the twin's."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SD15_WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)  # down, up, mid
TWIN_WIDTHS = (32, 32, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 32, 32, 32, 64)
SD15 = {"cross": 768, "dim": 768, "vision": 1280, "pooled": 1024, "widths": SD15_WIDTHS}
TWIN = {"cross": 32, "dim": 64, "vision": 40, "pooled": 24, "widths": TWIN_WIDTHS}


def shapes(variant: str, *, cross: int, dim: int, vision: int, pooled: int, widths: tuple[int, ...]) -> dict:
    """Return {"image_proj": {key: shape}, "ip_adapter": {key: shape}} of ip-adapter-plus_sd15 or ip-adapter_sd15."""
    attention: dict[str, tuple[int, ...]] = {}
    for n, width in enumerate(widths):
        attention[f"{2 * n + 1}.to_k_ip.weight"] = attention[f"{2 * n + 1}.to_v_ip.weight"] = (width, cross)
    if variant == "base":
        projection: dict[str, tuple[int, ...]] = {
            "proj.weight": (4 * cross, pooled),
            "proj.bias": (4 * cross,),
            "norm.weight": (cross,),
            "norm.bias": (cross,),
        }
        return {"image_proj": projection, "ip_adapter": attention}
    projection = {
        "latents": (1, 16, dim),
        "proj_in.weight": (dim, vision),
        "proj_in.bias": (dim,),
        "proj_out.weight": (cross, dim),
        "proj_out.bias": (cross,),
        "norm_out.weight": (cross,),
        "norm_out.bias": (cross,),
    }
    for n in range(4):
        for name in ("0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "1.0.weight", "1.0.bias"):
            projection[f"layers.{n}.{name}"] = (dim,)
        projection[f"layers.{n}.0.to_q.weight"] = projection[f"layers.{n}.0.to_out.weight"] = (dim, dim)
        projection[f"layers.{n}.0.to_kv.weight"] = (2 * dim, dim)
        projection[f"layers.{n}.1.1.weight"] = (4 * dim, dim)
        projection[f"layers.{n}.1.3.weight"] = (dim, 4 * dim)
    return {"image_proj": projection, "ip_adapter": attention}


def nested(variant: str = "plus", dtype: torch.dtype = torch.float16, **sizes) -> dict[str, dict[str, Tensor]]:
    """Return random tensors, nested as in a published .bin."""
    generator = torch.Generator().manual_seed(0)
    return {
        part: {key: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in table.items()}
        for part, table in shapes(variant, **(sizes or TWIN)).items()
    }


def flat(state: dict[str, dict[str, T]]) -> dict[str, T]:
    """Return nested tensors, or their shapes, by the keys of a published .safetensors."""
    return {f"{part}.{key}": tensor for part, table in state.items() for key, tensor in table.items()}
