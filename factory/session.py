"""The Ray session of a command: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator

from factory.settings import UsageError

# How often a task is tried again that Ray ended as the machine was short of memory: that may be another's fault, so
# more often than one that crashes (stage.py), but not without end, Ray's default. Each time it waits longer.
_TRIES_WITHOUT_MEMORY = 15


@contextlib.contextmanager
def ray_session(num_cpus: float = 2) -> Iterator[None]:
    """Hold a Ray: the caller's, the one RAY_ADDRESS names (set in a job), or a local one that ends here.

    A local one has at least `num_cpus` logical CPUs, so that no stage waits for ever on a small machine.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_task_oom_retries", str(_TRIES_WITHOUT_MEMORY))
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        cores = max(os.cpu_count() or 1, math.ceil(num_cpus))
        # Else Ray starts a worker for each logical CPU at once, and times out where they are more than the cores.
        unasked = {"prestart_worker_first_driver": False}
        with _known_to_its_processes():
            ray.init("local", num_cpus=cores, logging_level=logging.WARNING, _system_config=unasked)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _known_to_its_processes() -> Iterator[None]:
    """Tell a Ray that starts here its own address, through the environment that its processes are given.

    Where another Ray runs on the machine too, Ray Train would ask that one whether its controller lives, hear that it
    does not, and end the workers ("Placement group was removed").
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_gpus(num_gpus: float, without: str = "num_gpus=0") -> None:
    """Raise UsageError where what asks for so many GPUs would wait for ever: a local Ray gets no more.

    `without` is the setting that asks for none.
    """
    import ray

    if not os.environ.get("RAY_ADDRESS") and ray.cluster_resources().get("GPU", 0) < num_gpus:
        raise UsageError(f"{num_gpus:g} GPU(s) asked for, but Ray sees fewer on this machine. Give --set {without}.")
