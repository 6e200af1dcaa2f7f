"""The Ray session of a command: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
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
        ray.init("local", num_cpus=cores, logging_level=logging.WARNING, _system_config=unasked)
    try:
        yield
    finally:
        ray.shutdown()


def check_gpus(num_gpus: float) -> None:
    """Raise UsageError where a task that asks for so many GPUs would wait for ever: a local Ray gets no more."""
    import ray

    if not os.environ.get("RAY_ADDRESS") and ray.cluster_resources().get("GPU", 0) < num_gpus:
        raise UsageError(f"num_gpus={num_gpus:g}, but Ray sees no such GPU on this machine. Give --set num_gpus=0.")
