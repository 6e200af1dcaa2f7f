"""The Ray Serve application: a CPU ingress that speaks HTTP, and autoscaled replicas that each hold one engine.

    serve run serving.app:build adapter=/abs/run base=/abs/stable-diffusion-v1-5

No `from __future__ import annotations` here: it turns the annotation of the app builder's argument into text, which
Serve does not read.
"""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import create_api
from serving.backend import ServeBackend
from serving.config import ServingConfig, from_args
from serving.keys import is_loopback, load_keys
from serving.replica import SketchReplica
from trainer.adapter import read_config

INGRESS = "SketchIngress"
HEALTH_S = 2.0  # between two health checks of a replica; the third in a row that fails has it replaced


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


def _refuse_open_bind(host: str | None) -> None:
    """Raise ValueError unless Serve listens on loopback only."""
    if is_loopback(host):
        return
    raise ValueError(
        f"Serve listens on {host}, and no key_file is set: anybody who reaches this machine could use the server. Give "
        "key_file=/abs/keys, or start Serve with --http-host 127.0.0.1."
    )
