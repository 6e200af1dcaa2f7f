"""The sampler against stock diffusers, and what makes a picture depend on its recipe alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from serving.engine import Engine, Slot, ddim_step
from serving.recipe import MAX_SEED, Recipe
from trainer.adapter import WEIGHTS, AdapterError
from trainer.backbone import ddim, make_twin

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SCALE, PROMPT, NEGATIVE = 8, 0.7, "a girl under a tree", "blurry"


@pytest.fixture(scope="module")
def engine(twin: Path, adapter_folder: Path) -> Engine:
    return Engine.load(str(adapter_folder), base=str(twin))


@pytest.fixture(scope="module")
def reference() -> Image.Image:
    """A wide sketch: the stock image processor would crop its centre, so it is given `squeezed`."""
    noise = np.random.default_rng(3).integers(0, 256, (8, 16), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 80), Image.Resampling.NEAREST).convert("RGB")


def squeezed(reference: Image.Image) -> Image.Image:
    """The whole reference in the twin's 56 px, as the model card tells users of stock diffusers to do."""
    return reference.resize((56, 56))


@pytest.fixture(scope="module")
def stock(twin: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(twin, local_files_only=True)
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stock_with_adapter(twin: Path, adapter_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(twin, local_files_only=True)
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        str(adapter_folder.parent), subfolder=adapter_folder.name, weight_name=WEIGHTS, image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(SCALE)
    return pipe


def recipe(**changes: object) -> Recipe:
    fields = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "adapter_scale": SCALE}
    return Recipe(**{**fields, "seed": 11, **changes})  # type: ignore[arg-type]


def ask_stock(pipe: StableDiffusionPipeline, output_type: str, seed: int = 11, **more: object) -> np.ndarray:
    result = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        **more,
    ).images
    return result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result[0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def last_latents(engine: Engine, wanted: Recipe) -> np.ndarray:
    slot = engine.slot(wanted)
    while slot.timesteps:
        engine.step([slot])
    return slot.latents.numpy()


def test_the_picture_with_a_reference_equals_stock_diffusers(
    engine: Engine, stock_with_adapter: StableDiffusionPipeline, reference: Image.Image
) -> None:
    ours = pixels(engine.infer(recipe(reference=reference))[0])
    theirs = ask_stock(stock_with_adapter, "pil", ip_adapter_image=squeezed(reference))
    assert abs(ours - theirs.astype(int)).max() < 2
    latents = ask_stock(stock_with_adapter, "latent", ip_adapter_image=squeezed(reference))
    mine = last_latents(engine, recipe(reference=reference))
    assert abs(mine - latents).max() < 1e-3
    cropped = ask_stock(stock_with_adapter, "latent", ip_adapter_image=reference)
    assert abs(mine - cropped).max() > 5e-3  # so squeezing matters
    # what the numbers above are worth: the reference, its weight and the negative prompt each move the picture more
    for other in (recipe(), recipe(reference=reference, adapter_scale=SCALE / 2)):
        assert abs(ours - pixels(engine.infer(other)[0])).max() > 2, other
    moved = last_latents(engine, recipe(reference=reference, negative_prompt=""))
    assert abs(moved - latents).max() > 5e-3


def test_without_a_reference_or_at_alpha_zero_the_picture_is_the_base_models(
    engine: Engine, stock: StableDiffusionPipeline, reference: Image.Image
) -> None:
    base = ask_stock(stock, "latent")
    alone, zero = last_latents(engine, recipe()), last_latents(engine, recipe(reference=reference, adapter_scale=0.0))
    assert np.array_equal(alone, zero)
    assert abs(alone - base).max() < 1e-4
    assert abs(last_latents(engine, recipe(reference=reference)) - base).max() > 5e-3


def test_guidance_of_one_leaves_the_negative_half_out(engine: Engine) -> None:
    one = last_latents(engine, recipe(guidance_scale=1.0))
    assert np.array_equal(one, last_latents(engine, recipe(guidance_scale=1.0, negative_prompt="other")))
    near = last_latents(engine, recipe(guidance_scale=1.000001))
    assert abs(one - near).max() < 1e-3
    # at 0 the formula leaves only the negative half: its text as prompt at guidance 1 gives the same
    swapped = last_latents(engine, recipe(prompt=NEGATIVE, guidance_scale=1.0))
    assert abs(last_latents(engine, recipe(guidance_scale=0.0)) - swapped).max() < 1e-4


def test_picture_i_of_n_is_the_picture_of_its_own_seed(engine: Engine, reference: Image.Image) -> None:
    three = engine.infer(recipe(reference=reference, n=3))
    singles = [engine.infer(recipe(reference=reference, seed=11 + i))[0] for i in range(3)]
    for many, single in zip(three, singles, strict=True):
        assert abs(pixels(many) - pixels(single)).max() <= 1
    assert abs(pixels(three[0]) - pixels(three[1])).max() > 5


def test_the_same_recipe_gives_the_same_pixels(engine: Engine, reference: Image.Image) -> None:
    first, second = (engine.infer(recipe(reference=reference))[0].tobytes() for _ in range(2))
    assert first == second


def test_what_makes_steps_faster_changes_the_picture_by_noise_only(
    engine: Engine, adapter_folder: Path, twin: Path, reference: Image.Image
) -> None:
    wanted = recipe(reference=reference)
    true = pixels(engine.infer(wanted)[0])
    last = Engine.load(str(adapter_folder), base=str(twin), channels_last=True)
    assert last.backbone.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert abs(pixels(last.infer(wanted)[0]) - true).max() <= 1
    half = Engine.load(str(adapter_folder), base=str(twin), dtype=torch.bfloat16)
    assert abs(pixels(half.infer(wanted)[0]) - true).mean() < 8


def test_a_size_other_than_the_native_one(engine: Engine) -> None:
    assert engine.infer(recipe(size=(96, 72), num_inference_steps=1))[0].size == (96, 72)
    assert engine.infer(recipe(num_inference_steps=1))[0].size == (64, 64)
    with pytest.raises(ValueError, match="multiples of 8, got 65x64"):
        engine.infer(recipe(size=(65, 64)))


@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_ddim_steps_equal_diffusers(steps: int) -> None:
    scheduler: DDIMScheduler = ddim()
    scheduler.set_timesteps(steps)
    random = torch.Generator().manual_seed(steps)
    for t in {int(scheduler.timesteps[0]), int(scheduler.timesteps[steps // 2]), int(scheduler.timesteps[-1])}:
        x, eps = torch.randn(2, 1, 4, 8, 8, generator=random)
        previous = t - 1000 // steps
        abar = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        ours = ddim_step(x, eps, scheduler.alphas_cumprod[t], abar)
        theirs = scheduler.step(eps, t, x, eta=0.0)
        assert torch.equal(ours[0], theirs.prev_sample)
        assert torch.equal(ours[1], theirs.pred_original_sample)


def test_what_on_step_raises_ends_the_sampling(engine: Engine) -> None:
    seen: list[int] = []

    def stop(slots: list[Slot]) -> None:
        seen.append(slots[0].done)
        if slots[0].done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.infer(recipe(), stop)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1000}, "num_inference_steps"),
        ({"n": 0}, "n must"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"adapter_scale": float("inf")}, "adapter_scale"),
        ({"adapter_scale": -0.1}, "adapter_scale"),
    ],
)
def test_a_recipe_refuses_what_can_not_be_sampled(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(**changes)


def test_the_largest_seed_draws_noise(engine: Engine) -> None:
    assert torch.isfinite(engine.noise(MAX_SEED, (64, 64))).all()


def test_an_adapter_of_another_base_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    other = make_twin(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"was trained on base twin .*…, this server runs other .*base=…"):
        Engine.load(str(adapter_folder), base=str(other))


def test_a_bare_adapter_file_needs_a_base(adapter_folder: Path, twin: Path) -> None:
    with pytest.raises(ValueError, match="names no base"):
        Engine.load(str(adapter_folder / WEIGHTS))
    assert Engine.load(str(adapter_folder / WEIGHTS), base=str(twin)).backbone.random_weights
