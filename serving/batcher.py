"""Which slots are denoised together: pictures join and leave between steps, and none waits long for its size."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from serving.engine import Engine, Slot
from serving.recipe import Recipe

log = logging.getLogger("ray.serve")
MEASURED_S = 1.0  # that steps of one number of pictures are measured for, where more than four fit in
GAIN = 1.1  # more pictures a second that twice the slots must bring, to be worth the longer steps


class Batcher:
    """Slots of one engine. Not for several threads at once.

    Slots of one shape are denoised together, as many as `cap` pictures of the base's native size. Each step is for the
    slot that has waited longest for its size, as a multiple of its own work (steps x pixels), and for the next ones of
    its shape: short pictures don't wait for long ones, and nobody starves, since waiting alone brings a slot to the
    front.
    """

    def __init__(self, engine: Engine, cap: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.cap, self._clock = engine, cap, clock
        self._came: dict[Slot, float] = {}  # when each slot did, in that order

    def __len__(self) -> int:
        """Return the number of slots that are not done."""
        return len(self._came)

    def add(self, slots: Sequence[Slot]) -> None:
        """Have slots drawn."""
        self._came |= dict.fromkeys(slots, self._clock())

    def remove(self, slots: Sequence[Slot]) -> None:
        """Have no more to do with slots."""
        for slot in slots:
            self._came.pop(slot, None)

    def step(self) -> tuple[list[Slot], list[tuple[Slot, Exception]]]:
        """Take a batch a step further. Return its slots, and those that failed with their errors.

        Slots that are done, or failed, are removed. A step that fails is tried again slot by slot: what is wrong with
        one is not the others' fault. Nothing at all is returned when there is nothing to do.
        """
        slots, failed, again = self._next(), [], False
        if not slots:
            return [], []
        try:
            self.engine.step(slots)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and len(slots) > 1:
                self.cap = max(1, self.cap // 2)
                log.warning("Out of memory with %d pictures in a step: from now on %d at most.", len(slots), self.cap)
            again = len(slots) > 1
            failed = [] if again else [(slots[0], error)]
        if again:  # only here: the error, which is gone now, held the memory of the whole batch
            failed = self._one_by_one(slots)
        slots = [slot for slot in slots if all(slot is not other for other, _ in failed)]
        self.remove([slot for slot, _ in failed] + [slot for slot in slots if not slot.timesteps])
        return slots, failed

    def _next(self) -> list[Slot]:
        """Return the slots of the next step, in the order in which they came; one that is larger than `cap` alone."""
        now = self._clock()

        def waited(slot: Slot) -> float:
            return (now - self._came[slot]) / (slot.recipe.num_inference_steps * self._cost(slot))

        slots = sorted(self._came, key=waited, reverse=True)
        of_shape = [slot for slot in slots if slot.shape == slots[0].shape]
        chosen = of_shape[: max(1, int(self.cap / self._cost(slots[0])))] if slots else []
        return [slot for slot in self._came if slot in chosen]

    def _cost(self, slot: Slot) -> float:
        """Return how much of `cap` a slot takes: its pixels in pictures of the native size."""
        side = self.engine.backbone.unet.config["sample_size"]
        return slot.latents[0, 0].numel() / side**2

    def _one_by_one(self, slots: Sequence[Slot]) -> list[tuple[Slot, Exception]]:
        """Take each slot a step further alone; return those that failed."""
        failed = []
        for slot in slots:
            try:
                self.engine.step([slot])
            except Exception as error:
                failed.append((slot, error))
        return failed


def step_seconds(engine: Engine, adapter: str, most: int) -> dict[int, float]:
    """Return the seconds of a guided step of 1, 2, 4, … up to `most` pictures of the native size, with references.

    It ends at the first number that does not bring `GAIN` times the pictures of half as many, when both are measured
    again too, or does not fit the memory. What is measured is warm afterwards.
    """
    white = Image.new("RGB", (64, 64), "white")
    recipe = Recipe(prompt="warm", reference=white, num_inference_steps=50)
    found: dict[int, float] = {}

    def measure(count: int) -> None:
        slots, seconds = [engine.slot(recipe, i, adapter) for i in range(count)], []
        while len(seconds) < 4 or (sum(seconds) < MEASURED_S and slots[0].timesteps):
            begun = time.perf_counter()
            engine.step(slots)
            slots[0].latents.sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - begun)
        # the first one warms up; what else the machine does only adds to others
        found[count] = min(*seconds[1:], found.get(count, math.inf))

    def brings(count: int) -> bool:
        return count == 1 or found[count // 2] * 2 / found[count] >= GAIN

    count = 1
    while count <= most:
        try:
            measure(count)
            if not brings(count):  # or something else was at work
                measure(count // 2)
                measure(count)
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
        if not brings(count):
            break
        count *= 2
    return found


def best_cap(seconds: dict[int, float]) -> int:
    """Return the number of pictures, of those measured, that is worth its longer steps."""
    counts = sorted(seconds)
    best = counts[0]
    for count in counts[1:]:
        if seconds[best] * count / (best * seconds[count]) < GAIN:
            break
        best = count
    return best
