"""python -m tests.bench: each part against its peer, in the same run on the same machine."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"})


def main(names: list[str]) -> int:
    """Print the tables named, by default all but `cuts`, which takes an hour the first time; return the exit code."""
    import torch

    from tests.bench.cuts import cuts
    from tests.bench.decoding import decoding
    from tests.bench.harness import HEADER
    from tests.bench.sampling import sampling
    from tests.bench.sketching import sketching

    tables = {"decoding": decoding, "sampling": sampling, "sketching": sketching}
    unknown = set(names) - {*tables, "cuts"}
    if unknown:
        print(f"No benchmark {', '.join(sorted(unknown))}. There are: {', '.join(tables)}, cuts.", file=sys.stderr)
        return 2
    if "cuts" in names:
        for line in cuts():
            print(line, flush=True)
        names = [name for name in names if name != "cuts"]
        if not names:
            return 0
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}; median (range) of 5\n"
    )
    print(HEADER, flush=True)
    for name in names or tables:
        with tempfile.TemporaryDirectory() as folder:
            for comparison in tables[name](Path(folder)):
                print(comparison.row(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
