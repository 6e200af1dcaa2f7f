"""python -m factory.toon: write drawn films with their truth."""

import argparse

from .video import write_clips


def main() -> None:
    """Parse the command line and write the films."""
    parser = argparse.ArgumentParser(prog="python -m factory.toon", description=__doc__)
    parser.add_argument("--output", required=True, help="folder for toon-00.mp4, toon-00.truth.json, ...")
    parser.add_argument("--clips", type=int, default=12, help="number of films (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=12, help="shots per film (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first film (default: %(default)s)")
    parser.add_argument("--size", default="640x360", help="width x height in pixels (default: %(default)s)")
    parser.add_argument("--fps", type=int, default=24, help="frames per second (default: %(default)s)")
    parser.add_argument("--flashes", type=int, default=0, help="flashes of light per film (default: %(default)s)")
    parser.add_argument("--letterbox", type=float, help="aspect ratio of the picture between black bars, such as 2.39")
    parser.add_argument("--grain", type=float, default=0.0, help="film grain, levels of 255 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        width, height = (int(part) for part in arguments.size.split("x"))
    except ValueError:
        parser.error(f"--size is WIDTHxHEIGHT, such as 640x360, not {arguments.size!r}")
    try:
        _write(arguments, (width, height))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error.strerror or error}: {error.filename or arguments.output}\n")


def _write(arguments: argparse.Namespace, size: tuple[int, int]) -> None:
    write_clips(
        arguments.output,
        arguments.clips,
        arguments.seed,
        size,
        shots=arguments.shots,
        fps=arguments.fps,
        flashes=arguments.flashes,
        letterbox=arguments.letterbox,
        grain=arguments.grain,
    )


if __name__ == "__main__":
    main()
