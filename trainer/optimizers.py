"""Muon for a model's matrices and AdamW for the rest: what trains fastest here where seconds count; and the rates that
change from step to step."""

from __future__ import annotations

import math

import torch
from torch import nn


def muon_and_adamw(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)
) -> list[torch.optim.Optimizer]:
    """Return optimizers over the parameters of `model` that require gradients, each in one of them.

    Weights of linear layers, but such as are an embedding too, learn by Muon (Jordan 2024), scaled so that one
    `learning_rate` fits both; all else by AdamW.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tied
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if id(p) in linear]
    rest = [p for p in learning if id(p) not in linear]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True),
    ]


def learning_rate_at(step: int, *, learning_rate: float, scheduler: str, warmup: int, total: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`, as diffusers' schedulers of that name.

    "constant"; "constant_with_warmup": linear from 0 in the first `warmup` steps; "cosine": that, then half a cosine
    to 0.
    """
    if scheduler != "constant" and step < warmup:
        return learning_rate * step / warmup
    if scheduler != "cosine":
        return learning_rate
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ema_decay_at(step: int, ema_decay: float) -> float:
    """Return the share of the old average that is kept after optimizer step `step` (from 0), as diffusers' EMAModel.

    min(ema_decay, (1 + step) / (10 + step)), and 0 after the first: a short run is not left with its start.
    """
    return min(ema_decay, (1 + step) / (10 + step)) if step else 0.0
