"""python -m tests.bench: each part against its peer, in the same run on the same machine."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.harness import Comparison

os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"})


def main(names: list[str]) -> int:
    """Print the tables named; return the exit code. Without names those that take minutes are left out."""
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    from tests.bench.capacity import capacity
    from tests.bench.cores import cores
    from tests.bench.cuts import cuts
    from tests.bench.cuts_live import cuts_live
    from tests.bench.decoding import decoding
    from tests.bench.duplicates import duplicates
    from tests.bench.ingress import ingress
    from tests.bench.large import large
    from tests.bench.reading import reading
    from tests.bench.sampling import sampling
    from tests.bench.seams import seams
    from tests.bench.sketching import tiling, truth
    from tests.bench.text import text
    from tests.bench.training import training

    speeds = {"decoding": decoding, "cores": cores, "sampling": sampling, "tiling": tiling}
    speeds |= {"reading": reading, "training": training}
    finds = {
        "duplicates": duplicates,
        "text": text,
        "truth": truth,
        "seams": seams,
        "capacity": capacity,
        "ingress": ingress,
        "large": large,
        "cuts": cuts,
        "cuts-live": cuts_live,
    }
    unknown = set(names) - {*speeds, *finds}
    if unknown:
        there = ", ".join([*speeds, *finds])
        print(f"No benchmark {', '.join(sorted(unknown))}. There are: {there}.", file=sys.stderr)
        return 2
    names = names or [*speeds, "duplicates", "text", "truth", "seams", "ingress", "capacity"]
    _print_speeds([speeds[name] for name in names if name in speeds])
    for name in names:
        if name in finds:
            print(f"\n{name}\n")
            for line in finds[name]():
                print(line, flush=True)
    return 0


def _print_speeds(tables: list[Callable[[Path], Iterable[Comparison]]]) -> None:
    """Print what is measured in time, as one table."""
    import torch

    from tests.bench.harness import HEADER

    if not tables:
        return
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{os.cpu_count()} cores, {versions}; median (range) of 3 or 5\n")
    print(HEADER, flush=True)
    for table in tables:
        with tempfile.TemporaryDirectory() as folder:
            for comparison in table(Path(folder)):
                print(comparison.row(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
