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
    """Linear read-outs of each attribute of a picture's first `figures` figures; pictures of more teach nothing."""

    def __init__(self, width: int, figures: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES.values()) for _ in range(figures)
        )
        self.hidden = torch.tensor([name in COLOURS for name in VALUES]).float()

    def forward(self, embedding_BE: Tensor, scenes: Sequence[Scene], lines_B: np.ndarray) -> Tensor:
        """Return the cross-entropy, summed over the figures, averaged over pictures and attributes.

        What can't be told counts as 0: of one figure all of the second, and colours where `lines_B`.
        """
        shown_BA = 1 - torch.from_numpy(lines_B).float()[:, None] * self.hidden
        total = embedding_BE.new_zeros(())
        for figure, heads in enumerate(self.heads):
            there_B = torch.tensor([figure < len(scene.figures) <= len(self.heads) for scene in scenes]).float()
            truth_BA = torch.tensor([labels(scene, min(figure, len(scene.figures) - 1)) for scene in scenes])
            for i, head in enumerate(heads):  # type: ignore[arg-type]
                loss_B = F.cross_entropy(head(embedding_BE), truth_BA[:, i], reduction="none")
                total = total + (loss_B * shown_BA[:, i] * there_B).mean()
        return total / len(VALUES)
