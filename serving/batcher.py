"""Which slots are denoised together: pictures join and leave between steps, and shapes take turns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from PIL import Image

from serving.engine import Engine, Slot
from serving.recipe import Recipe

GAIN = 1.1  # more pictures a second that twice the slots must bring, to be worth the longer steps


class Batcher:
    """Slots of one engine, in the order in which they came. Not for several threads at once.

    At most `cap` slots are denoised at a time, counted in pictures of the base's native size; the others wait in line,
    and nobody overtakes. Slots of one shape are one batch; the batches of several shapes take a step in turn, so that
    each picture goes on as fast as every other.
    """

    def __init__(self, engine: Engine, cap: int) -> None:
        self.engine, self.cap = engine, cap
        self.waiting: deque[Slot] = deque()
        self.active: list[Slot] = []
        self._turns: deque[tuple[int, int, int]] = deque()  # shapes of active slots, whose turn is next first

    def add(self, slots: Sequence[Slot]) -> None:
        """Put slots at the end of the line."""
        self.waiting.extend(slots)

    def remove(self, slots: Sequence[Slot]) -> None:
        """Have no more to do with slots, wherever they are."""
        gone = set(map(id, slots))
        self.waiting = deque(slot for slot in self.waiting if id(slot) not in gone)
        self.active = [slot for slot in self.active if id(slot) not in gone]

    def step(self) -> tuple[list[Slot], list[tuple[Slot, Exception]]]:
        """Take the batch whose turn it is a step further. Return its slots, and those that failed with their errors.

        Slots that are done, or failed, are not active any more. A step that fails is tried again slot by slot: what is
        wrong with one is not the others' fault. Nothing at all is returned when there is nothing to do.
        """
        self._admit()
        if not self._turns:
            return [], []
        shape = self._turns[0]
        self._turns.rotate(-1)
        slots, failed = [slot for slot in self.active if slot.shape == shape], []
        try:
            self.engine.step(slots)
        except Exception as error:
            failed = [(slots[0], error)] if len(slots) == 1 else self._one_by_one(slots)
            slots = [slot for slot in slots if all(slot is not other for other, _ in failed)]
        self.remove([slot for slot, _ in failed] + [slot for slot in slots if not slot.timesteps])
        return slots, failed

    def cost(self, slot: Slot) -> float:
        """Return how much of `cap` a slot takes: its pixels in pictures of the native size."""
        side = self.engine.backbone.unet.config["sample_size"]
        return slot.latents[0, 0].numel() / side**2

    def _admit(self) -> None:
        """Let slots in as long as they fit; one that is larger than `cap` goes alone."""
        held = sum(map(self.cost, self.active))
        while self.waiting and (not self.active or held + self.cost(self.waiting[0]) <= self.cap):
            held += self.cost(self.waiting[0])
            self.active.append(self.waiting.popleft())
        shapes = {slot.shape for slot in self.active}
        self._turns = deque(shape for shape in self._turns if shape in shapes)
        self._turns.extend(shape for shape in dict.fromkeys(s.shape for s in self.active) if shape not in self._turns)

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

    It ends at the first number that does not bring `GAIN` times the pictures of half as many, or does not fit the
    memory. What is measured is warm afterwards.
    """
    white = Image.new("RGB", (64, 64), "white")
    recipe = Recipe(prompt="warm", reference=white, num_inference_steps=4)
    found: dict[int, float] = {}
    count = 1
    while count <= most:
        try:
            slots, seconds = [engine.slot(recipe, i, adapter) for i in range(count)], []
            for _ in range(recipe.num_inference_steps):
                begun = time.perf_counter()
                engine.step(slots)
                slots[0].latents.sum().item()  # waits for a GPU
                seconds.append(time.perf_counter() - begun)
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
        found[count] = min(seconds[1:])
        if count > 1 and found[count // 2] * 2 / found[count] < GAIN:
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
