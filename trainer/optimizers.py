"""Muon for a model's matrices and AdamW for the rest: what trains fastest here where seconds count."""

from __future__ import annotations

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
