"""python -m factory <verb>: anime video to a captioned line-art dataset."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict

DONE, UNFINISHED, USAGE, SOURCES_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
examples:
  python -m factory build films/ --root /data/anime
  python -m factory build 'films/*.mkv' --root /data/anime --preset paper --set 'split.holdout=["ep12.mkv"]'
  python -m factory select --root /data/anime --set selection.min_sharpness=80
  python -m factory status --root /data/anime
  ray job submit --working-dir . -- python -m factory build "$PWD/films" --root /data/anime

exit codes: 0 done; 1 not finished, run it again; 2 wrong usage; 3 (build) finished, but some sources failed.
Whatever was committed is kept: after a crash, run the same command again."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m factory",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    helps = {
        "build": "run all stages over films: decode, select, sketch, caption",
        "select": "decide again which candidates are kept, from their stored scores",
        "sketch": "draw the sketches that are missing or of another configuration",
        "caption": "write the captions that are missing or of another rule",
        "status": "print the funnel",
    }
    for verb, text in helps.items():
        sub = verbs.add_parser(
            verb, help=text, description=text, epilog=_EPILOG, formatter_class=parser.formatter_class
        )
        if verb == "build":
            sub.add_argument("sources", nargs="+", metavar="SOURCES", help="video files, folders, or globs in quotes")
            sub.add_argument(
                "--frames",
                choices=("shots", "keyframes", "interval"),
                help="candidates: the best frame of each shot, key frames alone (fast), or one every "
                "video.interval_seconds; the same as --set video.frames=...",
            )
            sub.add_argument("--allow-failures", action="store_true", help="exit 0 although some sources failed")
        sub.add_argument("--root", required=True, help="folder of the dataset's tables; made if absent")
        if verb == "status":
            sub.add_argument("--json", action="store_true", help="print the counts as JSON")
            continue
        sub.add_argument(
            "--preset",
            choices=("micro", "paper"),
            help="default: the settings that the root was last written with, or micro",
        )
        sub.add_argument("--config", metavar="FILE", help="YAML laid over them")
        sub.add_argument("--set", action="append", default=[], metavar="A.B=C", help="one setting; may be repeated")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    args = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    from factory.store import DamagedData, DatasetBusy, NotFinished

    try:
        return _run(args)
    except (ValueError, FileNotFoundError) as error:
        cause = getattr(error, "cause", error)  # of a Ray task; its own text is the worker's whole trace
        print(f"factory: {cause}", file=sys.stderr)
        return UNFINISHED if isinstance(cause, DatasetBusy | DamagedData | NotFinished) else USAGE
    except KeyboardInterrupt:
        print("factory: stopped. What was committed is kept: the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"factory: {error}. What was committed is kept: run the same command again.", file=sys.stderr)
        return UNFINISHED


def _run(args: argparse.Namespace) -> int:
    from factory import status
    from factory.files import write_atomic
    from factory.settings import absolute, load
    from factory.sources import find_sources
    from factory.store import Store

    store = Store(absolute(args.root, "--root"))
    if args.verb == "status":
        counts = status.funnel(store)
        print(json.dumps(counts) if args.json else status.describe(counts))
        return DONE

    from factory import pipeline
    from factory.config import PRESETS
    from factory.session import ray_session

    config = PRESETS[args.preset or "micro"]()
    if not args.preset and store.settings_file.exists():
        config = load(config, store.settings_file)
    frames = [f"video.frames={args.frames}"] if args.verb == "build" and args.frames else []
    config = load(config, args.config, [*frames, *args.set])
    paths = []
    if args.verb == "build":
        paths = find_sources([absolute(source, "SOURCES") for source in args.sources])
    else:
        store.table("samples")  # an absent dataset is an error, not a new one
    with ray_session(), store.lock():
        built: set[str] = set()
        if args.verb == "build":
            built = pipeline.build(store, paths, config)
        else:
            getattr(pipeline, args.verb)(store, config)
        write_atomic(store.settings_file, json.dumps(asdict(config), indent=2) + "\n")
    counts = status.funnel(store)
    print(status.describe(counts), flush=True)
    verb = status.next_verb(counts)
    if verb is not None:
        print(f"next: python -m factory {verb} --root {args.root}", flush=True)
        if verb == args.verb or args.verb == "build":
            return UNFINISHED
    sources = store.table("sources").to_table(columns=["source_id", "status"]).to_pylist()
    failed = any(row["status"] in ("failed", "partial") for row in sources if row["source_id"] in built)
    return SOURCES_FAILED if failed and not args.allow_failures else DONE


if __name__ == "__main__":
    sys.exit(main())
