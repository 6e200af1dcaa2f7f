"""How many requests a second a replica takes with short waits: ours, and Ray Serve's batching over the same sampler.

Requests of mixed steps and sizes come at random (Poisson), the same ones at the same moments on both sides, each of
which computes in one thread: how fast the machine is just then touches both. The capacity is the highest rate at which
95 of 100 are answered within three times what they take alone: one after the other, the other side at work likewise.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from factory.session import ray_session
from serving.batcher import best_cap, step_seconds
from serving.engine import ONLY, Engine, Slot
from serving.job import Job
from serving.recipe import Recipe
from serving.warmup import in_own_thread
from serving.worker import Worker
from tests.bench.sampling import new_adapter, sketch
from trainer.backbone import load_backbone
from trainer.base import MICRO

REQUESTS = 80  # of a trial
LONGEST = 3.0  # times the unloaded time
FIRST, GROWTH = 0.33, 1.3  # load of the first trial, near what the peer takes; a rate to the next
WAIT_S = 0.05  # of the peer, for a batch to fill up: it pays that alone too
Seen = dict[str, tuple[float, float]]  # by side: 95 of 100 within so many times their own time, and the mean time
REPLICA = {
    "max_ongoing_requests": 1000,
    "ray_actor_options": {"num_cpus": 1},
    "logging_config": {"log_level": "WARNING"},
}


class Counting:
    """An engine on the micro base that counts the pictures of its steps."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # both replicas are at work at the same time
        self.engine, self.seconds = in_own_thread(_warm_engine)
        self.counts: list[int] = []
        step = self.engine.step

        def counted(slots: list[Slot]) -> None:
            self.counts.append(len(slots))
            step(slots)

        self.engine.step = counted  # type: ignore[method-assign,assignment]

    def told(self) -> tuple[dict[int, float], float]:
        """Return the seconds of a step by pictures in it, and the mean pictures of steps since it was last asked."""
        counts, self.counts[:] = list(self.counts), []
        return self.seconds, float(np.mean(counts)) if counts else 0.0


def _warm_engine() -> tuple[Engine, dict[int, float]]:
    base = load_backbone(str(MICRO))
    engine = Engine(base, new_adapter(base))
    return engine, step_seconds(engine, ONLY, 16)


@serve.deployment(**REPLICA)
class Ours(Counting):
    """The server's worker."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker(self.engine, "bench", cap=best_cap(self.seconds))

    async def draw(self, recipe: Recipe) -> None:
        """Draw one request."""
        async for _ in self.worker.generate(Job(recipe=recipe)):
            pass


@serve.deployment(**REPLICA)
class Batched(Counting):
    """`@serve.batch`: at most eight requests at a time, each batch drawn to its end, one size after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(1)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=WAIT_S)
    async def draw(self, recipes: list[Recipe]) -> list[int]:
        """Draw a batch of requests."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._draw, recipes)

    def _draw(self, recipes: list[Recipe]) -> list[int]:
        slots = [self.engine.slot(recipe) for recipe in recipes]
        for shape in dict.fromkeys(slot.shape for slot in slots):
            while going := [slot for slot in slots if slot.shape == shape and slot.timesteps]:
                self.engine.step(going)
        return [len(self.engine.picture(slot).tobytes()) for slot in slots]


def capacity() -> Iterator[str]:
    """Yield a table of trials, rate by rate, and the capacities."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ray_session(3):
        sides = {
            name: serve.run(deployment.bind(), name=deployment.name, route_prefix=None)
            for name, deployment in (("ours", Ours), ("@serve.batch", Batched))
        }
        for name, side in sides.items():
            seconds, _ = side.told.remote().result()
            measured = ", ".join(f"{count}: {taken:.4f}" for count, taken in seconds.items())
            yield f"Seconds of a step by pictures in it, {name}: {measured}; {best_cap(seconds)} are worth it."
            yield ""
        alone = asyncio.run(unloaded(sides))
        for name, times in alone.items():
            spread = f"{times.min():.3f} to {times.max():.3f}"
            yield f"Alone, {name}: the {REQUESTS} requests take {times.mean():.3f} s ({spread})."
            yield ""
        yield "| side | requests/s | 95 % within, times its own alone | times the mean | median | pictures a step |"
        yield "|---|---|---|---|---|---|"
        lowest = highest = FIRST / alone["ours"].mean()
        found = {lowest: (yield from _rows(sides, alone, lowest))}
        while max(itertools.chain(*found[lowest].values())) > LONGEST:  # until both hold
            lowest /= GROWTH
            found[lowest] = yield from _rows(sides, alone, lowest)
        while min(itertools.chain(*found[highest].values())) <= LONGEST:  # until neither does
            highest *= GROWTH
            found[highest] = yield from _rows(sides, alone, highest)
        yield ""
        for measure, what in enumerate(("its own time", "the mean time")):
            ours, peers = (_highest({rate: seen[name][measure] for rate, seen in found.items()}) for name in sides)
            yield f"Capacity, of {what} alone: {ours:.3f} against {peers:.3f} requests/s, {ours / peers:.2f} times."
        serve.shutdown()


def _rows(sides: dict[str, DeploymentHandle], alone: dict[str, np.ndarray], rate: float) -> Generator[str, None, Seen]:
    """Yield a row for each side, at the same rate; return what was seen."""
    seen: Seen = {}
    for name, (times, pictures) in asyncio.run(trial(sides, rate)).items():
        ratios = times / alone[name]
        own, mean = np.quantile(ratios, 0.95), np.quantile(times, 0.95) / alone[name].mean()
        seen[name] = own, mean
        yield f"| {name} | {rate:.3f} | {own:.2f} | {mean:.2f} | {np.median(ratios):.2f} | {pictures:.2f} |"
    return seen


def _highest(times: dict[float, float]) -> float:
    """Return the highest rate at which `times`, by rate, are within LONGEST, on a straight line to the next one."""
    rates = sorted(times)
    holds = max(k for k, rate in enumerate(rates) if times[rate] <= LONGEST)
    return float(np.interp(LONGEST, [times[rate] for rate in rates[holds : holds + 2]], rates[holds : holds + 2]))


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


async def unloaded(sides: dict[str, DeploymentHandle]) -> dict[str, np.ndarray]:
    """Return the seconds of each request when it is alone on its side."""

    async def one_by_one(side: DeploymentHandle) -> np.ndarray:
        recipes = requests()
        return np.array([await _draw(side, recipe) for recipe in (recipes[0], *recipes)][1:])

    times = await asyncio.gather(*(one_by_one(side) for side in sides.values()))
    return dict(zip(sides, times, strict=True))


async def trial(sides: dict[str, DeploymentHandle], rate: float) -> dict[str, tuple[np.ndarray, float]]:
    """Return the seconds of each request where `rate` of them come in a second, and the mean pictures in a step."""
    rng = random.Random(1)
    moments = list(itertools.accumulate(rng.expovariate(rate) for _ in range(REQUESTS)))

    async def all_of(side: DeploymentHandle) -> tuple[np.ndarray, float]:
        await side.told.remote()
        asked = zip(requests(), moments, strict=True)
        times = await asyncio.gather(*(_draw(side, recipe, after) for recipe, after in asked))
        _, pictures = await side.told.remote()
        return np.array(times), pictures

    return dict(zip(sides, await asyncio.gather(*map(all_of, sides.values())), strict=True))


async def _draw(side: DeploymentHandle, recipe: Recipe, after: float = 0.0) -> float:
    """Return the seconds of a request that comes after so many."""
    await asyncio.sleep(after)
    begun = time.perf_counter()
    await side.draw.remote(recipe)
    return time.perf_counter() - begun
