"""Our sampler against the stock diffusers pipeline with the same base, the same adapter and the same recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from serving.engine import Engine
from serving.recipe import Recipe
from tests.bench.harness import Comparison, compare
from trainer.adapter import WEIGHTS, Adapter, AdapterConfig
from trainer.backbone import load_backbone, make_twin

STEPS = 50


def sampling(folder: Path) -> list[Comparison]:
    """Return the comparisons on a random-weight base: text with a reference, one picture and four."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.set_num_threads(2)
    base = make_twin(folder / "twin")
    backbone = load_backbone(str(base))
    unet = backbone.unet
    config = AdapterConfig(
        cross_attention_dim=unet.config.cross_attention_dim,
        embedding_dim=backbone.image_encoder.config.hidden_size,
        dim=64,
    )
    adapter = Adapter.for_unet(unet, config)
    adapter.save_pretrained(folder / "adapter")
    engine = Engine(backbone, adapter)

    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    stock.scheduler = DDIMScheduler.from_config(backbone.scheduler().config)
    stock.load_ip_adapter(str(folder), subfolder="adapter", weight_name=WEIGHTS, image_encoder_folder=None)
    stock.set_ip_adapter_scale(0.5)
    stock.set_progress_bar_config(disable=True)
    sketch = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    def ours(n: int) -> int:
        return len(engine.infer(Recipe(prompt="line art", reference=sketch, num_inference_steps=STEPS, n=n)))

    def peer(n: int) -> int:
        done = stock(
            "line art",
            ip_adapter_image=sketch,
            num_inference_steps=STEPS,
            num_images_per_prompt=n,
            generator=[torch.Generator().manual_seed(i) for i in range(n)],
        )
        return len(done.images)

    return [
        compare(
            f"sampler / stock diffusers, {STEPS} steps, n = {n}", "images/s", lambda n=n: ours(n), lambda n=n: peer(n)
        )
        for n in (1, 4)
    ]
