"""What turns features of the reference picture into image tokens: one class for each variant of IP-Adapter, its sizes
beside it.

Structure, names and keys are IP-Adapter's (tencent-ailab/IP-Adapter, `resampler.py` and `ip_adapter.py`).

Shape suffixes: B batch, N image patches + CLS, E width of the features, D Resampler width, T tokens, C cross-attention
width, S queries, H width of an attention layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, POOLED = "hidden_states[-2]", "image_embeds"  # of the image encoder: (B,N,E) of its patches; (B,1,E) of all


def _refuse_below_one(sizes: Any) -> None:
    for field in dataclasses.fields(sizes):
        if getattr(sizes, field.name) < 1:
            raise ValueError(f"{field.name} must be at least 1, got {getattr(sizes, field.name)}.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of IP-Adapter-Plus. Stock loaders accept depth 4, dim_head 64 and ff_mult 4 only; widths may differ."""

    variant: ClassVar[str] = "plus"
    features: ClassVar[str] = HIDDEN  # what it reads of the image encoder

    cross_attention_dim: int  # width of the text tokens that the UNet attends to: 768 for SD v1.5
    embedding_dim: int  # hidden size of the image encoder: 1280 for ViT-H/14
    dim: int  # width of the Resampler, a multiple of dim_head; 768 for SD v1.5
    num_tokens: int = 16  # image tokens per picture
    depth: int = 4  # Resampler layers
    dim_head: int = 64  # size of one attention head; loaders take heads = dim // 64
    ff_mult: int = 4  # hidden width of the feed-forward part, in units of dim

    def __post_init__(self) -> None:
        _refuse_below_one(self)
        if self.dim % self.dim_head:
            raise ValueError(f"dim must be a multiple of dim_head {self.dim_head}, got {self.dim}.")

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> AdapterConfig:
        """Return the sizes that the tensors of an adapter file (flat keys) have. KeyError when a tensor is missing."""
        embedding_dim = state["image_proj.proj_in.weight"].shape[1]
        _, num_tokens, dim = state["image_proj.latents"].shape
        depth = len([key for key in state if re.fullmatch(r"image_proj\.layers\.\d+\.0\.to_q\.weight", key)])
        return cls(
            cross_attention_dim=state["image_proj.proj_out.weight"].shape[0],
            embedding_dim=embedding_dim,
            dim=dim,
            num_tokens=num_tokens,
            depth=depth,
            ff_mult=state["image_proj.layers.0.1.1.weight"].shape[0] // dim,
        )

    @classmethod
    def fitting(cls, cross_attention_dim: int, image_encoder: Any, dim: int | None = None) -> AdapterConfig:
        """Return the sizes for a UNet and the config of an image encoder; `dim`: the text width, rounded up to 64."""
        dim = dim or -(-cross_attention_dim // 64) * 64
        return cls(cross_attention_dim=cross_attention_dim, embedding_dim=image_encoder.hidden_size, dim=dim)

    def projection(self) -> Resampler:
        """Return a new projection of these sizes."""
        return Resampler(self)


@dataclass(frozen=True, kw_only=True)
class PooledAdapterConfig:
    """Sizes of the base IP-Adapter (Ye et al. 2023, section 3.2.1): tokens from the pooled image embedding."""

    variant: ClassVar[str] = "base"
    features: ClassVar[str] = POOLED

    cross_attention_dim: int  # width of the text tokens that the UNet attends to: 768 for SD v1.5
    embedding_dim: int  # width of the image encoder's projection: 1024 for ViT-H/14
    num_tokens: int = 4  # image tokens per picture

    def __post_init__(self) -> None:
        _refuse_below_one(self)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> PooledAdapterConfig:
        """Return the sizes that the tensors of an adapter file (flat keys) have. KeyError when a tensor is missing."""
        rows, embedding_dim = state["image_proj.proj.weight"].shape
        width = len(state["image_proj.norm.weight"])
        return cls(cross_attention_dim=width, embedding_dim=embedding_dim, num_tokens=rows // max(1, width))

    @classmethod
    def fitting(cls, cross_attention_dim: int, image_encoder: Any, dim: int | None = None) -> PooledAdapterConfig:
        """Return the sizes for a UNet and the config of an image encoder. ValueError for a `dim`: it has none."""
        if dim is not None:
            raise ValueError(f"The base variant has no Resampler: leave resampler_dim out, got {dim}.")
        return cls(cross_attention_dim=cross_attention_dim, embedding_dim=image_encoder.projection_dim)

    def projection(self) -> ImageProjection:
        """Return a new projection of these sizes."""
        return ImageProjection(self)


Sizes = AdapterConfig | PooledAdapterConfig
VARIANTS: dict[str, type[AdapterConfig] | type[PooledAdapterConfig]] = {
    sizes.variant: sizes for sizes in (AdapterConfig, PooledAdapterConfig)
}


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """Return the sizes of an adapter file's tensors, told apart as diffusers does. KeyError when one is missing."""
    return VARIANTS["base" if "image_proj.proj.weight" in state else "plus"].of(state)


class ImageProjection(nn.Module):
    """A linear layer and LayerNorm: the pooled embedding (B,1,E) of a picture to image tokens (B,T,C)."""

    def __init__(self, config: PooledAdapterConfig) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.proj = nn.Linear(config.embedding_dim, config.num_tokens * config.cross_attention_dim)
        self.norm = nn.LayerNorm(config.cross_attention_dim)

    def forward(self, embeds_B1E: Tensor) -> Tensor:
        """Return image tokens (B,T,C)."""
        return self.norm(self.proj(embeds_B1E[:, 0]).unflatten(-1, (self.num_tokens, -1)))


class PerceiverAttention(nn.Module):
    """Attention of latent queries over image features and the latents themselves."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.heads = dim // dim_head
        self.norm1 = nn.LayerNorm(dim)  # of the image features
        self.norm2 = nn.LayerNorm(dim)  # of the latents
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)  # rows: first half keys, second half values
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, latents_BTD: Tensor) -> Tensor:
        """Return the update (B,T,D) of the latents."""
        latents_BTD = self.norm2(latents_BTD)
        keys, values = self.to_kv(torch.cat([self.norm1(x_BND), latents_BTD], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents_BTD), keys, values, self.heads))


class Resampler(nn.Module):
    """Perceiver resampler: image features (B,N,E) to image tokens (B,T,C)."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.dim * config.ff_mult
        self.latents = nn.Parameter(torch.randn(1, config.num_tokens, dim) / dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.proj_out = nn.Linear(dim, config.cross_attention_dim)
        self.norm_out = nn.LayerNorm(config.cross_attention_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, config.dim_head), _feed_forward(dim, hidden)])
            for _ in range(config.depth)
        )

    def forward(self, hidden_BNE: Tensor) -> Tensor:
        """Return image tokens (B,T,C) for hidden states (B,N,E) of the image encoder."""
        latents_BTD = self.latents.expand(hidden_BNE.shape[0], -1, -1)
        x_BND = self.proj_in(hidden_BNE)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            latents_BTD = attention(x_BND, latents_BTD) + latents_BTD
            latents_BTD = feed_forward(latents_BTD) + latents_BTD
        return self.norm_out(self.proj_out(latents_BTD))


def _feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return multi-head attention (B,S,H) of query (B,S,H) over key and value (B,T,H)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
