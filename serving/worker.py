"""One engine, one request at a time, off the event loop; a request that is given up stops after the step in flight."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from serving.engine import Engine, Recipe, Step
from serving.pictures import write_picture


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe and how its pictures are to be delivered."""

    recipe: Recipe
    output_format: str = "png"
    output_compression: int = 100
    # previews per picture
    partial_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Started:
    """First event of a job: it has its turn now."""

    # what the caller should know about the request, in words
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file: a preview when `partial` says which one (from 0), or the result."""

    data: bytes
    seed: int
    partial: int | None = None


Event = Started | Picture


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a server is: fixed as long as it runs."""

    model: str
    base: str
    base_weights_hash: str
    # pixels
    native_size: tuple[int, int]
    size_multiple: int
    # random weights: pictures are noise, everything else is real
    random_weights: bool


class GivenUp(Exception):
    """Nobody waits for this job any more."""


class Worker:
    """Runs jobs on an engine, in the order in which they come."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self.model = model
        self._turn = asyncio.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    def facts(self) -> Facts:
        """Return what this server is."""
        backbone = self.engine.backbone
        return Facts(
            model=self.model,
            base=backbone.id,
            base_weights_hash=backbone.weights_hash,
            native_size=(backbone.native_size, backbone.native_size),
            size_multiple=backbone.latent_factor,
            random_weights=backbone.random_weights,
        )

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield Started at the job's turn, then its Pictures. Cancelled or closed, it stops after the step in flight.

        What goes wrong in one job is raised here and touches no other.
        """
        async with self._turn:
            yield Started(warnings=self.warnings(job.recipe))
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[Picture | None] = asyncio.Queue()
            given_up = threading.Event()

            def send(event: Picture | None) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            def work() -> None:
                try:
                    self._run(job, given_up, send)
                finally:
                    send(None)

            done = loop.run_in_executor(self._pool, work)
            try:
                while (event := await events.get()) is not None:
                    yield event
                await done
            finally:  # the turn ends when the thread does, also when this task is cancelled again while it waits
                given_up.set()
                while not done.done():
                    try:
                        await asyncio.wait([done])
                    except asyncio.CancelledError:
                        continue
                if not done.cancelled():
                    done.exception()  # seen: raised above, or of no interest to anybody

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

    def _run(self, job: Job, given_up: threading.Event, send: Callable[[Picture], None]) -> None:
        recipe, steps = job.recipe, job.recipe.num_inference_steps
        previews = {round(steps * (k + 1) / (job.partial_images + 1)): k for k in range(job.partial_images)}

        def on_step(step: Step) -> None:
            if given_up.is_set():
                raise GivenUp
            number = (step.number - 1) % steps + 1
            if number in previews and number < steps:
                for i, image in enumerate(self.engine.decode(step.x0), start=step.first):
                    send(self._picture(job, image, i, previews[number]))

        if given_up.is_set():
            return
        try:
            images = self.engine.infer(recipe, on_step)
        except GivenUp:
            return
        for i, image in enumerate(images):
            send(self._picture(job, image, i, None))

    def _picture(self, job: Job, image: Image.Image, i: int, partial: int | None) -> Picture:
        """Return picture i as a file whose recipe makes it again, alone: its own seed, no time, no request id."""
        recipe, backbone = job.recipe, self.engine.backbone
        width, height = image.size
        reference = recipe.reference
        facts = {
            "prompt": recipe.prompt,
            "negative_prompt": recipe.negative_prompt,
            "num_inference_steps": recipe.num_inference_steps,
            "guidance_scale": recipe.guidance_scale,
            "adapter_scale": recipe.adapter_scale,
            "seed": recipe.seed + i,
            "size": f"{width}x{height}",
            "reference_sha256": None if reference is None else hashlib.sha256(reference.tobytes()).hexdigest(),
            "model": self.model,
            "base": backbone.id,
            "base_weights_hash": backbone.weights_hash,
            "dtype": str(backbone.unet.dtype).removeprefix("torch."),
        }
        data = write_picture(image, job.output_format, job.output_compression, facts)
        return Picture(data=data, seed=recipe.seed + i, partial=partial)
