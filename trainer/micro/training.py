"""One training loop for all stages: schedule, averaged weights, progress, curve, and going on where it was stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from factory.files import new_file
from trainer.optimizers import muon_and_adamw

SAVE_EVERY = 250  # steps between states that a stopped stage goes on from
SAY_EVERY = 50  # steps between lines of progress, each with the means since the last


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained: AdamW or Muon, linear warm-up, cosine to zero over the last part."""

    steps: int  # optimizer steps
    batch_size: int
    learning_rate: float
    muon: bool = False  # matrices by Muon, the rest by AdamW
    seed: int = 0  # of the initial weights and of everything that is drawn while training
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100  # steps
    decay_from: float = 0.5  # share of the steps after which the learning rate falls
    clip: float = 1.0  # largest norm of the gradient
    ema: float | None = None  # decay of the averaged weights, which are kept in the end; None: the last ones are kept

    def rate(self, step: int) -> float:
        """The learning rate of `step` (from 0)."""
        start = self.decay_from * self.steps
        fall = max(0.0, (step - start) / max(1.0, self.steps - start))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * fall))


def train(
    name: str,
    model: nn.Module,
    recipe: Recipe,
    loss: Callable[[int, np.random.Generator], dict[str, Tensor]],
    *,
    folder: Path,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int = 500,
) -> None:
    """Train the parameters of `model` that require gradients, in place; `loss` gives a step's terms, of which `loss` is
    followed, and all are shown.

    What a step draws depends on the recipe's seed and the step alone. `folder` gets `curve.jsonl`, and `state.pt` while
    the stage is under way; the same call goes on from it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates = {"weight_decay": recipe.weight_decay, "betas": recipe.betas}
    if recipe.muon:
        optimizers = muon_and_adamw(model, recipe.learning_rate, **rates)
    else:
        optimizers = [torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True, **rates)]
    average = [p.detach().clone() for p in parameters] if recipe.ema else None
    folder.mkdir(parents=True, exist_ok=True)
    state, curve, first, spent = folder / "state.pt", folder / "curve.jsonl", 0, 0.0
    if state.is_file():
        held = torch.load(state, weights_only=True)
        if held["recipe"] != asdict(recipe):
            raise ValueError(f"{state} is of another recipe. Remove {folder} to begin anew, or give another --output.")
        model.load_state_dict(held["model"])
        for optimizer, state_of in zip(optimizers, held["optimizers"], strict=True):
            optimizer.load_state_dict(state_of)
        average, first, spent = held["average"], held["step"], held["seconds"]
        rows = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= first]
        curve.write_text("".join(f"{row}\n" for row in rows))
    else:
        curve.write_text("")
    model.train()
    begun, sums, count = time.monotonic() - spent, {}, 0
    for step in range(first, recipe.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate(step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        terms = loss(step, np.random.default_rng((recipe.seed, step)))
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if average and recipe.ema:
            share = 1 - min(recipe.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, parameter in zip(average, parameters, strict=True):
                    mean.lerp_(parameter, share)
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        count += 1
        done, last = step + 1, step + 1 == recipe.steps
        if last or done % SAY_EVERY == 0:
            row = {"step": done, "seconds": round(time.monotonic() - begun, 1)}
            row |= {key: round(value / count, 5) for key, value in sums.items()}
            if validate and (last or done % validate_every == 0):
                row |= _validated(model, parameters, average, validate)
            with open(curve, "a") as file:
                file.write(json.dumps(row) + "\n")
            left = row["seconds"] / done * (recipe.steps - done)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key not in ("step", "seconds"))
            print(f"{name:<9}{done}/{recipe.steps}  {shown}  {left / 60:.0f} min left", flush=True)
            sums, count = {}, 0
        if last or done % SAVE_EVERY == 0:
            held = {
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average,
            }
            with new_file(state) as aside:
                torch.save(held | {"step": done, "seconds": time.monotonic() - begun}, aside)
    if average:
        _swap(parameters, average)
    model.eval()


@torch.no_grad()
def _validated(
    model: nn.Module,
    parameters: Sequence[Tensor],
    average: list[Tensor] | None,
    validate: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """What `validate` says of the averaged weights."""
    model.eval()
    if average:
        _swap(parameters, average)
    found = validate()
    if average:
        _swap(parameters, average)
    model.train()
    return found


@torch.no_grad()
def _swap(parameters: Sequence[Tensor], average: list[Tensor]) -> None:
    for parameter, mean in zip(parameters, average, strict=True):
        held = parameter.detach().clone()
        parameter.copy_(mean)
        mean.copy_(held)
