"""Where the factory's models are: shipped with the code, or in a folder."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from factory.files import SUMS, sha256_file
from factory.settings import NothingThere, UsageError

OWNER = "animesketch/"  # ids of models that are shipped with the code, in `weights/` beside their reader
WEIGHTS = Path(__file__).parent / "weights"
# On this machine, by `python -m factory weights`.
FETCHED = Path(os.path.abspath(os.environ.get("ANIMESKETCH_WEIGHTS") or Path.home() / ".cache/animesketch"))
HOW_TO_GET = {
    f"{OWNER}hed": "python -m factory weights fetch hed",
    f"{OWNER}anime2sketch": "python -m factory weights convert anime2sketch netG.pth",
}
_READ = ("*.safetensors", "*.json", "*.txt", "*.model")


def find_model(name_or_path: str, weights: Path = WEIGHTS) -> Path:
    """Return the folder of an id such as `animesketch/sketch`, which is shipped or was put into FETCHED, or the path
    itself where it is a folder.

    NothingThere for anything else, UsageError for a relative path: a worker runs in a folder of its own.
    """
    if name_or_path.startswith(OWNER):
        for folder in (weights, FETCHED):
            if (folder / name_or_path.removeprefix(OWNER)).is_dir():
                return folder / name_or_path.removeprefix(OWNER)
    if os.path.isdir(name_or_path):
        if not os.path.isabs(name_or_path):
            raise UsageError(f"Give the absolute path of the model {name_or_path!r}: {os.path.abspath(name_or_path)}")
        return Path(name_or_path)
    if name_or_path in HOW_TO_GET:
        raise NothingThere(
            f"The network {name_or_path} is not on this machine. Get it: {HOW_TO_GET[name_or_path]} — or name its "
            "folder: --set sketch.model=/models/..."
        )
    known = sorted(f"{OWNER}{path.parent.name}" for path in weights.glob(f"*/{SUMS}"))
    shipped_too = f", or one of those shipped: {', '.join(known)}" if known else ""
    raise NothingThere(f"No model {name_or_path!r}. Give a folder that exists{shipped_too}.")


@functools.lru_cache(maxsize=8)
def model_id(name_or_path: str) -> str:
    """Return what rows record of a model: its id or folder's name, never a path, and 8 digits of its weights' hash."""
    folder = find_model(name_or_path)
    name = name_or_path if name_or_path.startswith(OWNER) else folder.name
    return f"{name}@{weights_hash(folder)}"


def weights_hash(folder: Path) -> str:
    """Return 8 digits of a hash over all safetensors files below `folder`."""
    digests = sorted(sha256_file(file) for file in folder.rglob("*.safetensors"))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=8)
def files_hash(name_or_path: str) -> str:
    """Return 16 digits of a hash over all that a model reads: weights, tokenizer and settings, with their names."""
    folder = find_model(name_or_path)
    files = sorted(file for kind in _READ for file in folder.rglob(kind))
    sums = [f"{sha256_file(file)}  {file.relative_to(folder).as_posix()}" for file in files]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]
