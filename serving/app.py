"""The Ray Serve application: a CPU ingress that speaks HTTP, and autoscaled replicas that each hold one engine.

    serve run serving.app:build adapter=/abs/run base=/abs/stable-diffusion-v1-5

No `from __future__ import annotations` here: it turns the annotation of the app builder's argument into text, which
Serve does not read.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, cast

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError
from ray.serve import metrics
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.adapters import Adapters, ModelBroken, ModelUnavailable, Served, version_of
from serving.api import create_api
from serving.batcher import best_cap, step_seconds
from serving.config import ServingConfig, from_args
from serving.engine import ONLY, Engine
from serving.job import Event, Facts, Job, Picture, SamplerStopped
from serving.keys import is_loopback, load_keys
from serving.pictures import BadPicture
from serving.protocol import ApiError, Busy
from serving.worker import Worker, draw_canary, draw_shapes, in_own_thread
from trainer.adapter import AdapterError, find_adapter, read_config

log = logging.getLogger("ray.serve")
REPLICA, INGRESS = "SketchReplica", "SketchIngress"
MAX_ADAPTERS = 8  # of the folder, loaded in a replica at a time; 98 MB each for SD v1.5 in fp16
STATUS_S, ASKED_S, KEPT_S = 2.0, 5.0, 60.0  # an answer of Serve's controller is asked for anew after the first, waited
# for for the second, and used for the third: replicas go on without their controller
HEALTH_S = 2.0  # between two health checks; the third in a row that fails has a replica replaced
AGAIN = {"Retry-After": "5"}  # with answers of 503: another replica is there by then
NOT_AGAIN = {"X-Should-Retry": "false"}  # OpenAI's word to its client: an adapter that can't be loaded stays so
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
        """Take the numbers of a step; of zeros when nothing is drawn."""
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
        engine, seconds, warm_up_s = in_own_thread(lambda: _warm_engine(config))
        patience_s = max(LEAST_PATIENCE_S, PATIENCE * warm_up_s)  # what compiles a step is in it
        cap = best_cap(seconds)
        log.info("Seconds of a step by pictures in it: %s; at most %d at a time.", seconds, cap)
        self.config = config
        self.adapters = Adapters(config.adapter_folder)
        self._broken: set[str] = set()  # ids of adapters that can't be loaded, for good: an id changes with its content
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
    async def adapter(self, id: str) -> "LoadedAdapter":
        """Load an adapter of the folder; Serve unloads the least recently used, and asks replicas that have it."""
        name = id.rpartition("@")[0]
        gone = ModelUnavailable(f"Model {name} was replaced or removed just now. Try again.")
        why = f"Model {name} cannot be loaded: the server's log says why."
        if id in self._broken:
            raise ModelBroken(why)
        served = self.adapters.find(name)
        if served is None or served.id != id:
            raise gone
        try:
            await self.worker.add_adapter(served)
        except (AdapterError, OSError, torch.OutOfMemoryError) as error:
            log.error("Adapter %s cannot be served: %s", name, error)
            if isinstance(error, AdapterError):
                self._broken.add(id)
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


class ServeBackend:
    """The replicas, as the HTTP interface sees them (`serving.answers.Backend`)."""

    def __init__(self, config: ServingConfig, replicas: DeploymentHandle) -> None:
        self._config = config
        self._replicas = replicas
        self._facts: Facts | None = None
        self._asked: asyncio.Task[Facts] | None = None
        self._running = config.min_replicas
        self._trouble: str | None = None
        self._seen = -math.inf  # when both were
        self._looking: asyncio.Task[None] | None = None

    async def facts(self) -> Facts:
        """Return what the server is: remembered once a replica of our own settings has said it.

        During a rolling update the one asked may still be of the settings before. One question at a time is asked: it
        waits for a place like a request.
        """
        if self._facts is not None:
            return self._facts
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asked)

    async def _ask(self) -> Facts:
        with _told():
            facts, config = await cast(Any, self._replicas.facts.remote())
        facts = dataclasses.replace(facts, model=self._config.model)
        if config == self._config:
            self._facts = facts
        return facts

    async def trouble(self) -> str | None:
        """Return why jobs can't run now: no replica runs, or nobody knows."""
        if looking := self._look():
            await asyncio.wait((looking,), timeout=ASKED_S)
        if time.monotonic() - self._seen > KEPT_S:
            return "Serve's controller does not answer."
        return self._trouble

    def replicas(self) -> int:
        """Return how many replicas ran when last looked, and look again where that is a while ago."""
        self._look()
        return self._running

    def _look(self) -> asyncio.Task[None] | None:
        """Ask Serve's controller unless it has just answered; one question at a time, since one may hold a thread."""
        if time.monotonic() - self._seen < STATUS_S:
            return None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._ask_controller())
        return self._looking

    async def _ask_controller(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
            app = status.applications[serve.get_replica_context().app_name]
            replica = app.deployments[REPLICA]
        except Exception as error:  # it is away, or has not heard of this application yet
            log.warning("Serve's controller does not say how the replicas are: %r", error)
            return
        states: dict[Any, int] = replica.replica_states
        self._running, trouble = states.get("RUNNING", 0), None
        if not self._running and app.status.value == "DEPLOYING":
            trouble = "No replica runs yet: they are starting."
        elif not self._running:
            trouble = "No replica runs: the server's log says why."
        if trouble not in (None, self._trouble):
            log.warning("%s %s", trouble, replica.message)
        self._trouble, self._seen = trouble, time.monotonic()

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield the events of a job; closing this cancels it in its replica."""
        asked: Any = {"stream": True} | ({"multiplexed_model_id": job.adapter.id} if job.adapter else {})
        response = cast(DeploymentResponseGenerator, self._replicas.options(**asked).generate.remote(job))
        unfinished = job.recipe.n
        try:
            with _told():
                async for event in response:
                    yield event
                    unfinished -= isinstance(event, Picture) and event.partial is None
                    if not unfinished:  # the stream's end, which brings nothing, comes milliseconds later
                        return
        except (asyncio.CancelledError, GeneratorExit):  # not after an error: cancel() would raise it again, bare
            response.cancel()
            raise


class Disconnects:
    """ASGI middleware: Serve's `receive` may raise where a client left; ASGI has a message for that."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def received() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self.app(scope, received, send)


@serve.deployment(name=INGRESS)
@serve.ingress()
class SketchIngress:
    """Checks requests and keys, keeps the queue short; needs no GPU."""

    def __init__(self, config: ServingConfig, replicas: DeploymentHandle) -> None:
        self.config = config
        self.replicas = replicas
        self.digests = load_keys(config.key_file) if config.key_file else None
        if self.digests is None:
            client: Any = _get_global_client()  # Serve has no public way to ask where it listens
            _refuse_open_bind(client.http_config.host)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP interface; built here, in the replica, so that it need not be pickled."""
        api = create_api(self.config, ServeBackend(self.config, self.replicas), self.digests, request_ids=False)
        api.add_middleware(Disconnects)
        return api


def build(args: dict) -> serve.Application:
    """Return the application for `serve run serving.app:build adapter=URI …`; fields are those of ServingConfig.

    ValueError for a wrong or missing argument, a path at which nothing is here, and what holds no adapter or no keys:
    told here, at once, since replicas are tried for minutes.
    """
    config = from_args(args)
    for name in ("adapter", "base", "image_encoder", "adapter_folder", "key_file"):
        path = getattr(config, name)
        if path and os.path.isabs(path) and not os.path.exists(path):
            raise ValueError(f"{name}: there is nothing at {path}. All nodes must see it there, this one too.")
    read_config(config.adapter)
    if config.key_file:
        load_keys(config.key_file)
    refusal: Any = {"status_code": 429, "retry_after_s": config.retry_after_s}
    # what a replica has accepted is finished before it is stopped, and no request is older than that
    grace: Any = {"graceful_shutdown_timeout_s": config.request_timeout_s}
    replica = SketchReplica.options(
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": min(config.target_ongoing_requests, config.max_ongoing_requests),
        },
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=refusal,
        max_surge_percent=config.max_surge_percent,
        health_check_period_s=HEALTH_S,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        **grace,
    )
    ingress = SketchIngress.options(
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=config.max_requests + 64,  # room for /health and for answers of 429
        max_queued_requests=64,
        backpressure_config=refusal,
        max_surge_percent=100,  # the old one answers until the new one does
        ray_actor_options={"num_cpus": config.ingress_num_cpus},
        **grace,
    )
    return ingress.bind(config, replica.bind(config))


def _warm_engine(config: ServingConfig) -> tuple[Engine, dict[int, float], float]:
    """Return the engine after its canary, the seconds of its steps by pictures in them, and those of its warm-up."""
    device = config.device or ("cuda" if config.num_gpus else "cpu")
    engine = Engine.load(
        config.adapter,
        base=config.base,
        image_encoder=config.image_encoder,
        dtype=getattr(torch, config.dtype or ("float32" if device == "cpu" else "bfloat16")),
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


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what Serve raises about its replicas into what the HTTP interface answers."""
    try:
        yield
    except BackPressureError:
        raise Busy from None
    except BadPicture as error:
        raise getattr(error, "cause", error) from None  # what Serve raises has the replica's trace for a message
    except ModelUnavailable as error:
        (message,) = getattr(error, "cause", error).args
        headers = NOT_AGAIN if isinstance(error, ModelBroken) else AGAIN
        raise ApiError(503, message, type="server_error", code="model_unavailable", headers=headers) from None
    except (
        RayActorError, ObjectLostError, DeploymentUnavailableError, ReplicaUnavailableError, SamplerStopped
    ) as error:  # fmt: skip
        message = "The replica that worked on this is gone. Try again."
        raise ApiError(503, message, type="server_error", code="unavailable", headers=AGAIN) from error


def _refuse_open_bind(host: str | None) -> None:
    """Raise ValueError unless Serve listens on loopback only."""
    if is_loopback(host):
        return
    raise ValueError(
        f"Serve listens on {host}, and no key_file is set: anybody who reaches this machine could use the server. Give "
        "key_file=/abs/keys, or start Serve with --http-host 127.0.0.1."
    )
