"""Tags: one name for the present version of all tables, so that a trainer can pin what it reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from factory import schema
from factory.files import sync
from factory.settings import UsageError
from factory.store import Store, StoreError


class BadTag(StoreError, UsageError):
    """The tag cannot be given, or is not there."""


def tag(store: Store, name: str) -> dict[str, int]:
    """Name the newest version of each table, in a locked root; return these versions by table.

    Raises BadTag for a name that is a number or has other characters than letters, digits, ".", "-" and "_", and
    for one that is taken. A tag that a crash left on some of the tables only is set anew.
    """
    if not re.fullmatch(r"[\w.-]*[A-Za-z_-][\w.-]*", name, re.ASCII):
        raise BadTag(f'Tag {name!r}: use letters, digits, ".", "-" and "_", and not digits alone: those are versions.')
    taken = tags(store).get(name, {})
    if len(taken) == len(schema.TABLES):
        raise BadTag(
            f"Tag {name!r} is taken: it names {_said(taken)}. Take another, or remove it first: "
            f"python -m factory tag {name} --delete --root {shlex.quote(str(store.root))}"
        )
    versions = {}
    for table_name in schema.TABLES:
        table = store.table(table_name)
        (table.tags.update if table_name in taken else table.tags.create)(name, table.version)
        sync([Path(store.uri(table_name), "_refs", "tags", f"{name}.json")], top=store.root)
        versions[table_name] = table.version
    return versions


def delete(store: Store, name: str) -> None:
    """Take a tag off all tables, in a locked root; their versions stay until a clean-up. BadTag when absent."""
    if name not in tags(store):
        raise BadTag(f"No tag {name!r}. There are: {', '.join(tags(store)) or 'none'}.")
    for table_name in schema.TABLES:
        table = store.table(table_name)
        if name in table.tags.list():
            table.tags.delete(name)


def tags(store: Store) -> dict[str, dict[str, int]]:
    """Return {tag: {table: version}} in the order of names."""
    found: dict[str, dict[str, int]] = {}
    for table_name in schema.TABLES:
        for name, facts in store.table(table_name).tags.list().items():
            found.setdefault(name, {})[table_name] = facts["version"]
    return dict(sorted(found.items()))


def describe(found: dict[str, dict[str, int]]) -> str:
    """Return the tags as lines of text; one that is not on all tables says so."""
    lines = []
    for name, versions in found.items():
        cut_off = "" if len(versions) == len(schema.TABLES) else "  (not on all tables: tag again)"
        lines.append(f"{name:<20} {_said(versions)}{cut_off}")
    return "\n".join(lines) or "no tags"


def _said(versions: dict[str, int]) -> str:
    return ", ".join(f"{table} {version}" for table, version in versions.items())
