"""python -m factory.toon: write drawn films with their truth."""

import argparse

from .film import write_clips


def main() -> None:
    """Parse the command line and write the films."""
    parser = argparse.ArgumentParser(prog="python -m factory.toon", description=__doc__)
    parser.add_argument("--output", required=True, help="folder for toon-00.mp4, toon-00.truth.json, ...")
    parser.add_argument("--clips", type=int, default=12, help="number of films (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=12, help="shots per film (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first film (default: %(default)s)")
    parser.add_argument("--size", default="640x360", help="width x height in pixels (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        width, height = (int(part) for part in arguments.size.split("x"))
    except ValueError:
        parser.error(f"--size is WIDTHxHEIGHT, such as 640x360, not {arguments.size!r}")
    write_clips(arguments.output, arguments.clips, arguments.seed, (width, height), shots=arguments.shots)


if __name__ == "__main__":
    main()
