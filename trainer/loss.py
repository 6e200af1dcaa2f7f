"""What the training objective is: latents with noise on them, and the loss of the noise that is predicted."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def add_noise(scheduler: Any, latents_B4hw: Tensor, noise_B4hw: Tensor, timesteps_B: Tensor) -> Tensor:
    """Return noisy latents (B,4,h,w) in fp32, by the alpha-bar of a diffusers `scheduler` (DDPM, equation 4).

    In bf16 alpha-bar rounds to 1 at time steps 0 and 1: there would be no noise at all.
    """
    return scheduler.add_noise(latents_B4hw.float(), noise_B4hw.float(), timesteps_B)


def noise_loss(predicted_B4hw: Tensor, noise_B4hw: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise, a scalar in fp32 (DDPM, equation 14)."""
    return F.mse_loss(predicted_B4hw.float(), noise_B4hw.float())
