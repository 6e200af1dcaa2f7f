"""The DeepSpeed engine over an adapter, and its optimizer's state as it is without an engine: whole tensors by name.

ZeRO cuts parameters and state into as many shards as there are workers. What is saved is neither cut nor pickled, so
that a run goes on with another number of workers, or another stage, than it was saved with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state
from torch import Tensor

from trainer.adapter import Adapter
from trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside the number of steps


def make_engine(adapter: Adapter, config: TrainerConfig) -> Any:
    """Return a DeepSpeed engine over the adapter alone: the frozen base stays outside, hence out of its shards too."""
    # on CPUs DeepSpeed would compile a shared-memory op to set up communication: gloo serves, and needs no compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    parts = dist.get_world_size() * config.gradient_accumulation_steps
    bf16 = config.mixed_precision == "bf16"
    settings = {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": config.train_batch_size // parts,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed's default is 1.0
        # DeepSpeed sets a bucket for gradients aside whole: by default 2 GB
        "zero_optimization": {
            "stage": config.workers.zero_stage,
            "reduce_bucket_size": sum(parameter.numel() for parameter in adapter.parameters()),
        },
        # no "safe modules": gradients are exchanged in fp32
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 30,
    }
    return deepspeed.initialize(model=adapter, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def set_learning_rate(engine: Any, rate: float) -> None:
    """Make `rate` that of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[None]:
    """Have the parameters of all ranks whole, to read only, while the block runs: ZeRO-3 cuts them up else."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        yield


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """Return copies of AdamW's moments on the CPU, fp32, whole, as "exp_avg.NAME" and "exp_avg_sq.NAME".

    All ranks must call it together.
    """
    state = {}
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            if engine.zero_optimization_stage() == 0:
                value = engine.optimizer.state[parameter][moment]
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            assert value is not None, name
            state[f"{moment}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return state


def load_optimizer_state(engine: Any, state: dict[str, Tensor], step: int) -> None:
    """Give a new engine the state that `optimizer_state` returned after `step` steps, whatever its ranks and stage."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    flat = {
        0: lambda: list(engine.module.parameters()),
        1: lambda: optimizer.single_partition_of_fp32_groups,
        2: lambda: optimizer.single_partition_of_fp32_groups,
        3: lambda: optimizer.fp32_partitioned_groups_flat,
    }[stage]()
    inner = optimizer.optimizer if stage else optimizer
    for held in flat:  # AdamW makes these at its first step only
        inner.state[held] = {"step": torch.tensor(float(step))} | {name: torch.zeros_like(held) for name in MOMENTS}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            value = state[f"{moment}.{name}"]
            if stage == 0:
                inner.state[parameter][moment].copy_(value)
            elif stage == 3:
                safe_set_local_optimizer_state(parameter, _shard(value, parameter.ds_tensor), moment)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that ZeRO-3 has cut into parts of `like`'s size, the last one padded."""
    start, size = dist.get_rank() * like.numel(), like.numel()
    part = value.flatten()[start : start + size].to(like.device)
    return torch.nn.functional.pad(part, (0, size - len(part)))
