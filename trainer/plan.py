"""What a run needs before it is started: does it fit, with which ZeRO stage, and how long does it take.

Memory and work are counted from the run's own step (`trainer/walk.py`); nothing is loaded. Times are the counted work
at an assumed share of a GPU's peak: they leave out data, communication and validation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.base import BaseFiles, find_base
from trainer.config import TrainerConfig
from trainer.sd15 import ID, IMAGE_ENCODER, BaseSizes
from trainer.walk import PARTS, Walked, Walker

GIB = 2**30
UTILISATION = 0.3  # stock diffusers samples at 40 % of an A100's peak (1.50 pictures of 83 TFLOP a second, batch 16)
STAGES = (0, 1, 2, 3)
SET_ASIDE, SLACK = GIB, 0.1  # the CUDA context and workspaces of cuDNN, cuBLAS, NCCL; of the step: fragmentation


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its data sheet has it. Memory is what nvidia-smi shows as total; peaks are dense, without sparsity."""

    name: str
    mib: int
    bf16: float  # TFLOP/s of the tensor cores
    fp32: float  # TFLOP/s without them


GPUS = {
    "a10": Gpu(name="A10", mib=23_028, bf16=125, fp32=31.2),
    "a100-40": Gpu(name="A100 40 GB", mib=40_960, bf16=312, fp32=19.5),
    "a100-80": Gpu(name="A100 80 GB", mib=81_920, bf16=312, fp32=19.5),
    "h100": Gpu(name="H100 SXM", mib=81_559, bf16=989, fp32=66.9),
    "h200": Gpu(name="H200", mib=143_771, bf16=989, fp32=66.9),
}
DEFAULT_GPUS = ("a10", "a100-80", "h100")


def base_sizes(config: TrainerConfig) -> BaseSizes:
    """Return the sizes of the run's base: SD v1.5's are known, others are read from a folder's config.json.

    Nothing is downloaded: ValueError for another hub id, FileNotFoundError for a folder that is no pipeline.
    """
    name = config.pretrained_model_name_or_path
    if (name, config.image_encoder) == (ID, IMAGE_ENCODER):
        return BaseSizes()
    if not (os.path.isdir(name) or name.startswith("animesketch/")):
        raise ValueError(
            f"The sizes of {name} with image encoder {config.image_encoder} are not known here. Give --base a folder; "
            f"for a fine-tuned Stable Diffusion v1.5, plan with {ID}: it has the same sizes."
        )
    found: BaseFiles = find_base(name, config.image_encoder)
    return BaseSizes.of(found.folder, found.image_encoder, found.id)


def state_bytes(parameters: int, stage: int, workers: int) -> int:
    """Return the bytes of a worker for an adapter in fp32 and its AdamW, between steps, as DeepSpeed 0.19 keeps them.

    Stage 0: weights and two moments; gradients are part of the step. Stages 1 and 2: the weights, a bucket for the
    gradients of all, and a share of master weights, gradients and moments. Stage 3: a share of the weights too, but
    while a layer is at work its weights are whole, and here all layers are.
    """
    whole, share = 4 * parameters, 4 * -(-parameters // workers)
    if stage == 0:
        return whole + 2 * whole
    return whole + whole + 4 * share + (share if stage == 3 else 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answers for one run."""

    config: TrainerConfig
    base: str
    asked: Walked  # a part of a worker's batch, as the settings say
    other: Walked  # with gradient checkpointing the other way
    utilisation: float

    @property
    def parts(self) -> int:
        """Passes that a worker takes for one optimizer step."""
        return self.config.gradient_accumulation_steps

    def needs(self, walked: Walked, stage: int) -> int:
        """Return the bytes of a GPU that a run takes."""
        state = state_bytes(walked.parameters["adapter"], stage, self.config.workers.num_workers)
        return walked.frozen_bytes + state + int((1 + SLACK) * walked.peak_bytes) + SET_ASIDE

    def stage(self, gpu: Gpu, walked: Walked) -> int | None:
        """Return the lowest ZeRO stage with which the run fits; None when it fits with none."""
        return next((stage for stage in STAGES if self.needs(walked, stage) <= gpu.mib * 2**20), None)

    def largest(self, gpu: Gpu, walked: Walked) -> int:
        """Return the most samples of one pass that fit, with the stage that is set; 0 for none."""
        step = (1 + SLACK) * walked.peak_bytes
        room = gpu.mib * 2**20 - self.needs(walked, self.config.workers.zero_stage) + step
        return max(0, int(room * walked.batch / step))  # a peak grows with its samples

    def seconds(self, gpu: Gpu, walked: Walked) -> float:
        """Return the time of an optimizer step: counted work at the assumed share of the peak."""
        peak = gpu.bf16 if self.config.mixed_precision == "bf16" else gpu.fp32
        return self.parts * sum(walked.flops.values()) / (peak * 1e12 * self.utilisation)


def make_plan(config: TrainerConfig, utilisation: float | None = None) -> Plan:
    """Return the plan of a run. ValueError when its base's sizes are not known, or `utilisation` is no share."""
    utilisation = UTILISATION if utilisation is None else utilisation
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is a share of the peak, above 0 and at most 1, got {utilisation}.")
    sizes = base_sizes(config)
    walker = Walker(sizes, config)
    batch = config.train_batch_size // (config.workers.num_workers * config.gradient_accumulation_steps)
    asked, other = (walker.walk(batch, on) for on in (config.gradient_checkpointing, not config.gradient_checkpointing))
    return Plan(config=config, base=sizes.id, asked=asked, other=other, utilisation=utilisation)


def report(plan: Plan, gpus: list[Gpu]) -> str:
    """Return a plan as text: memory by part, work by part, and a table with a line for each GPU."""
    config, asked, workers = plan.config, plan.asked, plan.config.workers
    precision = config.mixed_precision if config.mixed_precision != "no" else "fp32"
    adapter = asked.parameters["adapter"]
    state = [state_bytes(adapter, stage, workers.num_workers) / GIB for stage in STAGES]
    counts = ", ".join(f"{part} {count:,}" for part, count in asked.parameters.items())
    work = ", ".join(f"{part} {flops / 1e12:.2f}" for part, flops in asked.flops.items())
    whole, trained = sum(asked.flops.values()) / 1e12, asked.flops[PARTS[-1]] / 1e12
    total = plan.needs(asked, workers.zero_stage)
    lines = [
        f"{plan.base}, {config.data.resolution} px, {precision}; parameters: {counts}",
        f"batch {config.train_batch_size} = {workers.num_workers} worker(s) x {plan.parts} part(s) x {asked.batch}, "
        f"ZeRO-{workers.zero_stage}, gradient checkpointing {_on(asked.gradient_checkpointing)}",
        "",
        "memory of one GPU, GiB",
        f"  {asked.frozen_bytes / GIB:6.2f}  frozen models",
        f"  {state[workers.zero_stage]:6.2f}  adapter and AdamW in fp32 "
        f"({', '.join(f'ZeRO-{stage}: {size:.2f}' for stage, size in zip(STAGES, state, strict=True))})",
        f"  {asked.peak_bytes / GIB:6.2f}  step at its peak ({_peaks(asked)}; with gradient checkpointing "
        f"{_on(plan.other.gradient_checkpointing)}: {_peaks(plan.other)})",
        f"  {SET_ASIDE / GIB + SLACK * asked.peak_bytes / GIB:6.2f}  set aside: 1 for CUDA's context and workspaces, "
        f"{SLACK:.0%} of the step for fragmentation",
        f"  {total / GIB:6.2f}  in all",
        "",
        f"work of one pass, TFLOP: {work}; in all {whole:.2f}",
        f"from a cache (python -m trainer cache) the encoders' part falls away: {whole / trained:.2f} times less work",
        "",
    ]
    head = [
        "GPU",
        "GiB",
        "fits",
        "lowest ZeRO",
        "largest pass",
        f"peak {precision} TFLOP/s",
        f"s a step at {plan.utilisation:.0%}",
        f"{config.max_train_steps:,} steps",
        "advice",
    ]
    rows = [head, *(_row(plan, gpu) for gpu in gpus)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "Times are work alone: no data, communication or validation. Measure: fit ... --max-train-steps 2"]
    return "\n".join(lines)


def _row(plan: Plan, gpu: Gpu) -> list[str]:
    stage, seconds = plan.stage(gpu, plan.asked), plan.seconds(gpu, plan.asked)
    peak = gpu.bf16 if plan.config.mixed_precision == "bf16" else gpu.fp32
    return [
        gpu.name,
        f"{gpu.mib / 1024:.1f}",
        "yes" if plan.needs(plan.asked, plan.config.workers.zero_stage) <= gpu.mib * 2**20 else "no",
        "none" if stage is None else str(stage),
        str(plan.largest(gpu, plan.asked)),
        f"{peak:g}",
        f"{seconds:.2f}",
        _hours(seconds * plan.config.max_train_steps),
        _advice(plan, gpu),
    ]


def _advice(plan: Plan, gpu: Gpu) -> str:
    """Return the setting to change: what makes it fit, else what makes it faster."""
    plain, saving = sorted((plan.asked, plan.other), key=lambda walked: walked.gradient_checkpointing)
    if plan.stage(gpu, plain) is not None:
        if not plan.asked.gradient_checkpointing:
            return "as it is"
        return f"gradient_checkpointing=false fits too: {plan.seconds(gpu, plain):.2f} s a step"
    if plan.stage(gpu, saving) is not None:
        return "as it is" if plan.asked.gradient_checkpointing else "gradient_checkpointing=true"
    if largest := plan.largest(gpu, saving):
        wanted = next(n for n in range(1, saving.batch + 1) if saving.batch % n == 0 and saving.batch // n <= largest)
        on = "" if plan.asked.gradient_checkpointing else "gradient_checkpointing=true and "
        return f"{on}gradient_accumulation_steps={plan.parts * wanted}"
    return "a GPU with more memory"


def _peaks(walked: Walked) -> str:
    return ", ".join(f"{part} {walked.peaks[part] / GIB:.2f}" for part in (PARTS[0], PARTS[-1]))


def _on(on: bool) -> str:
    return "on" if on else "off"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
