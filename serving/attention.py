"""Cross-attention over keys and values that are made once per request: they do not depend on the denoising step.

The UNet carries `encoder_hidden_states=(layers, scale)` to every attn2 layer untouched. Shape suffixes: B rows of a
batch, S queries, T tokens, H width of a layer, A heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from trainer.adapter import Adapter, cross_attention


class KeyValue(NamedTuple):
    """What one layer's queries meet: key and value (B,A,T,D)."""

    key: Tensor
    value: Tensor


Layers = dict[str, KeyValue]  # by the layer's position, as in an adapter's `ip_adapter`
States = tuple[dict[str, tuple[KeyValue, KeyValue | None]], Tensor | None]  # text and image by layer; alpha (B,1,1)


class CachedCrossAttention:
    """Attention processor of one attn2 layer: out = to_out(Attn(Q,K_t,V_t) + scale * Attn(Q,K_i,V_i)).

    Equal to the adapter's DecoupledCrossAttention, with the keys and values given. Without image keys the image branch
    is not computed, and the layer is the base model's.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: States, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the layer's output (B,S,H) for its input (B,S,H)."""
        layers, scale_B11 = encoder_hidden_states
        text, image = layers[self.key]
        query_BASD = _heads(attn.to_q(hidden_states), attn.heads)
        out_BSH = _joined(F.scaled_dot_product_attention(query_BASD, *text))
        if image is not None and scale_B11 is not None:
            out_BSH = out_BSH + scale_B11 * _joined(F.scaled_dot_product_attention(query_BASD, *image))
        return attn.to_out[1](attn.to_out[0](out_BSH))


def attach(unet: UNet2DConditionModel) -> None:
    """Make the attn2 layers of `unet` take States."""
    for key, attn in cross_attention(unet).items():
        attn.set_processor(CachedCrossAttention(key))


def text_layers(unet: UNet2DConditionModel, text_BTC: Tensor) -> Layers:
    """Return the keys and values of text tokens (B,T,C) in each layer."""
    return {
        key: KeyValue(_heads(attn.to_k(text_BTC), attn.heads), _heads(attn.to_v(text_BTC), attn.heads))
        for key, attn in cross_attention(unet).items()
    }


def image_layers(unet: UNet2DConditionModel, adapter: Adapter, image_BTC: Tensor) -> Layers:
    """Return the keys and values of image tokens (B,T,C) in each layer, by the adapter's own projections."""
    return {
        key: KeyValue(
            _heads(adapter.ip_adapter[key].to_k_ip(image_BTC), attn.heads),  # type: ignore[operator]
            _heads(adapter.ip_adapter[key].to_v_ip(image_BTC), attn.heads),  # type: ignore[operator]
        )
        for key, attn in cross_attention(unet).items()
    }


def side_by_side(rows: Sequence[tuple[Layers, Layers | None, float]], tokens: int, *, one_form: bool) -> States:
    """Return the States of a batch whose rows have these texts, images (or none) of `tokens` tokens, and alphas.

    A row without an image has zeros for keys and values, and 0 for alpha: the sum is the base model's, to the bit. A
    batch without any has no image branch, unless all batches must have `one_form`, for a compiler.
    """
    texts = [text for text, _, _ in rows]
    if not one_form and all(image is None for _, image, _ in rows):
        return {key: (joined, None) for key, joined in _cat(texts).items()}, None
    nothing = {
        key: KeyValue(*(x.new_zeros(1, x.shape[1], tokens, x.shape[3]) for x in text)) for key, text in texts[0].items()
    }
    images = _cat([nothing if image is None else image for _, image, _ in rows])
    some = next(iter(nothing.values())).key
    scale_B11 = torch.tensor([0.0 if image is None else scale for _, image, scale in rows]).to(some).view(-1, 1, 1)
    return {key: (joined, images[key]) for key, joined in _cat(texts).items()}, scale_B11


def nbytes(layers: Layers) -> int:
    """Return the memory that keys and values take."""
    return sum(tensor.nbytes for pair in layers.values() for tensor in pair)


def _cat(rows: Sequence[Layers]) -> Layers:
    return {
        key: KeyValue(torch.cat([row[key].key for row in rows]), torch.cat([row[key].value for row in rows]))
        for key in rows[0]
    }


def _heads(x_BTH: Tensor, heads: int) -> Tensor:
    return x_BTH.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x_BASD: Tensor) -> Tensor:
    return x_BASD.transpose(1, 2).flatten(2)
