"""The replicas as the HTTP interface sees them: jobs for them, and how they are."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, cast

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serving.adapters import ModelBroken, ModelUnavailable
from serving.config import ServingConfig
from serving.job import Event, Facts, Job, Picture, SamplerStopped
from serving.pictures import BadPicture
from serving.protocol import ApiError, Busy

log = logging.getLogger("ray.serve")
STATUS_S = 2.0  # how long an answer of Serve's controller is good for, where somebody asks how things are
REPLICAS_S = 15.0  # and where it is for the number of replicas: asking takes tens of milliseconds from other requests
ASKED_S, KNOWN_S = 5.0, 0.5  # how long one is waited for, and where the last one will do
KEPT_S = 60.0  # how long the last one is told while none comes: replicas go on without their controller
AGAIN = {"Retry-After": "5"}  # with answers of 503: another replica is there by then
NOT_AGAIN = {"X-Should-Retry": "false"}  # OpenAI's word to its client: an adapter that can't be loaded stays so


class ServeBackend:
    """A `serving.answers.Backend` over the handle of a deployment."""

    def __init__(self, config: ServingConfig, replicas: DeploymentHandle) -> None:
        self._config = config
        self._replicas = replicas
        self._facts: Facts | None = None
        self._asked: asyncio.Task[Facts] | None = None
        self._running = config.min_replicas
        self._trouble: str | None = None
        self._told: tuple[str | None, str] = (None, "")  # in the log, at last
        self._seen = -math.inf  # when both were
        self._looked_at = -math.inf  # when they were asked for
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
        looking, known = self._look(STATUS_S), time.monotonic() - self._seen < KEPT_S
        if looking and not looking.done():
            await asyncio.wait((looking,), timeout=KNOWN_S if known else ASKED_S)
        return self._trouble if time.monotonic() - self._seen < KEPT_S else "Serve's controller does not answer."

    def replicas(self) -> int:
        """Return how many replicas ran when last looked: jobs and /health do so."""
        return self._running

    def _look(self, after_s: float) -> asyncio.Task[None] | None:
        """Ask Serve's controller unless it was within `after_s`; once at a time, since it may hold a thread."""
        if (self._looking is None or self._looking.done()) and time.monotonic() >= self._looked_at + after_s:
            self._looked_at = time.monotonic()
            self._looking = asyncio.create_task(self._ask_controller())
        return self._looking

    async def _ask_controller(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
            app = status.applications[self._replicas.app_name]
            replica = app.deployments[self._replicas.deployment_name]
        except Exception as error:  # it is away, or has not heard of this application yet
            log.warning("Serve's controller does not say how the replicas are: %r", error)
            return
        states: dict[Any, int] = replica.replica_states
        self._running, trouble = states.get("RUNNING", 0), None
        if not self._running and app.status.value == "DEPLOYING":
            trouble = "No replica runs yet: they are starting."
        elif not self._running:
            trouble = "No replica runs: the server's log says why."
        if trouble is not None and (trouble, replica.message) != self._told:
            log.warning("%s %s", trouble, replica.message)
        self._told = trouble, replica.message
        self._trouble, self._seen = trouble, time.monotonic()

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield the events of a job; closing this cancels it in its replica."""
        asked: Any = {"stream": True} | ({"multiplexed_model_id": job.adapter.id} if job.adapter else {})
        response = cast(DeploymentResponseGenerator, self._replicas.options(**asked).generate.remote(job))
        self._look(REPLICAS_S)
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
