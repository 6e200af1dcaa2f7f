"""The sampler against stock diffusers, and what makes a picture depend on its recipe alone."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from serving.engine import MAX_SEED, Engine, Recipe, Step, ddim_step
from serving.pictures import read_recipe
from serving.worker import Job, Picture, Started, Worker
from trainer.adapter import WEIGHTS, Adapter, AdapterConfig, AdapterError
from trainer.backbone import ddim, load_backbone, make_twin

STEPS, SCALE, PROMPT, NEGATIVE = 8, 0.7, "a girl under a tree", "blurry"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and on a busy machine they wait for it at every one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapter_folder(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, wide enough that a reference changes the picture."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    backbone = load_backbone(str(twin))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        adapter = Adapter.for_unet(backbone.unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64))
        for module in adapter.ip_adapter.values():
            torch.nn.init.normal_(module.to_k_ip.weight, std=0.5)
            torch.nn.init.normal_(module.to_v_ip.weight, std=0.5)
    adapter.save_pretrained(folder, base={"id": backbone.id, "weights_hash": backbone.weights_hash})
    return folder


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
    """The final latents: after the last step to t = 1 they are x0 mixed with eps; x0 is what on_step gives."""
    with torch.inference_mode():
        text, image, scale = engine._condition(wanted)
        noise = engine.noise([wanted.seed], engine.size(wanted))
        return engine._sample(wanted, noise, text, image, scale, 0, None).numpy()


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


def test_groups_of_the_batch_size_give_the_same_pictures(engine: Engine, reference: Image.Image) -> None:
    wanted = recipe(reference=reference, n=3, num_inference_steps=3)
    steps: list[Step] = []
    whole = engine.infer(wanted)
    engine.batch_size = 2
    try:
        grouped = engine.infer(wanted, steps.append)
    finally:
        engine.batch_size = 4
    for a, b in zip(whole, grouped, strict=True):
        assert abs(pixels(a) - pixels(b)).max() <= 1
    assert [(s.number, s.total, s.first, len(s.x0)) for s in steps] == [
        (1, 6, 0, 2), (2, 6, 0, 2), (3, 6, 0, 2), (4, 6, 2, 1), (5, 6, 2, 1), (6, 6, 2, 1),
    ]  # fmt: skip


def test_the_same_recipe_gives_the_same_pixels(engine: Engine, reference: Image.Image) -> None:
    first, second = (engine.infer(recipe(reference=reference))[0].tobytes() for _ in range(2))
    assert first == second


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

    def stop(step: Step) -> None:
        seen.append(step.number)
        if step.number == 3:
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
    assert torch.isfinite(engine.noise([MAX_SEED, 0], (64, 64))).all()


def test_an_adapter_of_another_base_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    other = make_twin(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"was trained on base twin .*…, this server runs other .*base=…"):
        Engine.load(str(adapter_folder), base=str(other))


def test_a_bare_adapter_file_needs_a_base(adapter_folder: Path, twin: Path) -> None:
    with pytest.raises(ValueError, match="names no base"):
        Engine.load(str(adapter_folder / WEIGHTS))
    assert Engine.load(str(adapter_folder / WEIGHTS), base=str(twin)).backbone.random_weights


# the worker: engine in a thread, events on the loop


def test_a_job_gives_previews_then_pictures_with_their_recipe(engine: Engine, reference: Image.Image) -> None:
    async def collect() -> list:
        job = Job(
            recipe=recipe(reference=reference, n=2), partial_images=2, output_format="webp", output_compression=80
        )
        return [event async for event in Worker(engine, "m").generate(job)]

    started, *pictures = asyncio.run(collect())
    assert isinstance(started, Started)
    assert any("random weights" in warning for warning in started.warnings)
    assert [(p.partial, p.seed) for p in pictures] == [(0, 11), (0, 12), (1, 11), (1, 12), (None, 11), (None, 12)]
    facts = [read_recipe(Image.open(io.BytesIO(p.data))) for p in pictures]
    assert facts[-1]["seed"] == 12
    assert facts[-1]["prompt"] == PROMPT
    assert facts[-1]["base_weights_hash"] == engine.backbone.weights_hash
    assert len(facts[-1]["reference_sha256"]) == 64


def test_a_long_prompt_is_told_about(engine: Engine) -> None:
    worker = Worker(engine, "m")
    assert not any("longer" in warning for warning in worker.warnings(recipe(prompt="a" * 75)))  # + start and end: 77
    assert any("prompt is 3 tokens longer than the 77" in w for w in worker.warnings(recipe(prompt="a" * 78)))


def test_a_job_that_is_given_up_frees_its_turn_after_the_step_in_flight(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    second_step = threading.Event()
    infer = engine.infer

    def watched(wanted: Recipe, on_step: Callable[[Step], None]) -> list[Image.Image]:
        def counted(step: Step) -> None:
            sampled.append(step.number)
            if step.number == 2:
                second_step.set()
                assert given_up.wait(10)
            on_step(step)

        return infer(wanted, counted)

    given_up = threading.Event()
    monkeypatch.setattr(engine, "infer", watched)

    async def main() -> list:
        worker = Worker(engine, "m")

        async def first() -> None:
            async with contextlib.aclosing(worker.generate(Job(recipe=recipe()))) as events:
                async for _ in events:
                    pass

        task = asyncio.create_task(first())
        await asyncio.to_thread(second_step.wait, 10)
        waiting = asyncio.create_task(anext(worker.generate(Job(recipe=recipe(num_inference_steps=1)))))
        task.cancel()
        await asyncio.sleep(0.05)
        assert not waiting.done()  # the step in flight still holds the turn
        given_up.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [await asyncio.wait_for(waiting, 10)]

    (started,) = asyncio.run(main())
    assert isinstance(started, Started)
    assert sampled == [1, 2]


def test_an_error_in_one_job_leaves_the_next_one_alone(engine: Engine) -> None:
    async def main() -> list:
        worker = Worker(engine, "m")
        with pytest.raises(ValueError, match="multiples of 8"):
            [event async for event in worker.generate(Job(recipe=recipe(size=(65, 64))))]
        return [event async for event in worker.generate(Job(recipe=recipe(num_inference_steps=1)))]

    events = asyncio.run(main())
    assert [isinstance(event, Picture) for event in events] == [False, True]
