"""The sizes of Stable Diffusion v1.5 and its image encoder, or of a base on disk: models like them, without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from trainer.backbone import Backbone

ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
IMAGE_ENCODER = "h94/IP-Adapter/models/image_encoder"


def _unet() -> dict[str, Any]:
    return {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # of diffusers' old meaning: heads
    }


def _vae() -> dict[str, Any]:
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }


def _text() -> dict[str, Any]:
    return {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    }


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """The configs of a base's models, as their classes take them; by default SD v1.5 with ViT-H/14."""

    id: str = ID
    unet: Mapping[str, Any] = field(default_factory=_unet)
    vae: Mapping[str, Any] = field(default_factory=_vae)
    text: Mapping[str, Any] = field(default_factory=_text)
    vision: Mapping[str, Any] = field(default_factory=_vision)

    @classmethod
    def of(cls, folder: Path, image_encoder: Path, id: str) -> BaseSizes:
        """Return the sizes of a diffusers pipeline folder and an image encoder's; only config.json is read of each."""

        def read(folder: Path) -> dict[str, Any]:
            return json.loads((folder / "config.json").read_text())

        return cls(
            id=id,
            unet=read(folder / "unet"),
            vae=read(folder / "vae"),
            text=read(folder / "text_encoder"),
            vision=read(image_encoder),
        )

    def models(self) -> dict[str, nn.Module]:
        """Return new models by part: "unet", "vae", "text_encoder", "image_encoder"; on torch's default device, in its
        default dtype. Under `torch.device("meta")` they take no memory."""
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(dict(self.unet)),
            "vae": AutoencoderKL.from_config(dict(self.vae)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**self.text)),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**self.vision)),
        }
        return models


def backbone_of(models: Mapping[str, nn.Module], features: str) -> Backbone:
    """Return a frozen backbone of `models` that encodes pixels and token ids, but neither texts nor pictures."""
    for model in models.values():
        model.requires_grad_(False).eval()
    missing: Any = None
    parts: dict[str, Any] = dict(models)
    return Backbone(
        **parts,
        tokenizer=missing,
        image_processor=missing,
        files=missing,
        random_weights=True,
        features=features,
    )


def count(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(sizes: BaseSizes) -> dict[str, nn.Module]:
    """Return the models of `sizes` on the meta device."""
    with torch.device("meta"):
        return sizes.models()
