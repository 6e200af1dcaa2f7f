"""Our sampler against the stock diffusers pipeline with the same base, the same adapter and the same recipe."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from transformers import CLIPImageProcessor

from factory.toon import draw, random_pose, random_scene
from serving.engine import Engine
from serving.recipe import Recipe
from tests.bench.harness import Comparison, compare
from trainer.adapter import WEIGHTS, Adapter
from trainer.backbone import Backbone, load_backbone
from trainer.base import MICRO
from trainer.projection import VARIANTS
from trainer.sd15 import BaseSizes, backbone_of


def sampling(folder: Path) -> Iterator[Comparison]:
    """Yield the comparisons: one picture and four on the micro base, one on it compiled, one on a full-size base with
    random weights and few steps. Each request has a prompt and a sketch of its own, unless the title says otherwise."""
    torch.set_num_threads(2)
    micro = load_backbone(str(MICRO))
    recipe = Recipe(prompt="a girl with long hair, line art", reference=sketch(), num_inference_steps=25)
    engine, stock = Engine(micro, adapter := new_adapter(micro)), stock_pipeline(micro, adapter, folder / "micro")
    yield versus("micro base", engine, stock, recipe)
    yield versus("micro base, the same prompt and sketch again", engine, stock, recipe, same=True)
    yield versus("micro base, n = 4", engine, stock, dataclasses.replace(recipe, n=4))
    if shutil.which("g++") or shutil.which("c++"):
        engine.quicken(compile=True)
        stock.unet.compile()
        yield versus("micro base, both compiled", engine, stock, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full = backbone_of(BaseSizes().models(), VARIANTS["plus"].features)
    full = dataclasses.replace(full, tokenizer=micro.tokenizer, image_processor=CLIPImageProcessor())
    engine, stock = Engine(full, adapter := new_adapter(full)), stock_pipeline(full, adapter, folder / "full")
    few = dataclasses.replace(recipe, num_inference_steps=3, size=(256, 256))
    yield versus("SD v1.5's sizes, 256 px, 3 steps", engine, stock, few, rounds=3)


def versus(
    title: str, engine: Engine, stock: Any, recipe: Recipe, rounds: int = 7, *, same: bool = False
) -> Comparison:
    """Return pictures a second on both sides; of the `same` prompt and sketch each time, or of others."""
    steps = recipe.num_inference_steps
    others = (dataclasses.replace(recipe, prompt=f"a girl, {i}", reference=sketch(i)) for i in range(2 * rounds + 2))
    fresh = iter([recipe] * (2 * rounds + 2) if same else list(others))

    def peer() -> int:
        width, height = engine.size(recipe)
        asked = next(fresh)
        done = stock(
            asked.prompt,
            ip_adapter_image=asked.reference,
            num_inference_steps=steps,
            num_images_per_prompt=recipe.n,
            generator=[torch.Generator().manual_seed(i) for i in range(recipe.n)],
            width=width,
            height=height,
        )
        return len(done.images)

    return compare(
        f"sampler / stock diffusers, {title}, {steps} steps", "images/s", lambda: len(engine.infer(next(fresh))), peer,
        rounds=rounds,
    )  # fmt: skip


def new_adapter(base: Backbone) -> Adapter:
    """Return a new adapter for `base`, as a run starts from."""
    sizes = VARIANTS["plus"].fitting(base.unet.config.cross_attention_dim, base.image_encoder.config, None)
    return Adapter.for_unet(base.unet, sizes)


def stock_pipeline(base: Backbone, adapter: Adapter, folder: Path) -> Any:
    """Return the stock pipeline with the same weights, its UNet a copy."""
    adapter.save_pretrained(folder / "adapter")
    stock = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=copy.deepcopy(base.unet),
        scheduler=DDIMScheduler.from_config(base.scheduler().config),
        safety_checker=None,
        feature_extractor=base.image_processor,
        image_encoder=base.image_encoder,
        requires_safety_checker=False,
    )
    stock.unet.set_attn_processor(AttnProcessor2_0())
    stock.load_ip_adapter(str(folder), subfolder="adapter", weight_name=WEIGHTS, image_encoder_folder=None)
    stock.set_ip_adapter_scale(Recipe(prompt="").adapter_scale)
    stock.set_progress_bar_config(disable=True)
    return stock


def sketch(seed: int = 0) -> Image.Image:
    """Return a square line drawing."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    return Image.fromarray(draw(scene, (256, 256), [random_pose(rng) for _ in scene.figures]).lines).convert("RGB")
