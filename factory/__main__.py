"""python -m factory <verb>: anime video to a captioned line-art dataset."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import warnings
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from factory.arguments import parse

if TYPE_CHECKING:
    from pathlib import Path

    from factory.config import FactoryConfig
    from factory.store import Store

DONE, UNFINISHED, USAGE, SOURCES_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

# verb -> settings that have an option of their own
_SHORT = {
    "build": ("video.frames",),
    "sketch": tuple(f"sketch.{name}" for name in ("converter", "size", "tile", "overlap", "tile_offset")),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code. What is raised beyond what is told of here is a bug of ours."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    from factory.settings import UsageError
    from factory.store import StoreError

    def told(error: Exception) -> str:
        return f"factory: {getattr(error, 'cause', error)}"  # of a Ray task; its own text is the worker's whole trace

    try:
        own = {"config": _config, "status": _status, "report": _report}
        own |= {"verify": _verify, "tag": _tag, "compact": _compact, "weights": _weights}
        own |= {"sketch": _picture} if args.verb == "sketch" and args.image is not None else {}
        return own.get(args.verb, _run)(args)
    except UsageError as error:
        print(told(error), file=sys.stderr)
        return USAGE
    except StoreError as error:
        print(told(error), file=sys.stderr)
        return UNFINISHED
    except KeyboardInterrupt:
        print("factory: stopped. What was committed is kept: the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"{told(error)}. What was committed is kept: run the same command again.", file=sys.stderr)
        return UNFINISHED


def _store(root: str) -> Store:
    from factory.settings import absolute
    from factory.store import Store

    return Store(absolute(root, "--root"))


def _check_present(store: Store) -> None:
    """Raise NothingThere where there is no dataset: it is an error here, not a new one.

    The table is not opened: a manifest that a power cut left is removed first, by `Store.lock`.
    """
    if not store.has("samples"):
        store.table("samples")


def _settings(args: argparse.Namespace, store: Store | None) -> FactoryConfig:
    """The settings of a command: the preset, or those that `store` was last written with; --config and --set on top."""
    from factory.config import GROUPS, PRESETS
    from factory.settings import UsageError, load

    for item in args.set if args.verb in GROUPS else ():
        group = item.partition("=")[0].partition(".")[0]
        for stage in (stage for stage, groups in GROUPS.items() if group in groups and stage != args.verb):
            owner = "build" if stage == "decode" else stage
            raise UsageError(f"--set {item}: {args.verb} does not use it. Give it to {owner}.")
    kept = _kept(store) if store is not None and not args.preset else None
    given = {name: getattr(args, name.rpartition(".")[2]) for name in _SHORT.get(args.verb, ())}
    short = [f"{name}={value}" for name, value in given.items() if value is not None]
    return load(kept or PRESETS[args.preset or "micro"](), args.config, [*short, *args.set])


def _kept(store: Store) -> FactoryConfig | None:
    from factory.config import FactoryConfig
    from factory.settings import UsageError, from_dict

    kept = store.settings() if store.has("samples") else None
    try:
        return from_dict(FactoryConfig, kept) if kept else None
    except UsageError as error:
        raise UsageError(f"The settings kept in {store.root} are another version's. {error} Give --preset.") from None


def _config(args: argparse.Namespace) -> int:
    from factory.settings import template

    store = _store(args.root) if args.root else None
    if store is not None:
        store.table("samples")  # an absent dataset has no settings
    print(template(_settings(args, store)), end="")
    return DONE


def _status(args: argparse.Namespace) -> int:
    from factory import status
    from factory.config import micro
    from factory.settings import changes

    store = _store(args.root)
    counts = status.funnel(store)
    config = _kept(store) or micro()
    stale, notes = status.stale(store, config), status.split_notes(store, config)
    if args.json:
        print(json.dumps(counts | {"stale": stale, "split_notes": notes, "settings": asdict(config)}))
        return DONE
    print(status.describe(counts))
    print("settings", *changes(config, micro()) or ["those of preset micro"])
    print("\n".join(status.describe_stale(stale, args.root) or ["stale   nothing"]))
    print(*(f"split   {note}\n" for note in notes), sep="", end="")
    _print_next(status.unfinished(counts, stale), args.root)
    return DONE


def _print_next(verbs: list[str], root: str) -> None:
    for verb in verbs[:1]:
        sources = "SOURCES " if verb == "build" else ""
        print(f"next: python -m factory {verb} {sources}--root {shlex.quote(root)}", flush=True)


def _check_output(path: Path, given: str) -> None:
    """Make the folder of a file to write. UsageError where `path`, which was `given`, can't be written to."""
    import tempfile

    from factory.files import make_folder
    from factory.settings import UsageError

    if path.is_dir():
        raise UsageError(f"--output {given} is a folder. Give a file's name.")
    try:
        make_folder(path.parent)
        tempfile.TemporaryFile(dir=path.parent).close()
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--output {given}: {path.parent} is a file, no folder.") from None
    except OSError as error:
        raise UsageError(f"--output {given}: its folder cannot be written to ({error.strerror}).") from None


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from factory.report import write_report
    from factory.settings import absolute

    store = _store(args.root)
    _check_present(store)
    output = absolute(args.output, "--output") if args.output else str(store.root / "report.html")
    _check_output(Path(output), args.output or output)
    print(write_report(store, Path(output)))
    return DONE


def _run(args: argparse.Namespace) -> int:
    from factory import pipeline, status
    from factory.locations import normal
    from factory.rights import RightsFile
    from factory.session import ray_session
    from factory.settings import absolute
    from factory.sources import find_sources

    store = _store(args.root)
    paths, rights = [], None
    with contextlib.ExitStack() as held:
        if args.verb != "build":
            _check_present(store)
        if is_there := store.has("samples"):
            held.enter_context(store.lock())  # before its settings are read: another command may be writing others
        config = _settings(args, store)
        if args.verb == "build":
            paths = find_sources([absolute(source, "SOURCES") for source in args.sources])
            if args.sources_file:
                rights = RightsFile(normal(absolute(args.sources_file, "--sources-file")))
        if not is_there:
            held.enter_context(store.lock())  # makes the root, so after all that could be wrong
        held.enter_context(ray_session(max(2, config.num_cpus)))
        built: set[str] = set()
        if args.verb == "build":
            built = pipeline.build(store, paths, config, rights)
        else:
            getattr(pipeline, args.verb)(store, config)
    counts = status.funnel(store)
    print(status.describe(counts if args.verb == "build" else counts | {"failed_sources": {}}), flush=True)
    left = status.unfinished(counts, status.stale(store, _kept(store) or config))
    _print_next(left, args.root)
    if args.verb in left or (args.verb == "build" and left):
        return UNFINISHED
    sources = store.table("sources").to_table(columns=["source_id", "status"]).to_pylist()
    failed = any(row["status"] in ("failed", "partial") for row in sources if row["source_id"] in built)
    return SOURCES_FAILED if failed and not args.allow_failures else DONE


def _picture(args: argparse.Namespace) -> int:
    """Draw the lines of one picture."""
    from pathlib import Path

    from factory.files import write_atomic
    from factory.picture import encode_png
    from factory.settings import UsageError, absolute
    from factory.sketch.engine import sketch
    from factory.stage import Progress
    from factory.still import MAX_BYTES, decode

    for option, given in (("--image", args.image), ("--output", args.output)):
        if "://" in given:
            raise UsageError(f"{option} {given}: only a file on this machine is taken here.")
    path, output = Path(absolute(args.image, "--image")), Path(absolute(args.output, "--output"))
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {args.output}: lines are written as PNG. Give it a file's name that ends in .png.")
    config = _settings(args, None).sketch
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"the file is larger than {MAX_BYTES / 1e9:.1f} GB")
        image = decode(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UsageError(f"--image {args.image}: {getattr(error, 'strerror', None) or error}.") from None
    if output.exists() and output.samefile(path):
        raise UsageError(f"--output {args.output} is the picture itself. Give another name.")
    _check_output(output, args.output)

    progress: list[Progress] = []

    def watch(done: int, tiles: int) -> None:
        if not done:
            progress.append(Progress("sketch", "tiles", tiles))
        else:
            progress[0].reach(done)

    try:
        lines = sketch(image, config, watch=watch)
    except KeyboardInterrupt:
        print("factory: stopped. Nothing was written.", file=sys.stderr)
        return INTERRUPTED
    write_atomic(output, encode_png(lines))
    print(f"{output}: {lines.shape[1]} x {lines.shape[0]} px")
    return DONE


def _weights(args: argparse.Namespace) -> int:
    """Get a published sketch network."""
    from pathlib import Path

    from factory import models
    from factory.settings import absolute
    from factory.sketch.pretrained import convert_anime2sketch, fetch_hed

    folder = Path(absolute(args.output, "--output")) if args.output else models.FETCHED / args.network
    if args.how == "fetch":
        fetch_hed(folder)
    else:
        convert_anime2sketch(Path(absolute(args.file, "FILE")), folder)
    given = f" --set sketch.model={shlex.quote(str(folder))}" if args.output else ""
    print(f"{folder}: {args.network}. Take it: --set sketch.converter={args.network}{given}")
    return DONE


def _verify(args: argparse.Namespace) -> int:
    from factory.verify import verify

    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        report = verify(_store(args.root))
    print(json.dumps(asdict(report)) if args.json else report)
    return UNFINISHED if report.damaged else DONE


def _tag(args: argparse.Namespace) -> int:
    from factory import tags

    store = _store(args.root)
    _check_present(store)
    if args.name is not None:
        with store.lock():
            tags.delete(store, args.name) if args.delete else tags.tag(store, args.name)
    print(tags.describe(tags.tags(store)))
    return DONE


def _compact(args: argparse.Namespace) -> int:
    from factory import schema
    from factory.compact import ROWS, compact
    from factory.config import micro

    store, older_than = _store(args.root), timedelta(days=args.older_than)
    _check_present(store)
    with store.lock():
        # a fragment of samples stays a unit of work of the sketch and caption stages
        rows = {"samples": (_kept(store) or micro()).samples_per_unit}
        for name in schema.TABLES:
            done = compact(store, name, rows=rows.get(name, ROWS), older_than=older_than)
            print(f"compact  {name}: {done}", flush=True)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
