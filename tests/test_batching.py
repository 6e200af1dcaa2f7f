"""Pictures that are denoised together: none depends on its neighbours, none waits for ever, none takes others along."""

from __future__ import annotations

import itertools
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from serving.batcher import Batcher, best_cap, step_seconds
from serving.cache import Cache
from serving.engine import ONLY, Engine, Slot
from serving.recipe import Recipe
from trainer.adapter import WEIGHTS, Adapter, AdapterConfig
from trainer.backbone import ddim, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("a girl under a tree", "two boys in the rain", "a cat", "")


@pytest.fixture(scope="module")
def adapters(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with random weights, wide enough that a reference changes the picture."""
    folders, backbone = {}, load_backbone(str(twin))
    for seed, name in enumerate(("one", "two")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = Adapter.for_unet(backbone.unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64))
            for module in adapter.ip_adapter.values():
                torch.nn.init.normal_(module.to_k_ip.weight, std=0.5)
                torch.nn.init.normal_(module.to_v_ip.weight, std=0.5)
        folders[name] = tmp_path_factory.mktemp(name) / "adapter"
        adapter.save_pretrained(folders[name])
    return folders


@pytest.fixture
def engine(twin: Path, adapters: dict[str, Path]) -> Engine:
    engine = Engine.load(str(adapters["one"]), base=str(twin))
    engine.add("two", engine.read_adapter(str(adapters["two"])))
    return engine


def sketch(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return Image.fromarray(noise).resize((80, 80), Image.Resampling.NEAREST).convert("RGB")


def random_recipe(rng: random.Random) -> Recipe:
    return Recipe(
        prompt=rng.choice(PROMPTS),
        negative_prompt=rng.choice(("", "blurry")),
        reference=sketch(rng.randrange(3)) if rng.random() < 0.8 else None,
        num_inference_steps=rng.randrange(3, 12),
        guidance_scale=rng.choice((1.0, 3.0, 7.5)),
        adapter_scale=rng.choice((0.0, 0.5, 1.0)),
        seed=rng.randrange(1000),
        size=rng.choice((None, (64, 64), (96, 64))),
    )


def decoded(engine: Engine, latents: torch.Tensor) -> np.ndarray:
    """The picture before it is rounded, 0 to 255."""
    with torch.inference_mode():
        vae = engine.backbone.vae
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return (pixels.clamp(-1, 1) * 127.5 + 127.5).numpy()[0]


def test_twenty_random_recipes_with_strangers_or_alone_are_the_pictures_of_stock_diffusers(
    engine: Engine, twin: Path, adapters: dict[str, Path]
) -> None:
    stock = StableDiffusionPipeline.from_pretrained(twin, local_files_only=True)
    stock.scheduler = ddim()
    stock.set_progress_bar_config(disable=True)
    plain = StableDiffusionPipeline(**{**stock.components, "unet": load_backbone(str(twin)).unet})
    plain.set_progress_bar_config(disable=True)
    one = adapters["one"]
    stock.load_ip_adapter(str(one.parent), subfolder=one.name, weight_name=WEIGHTS, image_encoder_folder=None)
    rng = random.Random(0)
    recipes = [random_recipe(rng) for _ in range(20)]
    batcher, slots, done = Batcher(engine, cap=6), [engine.slot(recipe) for recipe in recipes], 0
    sizes: list[int] = []
    for slot in slots:  # they come while others are on their way
        batcher.add([slot])
        sizes.append(len(batcher.step()[0]))
    while done < 1000 and batcher:
        sizes.append(len(batcher.step()[0]))
        done += 1
    assert max(sizes) > 2
    worst, pictures = 0.0, []
    for recipe, slot in zip(recipes, slots, strict=True):
        assert not slot.timesteps
        alone = engine.slot(recipe)
        while alone.timesteps:
            engine.step([alone])
        pipe = plain if recipe.reference is None else stock
        stock.set_ip_adapter_scale(recipe.adapter_scale)
        width, height = recipe.size or (64, 64)
        theirs = pipe(
            recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            ip_adapter_image=recipe.reference,
            num_inference_steps=recipe.num_inference_steps,
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            width=width,
            height=height,
            output_type="latent",
        ).images
        for ours in (slot.latents, alone.latents):
            worst = max(worst, abs(decoded(engine, ours) - decoded(engine, theirs)).max())
        pictures.append(decoded(engine, theirs))
    assert worst <= 0.1
    assert {recipe.guidance_scale for recipe in recipes} == {1.0, 3.0, 7.5}  # with and without a negative half
    alike = [(a, b) for a, b in itertools.combinations(pictures, 2) if a.shape == b.shape and abs(a - b).max() < 1]
    assert not alike
    base = engine.slot(Recipe(prompt="a cat", num_inference_steps=3))
    zero = engine.slot(Recipe(prompt="a cat", num_inference_steps=3, reference=sketch(0), adapter_scale=0.0))
    for _ in range(3):
        engine.step([base])
        engine.step([zero])
    assert torch.equal(base.latents, zero.latents)


def test_one_batch_holds_pictures_of_several_adapters(engine: Engine, twin: Path, adapters: dict[str, Path]) -> None:
    recipe = Recipe(prompt="a cat", reference=sketch(1), num_inference_steps=4, adapter_scale=1.0)
    slots = [engine.slot(recipe), engine.slot(recipe, adapter="two")]
    engine.step(slots)
    engine.remove("two")  # what is being drawn is drawn to its end
    while slots[0].timesteps:
        engine.step(slots)
    for slot, name in zip(slots, adapters, strict=True):
        alone = Engine.load(str(adapters[name]), base=str(twin)).infer(recipe)[0]
        assert abs(np.asarray(engine.picture(slot)).astype(int) - np.asarray(alone)).max() <= 1
    assert abs(slots[0].latents - slots[1].latents).max() > 0.01
    with pytest.raises(KeyError):
        engine.slot(recipe, adapter="two")


def test_texts_and_references_are_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []
    text, image = engine.backbone.encode_text, engine.backbone.encode_image
    monkeypatch.setattr(engine.backbone, "encode_text", lambda texts: encoded.extend(texts) or text(texts))
    monkeypatch.setattr(engine.backbone, "encode_image", lambda pictures: encoded.append("picture") or image(pictures))
    for _ in range(2):
        engine.infer(Recipe(prompt="a cat", reference=sketch(1), num_inference_steps=2, n=2))
    engine.slot(Recipe(prompt="a dog", reference=sketch(2)))
    assert encoded == ["", "a cat", "picture", "a dog", "picture"]
    engine.slot(Recipe(prompt="a dog", reference=sketch(2)), adapter="two")
    assert encoded[5:] == ["picture"]  # the reference means something else to another adapter; the text doesn't


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    cache: Cache[bytes] = Cache(10, len)
    made: list[str] = []

    def get(key: str, size: int) -> None:
        assert len(cache.get(key, lambda: made.append(key) or bytes(size))) == size

    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4), ("huge", 11), ("huge", 11)):
        get(key, size)
    assert made == ["a", "b", "c", "b", "huge", "huge"]
    assert (len(cache), cache.held) == (2, 8)
    cache.drop(lambda key: key == "a")
    assert (len(cache), cache.held) == (1, 4)


def slots_of(engine: Engine, count: int, **fields: object) -> list[Slot]:
    return [engine.slot(Recipe(prompt="a cat", seed=i, **fields)) for i in range(count)]  # type: ignore[arg-type]


def drawn(batcher: Batcher, names: dict[Slot, str], clock: list[float]) -> str:
    """Return who was in each step; a step takes a second."""
    steps = []
    while batcher:
        slots, failed = batcher.step()
        assert not failed
        clock[0] += 1
        steps.append("".join(names[slot] for slot in slots))
    return " ".join(steps)


def test_pictures_of_one_shape_share_steps_and_a_full_batch_is_left_in_the_order_of_coming(engine: Engine) -> None:
    clock = [0.0]
    batcher = Batcher(engine, cap=3, clock=lambda: clock[0])
    slots = dict(zip(slots_of(engine, 5, num_inference_steps=3), "abcde", strict=True))
    batcher.add(list(slots))
    assert drawn(batcher, slots, clock) == "abc abc abc de de de"


def test_a_step_is_for_who_has_waited_longest_for_its_size(engine: Engine) -> None:
    clock = [0.0]
    batcher = Batcher(engine, cap=4, clock=lambda: clock[0])
    (long,), (wide,) = (
        slots_of(engine, 1, num_inference_steps=12),
        slots_of(engine, 1, num_inference_steps=2, size=(96, 64)),
    )
    late = slots_of(engine, 1, num_inference_steps=3)[0]
    names = {long: "L", wide: "w", late: "s"}
    batcher.add([long])
    batcher.step()
    clock[0] = 1.0
    batcher.add([wide])
    batcher.step()  # who has just come has not waited
    clock[0] = 2.0
    batcher.add([late])
    # a second is a third of the wide one's three units of work, but two are a sixth of the long one's twelve
    assert drawn(batcher, names, clock) == "w w Ls Ls Ls L L L L L L L"


def test_nobody_starves_behind_others_that_keep_coming(engine: Engine) -> None:
    clock = [0.0]
    batcher = Batcher(engine, cap=1, clock=lambda: clock[0])
    (large,) = slots_of(engine, 1, num_inference_steps=4, size=(96, 64))
    batcher.add([large])
    for _ in range(40):
        batcher.add(slots_of(engine, 1, num_inference_steps=1))  # one a second, and the engine takes one step in it
        batcher.step()
        clock[0] += 1
    assert not large.timesteps


def test_one_larger_than_the_cap_goes_alone(engine: Engine) -> None:
    batcher = Batcher(engine, cap=1)
    batcher.add(
        [*slots_of(engine, 1, num_inference_steps=2, size=(128, 128)), *slots_of(engine, 1, num_inference_steps=1)]
    )
    assert [len(batcher.step()[0]) for _ in range(4)] == [1, 1, 1, 0]


def test_one_poisoned_slot_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # without guidance, which multiplies the float noise of random weights
    clean, slots = (slots_of(engine, 3, num_inference_steps=3, guidance_scale=1.0) for _ in range(2))
    step = engine.step

    def poisoned(batch: list[Slot]) -> None:
        if slots[1] in batch and slots[1].done == 1:
            raise RuntimeError("poison")
        step(batch)

    monkeypatch.setattr(engine, "step", poisoned)
    batcher = Batcher(engine, cap=4)
    batcher.add(slots)
    failures = []
    while batcher:
        failures += batcher.step()[1]
    assert [(slot, str(error)) for slot, error in failures] == [(slots[1], "poison")]
    assert [slot.done for slot in slots] == [3, 1, 3]
    for slot, other in zip(slots, clean, strict=True):
        while other.timesteps:
            step([other])
        if slot is not slots[1]:
            assert abs(slot.latents - other.latents).max() < 1e-3


def test_a_batch_that_does_not_fit_is_drawn_one_by_one_without_the_memory_it_held(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Held:
        pass

    step, held, alive = engine.step, [], []

    def little(slots: list[Slot]) -> None:
        if len(slots) > 1:
            activations = Held()
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError
        alive.append(held[0]() is not None)
        step(slots)

    batcher, slots = Batcher(engine, 4), slots_of(engine, 2, num_inference_steps=2)
    monkeypatch.setattr(engine, "step", little)
    batcher.add(slots)
    assert batcher.step() == (slots, [])
    assert alive == [False, False]
    assert [slot.done for slot in slots] == [1, 1]
    assert batcher.cap == 2
    assert "2 pictures in a step: from now on 2 at most" in caplog.text


def test_not_a_number_in_one_slot_is_not_its_neighbours(engine: Engine) -> None:
    good, bad = slots_of(engine, 2, num_inference_steps=2)
    (alone,) = slots_of(engine, 1, num_inference_steps=2)
    bad.latents = bad.latents * float("nan")
    for _ in range(2):
        engine.step([good, bad])
        engine.step([alone])
    assert abs(good.latents - alone.latents).max() < 1e-4
    with pytest.raises(ArithmeticError, match="NaN"):
        engine.picture(bad)


def test_the_cap_is_where_more_pictures_bring_nothing() -> None:
    assert best_cap({1: 1.0}) == 1
    assert best_cap({1: 1.0, 2: 1.1, 4: 1.5, 8: 2.9}) == 4
    assert best_cap({1: 1.0, 2: 1.95}) == 1


def test_step_times_are_measured_up_to_where_they_bring_something(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine.step
    seen: list[int] = []

    def counted(slots: list[Slot]) -> None:
        if len(slots) == 4:
            raise torch.OutOfMemoryError
        seen.append(len(slots))
        step(slots)

    monkeypatch.setattr(engine, "step", counted)
    monkeypatch.setattr("serving.batcher.GAIN", 0.0)
    monkeypatch.setattr("serving.batcher.MEASURED_S", 0.0)
    seconds = step_seconds(engine, ONLY, 16)
    assert list(seconds) == [1, 2]
    assert min(seconds.values()) > 0
    assert seen == [1] * 4 + [2] * 4
    monkeypatch.setattr("serving.batcher.GAIN", 99.0)
    seen.clear()
    assert list(step_seconds(engine, ONLY, 16)) == [1, 2]
    assert seen == 2 * ([1] * 4 + [2] * 4)  # again, before it is believed
