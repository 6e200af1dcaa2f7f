"""The warm start: a new adapter's image branch learns to add what the text adds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from factory import toon
from trainer.adapter import Adapter, AdapterConfig, cross_attention
from trainer.align import align, alignment_loss, record_queries
from trainer.backbone import load_backbone
from trainer.base import MICRO
from trainer.micro.corpus import random_scene


@pytest.mark.parametrize("bf16", [False, True])
def test_the_image_branch_comes_to_add_what_the_text_adds(bf16: bool) -> None:
    base = load_backbone(MICRO)
    unet: torch.nn.Module = base.unet
    torch.manual_seed(0)
    adapter = Adapter.for_unet(base.unet, AdapterConfig(cross_attention_dim=128, embedding_dim=128, dim=128))
    adapter.attach(base.unet)
    scenes = [random_scene(random.Random(i), judged=True) for i in range(8)]
    text = base.encode_text([toon.caption(scene, random.Random(0)) for scene in scenes])
    hidden = base.encode_image([Image.fromarray(toon.draw(scene, (64, 64)).image) for scene in scenes])
    empty = base.encode_text([""])
    frozen = {name: p.clone() for name, p in unet.named_parameters() if not p.requires_grad}

    def call() -> Tensor:
        return adapter.denoise(base.unet, torch.randn(8, 8, 16, 16), torch.full((8,), 900), text, text[:, :0], 0.0)

    queries = record_queries(base.unet, [call, call], per_call=100)
    layers = cross_attention(base.unet)
    assert {key: q.shape[1] for key, q in queries.items()} == {
        key: layer.to_q.out_features for key, layer in layers.items()
    }
    assert max(len(q) for q in queries.values()) == 200
    assert not any(layer.to_q._forward_hooks for layer in layers.values())

    losses = align(
        adapter,
        base.unet,
        queries,
        empty,
        lambda _: (text, hidden),
        progress=lambda before: len(before) / 80,
        bf16=bf16,
    )
    assert len(losses) == 80
    assert np.mean(losses[-5:]) < 0.7 < losses[0]  # 1: a branch that adds nothing
    others = alignment_loss(adapter, base.unet, queries, text, empty, adapter.image_tokens(hidden.roll(1, 0)))
    assert others > 1.3 * np.mean(losses[-5:])  # it is the picture that decides
    assert frozen
    assert all(torch.equal(p, frozen[name]) for name, p in unet.named_parameters() if name in frozen)
