"""A compiled base: the same latents, whatever is in a batch."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from serving.batcher import step_seconds
from serving.engine import ONLY, Engine
from serving.recipe import Recipe
from serving.warmup import draw_shapes
from tests.bench.sampling import new_adapter, sketch
from trainer.backbone import load_backbone
from trainer.base import MICRO

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, when it compiles
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler here"),
]


def test_a_compiled_base_draws_the_same_whatever_is_in_a_batch() -> None:
    base = load_backbone(MICRO)
    adapter = new_adapter(base)
    plain, compiled = Engine(base, adapter), Engine(load_backbone(MICRO), adapter)
    compiled.quicken(compile=True)
    draw_shapes(compiled)
    step_seconds(compiled, ONLY, 4)
    many = compiled.size_multiple
    assert many > plain.size_multiple
    guided = Recipe(prompt="a girl with long hair, line art", reference=sketch(), num_inference_steps=4, seed=3)
    free, textual = dataclasses.replace(guided, guidance_scale=1.0), dataclasses.replace(guided, reference=None)
    for size in (None, (2 * many, 2 * many)):
        for batch in ([guided], [free], [textual], [guided, free, textual], [guided] * 5, [free] * 3):
            recipes = [dataclasses.replace(recipe, size=size) for recipe in batch]
            ours, theirs = ([engine.slot(recipe) for recipe in recipes] for engine in (compiled, plain))
            while theirs[0].timesteps:
                compiled.step(ours)
                plain.step(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert abs(one.latents - other.latents).max() < 1e-3
