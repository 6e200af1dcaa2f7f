"""Rights: whose the sources are and what may be done with them, from a YAML file beside the films."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fsspec.utils import glob_translate

from factory.locations import SourceGone, is_remote, open_binary, path_of
from factory.settings import STRICT, NothingThere, UsageError, layered, parse_yaml


@dataclass(frozen=True, kw_only=True)
class Rights:
    """What a rights file can say of a source, under the names of its columns in the `sources` table."""

    __pydantic_config__ = STRICT

    title: str | None = None
    rights_holder: str | None = None
    # As the owner names it, best an SPDX identifier; never guessed.
    licence: str = "unknown"
    url: str | None = None
    # Whether pictures of it may be passed on.
    redistributable: bool | None = None


class RightsFile:
    """A YAML mapping of paths or globs, relative to the file's folder, to Rights; later entries lie over earlier ones.

    `*` stays within a folder, `**` doesn't; a folder stands for all that lies below it.
    """

    def __init__(self, location: str) -> None:
        """Read and check the file. UsageError names what is wrong; OSError when it can't be read."""
        try:
            with open_binary(location) as file:
                text = file.read().decode(errors="replace")
        except SourceGone as error:
            raise NothingThere(f"No sources file {location}: {error.strerror or error}.") from None
        entries = parse_yaml(text, f"Sources file {location}")
        if not isinstance(entries, Mapping):
            raise UsageError(f"Sources file {location} must map paths or globs to rights, such as 'show/*.mkv'.")
        for pattern, entry in entries.items():
            if not isinstance(entry, Mapping):
                raise UsageError(f"Sources file {location}: {pattern!r} must hold a mapping, found {entry!r}.")
            try:
                layered(Rights(), entry)
            except UsageError as error:
                raise UsageError(f"Sources file {location}, {pattern!r}: {error}") from None
        self._remote = is_remote(location)
        self._folder = path_of(location).parent
        self._entries: dict[str, Mapping[str, Any]] = {str(pattern): entry for pattern, entry in entries.items()}

    def rights_of(self, uri: str) -> dict[str, Any] | None:
        """Return the columns of rights of the source at `uri`; None where no entry names it."""
        layers = [entry for pattern, entry in self._entries.items() if self._names(pattern, uri)]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer
        return asdict(layered(Rights(), merged)) if layers else None

    def unused(self, uris: list[str]) -> list[str]:
        """Return the patterns that name none of `uris`: misspelt, or of films that are not there yet."""
        return [pattern for pattern in self._entries if not any(self._names(pattern, uri) for uri in uris)]

    def _names(self, pattern: str, uri: str) -> bool:
        path = path_of(uri)
        if is_remote(uri) != self._remote or not path.is_relative_to(self._folder):
            return False
        inside = path.relative_to(self._folder)
        matches = re.compile(glob_translate(pattern.rstrip("/"))).match
        return any(matches(str(part)) for part in (inside, *inside.parents))
