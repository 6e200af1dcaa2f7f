"""What a replica does before it takes requests: it loads its models, measures its steps, and draws a canary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

from serving.batcher import step_seconds
from serving.config import ServingConfig
from serving.engine import ONLY, Engine
from serving.recipe import Recipe

T = TypeVar("T")


def warm_engine(config: ServingConfig) -> tuple[Engine, dict[int, float], float]:
    """Return the engine after its canary, the seconds of its steps by pictures in them, and those of its warm-up."""
    device, dtype = config.device_and_dtype
    engine = Engine.load(
        config.adapter,
        base=config.base,
        image_encoder=config.image_encoder,
        dtype=getattr(torch, dtype),
        device=device,
        channels_last=config.channels_last,
        compile=config.compile,
    )
    begun = time.monotonic()
    if config.compile:
        draw_shapes(engine)
    seconds = step_seconds(engine, ONLY, config.max_batch_size)
    warm_up_s = time.monotonic() - begun
    draw_canary(engine)
    return engine, seconds, warm_up_s


def draw_canary(engine: Engine) -> None:
    """Draw a small picture to see whether it can be done. ArithmeticError when it is not finite."""
    engine.infer(Recipe(prompt="a canary", reference=Image.new("RGB", (64, 64)), num_inference_steps=2))


def draw_shapes(engine: Engine) -> None:
    """Draw what a compiled UNet takes for new, so that few requests wait for the compiler: sizes, one row and more."""
    side, more, white = engine.backbone.native_size, engine.size_multiple, Image.new("RGB", (64, 64))
    for size, guidance in itertools.product(((side, side), (side + more, side + 2 * more)), (7.5, 1.0)):
        recipe = Recipe(prompt="a shape", reference=white, num_inference_steps=1, size=size, guidance_scale=guidance)
        for count in (1, 2):
            engine.step([engine.slot(recipe, number) for number in range(count)])


def in_own_thread(do: Callable[[], T]) -> T:
    """Return what `do` returns, or raise what it raises, in a thread that ends with it.

    Nothing but this and the sampler may compute with torch on CPUs: OpenMP (libgomp) keeps helpers for each thread that
    has computed, and once all helpers of all threads are more than the cores, they sleep between two operations instead
    of waiting awake: a step on two cores takes twice its time. Helpers end with their thread.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(do).result()
