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


def noise_loss(predicted_B4hw: Tensor, noise_B4hw: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return the mean squared error of the predicted noise, a scalar in fp32 (DDPM, equation 14).

    With `weights_B` the mean over the samples' errors, each times its weight.
    """
    if weights_B is None:
        return F.mse_loss(predicted_B4hw.float(), noise_B4hw.float())
    errors_B = F.mse_loss(predicted_B4hw.float(), noise_B4hw.float(), reduction="none").flatten(1).mean(1)
    return (weights_B * errors_B).mean()


def min_snr_weights(scheduler: Any, timesteps_B: Tensor, gamma: float) -> Tensor:
    """Return weights (B,), at most 1, of samples at these time steps whose noise is predicted: min(SNR, gamma) / SNR.

    SNR = alpha-bar / (1 - alpha-bar). Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al. 2023),
    section 3.4.
    """
    abar_B = scheduler.alphas_cumprod.to(timesteps_B.device)[timesteps_B]
    snr_B = abar_B / (1 - abar_B)
    return snr_B.clamp(max=gamma) / snr_B
