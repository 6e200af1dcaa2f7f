"""A warm start for a new adapter: in each cross-attention, its image branch learns to add what the text would add.

The base follows texts already. Before noise teaches the adapter, it is shown what the text of a sample does in each
layer, for queries that the base really has, and learns to do the same with the sample's picture:

    sum over layers l of |Attn(Q_l, K_ip, V_ip) - (Attn(Q_l, K_l, V_l)(text) - Attn(Q_l, K_l, V_l)(no text))|^2 / var

No step goes through the UNet, so one costs a fraction of a training step. This is not in the paper, nor in IP-Adapter:
it brings through what texts tell, fast; the rest is left to the training proper.

Shape suffixes: B batch, T tokens, C cross-attention width, N image patches + CLS, E vision width, M queries, H width of
an attention layer, A its heads, D width of a head, S heads times queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from trainer.adapter import Adapter, attend, cross_attention
from trainer.optimizers import muon_and_adamw

TIMESTEPS = (990, 900, 800, 700, 500, 300)  # whose queries are recorded: mostly high noise, where a text decides
QUERIES = 12  # of each layer in a step, shared by its samples


@torch.no_grad()
def record_queries(
    unet: UNet2DConditionModel, calls: Iterable[Callable[[], object]], *, per_call: int = 2048
) -> dict[str, Tensor]:
    """Return queries (M,H) of each cross-attention layer that `unet` has in `calls`, which each run it once.

    `per_call` random positions of each call are kept.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, query_BSH: Tensor) -> None:
            query_MH = query_BSH.flatten(0, 1)
            chosen = torch.randperm(len(query_MH))[:per_call].to(query_MH.device)
            found.setdefault(key, []).append(query_MH[chosen])

        return hook

    hooks = [layer.to_q.register_forward_hook(keep(key)) for key, layer in cross_attention(unet).items()]
    try:
        for call in calls:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}


def alignment_loss(
    adapter: Adapter,
    unet: UNet2DConditionModel,
    queries: dict[str, Tensor],
    text_BTC: Tensor,
    empty_1TC: Tensor,
    image_BTC: Tensor,
) -> Tensor:
    """Return the mean over the layers of the image branch's squared distance from the text's part, a scalar in units of
    that part's variance: 1 where the branch adds nothing, 0 where it does what the text does. Much of that part is the
    same for all texts: on the micro base, a branch that adds it whatever the picture comes to 0.65."""
    losses = []
    for key, layer in cross_attention(unet).items():
        query_MH = queries[key][torch.randint(len(queries[key]), (QUERIES,))].to(text_BTC)
        query_BMH = query_MH.expand(len(text_BTC), -1, -1)
        with torch.no_grad():
            wanted = _attend_text(query_MH, layer, text_BTC) - _attend_text(query_MH, layer, empty_1TC)
        branch = adapter.ip_adapter[key]
        made = attend(query_BMH, branch.to_k_ip(image_BTC), branch.to_v_ip(image_BTC), layer.heads)  # type: ignore[operator]
        losses.append(F.mse_loss(made.float(), wanted.float()) / wanted.float().var().clamp(min=1e-8))
    return torch.stack(losses).mean()


def _attend_text(query_MH: Tensor, layer: Any, text_BTC: Tensor) -> Tensor:
    """Return what `attend` gives for queries that all samples share, (B,M,H), without the keys and values of the text.

    Few queries meet many tokens here: a query times to_k's weight, and to_v's times the mixed text, cost a fraction.
    """
    key_ADC, value_ADC = (linear.weight.unflatten(0, (layer.heads, -1)) for linear in (layer.to_k, layer.to_v))
    query_MAD = query_MH.unflatten(-1, (layer.heads, -1)) / math.sqrt(key_ADC.shape[1])
    asked_SC = torch.einsum("mad,adc->amc", query_MAD, key_ADC).flatten(0, 1)
    mixed_BSC = (text_BTC @ asked_SC.T).softmax(1).transpose(1, 2) @ text_BTC
    mixed_BAMC = mixed_BSC.unflatten(1, (layer.heads, -1))
    return torch.einsum("bamc,adc->bmad", mixed_BAMC, value_ADC).flatten(2)


def align(
    adapter: Adapter,
    unet: UNet2DConditionModel,
    queries: dict[str, Tensor],
    empty_1TC: Tensor,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    progress: Callable[[list[float]], float],
    learning_rate: float = 3e-3,
    bf16: bool = False,
    reduce: Callable[[Tensor], object] | None = None,
) -> list[float]:
    """Train `adapter`, which fits `unet`, in place until `progress`, the share that is done, comes to 1.

    `progress` is asked before each step, and given the losses of those before; they are returned in the end.

    `batch(step)` gives text tokens (B,T,C) and image features (B,N,E) of its samples. `reduce` averages a gradient over
    the ranks, in place; with `bf16` the adapter's products are computed so. Muon needs less than half of AdamW's steps.
    A linear warm-up over 50 steps, and a linear fall over the second half.
    """
    parameters = list(adapter.parameters())
    optimizers = muon_and_adamw(adapter, learning_rate)
    losses: list[float] = []
    while (done := progress(losses)) < 1:
        rate = learning_rate * min(1, (len(losses) + 1) / 50, 2 * (1 - done) + 0.02)
        text_BTC, hidden_BNE = batch(len(losses))
        with torch.autocast(hidden_BNE.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = alignment_loss(adapter, unet, queries, text_BTC, empty_1TC, adapter.image_tokens(hidden_BNE))
        loss.backward()
        for parameter in parameters:
            if reduce and parameter.grad is not None:
                reduce(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses
