"""How many requests a second a replica takes with short waits: ours, and Ray Serve's batching over the same sampler.

Requests of mixed steps and sizes come at random (Poisson), the same ones at the same times on both sides. The capacity
is the highest rate at which 95 of 100 are answered within three times what they take alone.
"""

from __future__ import annotations

import asyncio
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

REQUESTS = 60  # of a trial
LONGEST, GROWTH = 3.0, 1.3  # times the unloaded time; a rate to the next
FIRST = {"ours": 0.6, "@serve.batch": 0.35}  # load of the first trial, near what it comes to
WAIT_S = 0.05  # of the peer, for a batch to fill up: it pays that alone too
REPLICA = {
    "max_ongoing_requests": 1000,
    "ray_actor_options": {"num_cpus": 1},
    "logging_config": {"log_level": "WARNING"},
}


class Counting:
    """An engine on the micro base that counts the pictures of its steps."""

    def __init__(self) -> None:
        torch.set_num_threads(2)  # the replicas are at work in turn
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
        alone = asyncio.run(unloaded(sides["ours"]))
        for name, side in sides.items():
            seconds, _ = side.told.remote().result()
            measured = ", ".join(f"{count}: {taken:.4f}" for count, taken in seconds.items())
            yield f"Seconds of a step by pictures in it, {name}: {measured}; ours takes {best_cap(seconds)} at most."
            yield ""
        yield f"Alone, the {REQUESTS} requests take {alone.mean():.3f} s ({alone.min():.3f} to {alone.max():.3f})."
        yield ""
        yield "| side | requests/s | 95 % within, times its own alone | times the mean | median | pictures a step |"
        yield "|---|---|---|---|---|---|"
        capacities = []
        for name, side in sides.items():
            trials = Trials(name, side, alone + (WAIT_S if name == "@serve.batch" else 0.0))
            own = yield from trials.highest(0)
            capacities.append((own, (yield from trials.highest(1))))
        yield ""
        for what, ours, peers in zip(("its own time", "the mean time"), *capacities, strict=True):
            yield f"Capacity, of {what} alone: {ours:.3f} against {peers:.3f} requests/s, {ours / peers:.2f} times."
        serve.shutdown()


class Trials:
    """Trials of one side, at rates that are GROWTH apart."""

    def __init__(self, name: str, side: DeploymentHandle, alone: np.ndarray) -> None:
        self._name, self._side, self._alone = name, side, alone
        self._seen: dict[int, tuple[float, float]] = {}

    def highest(self, measure: int) -> Generator[str, None, float]:
        """Yield a row for each trial; return the rate at which a measure passes LONGEST.

        Between neighbouring rates of which one holds and one does not, the measure is taken for a straight line.
        """
        k = 0
        while (yield from self._times(k + 1))[measure] <= LONGEST:
            k += 1
        while (yield from self._times(k))[measure] > LONGEST:
            k -= 1
        holds, fails = (yield from self._times(k))[measure], (yield from self._times(k + 1))[measure]
        return self._rate(k) + (self._rate(k + 1) - self._rate(k)) * (LONGEST - holds) / (fails - holds)

    def _rate(self, k: int) -> float:
        return FIRST[self._name] * GROWTH**k / self._alone.mean()

    def _times(self, k: int) -> Generator[str, None, tuple[float, float]]:
        """Return the times of 95 of 100 requests at a rate: of their own alone, and of the mean; a row if it is new."""
        if k not in self._seen:
            times, pictures = asyncio.run(trial(self._side, rate := self._rate(k)))
            own, mean = np.quantile(times / self._alone, 0.95), np.quantile(times, 0.95) / self._alone.mean()
            self._seen[k] = own, mean
            middle = np.median(times / self._alone)
            yield f"| {self._name} | {rate:.3f} | {own:.2f} | {mean:.2f} | {middle:.2f} | {pictures:.2f} |"
        return self._seen[k]


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


async def unloaded(side: DeploymentHandle) -> np.ndarray:
    """Return the seconds of each request when it is alone."""
    times, recipes = [], requests()
    for recipe in (recipes[0], *recipes):
        begun = time.perf_counter()
        await side.draw.remote(recipe)
        times.append(time.perf_counter() - begun)
    return np.array(times[1:])


async def trial(side: DeploymentHandle, rate: float) -> tuple[np.ndarray, float]:
    """Return the seconds of each request where `rate` of them come in a second, and the mean pictures in a step."""
    rng, at, asked = random.Random(1), 0.0, []
    await side.told.remote()

    async def ask(recipe: Recipe, after: float) -> float:
        await asyncio.sleep(after)
        begun = time.perf_counter()
        await side.draw.remote(recipe)
        return time.perf_counter() - begun

    for recipe in requests():
        at += rng.expovariate(rate)
        asked.append(ask(recipe, at))
    times = await asyncio.gather(*asked)
    _, pictures = await side.told.remote()
    return np.array(times), pictures
