"""python -m serving.load: requests as a crowd sends them, to a server on this machine, and what came of them.

Requests come at random (Poisson), with mixed sizes and steps; some of the clients leave before their answer. It stops
by itself. Only addresses of this machine are taken: it is a measure, not a weapon.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from serving.keys import is_loopback

MAX_REQUESTS = 100_000  # of a run
EXAMPLES = """It prints latencies in seconds, goodput in requests a second, in_progress: the mean number of requests
that the server held, and occupancy: the mean number of pictures in a denoising step.

examples:
  two requests a second for a minute:
    python -m serving.load --rate 2 --seconds 60
  small and large pictures, from a sketch; every tenth client leaves:
    python -m serving.load --rate 2 --size 512x512 --size 768x512 --image sketch.png --disconnects 0.1"""


@dataclass(kw_only=True)
class Tally:
    """What came of the requests so far. Seconds, of those that were answered with pictures or refused."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    left: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by what
    said: dict[str, str] = field(default_factory=dict)  # of each what, the words that came with the first one
    in_progress: list[float] = field(default_factory=list)  # requests that the server held, seen each second
    # what the server counted meanwhile: steps of finished pictures, the denoising steps that drew them, their seconds
    counted: dict[str, float] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Run one load; 0 when every request was answered, refused or left by its client, 1 when some failed otherwise."""
    args = make_parser().parse_args(argv)
    try:
        bodies = make_bodies(args)
        _check_local(args.url)
    except (ValueError, OSError) as error:
        print(f"serving.load: {error}", file=sys.stderr)
        return 2
    tally, seconds = asyncio.run(load(args, bodies))
    if sys.stderr.isatty():
        print(file=sys.stderr)  # after the line that told how far it was
    print(json.dumps(summary(tally, seconds), indent=1))
    return 1 if tally.failed else 0


def make_bodies(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the requests of a run, the same ones for the same arguments. ValueError for more than MAX_REQUESTS."""
    rng, count = random.Random(args.seed), round(args.rate * args.seconds)
    if not 1 <= count <= MAX_REQUESTS:
        raise ValueError(f"rate x seconds must be from 1 to {MAX_REQUESTS} requests, got {count}.")
    low, high = args.steps
    shared: dict[str, Any] = {"prompt": args.prompt, **({"model": args.model} if args.model else {})}
    if args.image:
        shared["image"] = base64.b64encode(Path(args.image).read_bytes()).decode()
    sizes = [{"size": size} for size in args.size] or [{}]
    return [
        {**shared, **rng.choice(sizes), "num_inference_steps": rng.randint(low, high), "seed": number}
        for number in range(count)
    ]


async def load(args: argparse.Namespace, bodies: list[dict[str, Any]]) -> tuple[Tally, float]:
    """Send the requests; return what came of them, and the seconds from the first one to the last answer."""
    rng, tally, at = random.Random(args.seed), Tally(), 0.0
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, limits=limits, timeout=args.timeout, trust_env=False
    ) as http:
        before, watch = await _counters(http), asyncio.create_task(_watch(http, tally))
        begun, asked = time.monotonic(), []
        for body in bodies:
            at += rng.expovariate(args.rate)
            leaves = rng.uniform(0.0, 1.0) if rng.random() < args.disconnects else None
            asked.append(asyncio.create_task(_ask(http, body, at, leaves, tally)))
        await asyncio.gather(*asked)
        seconds = time.monotonic() - begun
        watch.cancel()
        tally.counted = {name: value - before.get(name, 0.0) for name, value in (await _counters(http)).items()}
    return tally, seconds


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], at: float, leaves: float | None, tally: Tally) -> None:
    await asyncio.sleep(at)
    begun = time.monotonic()
    try:
        async with asyncio.timeout(leaves):
            reply = await http.post("/v1/images/generations", json=body)
    except TimeoutError:
        tally.left += 1
        return
    except httpx.HTTPError as error:
        tally.failed[type(error).__name__] += 1
        tally.said.setdefault(type(error).__name__, str(error))
        return
    seconds = time.monotonic() - begun
    if reply.status_code == 200:
        tally.answered.append(seconds)
    elif reply.status_code == 429:
        tally.refused.append(seconds)
    else:
        what = f"status {reply.status_code}"
        tally.failed[what] += 1
        tally.said.setdefault(what, _words(reply))


def _words(reply: httpx.Response) -> str:
    try:
        words = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = reply.text[:200]
    return words + (" It is read from ANIMESKETCH_KEY." if reply.status_code == 401 else "")


async def _watch(http: httpx.AsyncClient, tally: Tally) -> None:
    """Note each second how many requests the server holds."""
    while True:
        await asyncio.sleep(1)
        if sys.stderr.isatty():
            done, failed = len(tally.answered), sum(tally.failed.values())
            print(f"\r{done} answered, {len(tally.refused)} refused, {failed} failed ", end="", file=sys.stderr)
        tally.in_progress += [
            value for name, value in (await _counters(http)).items() if name == "animesketch_requests_in_progress"
        ]


async def _counters(http: httpx.AsyncClient) -> dict[str, float]:
    """Return the server's counters that have no labels; none when it does not answer."""
    try:
        lines = (await http.get("/metrics")).text.splitlines()
    except httpx.HTTPError:
        return {}
    return {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name.isidentifier()}


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    """Return the numbers of a run: latencies in seconds, goodput in requests a second.

    `occupancy` is the mean number of pictures in a denoising step.
    """
    steps = tally.counted.get("animesketch_steps_total", 0.0)
    return {
        "answered": len(tally.answered),
        "refused": len(tally.refused),
        "left": tally.left,
        "failed": dict(tally.failed),
        "said": tally.said,
        "seconds": round(seconds, 2),
        "goodput": round(len(tally.answered) / seconds, 3),
        "latency": percentiles(tally.answered),
        "refused_within": percentiles(tally.refused),
        "in_progress": round(statistics.mean(tally.in_progress), 2) if tally.in_progress else None,
        "occupancy": round(tally.counted["animesketch_picture_steps_total"] / steps, 2) if steps else None,
        "step_seconds": round(tally.counted["animesketch_step_seconds_total"] / steps, 4) if steps else None,
    }


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return median, 95th and 99th percentile and the largest of `values`; None for none."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    }


def _check_local(url: str) -> None:
    if not is_loopback(urlsplit(url).hostname):
        raise ValueError(f"--url {url}: only a server on this machine is loaded, such as http://127.0.0.1:8000.")


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    found = (int(low), int(high or low))
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"a number or a range such as 20-50, got {text!r}")
    return found


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+x[0-9]+", text):
        raise argparse.ArgumentTypeError(f"a width and a height such as 768x512, got {text!r}")
    return text


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"a share from 0 to 1, got {text!r}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m serving.load",
        description=__doc__.partition(": ")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument(
        "--key",
        default=os.environ.get("ANIMESKETCH_KEY"),
        help="an API key, where the server asks for one (default: $ANIMESKETCH_KEY, which other users can't see)",
    )
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second, on average (default: 1)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for so long requests are sent (default: 30)")
    parser.add_argument(
        "--steps", type=_range, default=(20, 50), metavar="LOW-HIGH", help="DDIM steps (default: 20-50)"
    )
    parser.add_argument(
        "--size", type=_size, action="append", default=[], metavar="WxH", help="may be given again, to be mixed"
    )
    parser.add_argument("--prompt", default="a smiling girl with long hair, anime sketch, line art")
    parser.add_argument("--model", help="a name that /v1/models lists")
    parser.add_argument("--image", metavar="FILE", help="a reference sketch for all requests")
    parser.add_argument("--disconnects", type=_share, default=0.0, metavar="SHARE", help="of clients that leave (0)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a client waits (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same requests at the same times")
    return parser


if __name__ == "__main__":
    sys.exit(main())
