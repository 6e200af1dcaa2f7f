"""A replica: one engine behind Serve, and the adapters that are loaded into it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator

import torch
from ray import serve
from ray.serve import metrics

from serving.adapters import Adapters, ModelBroken, ModelUnavailable, Served, version_of
from serving.batcher import best_cap
from serving.config import ServingConfig
from serving.job import Event, Facts, Job
from serving.warmup import in_own_thread, warm_engine
from serving.worker import Worker
from trainer.adapter import AdapterError, find_adapter

log = logging.getLogger("ray.serve")
REPLICA = "SketchReplica"
MAX_ADAPTERS = 8  # of the folder, loaded in a replica at a time; 98 MB each for SD v1.5 in fp16
PATIENCE, LEAST_PATIENCE_S = 5, 60.0  # times the whole warm-up, before a single step counts as one that hangs


class StepMetrics:
    """What a replica does, for Ray's own Prometheus endpoint: the ingress's /metrics does not know."""

    def __init__(self) -> None:
        bounds = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
        self._seconds = metrics.Histogram("animesketch_step_seconds", "Seconds of a denoising step.", bounds)
        self._steps = metrics.Counter("animesketch_picture_steps", "Steps of one picture each.")
        self._drawn = metrics.Gauge("animesketch_pictures_in_step", "Pictures in the last denoising step.")
        self._waiting = metrics.Gauge("animesketch_pictures_waiting", "Pictures that wait for a place in a replica.")
        self._places = metrics.Gauge(
            "animesketch_picture_places", "Pictures that a replica denoises at a time, at most."
        )

    def watch(self, drawn: int, waiting: int, seconds: float, places: int) -> None:
        """Take the numbers of a step, as `Worker` tells them."""
        if drawn:
            self._seconds.observe(seconds)
            self._steps.inc(drawn)
        self._drawn.set(drawn)
        self._waiting.set(waiting)
        self._places.set(places)


class LoadedAdapter:
    """What Serve holds of an adapter that is loaded."""

    def __init__(self, worker: Worker, served: Served) -> None:
        self._worker: Worker | None = worker
        self._served = served

    def __del__(self) -> None:
        """Unload it: Serve calls this when others have taken its place, then Python does when Serve drops it."""
        worker, self._worker = self._worker, None
        if worker is not None:  # the second call could unload what has been loaded again in between
            worker.remove_adapter(self._served)


@serve.deployment(name=REPLICA)
class SketchReplica:
    """One engine. Jobs are drawn side by side; the event loop stays free for Serve's health checks."""

    def __init__(self, config: ServingConfig) -> None:
        """Load base and adapter. The deployment fails where they don't belong together (AdapterError), or draw NaN."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        engine, seconds, warm_up_s = in_own_thread(lambda: warm_engine(config))
        patience_s = max(LEAST_PATIENCE_S, PATIENCE * warm_up_s)  # what compiles a step is in it
        cap = best_cap(seconds)
        log.info("Seconds of a step by pictures in it: %s; at most %d at a time.", seconds, cap)
        self.config = config
        self.adapters = Adapters(config.adapter_folder)
        self._broken: set[Served] = set()  # what can't be loaded, as long as it is not written anew
        self.worker = Worker(
            engine,
            config.model,
            version=version_of(find_adapter(config.adapter)),
            cap=cap,
            steps_per_second=cap / seconds[cap],
            patience_s=patience_s,
            watch=StepMetrics().watch,
        )

    async def check_health(self) -> None:
        """Raise when this replica can't draw. Serve calls this again and again."""
        await self.worker.check()

    async def facts(self) -> tuple[Facts, ServingConfig]:
        """Return what this replica is, and the settings that it was started with."""
        return self.worker.facts(), self.config

    @serve.multiplexed(max_num_models_per_replica=MAX_ADAPTERS)
    async def adapter(self, id: str) -> LoadedAdapter:
        """Load an adapter of the folder; Serve unloads the least recently used, and asks replicas that have it."""
        name = id.rpartition("@")[0]
        gone = ModelUnavailable(f"Model {name} was replaced or removed just now. Try again.")
        why = f"Model {name} cannot be loaded: the server's log says why."
        served = self.adapters.find(name)
        if served is None or served.id != id:
            raise gone
        if served in self._broken:
            raise ModelBroken(why)
        try:
            await self.worker.add_adapter(served)
        except (AdapterError, OSError, torch.OutOfMemoryError) as error:
            log.error("Adapter %s cannot be served: %s", name, error)
            if isinstance(error, AdapterError):
                self._broken.add(served)
                raise ModelBroken(why) from None
            raise ModelUnavailable(why) from None
        if self.adapters.find(name) != served:  # while it was read: who knows which one was
            self.worker.remove_adapter(served)
            raise gone
        return LoadedAdapter(self.worker, served)

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield the events of a job; Serve cancels this when the client is gone."""
        if job.adapter is not None:
            await self.adapter(job.adapter.id)  # type: ignore[operator]
        async with contextlib.aclosing(self.worker.generate(job)) as events:
            async for event in events:
                yield event
