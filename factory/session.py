"""The Ray session of a command: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS or the job names, or start a local one that ends here."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without GPUs see them as they are
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    else:
        # Workers share two logical CPUs at least, so that a stage and its consumer can run on one core.
        ray.init(
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    try:
        yield
    finally:
        ray.shutdown()
