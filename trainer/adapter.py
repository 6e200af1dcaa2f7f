"""The image-prompt adapter: image tokens and decoupled cross-attention on a frozen UNet, and its file.

Structure, names and file layout are those of IP-Adapter and IP-Adapter-Plus (tencent-ailab/IP-Adapter, `resampler.py`
and `attention_processor.py`), so that stock loaders read what is written here.

Shape suffixes: B batch, N image patches + CLS, E vision width, T tokens, C cross-attention width, S spatial positions,
H width of an attention layer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from factory.files import DamagedFolder, check_sealed, new_folder, write_atomic
from trainer.projection import VARIANTS, AdapterConfig, PooledAdapterConfig, Resampler, Sizes, attend, sizes_of

if TYPE_CHECKING:
    from trainer.backbone import Backbone
    from trainer.config import TrainerConfig

WEIGHTS = "ip_adapter.safetensors"
CONFIG = "config.json"


class AdapterError(ValueError):
    """An adapter that can't be used: damaged, of another layout, or made for another base."""


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

    def __init__(self, config: Sizes, layers: Mapping[str, int]) -> None:
        """Build with random weights; `layers` maps each key of `ip_adapter` to the width of its attention layer."""
        super().__init__()
        self.config = config
        self.stored: dict[str, torch.dtype] = {}  # dtype of each tensor in the file that was read, and of what is saved
        self.image_proj = config.projection()
        self.ip_adapter = nn.ModuleDict(
            {key: DecoupledCrossAttention(size, config.cross_attention_dim) for key, size in layers.items()}
        )

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, config: Sizes) -> Adapter:
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
        """Return image tokens (B,T,C) of what `config.features` names of the image encoder, (B,N,E)."""
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

        An adapter that was read from a file is written with that file's dtypes, so that a published one in fp16 stays
        one; a new adapter keeps its own. `facts` must be JSON: base id and weights hash, preprocessing, dataset, step.
        """
        with new_folder(folder) as aside:
            state = {
                key: value.detach().to("cpu", self.stored.get(key, value.dtype)).contiguous()
                for key, value in self.state_dict().items()
            }
            write_atomic(aside / WEIGHTS, save(state))
            config = {"adapter": {"variant": self.config.variant} | dataclasses.asdict(self.config), **facts}
            write_atomic(aside / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """Return the adapter in `folder`: an adapter folder, a run folder, or a bare published `.safetensors` file.

        On the CPU, in `dtype`. FileNotFoundError when nothing is there; AdapterError when it is damaged (a folder is
        checked against its SHA256SUMS), a pickle, or not in the layout of IP-Adapter or IP-Adapter-Plus.
        """
        path = find_adapter(folder)
        if path.is_dir():
            try:
                check_sealed(path)
            except DamagedFolder as error:
                raise AdapterError(f"{error} Copy the adapter again, or take another checkpoint of its run.") from None
        file = path / WEIGHTS if path.is_dir() else path
        return cls.from_state(_read(file), dtype=dtype, name=str(file))

    @classmethod
    def from_state(cls, state: dict[str, Tensor], *, dtype: torch.dtype = torch.float32, name: str) -> Adapter:
        """Return the adapter with the tensors (flat keys) of the file called `name`, on the CPU in `dtype`.

        AdapterError naming tensors that are missing, unknown or of another shape than the layout has.
        """
        try:
            config = sizes_of(state)
            names = [key for key in state if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", key)]
            layers = {str(n): state[f"ip_adapter.{n}.to_k_ip.weight"].shape[0] for n in range(1, 2 * len(names), 2)}
            with torch.device("meta"):
                adapter = cls(config, layers)
        except (KeyError, ValueError, IndexError) as error:
            words = f"1 missing: {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise AdapterError(f"{name} is not an IP-Adapter file ({words}). {_LAYOUT}") from None
        odd = _odd({key: value.shape for key, value in adapter.state_dict().items()}, state)
        if odd or not layers:
            raise AdapterError(f"{name} is not an IP-Adapter file ({odd or 'nothing in ip_adapter'}). {_LAYOUT}")
        adapter.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
        adapter.stored = {key: value.dtype for key, value in state.items()}
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


def adapter_sizes(base: Backbone, config: TrainerConfig) -> Sizes:
    """Return the sizes of the adapter that `config` trains on `base`: of the file it starts from, else of a new one.

    Errors as in `Adapter.from_pretrained`; AdapterError too when the file reads wider or narrower features than the
    base's image encoder gives.
    """
    width, encoder = base.unet.config.cross_attention_dim, base.image_encoder.config
    if not config.adapter:
        return VARIANTS[config.variant].fitting(width, encoder, config.resampler_dim)
    sizes = Adapter.from_pretrained(config.adapter).config
    if sizes.embedding_dim != (given := type(sizes).fitting(width, encoder).embedding_dim):
        raise AdapterError(
            f"Adapter {config.adapter} reads features of width {sizes.embedding_dim}; the image encoder gives {given}. "
            "Give the one that it was trained with: --set image_encoder=…"
        )
    return sizes


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
        config = json.loads(file.read_text())
    except ValueError as error:
        raise AdapterError(f"{file} is not valid JSON ({error}). Copy the adapter again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("base") or {}, dict):
        raise AdapterError(f"{file} is none of an adapter's: no object, or its `base` is none. Copy the adapter again.")
    return config


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


_LAYOUT = (
    "Take one with keys image_proj.latents, … (Plus) or image_proj.proj.weight, … and ip_adapter.1.to_k_ip.weight, …, "
    "such as ip-adapter-plus_sd15.safetensors."
)


def _odd(want: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> str:
    """Return in words which tensors of `state` are missing, unknown, or have other shapes than `want`; "" for none."""
    shapes = [
        f"{key} {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, shape in want.items()
        if key in state and state[key].shape != shape
    ]
    found = {
        "missing": [key for key in want if key not in state],
        "unknown": [key for key in state if key not in want],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for what, keys in found.items()
        if keys
    )


def cross_attention(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return the attn2 layers of `unet` by their position in `attn_processors`: down blocks, up blocks, mid block."""
    attention = [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]
    return {str(i): module for i, (name, module) in enumerate(attention) if name.endswith("attn2")}


__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "DecoupledCrossAttention",
    "PooledAdapterConfig",
    "Resampler",
    "adapter_sizes",
    "attend",
    "cross_attention",
    "find_adapter",
    "read_config",
]
