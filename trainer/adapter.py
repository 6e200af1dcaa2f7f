"""The image-prompt adapter: a Resampler and decoupled cross-attention on a frozen UNet, and its file.

Structure, names and file layout are those of IP-Adapter-Plus (tencent-ailab/IP-Adapter, `resampler.py` and
`attention_processor.py`), so that stock loaders read what is written here.

Shape suffixes: B batch, N image patches + CLS, E vision width, D Resampler width, T tokens, C cross-attention width,
S spatial positions, H width of an attention layer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from factory.files import DamagedFolder, check_sealed, new_folder, write_atomic

WEIGHTS = "ip_adapter.safetensors"
CONFIG = "config.json"


class AdapterError(ValueError):
    """An adapter that can't be used: damaged, of another layout, or made for another base."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of the Resampler. Stock loaders accept depth 4, dim_head 64 and ff_mult 4 only; widths may differ."""

    cross_attention_dim: int  # width of the text tokens that the UNet attends to: 768 for SD v1.5
    embedding_dim: int  # hidden size of the image encoder: 1280 for ViT-H/14
    dim: int  # width of the Resampler, a multiple of dim_head; 768 for SD v1.5
    num_tokens: int = 16  # image tokens per picture
    depth: int = 4  # Resampler layers
    dim_head: int = 64  # size of one attention head; loaders take heads = dim // 64
    ff_mult: int = 4  # hidden width of the feed-forward part, in units of dim

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}.")
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


class DecoupledCrossAttention(nn.Module):
    """Attention processor of one attn2 layer: out = to_out(Attn(Q,K_t,V_t) + scale * Attn(Q,K_i,V_i)).

    The UNet carries `encoder_hidden_states=(text tokens (B,77,C), image tokens (B,T,C), scale)` to it untouched, also
    under gradient checkpointing. `scale` is the paper's α: a float, or a tensor (B,) with one value per sample. At the
    float 0.0 the image branch is not computed, and the layer equals the base model's bit for bit.
    """

    def __init__(self, hidden_size: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)

    def forward(
        self,
        attn: Any,  # diffusers' Attention, whose parts are typed optional
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor, float | Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output (B,S,H) for its input (B,S,H)."""
        if attention_mask is not None:
            raise ValueError("Attention masks are not supported: SD v1.5 attends to all 77 text tokens.")
        text_BTC, image_BTC, scale = encoder_hidden_states
        query_BSH = attn.to_q(hidden_states)
        out_BSH = attend(query_BSH, attn.to_k(text_BTC), attn.to_v(text_BTC), attn.heads)
        if isinstance(scale, Tensor) or scale != 0.0:
            image_BSH = attend(query_BSH, self.to_k_ip(image_BTC), self.to_v_ip(image_BTC), attn.heads)
            if isinstance(scale, Tensor):
                scale = scale.to(image_BSH).view(-1, 1, 1)
            out_BSH = out_BSH + scale * image_BSH
        return attn.to_out[1](attn.to_out[0](out_BSH))


class Adapter(nn.Module):
    """What is trained: `image_proj`, and `ip_adapter`, one DecoupledCrossAttention per attn2 layer of the UNet.

    Keys of `ip_adapter` are the layer's position in `unet.attn_processors` (down, up, mid): "1", "3", … "31".
    """

    def __init__(self, config: AdapterConfig, layers: Mapping[str, int]) -> None:
        """Build with random weights; `layers` maps each key of `ip_adapter` to the width of its attention layer."""
        super().__init__()
        self.config = config
        self.image_proj = Resampler(config)
        self.ip_adapter = nn.ModuleDict(
            {key: DecoupledCrossAttention(size, config.cross_attention_dim) for key, size in layers.items()}
        )

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, config: AdapterConfig) -> Adapter:
        """Return a new adapter in fp32: to_k_ip and to_v_ip start as copies of each layer's to_k and to_v."""
        layers = cross_attention(unet)
        adapter = cls(config, {key: attn.to_k.out_features for key, attn in layers.items()})
        adapter.check(unet)
        with torch.no_grad():
            for key, attn in layers.items():
                layer: Any = adapter.ip_adapter[key]
                layer.to_k_ip.weight.copy_(attn.to_k.weight)
                layer.to_v_ip.weight.copy_(attn.to_v.weight)
        return adapter.to(unet.device)

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Make the processors of this adapter those of `unet`'s attn2 layers; attn1 keeps its own.

        The modules are shared with the UNet from then on: freeze or cast the UNet before. AdapterError when it has
        other layers.
        """
        self.check(unet)
        for key, attn in cross_attention(unet).items():
            attn.set_processor(self.ip_adapter[key])

    def detach(self, unet: UNet2DConditionModel) -> None:
        """Give `unet`'s attn2 layers their stock processor back, so that it is the base model again."""
        for attn in cross_attention(unet).values():
            attn.set_processor(AttnProcessor2_0())

    def image_tokens(self, hidden_BNE: Tensor) -> Tensor:
        """Return image tokens (B,T,C) of hidden states (B,N,E), the image encoder's `hidden_states[-2]`."""
        return self.image_proj(hidden_BNE)

    def denoise(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timesteps: Tensor,
        text_tokens: Tensor,
        image_tokens: Tensor,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the noise (B,4,h,w) that the attached `unet` predicts; the one way to call it, training or serving.

        latents (B,4,h,w), timesteps (B,) of 0..999, text_tokens (B,77,C), image_tokens (B,T,C); `scale` is α, a float
        or a tensor (B,). AdapterError when this adapter isn't attached to `unet`.
        """
        first = next(iter(cross_attention(unet).values()))
        if first.processor not in self.ip_adapter.values():
            raise AdapterError("This adapter is not attached to the UNet. Call adapter.attach(unet) first.")
        states: Any = (text_tokens, image_tokens, scale)
        return unet(latents, timesteps, encoder_hidden_states=states, return_dict=False)[0]

    def forward(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timesteps: Tensor,
        text_tokens: Tensor,
        hidden_BNE: Tensor,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return `denoise` with the image tokens of `hidden_BNE`: one training step's forward pass."""
        return self.denoise(unet, latents, timesteps, text_tokens, self.image_tokens(hidden_BNE), scale)

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write the adapter folder of contract 2: weights, config.json with `facts`, SHA256SUMS; aside, then renamed.

        The tensors keep their dtype. `facts` must be JSON: base id and weights hash, preprocessing, dataset, step.
        """
        with new_folder(folder) as aside:
            state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
            write_atomic(aside / WEIGHTS, save(state))
            config = {"adapter": dataclasses.asdict(self.config), **facts}
            write_atomic(aside / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """Return the adapter in `folder`: an adapter folder, a run folder, or a bare published `.safetensors` file.

        On the CPU, in `dtype`. FileNotFoundError when nothing is there; AdapterError when it is damaged (a folder is
        checked against its SHA256SUMS), a pickle, or not in the IP-Adapter-Plus layout.
        """
        path = find_adapter(folder)
        if path.is_dir():
            try:
                check_sealed(path)
            except DamagedFolder as error:
                raise AdapterError(f"{error} Copy the adapter again, or take another checkpoint of its run.") from None
        file = path / WEIGHTS if path.is_dir() else path
        state = _read(file)
        try:
            config = AdapterConfig.of(state)
            layers = {
                key.split(".")[1]: value.shape[0] for key, value in state.items() if key.endswith(".to_k_ip.weight")
            }
            with torch.device("meta"):
                adapter = cls(config, dict(sorted(layers.items(), key=lambda item: int(item[0]))))
            adapter.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise AdapterError(
                f"{file} is not an IP-Adapter-Plus file ({error}). Take one with keys image_proj.latents, … and "
                "ip_adapter.1.to_k_ip.weight, …, such as ip-adapter-plus_sd15.safetensors."
            ) from None
        return adapter.requires_grad_(True)

    def check(self, unet: UNet2DConditionModel) -> None:
        """Raise AdapterError unless this adapter fits the attn2 layers of `unet`."""
        layers = cross_attention(unet)
        modules: dict[str, Any] = dict(self.ip_adapter.items())
        have = {key: tuple(module.to_k_ip.weight.shape) for key, module in modules.items()}
        want = {key: tuple(attn.to_k.weight.shape) for key, attn in layers.items()}
        if have != want:
            odd = next((key for key in want if have.get(key) != want[key]), None) or next(
                k for k in have if k not in want
            )
            raise AdapterError(
                f"The adapter does not fit this UNet: {len(have)} layers against {len(want)}; layer {odd} is "
                f"{have.get(odd)} in the adapter and {want.get(odd)} in the UNet (rows, width of text tokens). Take an "
                "adapter that was made for this base."
            )


def find_adapter(folder: str | Path) -> Path:
    """Return the adapter folder, or bare file, that `folder` means: itself, or `adapter/` of a run folder."""
    if "://" in str(folder):
        raise AdapterError(f"Adapter {folder} is not on a file system. Copy its folder here, and give that path.")
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(
            f"No adapter at {path}. Give an adapter folder or a run folder of `python -m trainer fit`."
        )
    if path.is_file() or (path / WEIGHTS).exists():
        return path
    if (path / "adapter" / WEIGHTS).exists():
        return path / "adapter"
    raise AdapterError(f"{path} holds neither {WEIGHTS} nor adapter/{WEIGHTS}. Give an adapter folder or a run folder.")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return config.json of an adapter or run folder: `adapter` (its sizes) and the facts that were saved with it.

    A bare file has none: {} is returned. Errors as in `Adapter.from_pretrained`, of which this is no check.
    """
    path = find_adapter(folder)
    if path.is_file():
        return {}
    file = path / CONFIG
    if not file.exists():
        raise AdapterError(f"{file} is missing. Copy the adapter again, whole.")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise AdapterError(f"{file} is not valid JSON ({error}). Copy the adapter again.") from None


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; AdapterError for anything else. Pickles are never opened."""
    if file.suffix != ".safetensors":
        raise AdapterError(
            f"{file} is not a .safetensors file. Pickled weights run code when opened, so they are refused: convert "
            "it, or download the .safetensors version."
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged or not safetensors ({error}). Copy or download it again.") from None


def cross_attention(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return the attn2 layers of `unet` by their position in `attn_processors`: down blocks, up blocks, mid block."""
    attention = [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]
    return {str(i): module for i, (name, module) in enumerate(attention) if name.endswith("attn2")}


def _feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return multi-head attention (B,S,H) of query (B,S,H) over key and value (B,T,H)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "DecoupledCrossAttention",
    "Resampler",
    "attend",
    "cross_attention",
    "find_adapter",
    "read_config",
]
