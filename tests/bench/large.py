"""A 3840 x 2160 frame at 10240 px: peak memory of the command, read from outside; and time against size.

`make bench ARGS=large`: a quarter of an hour on two cores.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2

from tests.bench.art import scene

FOLDER = Path("out/bench/large")
SIZES = (("--size=1024",), ("--size=2048",), ("--size=4096",), ("--size=10240",))
# A process begins with the peak of the one that starts it: this one is small.
_WATCHED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
SQUARE = ("--size=10240", "--set=sketch.square=stretch")


def large() -> Iterator[str]:
    """Yield the table: seconds and peak resident memory by converter and long side."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    frame = FOLDER / "frame.png"
    cv2.imwrite(
        str(frame), cv2.resize(scene("concert1")[90:1440, :, ::-1], (3840, 2160), interpolation=cv2.INTER_CUBIC)
    )
    yield "| converter | size | megapixels | seconds | seconds per megapixel | peak resident memory |"
    yield "|---|---|---|---|---|---|"
    for converter, sizes in (("xdog", (*SIZES, SQUARE)), ("micro", (*SIZES, SQUARE)), ("hed", SIZES)):
        for size in sizes:
            output = FOLDER / f"{converter}.png"
            seconds, peak = measured(frame, output, "--converter", converter, *size)
            height, width = cv2.imread(str(output), cv2.IMREAD_UNCHANGED).shape
            pixels = height * width / 1e6
            yield (
                f"| {converter} | {width} x {height} | {pixels:.1f} | {seconds:.1f} | {seconds / pixels:.2f} | "
                f"{peak / 1e9:.2f} GB |"
            )


def measured(frame: Path, output: Path, *options: str) -> tuple[float, float]:
    """Return the seconds and the peak resident bytes of one command."""
    command = [sys.executable, "-m", "factory", "sketch", "--image", str(frame), "--output", str(output)]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, *command, *options], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begun, int(done.stdout) * 1024
