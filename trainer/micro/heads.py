"""Read-outs of every attribute from an embedding: a help in training, not kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory.toon.traits import Scene
from trainer.micro.attributes import COLOURS, VALUES, labels


class Heads(nn.Module):
    """Linear read-outs whose targets are the attributes of `scenes`; pictures of two figures teach nothing."""

    def __init__(self, width: int, scenes: Sequence[Scene]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, len(values)) for values in VALUES.values()])
        self.truth = torch.tensor([labels(scene) for scene in scenes])
        self.single = torch.tensor([len(scene.figures) == 1 for scene in scenes]).float()
        self.hidden = torch.tensor([name in COLOURS for name in VALUES]).float()

    def forward(self, embedding_BE: Tensor, chosen_B: np.ndarray, lines_B: np.ndarray) -> Tensor:
        """Return the mean cross-entropy over the attributes that can be told; where `lines_B`, colours can't."""
        told = self.single[chosen_B][:, None] * (1 - torch.from_numpy(lines_B).float()[:, None] * self.hidden)
        total = embedding_BE.new_zeros(())
        for i, head in enumerate(self.heads):
            loss_B = F.cross_entropy(head(embedding_BE), self.truth[chosen_B, i], reduction="none")
            total = total + (loss_B * told[:, i]).mean()
        return total / len(self.heads)
