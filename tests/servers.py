"""Servers under test, in the session's Ray: an adapter to serve, the application, and the processes it runs in."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from cluster.local import free_ports
from trainer.adapter import Adapter
from trainer.backbone import load_backbone
from trainer.projection import VARIANTS

URL = "/v1/images/generations"
ONE = {"prompt": "line art", "num_inference_steps": 35, "seed": 0}  # a request like others
STEPS = (20, 50)  # of the others, from and to
SMALL = {"num_threads": "1", "num_cpus": "0.5", "ingress_num_cpus": "0.1"}  # of a server that leaves room for clients


def save_adapter(base: str, folder: Path) -> Path:
    """Write an adapter for `base` with random weights, wide enough that a reference changes the picture."""
    backbone = load_backbone(base)
    sizes = VARIANTS["plus"].fitting(backbone.unet.config["cross_attention_dim"], backbone.image_encoder.config, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        adapter = Adapter.for_unet(backbone.unet, sizes)
        for module in adapter.ip_adapter.values():
            torch.nn.init.normal_(module.to_k_ip.weight, std=0.5)  # type: ignore[union-attr, arg-type]
            torch.nn.init.normal_(module.to_v_ip.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    adapter.save_pretrained(folder, base={"id": backbone.id, "weights_hash": backbone.weights_hash})
    return folder


@contextlib.contextmanager
def serving(name: str, **arguments: Any) -> Iterator[httpx.Client]:
    """Run the application under `name`, and yield a client of it."""
    from ray import serve

    from serving.app import build

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(arguments), name=name, route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()


def seconds_of(client: httpx.Client) -> float:
    """Return the seconds that `ONE` takes."""
    begun = time.monotonic()
    client.post(URL, json=ONE).raise_for_status()
    return time.monotonic() - begun


def processes(app: str, deployment: str) -> dict[str, int]:
    """Return the process of each replica that Serve has, by the replica's name."""
    import ray

    start = f"SERVE_REPLICA::{app}#{deployment}#"
    names = [it["name"] for it in ray.util.list_named_actors(all_namespaces=True) if it["name"].startswith(start)]
    found = {}
    for name in names:
        with contextlib.suppress(ValueError, ray.exceptions.RayActorError):  # gone in between
            actor = ray.get_actor(name, namespace="serve")
            found[name] = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return found


def pin(process: int, *cores: int) -> None:
    """Have all threads of a process, if it still runs, run on these cores alone."""
    with contextlib.suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


def memory_mb(process: int) -> float:
    """Return the memory that a process holds and shares with no file (RssAnon)."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kilobytes) / 1024
