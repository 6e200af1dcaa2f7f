"""One engine in a thread of its own, off the event loop: jobs join it and leave it between two steps.

A job that is given up costs the step in flight and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from serving.adapters import Served
from serving.batcher import Batcher
from serving.engine import ONLY, Engine, Slot
from serving.job import Event, Facts, Job, Picture, SamplerStopped, Started
from serving.pictures import read_picture, write_picture
from serving.recipe import Recipe
from serving.warmup import draw_canary, in_own_thread

T = TypeVar("T")


@dataclass(eq=False)
class _Running:
    """A job that is being drawn, and where its events go: from any thread; None is the last one."""

    job: Job
    # its own, with the reference
    recipe: Recipe
    send: Callable[[Event | Exception | None], object]
    reference_sha256: str | None = None
    slots: list[Slot] = field(default_factory=list)
    # nobody waits for it any more
    left: bool = False


class Worker:
    """Draws jobs on an engine."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        *,
        version: str = "",
        cap: int = 4,
        steps_per_second: float = 0.0,
        patience_s: float = 60.0,
        watch: Callable[[int, int, float, int], object] = lambda drawn, waiting, seconds, places: None,
    ) -> None:
        """`version` of the engine's own adapter, for recipes. `cap`: pictures of the native size that are denoised at a
        time; `steps_per_second`: as in Facts.

        `patience_s`: seconds that no single step takes, nor anything else that is done between two of them: beyond it
        the sampler hangs. `watch` is told of each step: the pictures in it, those that wait for a place, its seconds,
        and `cap`, which is less after a step that the memory had no room for; of zeros and `cap` when there is nothing
        to draw any more.
        """
        self.engine = engine
        self.model, self.version = model, version
        self.steps_per_second = steps_per_second
        self._patience_s = patience_s
        self._watch = watch
        self.batcher = Batcher(engine, cap)
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()  # what to do before the next step
        self._jobs: set[_Running] = set()  # all whose caller waits
        self._running: dict[int, _Running] = {}  # by id of slot
        # one thing at a time, beside the next step: one reference's pixels are held, and files come in order
        self._references = ThreadPoolExecutor(max_workers=1, thread_name_prefix="references")
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._stopped: str | None = None  # why nothing is drawn any more
        self._since: float | None = None  # when what is being done was begun; None = nothing is
        self._doubtful = False  # something has failed, and nothing been proven since
        self._fault: BaseException | None = None  # of the last canary; None = it could be drawn
        self._canary: Future[None] | None = None  # that is to be drawn, or is drawn and not yet asked about
        threading.Thread(target=self._draw, name="sampler", daemon=True).start()

    def facts(self) -> Facts:
        """Return what this server is."""
        backbone = self.engine.backbone
        return Facts(
            model=self.model,
            base=backbone.id,
            base_weights_hash=backbone.weights_hash,
            native_size=(backbone.native_size, backbone.native_size),
            size_multiple=self.engine.size_multiple,
            random_weights=backbone.random_weights,
            steps_per_second=self.steps_per_second,
        )

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield Started once the job is accepted, then its Pictures. Cancelled or closed, it leaves the batch.

        What goes wrong in one job is raised here and touches no other. BadPicture when its reference can't be decoded,
        SamplerStopped when nothing works any more.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        recipe, sha256 = job.recipe, job.recipe.reference_sha256
        if job.reference is not None:
            recipe, sha256 = await loop.run_in_executor(self._references, self._with_reference, job)
        running = _Running(job, recipe, lambda event: loop.call_soon_threadsafe(events.put_nowait, event), sha256)
        self._jobs.add(running)
        try:
            self._inbox.put(lambda: self._join(running))
            if self._stopped is not None:  # asked after the job is known: those known when it stopped are told there
                raise SamplerStopped(self._stopped)
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            running.left = True
            self._jobs.discard(running)
            self._inbox.put(lambda: self._leave(running))

    def _with_reference(self, job: Job) -> tuple[Recipe, str]:
        """Return the recipe of a job with its reference, as small as the encoder sees it, and the sha256 of the whole.

        BadPicture when it is damaged.
        """
        whole = dataclasses.replace(job.recipe, reference=read_picture(job.reference or b""))
        assert whole.reference is not None
        assert whole.reference_sha256 is not None
        recipe = dataclasses.replace(job.recipe, reference=self.engine.backbone.squeeze(whole.reference))
        return recipe, whole.reference_sha256

    async def check(self) -> None:
        """Say whether this worker can draw: nothing is raised when it can.

        SamplerStopped when its thread has ended or hangs: all jobs are told so, and it takes no more. After a job has
        failed, a canary is drawn before the next step; later calls raise what went wrong there, until one can be drawn.
        """
        since = self._since
        if self._stopped is None and since is not None and time.monotonic() - since > self._patience_s:
            self._stop(f"The sampler hangs: it has been at one thing for more than {self._patience_s:.0f} s.")
        if self._stopped is not None:
            raise SamplerStopped(self._stopped)
        if self._canary is not None and self._canary.done():
            self._fault, self._canary = self._canary.exception(), None
        if self._doubtful and self._canary is None:
            self._canary = self._put(self._draw_canary)
        if self._fault is not None:
            raise self._fault

    async def add_adapter(self, served: Served) -> None:
        """Load an adapter, while the others are drawn. AdapterError when it is damaged, or of another base."""
        loaded = await asyncio.to_thread(in_own_thread, lambda: self.engine.read_adapter(served.path))
        try:
            await self._between_steps(lambda: self.engine.add(served.id, loaded))
        except asyncio.CancelledError:  # too late perhaps: nobody would unload it
            self.remove_adapter(served)
            raise

    def remove_adapter(self, served: Served) -> None:
        """Unload an adapter, if it is there; what it has begun is drawn to its end."""
        self._inbox.put(lambda: served.id in self.engine.adapters and self.engine.remove(served.id))

    async def _between_steps(self, do: Callable[[], T]) -> T:
        """Return what `do` returns, or raise what it raises, in the thread that draws."""
        done = self._put(do)
        if self._stopped is not None:
            raise SamplerStopped(self._stopped)
        return await asyncio.wrap_future(done)

    def _put(self, do: Callable[[], T]) -> Future[T]:
        """Have something done in the thread that draws, between two steps."""
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._stopped is not None:
                    raise SamplerStopped(self._stopped)
                done.set_result(do())
            except Exception as error:
                done.set_exception(error)

        self._inbox.put(run)
        return done

    def _draw_canary(self) -> None:
        draw_canary(self.engine)
        self._doubtful = False

    def _stop(self, why: str) -> None:
        """Take no more jobs, and tell those that there are."""
        self._stopped = why
        for running in list(self._jobs):
            self._send(running, SamplerStopped(why))

    def _draw(self) -> None:
        """Step through what there is, for ever."""
        try:
            while self._stopped is None:
                self._take_in()
                self._step()
        except BaseException as error:
            self._stop(f"The sampler stopped: {error!r}")
            raise
        finally:
            while not self._inbox.empty():
                self._inbox.get()()

    def _take_in(self) -> None:
        """Do what has come in; wait for it when there is nothing to draw."""
        wait = not self.batcher
        while wait or not self._inbox.empty():
            if wait:
                self._since = None
                self._watch(0, 0, 0.0, self.batcher.cap)
            do, wait = self._inbox.get(), False
            self._since = time.monotonic()
            do()

    def _step(self) -> None:
        self._since = begun = time.monotonic()
        slots, failed = self.batcher.step()
        if slots:
            waiting, seconds = len(self.batcher) - sum(bool(slot.timesteps) for slot in slots), time.monotonic() - begun
            self._watch(len(slots), waiting, seconds, self.batcher.cap)
            for slot in slots:
                slot.share += 1 / len(slots)
                slot.seconds += seconds / len(slots)
        for slot, error in failed:
            if id(slot) in self._running:  # its job has not failed by another slot
                self._fail(self._running[id(slot)], error)
        for slot in slots:
            if id(slot) in self._running:
                self._since = time.monotonic()
                self._stepped(self._running[id(slot)], slot)

    def _join(self, running: _Running) -> None:
        if self._stopped is not None:
            self._send(running, SamplerStopped(self._stopped))
            return
        if running.left:  # while it waited for the step in flight: nothing is encoded for it
            return
        if self._doubtful:
            try:
                self._draw_canary()
            except Exception as error:  # no fault of this job: another replica may draw it
                self._send(running, SamplerStopped(f"The canary can't be drawn: {error!r}"))
                return
        recipe = running.recipe
        try:
            adapter = running.job.adapter.id if running.job.adapter else ONLY
            running.slots = [self.engine.slot(recipe, i, adapter) for i in range(recipe.n)]
            warnings = self.warnings(recipe)
        except Exception as error:
            self._doubtful = True
            self._send(running, error)
            return
        self._running |= {id(slot): running for slot in running.slots}
        self.batcher.add(running.slots)
        self._send(running, Started(warnings=warnings))

    def _leave(self, running: _Running) -> None:
        running.left = True
        self.batcher.remove(running.slots)
        for slot in running.slots:
            self._running.pop(id(slot), None)

    def _stepped(self, running: _Running, slot: Slot) -> None:
        """Send what a slot's step has brought: a preview, or its picture, and with the last one the end."""
        job, steps = running.job, running.job.recipe.num_inference_steps
        previews = {round(steps * (k + 1) / (job.partial_images + 1)): k for k in range(job.partial_images)}
        partial = previews.get(slot.done) if slot.timesteps else None
        if slot.timesteps and partial is None:
            return
        try:
            image = self.engine.picture(slot)
        except Exception as error:
            self._fail(running, error)
            return
        self._files.submit(self._write, running, image, slot, partial)
        if not slot.timesteps:
            del self._running[id(slot)]
            running.slots = [other for other in running.slots if other is not slot]
            if not running.slots:
                self._files.submit(self._send, running, None)

    def _fail(self, running: _Running, error: Exception) -> None:
        self._doubtful = True
        self._leave(running)
        self._files.submit(self._send, running, error)

    def _write(self, running: _Running, image: Image.Image, slot: Slot, partial: int | None) -> None:
        if running.left:
            return
        try:
            self._send(running, self._picture(running, image, slot, partial))
        except Exception as error:
            self._send(running, error)

    def warnings(self, recipe: Recipe) -> tuple[str, ...]:
        """Return what was asked for and will not be seen in the picture."""
        found = []
        for name in ("prompt", "negative_prompt"):
            if cut := self.engine.cut_tokens(getattr(recipe, name)):
                most = self.engine.backbone.max_tokens
                found.append(
                    f"{name} is {cut} tokens longer than the {most} that the model reads; its end has no effect."
                )
        if self.engine.backbone.random_weights:
            found.append("The base has random weights, made for tests: pictures are noise.")
        return tuple(found)

    def _picture(self, running: _Running, image: Image.Image, slot: Slot, partial: int | None) -> Picture:
        """Return a picture as a file whose recipe makes it again, alone: its own seed, no time, no request id."""
        job, recipe, backbone = running.job, running.job.recipe, self.engine.backbone
        seed = recipe.seed + slot.number
        width, height = image.size
        facts = {
            "prompt": recipe.prompt,
            "negative_prompt": recipe.negative_prompt,
            "num_inference_steps": recipe.num_inference_steps,
            "guidance_scale": recipe.guidance_scale,
            "adapter_scale": recipe.adapter_scale,
            "seed": seed,
            "size": f"{width}x{height}",
            "reference_sha256": running.reference_sha256,
            "model": job.adapter.name if job.adapter else self.model,
            "model_version": job.adapter.version if job.adapter else self.version,
            "base": backbone.id,
            "base_weights_hash": backbone.weights_hash,
            "dtype": str(backbone.dtype).removeprefix("torch."),
        }
        data = write_picture(image, job.output_format, job.output_compression, facts)
        if partial is not None:
            return Picture(data=data, seed=seed, partial=partial)
        return Picture(data=data, seed=seed, steps=slot.done, share=slot.share, seconds=slot.seconds)

    @staticmethod
    def _send(running: _Running, event: Event | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            running.send(event)
