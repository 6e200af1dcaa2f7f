"""A server of the micro base under ten times its load; minutes. The table is docs/overload.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serving import load
from serving.app import INGRESS
from serving.replica import REPLICA
from tests.servers import ONE, SMALL, STEPS, URL, memory_mb, pin, processes, save_adapter, seconds_of, serving
from tests.test_soak import write_table
from trainer.base import MICRO

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("one_thread")]
TRIAL_S, OVERLOAD_S = 25, 60
LATE_S = 0.05  # of a refusal
KEYS = ("p50", "p99", "max")


@pytest.fixture
def server(ray_session: str, tmp_path: Path) -> Iterator[httpx.Client]:
    """A server with one replica."""
    adapter = str(save_adapter(MICRO, tmp_path / "adapter"))
    with serving("overload", adapter=adapter, base=MICRO, **SMALL) as client:
        yield client


def test_ten_times_what_it_can_do(server: httpx.Client) -> None:
    """The replica on one core; ingress, clients and Ray on the other. All is measured by one generator."""
    ((_, replica),) = processes("overload", REPLICA).items()
    ((_, ingress),) = processes("overload", INGRESS).items()
    with pinned(replica):
        alone = statistics.median(seconds_of(server) for _ in range(5))
        trials = [trial(server, 1 / alone)]
        while len(trials) < 2 or trials[-1]["goodput"] > 1.05 * trials[-2]["goodput"]:
            trials.append(trial(server, 1.5 ** len(trials) / alone))
        peak = max(found["goodput"] for found in trials)
        with watched(replica, ingress) as memory, ThreadPoolExecutor(1) as pool:
            crowd = pool.submit(trial, server, 10 * peak, OVERLOAD_S)
            again = accepted_within(server, OVERLOAD_S)
            found = crowd.result()
        after = seconds_of(server)
    grown = [statistics.mean(held[-10:]) / statistics.mean(held[20:30]) - 1 for held in memory.values()]
    refused, rows = found["refused_within"], []
    rows += [["a request of 35 steps, alone", f"{alone:.2f} s"], ["peak, requests/s", f"{peak:.2f}"]]
    rows += [["sent in a second", f"{10 * peak:.1f}"], ["answered 200", found["answered"]]]
    rows += [["answered 429", found["refused"]], ["anything else", sum(found["failed"].values())]]
    rows += [["goodput, requests/s", f"{found['goodput']:.2f} ({found['goodput'] / peak:.0%} of the peak)"]]
    rows += [["time to a 429: median, 99 %, most", ", ".join(f"{1000 * refused[k]:.0f} ms" for k in KEYS)]]
    rows += [["time to a 200: median, 99 %, most", ", ".join(f"{found['latency'][k]:.1f} s" for k in KEYS)]]
    rows += [["memory of the replica, and of the ingress", ", ".join(f"{share:+.1%}" for share in grown)]]
    rows += [["from the last request sent until one is not refused", f"{again:.2f} s"]]
    rows += [["a request of 35 steps, alone, right after", f"{after:.2f} s"]]
    met = "met" if refused["max"] < LATE_S else "NOT met"
    note = (
        "Memory: the last ten seconds against seconds 20 to 30. Refusals within 50 ms are asked for: "
        f"{met} (see serving-speed.md)."
    )
    write_table("overload", f"Overload: ten times the peak for {OVERLOAD_S} s", ["", ""], rows, note)
    print(rows)
    assert not found["failed"]
    assert found["goodput"] > 0.9 * peak
    assert refused["p99"] < LATE_S
    assert max(grown) < 0.03
    assert again < 1.5 * alone
    assert after < 1.5 * alone


def trial(client: httpx.Client, rate: float, seconds: float = TRIAL_S) -> dict[str, Any]:
    low, high = STEPS
    told = ["--url", str(client.base_url), "--rate", f"{rate}", "--seconds", f"{seconds}", "--steps", f"{low}-{high}"]
    args = load.make_parser().parse_args([*told, "--size", "64x64", "--size", "96x64"])
    return load.summary(*asyncio.run(load.load(args, load.make_bodies(args))))


def accepted_within(client: httpx.Client, after: float) -> float:
    """Return the seconds, `after` so many, until a request is not refused: there is a place for it in the line."""
    time.sleep(after)
    begun = time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            if client.post(URL, json=ONE, timeout=0.5).status_code == 200:
                return asked - begun
        except httpx.ReadTimeout:
            return asked - begun
        time.sleep(0.02)


@contextlib.contextmanager
def pinned(replica: int) -> Iterator[None]:
    """Have a replica run on one core, this process and all others of its Ray on another."""
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= 2, "one core for the replica, one for the rest"
    others = [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]
    try:
        for process in others:
            pin(process, cores[process != replica])
        yield
    finally:
        for process in others:
            pin(process, *cores)


@contextlib.contextmanager
def watched(*ids: int) -> Iterator[dict[int, list[float]]]:
    """Yield the memory of processes, which is looked at each second while the block runs."""
    memory: dict[int, list[float]] = {process: [] for process in ids}
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            for process, held in memory.items():
                held.append(memory_mb(process))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        try:
            yield memory
        finally:
            over.set()
