"""How many requests a second a server takes with short waits: ours, and Ray Serve's own batching over the same sampler.

Requests of mixed steps and sizes come at random (Poisson). The capacity is the highest rate at which 95 of 100 are
answered within three times the mean time that the same requests take alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from ray import serve

from serving.batcher import best_cap, step_seconds
from serving.engine import ONLY, Engine
from serving.recipe import Recipe
from serving.worker import Job, Worker
from tests.bench.sampling import new_adapter, sketch
from trainer.backbone import load_backbone
from trainer.base import MICRO

REQUESTS = 60  # of a trial
LONGEST, GROWTH = 3.0, 1.15  # times the unloaded time; a rate after the one before
Draw = Callable[[Recipe], Awaitable[object]]


def capacity() -> Iterator[str]:
    """Yield a table of trials, rate by rate, and the capacities."""
    torch.set_num_threads(1)  # one core to draw on, one to ask from
    base = load_backbone(str(MICRO))
    engine = Engine(base, new_adapter(base))
    seconds = step_seconds(engine, ONLY, 16)
    cap = best_cap(seconds)
    measured = ", ".join(f"{count}: {taken:.4f}" for count, taken in seconds.items())
    yield f"Seconds of a step by pictures in it: {measured}; at most {cap} at a time."
    yield ""
    ours, peer = Ours(engine, cap), Peer(engine)
    alone = asyncio.run(unloaded(ours))
    yield f"Alone, a request takes {alone:.3f} s (mean of {REQUESTS // 3})."
    yield ""
    yield "| side | requests/s | median | 95 % within | pictures in a step |"
    yield "|---|---|---|---|---|"
    best: dict[str, float] = {}
    for side in (ours, peer):
        rate = 0.4 / alone
        while True:
            times, occupancy = asyncio.run(trial(side, rate))
            p95 = float(np.quantile(times, 0.95)) / alone
            yield f"| {side.name} | {rate:.2f} | {np.median(times) / alone:.2f} | {p95:.2f} | {occupancy:.2f} |"
            if p95 > LONGEST:
                break
            best[side.name] = rate
            rate *= GROWTH
    yield ""
    most, peers = best[ours.name], best[peer.name]
    yield f"Capacity: {most:.2f} against {peers:.2f} requests/s, {most / peers:.2f} times."


class Ours:
    """The server's worker."""

    name = "ours"

    def __init__(self, engine: Engine, cap: int) -> None:
        self.engine, self.cap = engine, cap

    def open(self) -> Draw:
        """Return what draws a recipe, on the running loop."""
        worker = Worker(self.engine, "bench", cap=self.cap)

        async def draw(recipe: Recipe) -> None:
            async for _ in worker.generate(Job(recipe=recipe)):
                pass

        return draw


class Peer:
    """`@serve.batch`: at most eight requests at a time, each batch drawn to its end, sizes one after the other."""

    name = "@serve.batch"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool = ThreadPoolExecutor(1)

    def open(self) -> Draw:
        """Return what draws a recipe, on the running loop."""

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
        async def draw(recipes: list[Recipe]) -> list[object]:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self._draw, recipes)

        return draw  # type: ignore[return-value]

    def _draw(self, recipes: list[Recipe]) -> list[object]:
        slots = [self.engine.slot(recipe) for recipe in recipes]
        for shape in {slot.shape for slot in slots}:
            while going := [slot for slot in slots if slot.shape == shape and slot.timesteps]:
                self.engine.step(going)
        return [self.engine.picture(slot).tobytes() for slot in slots]


def requests() -> list[Recipe]:
    """Return the same mixed requests each time."""
    rng, reference = random.Random(0), sketch()
    return [
        Recipe(
            prompt=f"a girl with {rng.choice(('long', 'short'))} hair, {number}",
            reference=reference,
            num_inference_steps=rng.randint(20, 50),
            seed=number,
            size=rng.choice(((64, 64), (96, 64))),
        )
        for number in range(REQUESTS)
    ]


async def unloaded(side: Ours) -> float:
    """Return the mean seconds of a request that is alone."""
    draw, recipes = side.open(), requests()[: REQUESTS // 3]
    await draw(recipes[0])
    begun = time.perf_counter()
    for recipe in recipes:
        await draw(recipe)
    return (time.perf_counter() - begun) / len(recipes)


async def trial(side: Ours | Peer, rate: float) -> tuple[list[float], float]:
    """Return the seconds of each request where `rate` of them come in a second, and the mean pictures in a step."""
    draw, rng, sizes = side.open(), random.Random(1), []
    step = side.engine.step

    def counted(slots: list) -> None:
        sizes.append(len(slots))
        step(slots)

    async def ask(recipe: Recipe, after: float) -> float:
        await asyncio.sleep(after)
        begun = time.perf_counter()
        await draw(recipe)
        return time.perf_counter() - begun

    at, asked = 0.0, []
    for recipe in requests():
        at += rng.expovariate(rate)
        asked.append(ask(recipe, at))
    side.engine.step = counted  # type: ignore[method-assign]
    try:
        times = await asyncio.gather(*asked)
    finally:
        side.engine.step = step  # type: ignore[method-assign]
    return list(times), float(np.mean(sizes))
