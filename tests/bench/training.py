"""Training on two workers, each on one thread: on a cache against encoders in each step, DeepSpeed against plain DDP,
and against a plain loop after IP-Adapter's tutorial_train_plus.py. The shipped micro base, 16 drawings a step.

All sides live in the same two processes and take their turns, so that they meet the same machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.drawings import WIDTHS, write_drawings
from tests.bench.harness import Comparison, compare
from trainer.config import DataConfig, TrainerConfig, WorkersConfig

WORKERS = 2
STEPS = 6  # of a side's turn
ROUNDS = 5
DRAWINGS = 96


def training(folder: Path) -> Iterator[Comparison]:
    """Yield the comparisons, in samples/s of both workers together, and the share of step time that waits for data."""
    from trainer.cache_writer import write_cache

    root = write_drawings(folder / "root", folder / "files", DRAWINGS)
    config = TrainerConfig(
        pretrained_model_name_or_path="animesketch/micro",
        data=DataConfig(root=root, resolution=64),  # the drop rates are the recipe's
        workers=WorkersConfig(num_workers=WORKERS),
        train_batch_size=16,
    )
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        cache = write_cache(config)["cache"]
    with Ranks(config, cache, folder) as ranks:

        def against(title: str, ours: str, peer: str) -> Comparison:
            return compare(title, "samples/s", ranks.turn(ours), ranks.turn(peer), rounds=ROUNDS)

        losses = {side: ranks.losses(side) for side in ("cached", "online", "ddp")}  # they do the same
        assert all(abs(a - b) < 1e-3 for side in losses.values() for a, b in zip(side, losses["cached"], strict=True))
        yield against("training on a cache / encoders in each step", "cached", "online")
        yield against("DeepSpeed ZeRO-1 / plain DDP, both on a cache", "cached", "ddp")
        for width in WIDTHS:
            alone = {side: _speed(ranks.turn(side)) for side in (f"{width}-0", f"{width}-1")}
            plain = max(alone, key=alone.__getitem__)  # the faster one
            ranks.waits.clear()
            words = f"a plain loop over sketches {width} px wide, DataLoader with {plain[-1]} workers"
            yield against(f"training on a cache / {words}", "cached", plain)
            waits = {side: [100 * share for share in ranks.waits[side][1:]] for side in ("cached", plain)}
            title = "share of step time that waits for data, ours / that loop (less is better)"
            yield Comparison(title=title, unit="%", ours=waits["cached"], peer=waits[plain])


def _speed(turn: Callable[[], int]) -> float:
    turn()  # DataLoader workers start
    begun = time.perf_counter()
    return turn() / (time.perf_counter() - begun)


class Ranks:
    """The two processes, each a rank, which run steps of a side when they are told."""

    def __init__(self, config: TrainerConfig, cache: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.waits: dict[str, list[float]] = defaultdict(list)  # by side: share of its turn that waited for data
        self._ranks = []
        for rank in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, theirs, config, cache, folder))
            process.start()
            self._ranks.append((process, ours))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._ranks:
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(30)
            process.kill()

    def turn(self, side: str) -> Callable[[], int]:
        """Return what runs STEPS steps of a side, and returns their samples."""

        def run() -> int:
            waited, _, samples = self._run(side)
            self.waits[side].append(waited)
            return samples

        return run

    def losses(self, side: str) -> list[float]:
        """Return the losses of a side's next STEPS steps."""
        return self._run(side)[1]

    def _run(self, side: str) -> tuple[float, list[float], int]:
        for _, pipe in self._ranks:
            pipe.send(side)
        first, *_ = [pipe.recv() for _, pipe in self._ranks]
        return first


def _rank(rank: int, pipe: Any, config: TrainerConfig, cache: str, folder: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    logging.disable(logging.INFO)  # DeepSpeed's
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=WORKERS)
    from tests.bench.plain_training import PlainDdp, PlainLoop
    from trainer import worker as workers

    def ours(name: str, cache: str | None = None) -> workers.Worker:
        named = dataclasses.replace(config, output=str(folder / name))
        (folder / name).mkdir(exist_ok=True)
        return workers.Worker(named, torch.device("cpu"), {"base": {}, "preprocessing": {}}, cache)

    sides: dict[str, Any] = {"cached": ours("cached", cache), "online": ours("online")}
    engine, workers.make_engine = workers.make_engine, PlainDdp  # type: ignore[assignment]
    sides["ddp"] = ours("ddp", cache)
    workers.make_engine = engine
    for width, loaders in itertools.product(WIDTHS, (0, 1)):
        sides[f"{width}-{loaders}"] = PlainLoop(config, folder / "files" / str(width), num_workers=loaders)
    step: dict[str, int] = defaultdict(int)
    while (name := pipe.recv()) is not None:
        side = sides[name]
        dist.barrier()
        begun, done = time.perf_counter(), []
        for _ in range(STEPS):
            done.append(side.step(step[name]))
            step[name] += 1
        seconds = time.perf_counter() - begun
        waited = sum(each["data_wait"] for each in done)
        pipe.send((waited / seconds, [each["loss"] for each in done], STEPS * config.train_batch_size))
