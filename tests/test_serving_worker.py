"""The worker: a batcher in a thread of its own, whose events come out on the loop of who asked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving.adapters import Served
from serving.config import ServingConfig
from serving.engine import Engine, Slot
from serving.job import Job, Picture, SamplerStopped, Started
from serving.pictures import BadPicture, read_picture, read_recipe
from serving.recipe import Recipe
from serving.replica import SketchReplica
from serving.worker import Worker
from tests import asking

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def engine(twin: Path, adapter_folder: Path) -> Engine:
    return Engine.load(str(adapter_folder), base=str(twin))


async def collected(worker: Worker, job: Job) -> list:
    return [event async for event in worker.generate(job)]


def recipe(**fields: object) -> Recipe:
    return Recipe(**{"prompt": "a girl under a tree", "num_inference_steps": 8, "seed": 11, **fields})  # type: ignore[arg-type]


def test_a_job_gives_previews_then_pictures_with_their_recipe(engine: Engine) -> None:
    drawing = asking.picture()
    job = Job(
        recipe=recipe(n=2),
        reference=drawing,
        partial_images=2,
        output_format="webp",
        output_compression=80,
    )
    worker = Worker(engine, "m")
    started, *pictures = asyncio.run(collected(worker, job))
    assert isinstance(started, Started)
    assert any("random weights" in warning for warning in started.warnings)
    assert [(p.partial, p.seed) for p in pictures] == [(0, 11), (0, 12), (1, 11), (1, 12), (None, 11), (None, 12)]
    facts = [read_recipe(Image.open(io.BytesIO(p.data))) for p in pictures]
    assert facts[-1]["seed"] == 12
    assert facts[-1]["prompt"] == "a girl under a tree"
    assert facts[-1]["base_weights_hash"] == engine.backbone.weights_hash
    pixels = Image.open(io.BytesIO(drawing)).convert("RGB")
    assert facts[-1]["reference_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    again = recipe(n=1, seed=12, reference=pixels)
    job = dataclasses.replace(job, output_format="png", partial_images=0)
    last = Image.open(io.BytesIO(asyncio.run(collected(worker, job))[-1].data))
    assert abs(np.int16(last) - np.int16(engine.infer(again)[0])).max() <= 1


def test_a_reference_that_is_damaged_is_its_own_jobs_fault(engine: Engine) -> None:
    worker, damaged = Worker(engine, "m"), asking.picture(size=(64, 64))[:100]

    async def main() -> list:
        with pytest.raises(BadPicture, match="is damaged"):
            await collected(worker, Job(recipe=recipe(), reference=damaged))
        assert not worker._doubtful  # nothing is wrong with this replica
        return await collected(worker, Job(recipe=recipe(num_inference_steps=1)))

    assert len(asyncio.run(main())) == 2


def test_no_pixels_of_a_reference_are_held_beyond_those_that_are_seen(engine: Engine) -> None:
    job = Job(recipe=recipe(), reference=asking.picture(size=(2000, 1000)))
    small, sha256 = Worker(engine, "m")._with_reference(job)
    whole = dataclasses.replace(job.recipe, reference=read_picture(job.reference))  # type: ignore[arg-type]
    assert small.reference is not None
    assert small.reference.size == 2 * (engine.backbone.image_encoder.config.image_size,)
    assert sha256 == whole.reference_sha256
    seen, all_of_it = (engine.backbone.encode_image([one.reference]) for one in (small, whole))  # type: ignore[list-item]
    assert torch.equal(seen, all_of_it)
    slot = engine.slot(recipe(reference=Image.new("RGB", (80, 80), "white")))
    assert slot.recipe.reference is None
    assert slot.rows[1][1] is not None  # what the layers attend to


def test_a_long_prompt_is_told_about(engine: Engine) -> None:
    worker = Worker(engine, "m")
    assert not any("longer" in warning for warning in worker.warnings(recipe(prompt="a" * 75)))  # + start and end: 77
    assert any("prompt is 3 tokens longer than the 77" in w for w in worker.warnings(recipe(prompt="a" * 78)))


def test_jobs_are_drawn_side_by_side_and_one_that_is_given_up_leaves_after_the_step_in_flight(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []  # seeds of each step
    second, go_on = threading.Event(), threading.Event()
    step = engine.step

    def watched(slots: list[Slot]) -> None:
        taken.append([slot.recipe.seed for slot in slots])
        step(slots)
        if len(taken) == 2:
            second.set()
            assert go_on.wait(10)

    monkeypatch.setattr(engine, "step", watched)

    async def main() -> list:
        worker = Worker(engine, "m")
        given_up = asyncio.create_task(collected(worker, Job(recipe=recipe(seed=1))))
        await asyncio.to_thread(second.wait, 10)
        others = [
            asyncio.create_task(collected(worker, Job(recipe=recipe(seed=seed, num_inference_steps=3))))
            for seed in (2, 3)
        ]
        await asyncio.sleep(0.05)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        go_on.set()
        return await asyncio.gather(*others)

    second_job, third_job = asyncio.run(main())
    assert [len(second_job), len(third_job)] == [2, 2]
    assert taken == [[1], [1], [2, 3], [2, 3], [2, 3]]
    for picture in (second_job[1], third_job[1]):
        assert (picture.steps, picture.share) == (3, 1.5)  # half of each of its steps
        assert picture.seconds > 0


def test_a_job_that_is_given_up_before_it_begins_costs_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    step, slot, made = engine.step, engine.slot, []
    monkeypatch.setattr(engine, "step", lambda slots: (begun.set(), go_on.wait(10), step(slots)))
    monkeypatch.setattr(engine, "slot", lambda recipe, *how: (made.append(recipe.seed), slot(recipe, *how))[1])

    async def main() -> None:
        worker = Worker(engine, "m")
        first = asyncio.create_task(collected(worker, Job(recipe=recipe(seed=1, num_inference_steps=1))))
        await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collected(worker, Job(recipe=recipe(seed=2))), 0.05)
        go_on.set()
        await first
        await collected(worker, Job(recipe=recipe(seed=3, num_inference_steps=1)))

    asyncio.run(main())
    assert made == [1, 3]


def test_an_error_in_one_job_leaves_the_others_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make = engine.picture
    monkeypatch.setattr(engine, "picture", lambda slot: make(slot) if slot.recipe.seed != 9 else make(None))

    async def main() -> list:
        worker = Worker(engine, "m")
        jobs = [recipe(size=(65, 64)), recipe(seed=9, n=2), recipe(seed=1)]
        tasks = [asyncio.create_task(collected(worker, Job(recipe=job))) for job in jobs]
        return await asyncio.gather(*tasks, return_exceptions=True)

    wrong_size, no_picture, good = asyncio.run(main())
    assert isinstance(wrong_size, ValueError)
    assert "multiples of 8" in str(wrong_size)
    assert isinstance(no_picture, AttributeError)
    assert [type(event) for event in good] == [Started, Picture]


def test_a_sampler_that_stops_says_so_to_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def main() -> None:
        worker = Worker(engine, "m")
        monkeypatch.setattr(worker.batcher, "step", lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(SamplerStopped, match="division by zero"):
                await asyncio.wait_for(collected(worker, Job(recipe=recipe())), 10)

    asyncio.run(main())


def test_a_reader_that_stops_after_the_first_event_costs_nothing(engine: Engine) -> None:
    async def main() -> int:
        worker = Worker(engine, "m")
        async with contextlib.aclosing(worker.generate(Job(recipe=recipe(num_inference_steps=999)))) as events:
            await anext(events)
        await collected(worker, Job(recipe=recipe(num_inference_steps=1)))
        return len(worker.batcher)

    assert asyncio.run(main()) == 0


def test_nothing_that_lives_on_computes_beside_the_sampler(
    twin: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that has computed has helpers of OpenMP: too many of them, and all of them go slow."""
    computed: dict[str, set[threading.Thread]] = {}

    def recorded(name: str) -> None:
        function = getattr(Engine, name)

        def call(*args: Any, **more: Any) -> Any:
            computed.setdefault(name, set()).add(threading.current_thread())
            return function(*args, **more)

        monkeypatch.setattr(Engine, name, call)

    names = ("load", "read_adapter", "slot", "step", "picture")
    for name in names:
        recorded(name)
    config = ServingConfig(adapter=str(adapter_folder), base=str(twin), max_batch_size=2)
    worker = SketchReplica.func_or_class(config).worker

    async def main() -> None:
        await worker.add_adapter(Served(name="other", path=str(adapter_folder), version="1"))
        await collected(worker, Job(recipe=recipe(num_inference_steps=2)))

    asyncio.run(main())
    assert set(computed) == set(names)
    assert {thread.name for threads in computed.values() for thread in threads if thread.is_alive()} == {"sampler"}
