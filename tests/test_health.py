"""Is a worker of any use? Its thread must be there and go on, and what it draws must be finite."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.adapters import Served
from serving.backend import ServeBackend
from serving.config import ServingConfig
from serving.engine import Engine, Slot
from serving.job import Job, Picture, SamplerStopped
from serving.recipe import Recipe
from serving.replica import REPLICA
from serving.warmup import draw_canary
from serving.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(prompt="a cat", num_inference_steps=2, seed=1)


@pytest.fixture
def engine(twin: Path, adapter_folder: Path) -> Engine:
    return Engine.load(str(adapter_folder), base=str(twin))


async def draw(worker: Worker, recipe: Recipe = RECIPE) -> list[Picture]:
    return [event async for event in worker.generate(Job(recipe=recipe)) if isinstance(event, Picture)]


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch, seed: int | None = None) -> list[int]:
    """Have steps fail that draw the picture of `seed`, None for all; return the list of seeds that are drawn."""
    step, drawn = engine.step, []

    def poisoned(slots: list[Slot]) -> None:
        drawn.extend(slot.recipe.seed for slot in slots)
        if seed is None or seed in drawn[-len(slots) :]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        step(slots)

    monkeypatch.setattr(engine, "step", poisoned)
    return drawn


async def checked(worker: Worker) -> None:
    """Check until no canary is on its way."""
    await worker.check()
    while worker._canary is not None:
        await asyncio.sleep(0.01)
        await worker.check()


def test_a_canary_is_drawn_after_a_failure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = poison(engine, monkeypatch, seed=13)

    async def main() -> None:
        worker = Worker(engine, "m")
        await checked(worker)
        assert drawn == []
        with pytest.raises(RuntimeError, match="CUDA"):
            await draw(worker, Recipe(prompt="a cat", num_inference_steps=2, seed=13))
        drawn.clear()
        for _ in range(3):
            await checked(worker)  # that one was the request's own fault
        assert drawn == [0, 0]
        with pytest.raises(RuntimeError, match="CUDA"):
            await draw(worker, Recipe(prompt="a cat", num_inference_steps=2, seed=13))
        drawn.clear()
        assert len(await draw(worker)) == 1
        assert drawn[:2] == [0, 0]  # the next request does not wait for a check
        assert len(drawn) == 2 + RECIPE.num_inference_steps

    asyncio.run(main())


def test_a_device_that_draws_no_more_is_found_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        worker = Worker(engine, "m")
        poison(engine, monkeypatch)
        with pytest.raises(RuntimeError, match="CUDA"):
            await draw(worker)
        with pytest.raises(SamplerStopped, match="CUDA"):  # not its fault: 503, so that it is sent again
            await draw(worker)
        await worker.check()  # a canary is sent out
        for _ in range(3):  # as often as Serve asks before it replaces a replica
            while worker._canary is not None and not worker._canary.done():
                await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="CUDA"):
                await worker.check()
        monkeypatch.undo()
        async with asyncio.timeout(10):
            while True:  # until one is drawn again
                with contextlib.suppress(RuntimeError):
                    await worker.check()
                    break
                await asyncio.sleep(0.01)

    asyncio.run(main())


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_not_finite_are_found_out_before_the_first_job(engine: Engine, part: str) -> None:
    with torch.no_grad():
        next(getattr(engine.backbone, part).parameters()).fill_(float("nan"))
        if part == "vae":
            engine.backbone.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="NaN"):
        draw_canary(engine)


def test_a_step_that_takes_too_long_is_found_out_and_idleness_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    step = engine.step

    async def main() -> None:
        worker = Worker(engine, "m", patience_s=1.0)
        await draw(worker)
        await asyncio.sleep(1.2)
        await worker.check()
        monkeypatch.setattr(engine, "step", lambda slots: go_on.wait(10) and step(slots))
        jobs = [asyncio.create_task(draw(worker)) for _ in range(2)]  # one of them has not joined yet
        await asyncio.sleep(0.2)
        await worker.check()  # not yet
        await asyncio.sleep(1.2)
        with pytest.raises(SamplerStopped, match="hangs"):
            await worker.check()
        for job in jobs:  # they are told, and wait no longer
            with pytest.raises(SamplerStopped, match="hangs"):
                await asyncio.wait_for(job, 1)
        go_on.set()
        with pytest.raises(SamplerStopped, match="hangs"):  # it is given up for good
            await draw(worker)

    asyncio.run(main())


def test_a_thread_that_has_ended_is_found_out_and_nobody_waits_for_it(
    engine: Engine, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def main() -> None:
        worker = Worker(engine, "m")
        monkeypatch.setattr(worker.batcher, "step", lambda: 1 / 0)
        calls: list[Callable] = [
            lambda: draw(worker),
            worker.check,
            lambda: worker.add_adapter(Served(name="other", path=str(adapter_folder), version="1")),
        ] + 20 * [worker.check]
        for call in calls:
            with pytest.raises(SamplerStopped, match="division by zero") as told:
                await asyncio.wait_for(call(), 10)
            assert len(told.traceback) < 20  # one that is raised again and again grows

    asyncio.run(main())


def test_an_adapter_is_unloaded_once_however_often_it_is_said(engine: Engine, adapter_folder: Path) -> None:
    from serving.replica import LoadedAdapter

    served = Served(name="other", path=str(adapter_folder), version="1")

    async def main() -> None:
        worker = Worker(engine, "m")
        await worker.add_adapter(served)
        loaded = LoadedAdapter(worker, served)
        loaded.__del__()  # as Serve does, before it drops it
        await worker.add_adapter(served)
        del loaded
        await draw(worker)
        assert served.id in engine.adapters
        worker.remove_adapter(served)
        worker.remove_adapter(served)
        await draw(worker)
        assert served.id not in engine.adapters

    asyncio.run(main())


def test_an_adapter_that_nobody_waits_for_any_more_is_not_kept(
    engine: Engine, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adding, go_on = threading.Event(), threading.Event()
    add = engine.add

    def slow(*how: object) -> None:
        adding.set()
        assert go_on.wait(10)
        add(*how)  # type: ignore[arg-type]

    async def main() -> None:
        worker = Worker(engine, "m")
        monkeypatch.setattr(engine, "add", slow)
        load = asyncio.create_task(worker.add_adapter(Served(name="other", path=str(adapter_folder), version="1")))
        await asyncio.to_thread(adding.wait, 10)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        go_on.set()
        await draw(worker)
        assert list(engine.adapters) == ["adapter"]

    asyncio.run(main())


def test_the_state_is_asked_for_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often /health is asked while Serve's controller hangs: each question holds a thread."""
    answer, asked = threading.Event(), []

    def hangs() -> None:
        asked.append(1)
        answer.wait(10)

    async def main() -> None:
        backend = ServeBackend(ServingConfig(adapter="/a"), None)  # type: ignore[arg-type]
        monkeypatch.setattr("ray.serve.status", hangs)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await backend.trouble()
        answer.set()

    asyncio.run(main())
    assert asked == [1]


def test_the_state_is_that_of_the_last_answer_while_serves_controller_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def says(app: str, running: int) -> Any:
        replica = SimpleNamespace(replica_states={"RUNNING": running}, message="waits for a GPU")
        return SimpleNamespace(
            applications={"sketch": SimpleNamespace(status=SimpleNamespace(value=app), deployments={REPLICA: replica})}
        )

    def away() -> Any:
        raise RuntimeError("away")

    async def main() -> None:
        monkeypatch.setattr("serving.backend.STATUS_S", 0.0)
        handle: Any = SimpleNamespace(app_name="sketch", deployment_name=REPLICA)
        backend = ServeBackend(ServingConfig(adapter="/a", max_replicas=3), handle)
        monkeypatch.setattr("ray.serve.status", away)
        assert "controller does not answer" in str(await backend.trouble())
        monkeypatch.setattr("ray.serve.status", lambda: says("DEPLOYING", 0))
        assert "starting" in str(await backend.trouble())
        monkeypatch.setattr("ray.serve.status", lambda: says("RUNNING", 3))
        assert await backend.trouble() is None
        assert backend.replicas() == 3
        monkeypatch.setattr("ray.serve.status", away)
        assert await backend.trouble() is None
        assert backend.replicas() == 3
        monkeypatch.setattr("ray.serve.status", lambda: says("RUNNING", 0))
        assert "the server's log says why" in str(await backend.trouble())
        monkeypatch.setattr("serving.backend.KEPT_S", 0.0)
        monkeypatch.setattr("ray.serve.status", away)
        assert "controller does not answer" in str(await backend.trouble())

    asyncio.run(main())
    assert sum("waits for a GPU" in record.getMessage() for record in caplog.records) == 2


def test_a_path_at_which_nothing_is_is_told_before_anything_is_started(tmp_path: Path) -> None:
    from serving.app import build

    for name in ("adapter", "base", "key_file"):
        with pytest.raises(ValueError, match=f"{name}: there is nothing at /not/here"):
            build({"adapter": str(tmp_path), name: "/not/here"})


def test_what_holds_no_adapter_or_no_key_is_told_before_anything_is_started(
    adapter_folder: Path, tmp_path: Path
) -> None:
    from serving.app import build

    with pytest.raises(ValueError, match=r"holds neither ip_adapter.safetensors"):
        build({"adapter": str(tmp_path)})
    (tmp_path / "keys").touch()
    with pytest.raises(ValueError, match=r"holds no key, so nobody could call the server.*sha256sum"):
        build({"adapter": str(adapter_folder), "key_file": str(tmp_path / "keys")})


def test_what_a_server_has_accepted_may_take_as_long_as_a_request_before_it_is_stopped(adapter_folder: Path) -> None:
    from serving.app import build

    ingress = build(
        {"adapter": str(adapter_folder), "request_timeout_s": "77", "max_surge_percent": "50"}
    )._bound_deployment
    replica = ingress.init_args[1]._bound_deployment
    for deployment in (ingress, replica):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 77
    assert ingress._deployment_config.max_surge_percent == 100
    assert replica._deployment_config.max_surge_percent == 50
