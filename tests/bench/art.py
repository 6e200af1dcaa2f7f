"""Real anime art for the sketch benchmarks: a scene of Debian's renpy-demo (Expat; art by Piroshki, Mugenjohncel).

The package is downloaded once and unpacked, not installed.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np

FOLDER = Path("out/bench/art")
PACKAGE = "renpy-demo"
SCENES = ("concert1", "concert2", "concert3")  # 2400 x 1530, one scene under three lights


def scene(name: str) -> np.ndarray:
    """Return a scene as RGB uint8 H,W,3."""
    path = FOLDER / f"{name}.png"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=aside, check=True, capture_output=True)
            subprocess.run(["dpkg-deb", "-x", str(next(Path(aside).glob("*.deb"))), aside], check=True)
            for wanted in SCENES:
                (found,) = Path(aside).rglob(f"{wanted}.png")
                (FOLDER / f"{wanted}.png").write_bytes(found.read_bytes())
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
