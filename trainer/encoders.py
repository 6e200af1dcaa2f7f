"""What the frozen encoders make of samples, computed when it is asked for; trainer/cache.py reads it from a table.

Shape suffixes: B batch, h and w latents, T text tokens, C text width, N image patches + CLS, E vision width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.backbone import Backbone
from trainer.data import Sample, Samples, flipped


class Source(Protocol):
    """Where a worker's samples come from: read on a thread ahead of the step, then given to the device."""

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> list[Any]:
        """Return the samples at `indices`, those of `flips` mirrored."""
        ...

    def posterior(self, samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B,4,h,w) of their latents, fp32, unscaled."""
        ...

    def texts(self, samples: Sequence[Any]) -> Tensor:
        """Return their text tokens (B,T,C)."""
        ...

    def features(self, samples: Sequence[Any]) -> Tensor:
        """Return the image features (B,N,E) of their references."""
        ...


class Encoders:
    """Samples of a dataset, and what the encoders of `base` make of them."""

    def __init__(self, base: Backbone, samples: Samples) -> None:
        self._base, self._samples = base, samples

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> list[Sample]:
        """Return the decoded samples. ValueError naming the row that can't be decoded."""
        return flipped(self._samples.read(indices), flips)

    def posterior(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B,4,h,w) of the targets' latents, fp32, unscaled."""
        return self._base.posterior(torch.stack([sample.target for sample in samples]))

    def texts(self, samples: Sequence[Sample]) -> Tensor:
        """Return text tokens (B,T,C)."""
        return self._base.encode_text([sample.text for sample in samples])

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """Return image features (B,N,E) of the references."""
        return self._base.encode_image([sample.reference for sample in samples])


def with_drops(
    null: Tensor, samples: Sequence[Any], dropped: Sequence[bool], encode: Callable[[Sequence[Any]], Tensor]
) -> Tensor:
    """Return `encode` of the samples (B,...), with `null` (1,...), the state of nothing, where one is dropped."""
    states = null.repeat(len(samples), *(1 for _ in null.shape[1:]))
    shown = [i for i, drop in enumerate(dropped) if not drop]
    if shown:
        states[shown] = encode([samples[i] for i in shown]).to(states)
    return states
