"""What the way through the server costs: the time of a request over HTTP, less the time that its engine is at work.

The peer is Serve itself: an ingress that asks a replica which draws the same by the bare engine, and answers as many
bytes; and once more without anything to draw. Requests come one after the other, of each kind in turn.
Serve's own switches (RAY_SERVE_…) of the environment are those of all its processes.
"""

from __future__ import annotations

import asyncio
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
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from cluster.local import free_ports
from serving.app import SketchIngress
from serving.config import ServingConfig, from_args
from serving.recipe import Recipe
from serving.replica import REPLICA, SketchReplica
from serving.warmup import warm_engine
from tests.bench.sampling import new_adapter, sketch
from trainer.backbone import load_backbone
from trainer.base import MICRO

REPO = Path(__file__).parents[2]
PATH = "/v1/images/generations"
PROMPT = "a girl with long hair, line art"
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


class Bare:
    """A replica that draws by the engine alone."""

    def __init__(self, config: ServingConfig, answer: bytes) -> None:
        torch.set_num_threads(1)
        self._engine, self._answer, self._seconds = warm_engine(config)[0], answer, 0.0

    async def draw(self, steps: int) -> bytes:
        """Draw a picture, or nothing with no steps; return bytes as many as there are in an answer."""
        if steps:
            await asyncio.to_thread(self._draw, Recipe(prompt=PROMPT, num_inference_steps=steps))
        return self._answer

    def _draw(self, recipe: Recipe) -> None:
        begun = time.perf_counter()
        self._engine.infer(recipe)
        self._seconds += time.perf_counter() - begun

    async def seconds(self) -> float:
        """Return the seconds at work so far."""
        return self._seconds


class Asks:
    """An ingress that asks such a replica."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    async def __call__(self, http: Request) -> Response:
        """Answer a request once its body is read and the replica has answered."""
        answer = await self._replica.draw.remote((await http.json())["num_inference_steps"])
        return Response(answer, media_type="application/json")


def ingress() -> Iterator[str]:
    """Yield a table of the overhead of single requests, one after the other, on the micro base."""
    file = io.BytesIO()
    sketch().save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    plain = {"prompt": PROMPT, "num_inference_steps": STEPS}
    yield f"{REQUESTS} requests of {STEPS} steps a row; milliseconds."
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
            idle: Any = {"ray_actor_options": {"num_cpus": 0}}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                answer = client.post(PATH, json=plain).raise_for_status().content
                bare = serve.deployment(Bare, **idle).bind(config, answer)
                serve.run(serve.deployment(Asks, **idle).bind(bare), name="peer", route_prefix="/peer")
                alone = serve.get_deployment_handle("Bare", "peer")
                rows = [
                    Row("Serve alone, nothing drawn", alone, "/peer", {**plain, "num_inference_steps": 0}),
                    Row("Serve alone", alone, "/peer", plain),
                    Row("a prompt", engine, PATH, plain),
                    Row("a prompt and a sketch", engine, PATH, {**plain, "image": picture}),
                ]
                for seed in range(REQUESTS + 5):
                    first = seed % len(rows)
                    for row in rows[first:] + rows[:first]:
                        row.ask(client, seed)
                yield from (row.text() for row in rows)
        finally:
            serve.shutdown()
            ray.shutdown()


class Row:
    """One kind of request, and what it took."""

    def __init__(self, title: str, engine: Any, path: str, body: dict[str, Any]) -> None:
        self._title, self._engine, self._path, self._body = title, engine, path, body
        self._whole: list[float] = []
        self._inside: list[float] = []

    def ask(self, client: httpx.Client, seed: int) -> None:
        """Send one more."""
        before = self._engine.seconds.remote().result()
        begun = time.perf_counter()
        client.post(self._path, json={**self._body, "seed": seed}).raise_for_status()
        self._whole.append(1000 * (time.perf_counter() - begun))
        self._inside.append(1000 * (self._engine.seconds.remote().result() - before))

    def text(self) -> str:
        """Return the row of the table, without the first five requests."""
        whole, inside = self._whole[5:], self._inside[5:]
        over = sorted(a - b for a, b in zip(whole, inside, strict=True))
        found = statistics.median(whole), statistics.median(inside), statistics.median(over)
        return f"| {self._title} | {' | '.join(f'{value:.1f}' for value in (*found, over[int(0.95 * len(over))]))} |"
