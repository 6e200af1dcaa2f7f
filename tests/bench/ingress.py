"""What the way through the server costs: the time of a request over HTTP, less the time that its engine is at work.

The peer is Serve itself: an application whose ingress asks a replica that does nothing, and answers as many bytes.
Serve's own switches (RAY_SERVE_…) of the environment are those of all its processes.
"""

from __future__ import annotations

import base64
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from cluster.local import free_ports
from serving.app import SketchIngress
from serving.config import ServingConfig, from_args
from serving.replica import REPLICA, SketchReplica
from tests.bench.sampling import new_adapter, sketch
from trainer.backbone import load_backbone
from trainer.base import MICRO

REPO = Path(__file__).parents[2]
PATH = "/v1/images/generations"
REQUESTS, STEPS = 60, 4


class TimedReplica(SketchReplica.func_or_class):  # type: ignore[misc, name-defined]
    """A replica that counts the seconds that its engine is at work."""

    def __init__(self, config: ServingConfig) -> None:
        super().__init__(config)
        self._seconds, engine = 0.0, self.worker.engine
        for name in ("slot", "step", "picture"):
            setattr(engine, name, self._timed(getattr(engine, name)))

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                self._seconds += time.perf_counter() - begun

        return timed

    async def seconds(self) -> float:
        """Return the seconds so far."""
        return self._seconds


class Idle:
    """A replica without an engine."""

    async def seconds(self) -> float:
        """Return the seconds at work so far."""
        return 0.0


class Asks:
    """An ingress that asks such a replica."""

    def __init__(self, replica: Any, answer: str) -> None:
        self._replica, self._answer = replica, answer

    async def __call__(self, http: Request) -> JSONResponse:
        """Answer a request once its body is read and the replica has answered."""
        await http.body()
        await self._replica.seconds.remote()
        return JSONResponse({"data": self._answer})


def ingress() -> Iterator[str]:
    """Yield a table of the overhead of single requests, one after the other, on the micro base."""
    file = io.BytesIO()
    sketch().save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    plain = {"prompt": "a girl with long hair, line art", "num_inference_steps": STEPS}
    yield f"{REQUESTS} requests of {STEPS} steps, one after the other; milliseconds."
    yield ""
    yield "| request | whole | engine | overhead: median | 95 % within |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        new_adapter(load_backbone(MICRO)).save_pretrained(Path(folder) / "adapter")
        config = from_args({"adapter": f"{folder}/adapter", "base": MICRO, "num_threads": 1, "ingress_num_cpus": 0.1})
        switches = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": str(REPO), **switches}},
        )  # fmt: skip
        try:
            (port,) = free_ports(1)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            replica = serve.deployment(TimedReplica, name=REPLICA).bind(config)
            serve.run(SketchIngress.bind(config, replica), name="bench", route_prefix="/")
            engine = serve.get_deployment_handle(REPLICA, "bench")
            idle = {"ray_actor_options": {"num_cpus": 0}}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                answer = client.post(PATH, json=plain).raise_for_status().text
                nothing = serve.deployment(Idle, **idle).bind()
                serve.run(serve.deployment(Asks, **idle).bind(nothing, answer), name="peer", route_prefix="/peer")
                yield row("Serve alone", client, serve.get_deployment_handle("Idle", "peer"), "/peer", plain)
                yield row("a prompt", client, engine, PATH, plain)
                yield row("a prompt and a sketch", client, engine, PATH, {**plain, "image": picture})
        finally:
            serve.shutdown()
            ray.shutdown()


def row(title: str, client: httpx.Client, engine: Any, path: str, body: dict[str, Any]) -> str:
    """Return a row of the table."""
    whole, inside = [], []
    for seed in range(REQUESTS + 5):
        before = engine.seconds.remote().result()
        begun = time.perf_counter()
        client.post(path, json={**body, "seed": seed}).raise_for_status()
        whole.append(1000 * (time.perf_counter() - begun))
        inside.append(1000 * (engine.seconds.remote().result() - before))
    over = sorted(a - b for a, b in zip(whole[5:], inside[5:], strict=True))
    found = statistics.median(whole[5:]), statistics.median(inside[5:]), statistics.median(over)
    return f"| {title} | {' | '.join(f'{value:.1f}' for value in (*found, over[int(0.95 * len(over))]))} |"
