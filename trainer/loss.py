"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def noise_loss(predicted_B4hw: Tensor, noise_B4hw: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise, a scalar in fp32 (DDPM, equation 14)."""
    return F.mse_loss(predicted_B4hw.float(), noise_B4hw.float())
