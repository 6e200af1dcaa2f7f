"""The adapters that a server has, by name: its own, and those in a folder that is looked at anew for each request.

An adapter or run folder that is put there is served under its name; one that is taken away is not; one that is replaced
is loaded anew. Nothing is restarted.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from factory.files import SUMS
from trainer.adapter import WEIGHTS, AdapterError, find_adapter

log = logging.getLogger("ray.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Served:
    """An adapter of a folder as it is now."""

    name: str
    path: str
    version: str  # changes with its content
    written: tuple[int, int] = (0, 0)  # size and time of its weights: the same content, copied again, is tried again

    @property
    def id(self) -> str:
        """What it is loaded under."""
        return f"{self.name}@{self.version}"


class ModelUnavailable(Exception):
    """An adapter that was asked for can't be loaded; the words are for the client."""


class ModelBroken(ModelUnavailable):
    """It never can, as long as nobody replaces it."""


class Adapters:
    """The adapters of `folder`, an absolute path that all nodes see; None for none."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None
        self._told: set[str] = set()  # of what is no adapter: once

    def names(self) -> list[str]:
        """Return the names that can be asked for, sorted."""
        if self._folder is None or not self._folder.is_dir():
            return []
        names = sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))
        for name in names:
            if not NAME.fullmatch(name):
                self._tell(name, f"a name has up to 128 letters, digits and . _ -, got {name!r}.")
        return [name for name in names if self.find(name) is not None]

    def find(self, name: str) -> Served | None:
        """Return the adapter of that name; None when there is none, and a line in the log when something else is.

        Whether its content is an adapter's is seen when it is loaded.
        """
        if self._folder is None or not NAME.fullmatch(name):
            return None
        try:
            path = find_adapter(self._folder / name)
            if (path / SUMS).is_file() or (path.is_file() and path.suffix == ".safetensors"):
                weights = path if path.is_file() else path / WEIGHTS
                with safe_open(weights, "numpy"):  # reads the header, which says how long a whole file is
                    stat = weights.stat()
                written = stat.st_size, stat.st_mtime_ns
                return Served(name=name, path=str(path), version=version_of(path), written=written)
            why = f"{path} is neither a .safetensors file nor a folder with {SUMS}: copy the adapter's folder, whole."
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            why = f"{path} has no whole .safetensors file ({error})."
        except (OSError, AdapterError) as error:  # it is being put there, or is something else
            why = str(error)
        self._tell(name, why)
        return None

    def _tell(self, name: str, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            log.warning("%s is not served: %s", name, why)


def version_of(path: Path) -> str:
    """Return what changes with the content of an adapter's folder, or bare file. OSError when it can't be read."""
    sums = path / SUMS
    mark = sums.read_bytes() if sums.is_file() else repr((path.stat().st_size, path.stat().st_mtime_ns)).encode()
    return hashlib.sha256(mark).hexdigest()[:12]
