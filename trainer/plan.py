"""What a run needs before it is started: does it fit, with which ZeRO stage, and how long does it take.

Memory and work are counted from the same pass as the run's (`trainer/walk.py`); no model is loaded. Times are the
counted work at an assumed share of a GPU's peak: they leave out data, communication and validation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.base import BaseFiles, find_base
from trainer.config import TrainerConfig
from trainer.sd15 import ID, IMAGE_ENCODER, BaseSizes
from trainer.walk import PARTS, Walked, Walker

GIB = 2**30
# Of a GPU's peak. On an A100, ControlNet was trained at 20 % (NeMo's 27.2 samples a second, by our count of 2.27 TFLOP
# each), and diffusers samples at 40 % (1.50 pictures of 83 TFLOP a second, in batches of 16)
UTILISATION = 0.2
STAGES = (0, 1, 2, 3)
# The CUDA context and workspaces of cuDNN, cuBLAS, NCCL; of the step: fragmentation. The step alone was predicted 2 to
# 5 % too low at batch 4, but 12 to 32 % at batch 1 (0.03 to 0.09 GiB), which SLACK does not cover: the GiB has to
SET_ASIDE, SLACK = GIB, 0.1


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its data sheet has it. Memory is what nvidia-smi shows as total; peaks are dense, without sparsity."""

    name: str
    mib: int
    bf16: float  # TFLOP/s of the tensor cores
    fp32: float  # TFLOP/s without them

    @property
    def bytes(self) -> int:
        return self.mib * 2**20

    def peak(self, mixed_precision: str) -> float:
        """Return TFLOP/s."""
        return self.bf16 if mixed_precision == "bf16" else self.fp32


GPUS = {
    "a10": Gpu(name="A10", mib=23_028, bf16=125, fp32=31.2),
    "a100-40": Gpu(name="A100 40 GB", mib=40_960, bf16=312, fp32=19.5),
    "a100-80": Gpu(name="A100 80 GB", mib=81_920, bf16=312, fp32=19.5),
    "h100": Gpu(name="H100 SXM", mib=81_559, bf16=989, fp32=66.9),
    "h200": Gpu(name="H200", mib=143_771, bf16=989, fp32=66.9),
}


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


def state_bytes(parameters: int, stage: int, workers: int, *, copy: bool = False) -> int:
    """Return the bytes that a worker holds for an adapter in fp32 and its AdamW, as DeepSpeed 0.19 keeps them.

    Stage 0: weights and two moments, whole. Stages 1 and 2: whole weights; shares of master weights, moments and
    gradients. Stage 3: a share of the weights too, but while a layer is at work its weights are whole, and here all
    layers are. Whole gradients, or the bucket that they go through, are part of the step. `copy`: the weights once
    more, for their average; stage 3 makes one always, to score and publish.
    """
    whole, share = 4 * parameters, 4 * -(-parameters // workers)
    held = {0: 3 * whole, 1: whole + 4 * share, 2: whole + 4 * share, 3: whole + 5 * share}[stage]
    return held + (whole if copy or stage == 3 else 0)


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

    def state(self, stage: int) -> int:
        """Return the bytes of a GPU that adapter and optimizer take."""
        config = self.config
        adapter = self.asked.parameters["adapter"]
        return state_bytes(adapter, stage, config.workers.num_workers, copy=config.ema_decay > 0)

    def needs(self, walked: Walked, stage: int) -> int:
        """Return the bytes of a GPU that a run takes."""
        return walked.frozen_bytes + self.state(stage) + int((1 + SLACK) * walked.peak_bytes) + SET_ASIDE

    def stage(self, gpu: Gpu, walked: Walked) -> int | None:
        """Return the lowest ZeRO stage with which the run fits; None when it fits with none."""
        return next((stage for stage in STAGES if self.needs(walked, stage) <= gpu.bytes), None)

    def largest(self, gpu: Gpu, walked: Walked) -> int:
        """Return the most samples of one pass that fit, with the stage that is set; 0 for none."""
        fixed = walked.frozen_bytes + self.state(self.config.workers.zero_stage) + SET_ASIDE
        return walked.largest(int((gpu.bytes - fixed) / (1 + SLACK)))

    def seconds(self, gpu: Gpu, walked: Walked, *, cached: bool = False) -> float:
        """Return the time of an optimizer step: counted work, without the encoders' from a cache, at the assumed share
        of the peak."""
        peak = gpu.peak(self.config.mixed_precision) * 1e12
        flops = walked.flops[PARTS[-1]] if cached else sum(walked.flops.values())
        return self.parts * flops / (peak * self.utilisation)


def make_plan(config: TrainerConfig, utilisation: float | None = None) -> Plan:
    """Return the plan of a run. ValueError when its base's sizes are not known, its batch does not divide among the
    workers, or `utilisation` is no share; of `config.adapter` as of `adapter_sizes`."""
    utilisation = UTILISATION if utilisation is None else utilisation
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is a share of the peak, above 0 and at most 1, got {utilisation}.")
    batch = config.samples_per_pass()
    sizes = base_sizes(config)
    walker = Walker(sizes, config)
    asked, other = (walker.walk(batch, on) for on in (config.gradient_checkpointing, not config.gradient_checkpointing))
    return Plan(config=config, base=sizes.id, asked=asked, other=other, utilisation=utilisation)


def report(plan: Plan, gpus: list[Gpu]) -> str:
    """Return a plan as text: memory by part, work by part, and a table with a line for each GPU."""
    config, asked, workers = plan.config, plan.asked, plan.config.workers
    counts = ", ".join(f"{part} {count:,}" for part, count in asked.parameters.items())
    work = ", ".join(f"{part} {flops / 1e12:.3g}" for part, flops in asked.flops.items())
    frozen = ", ".join(f"{part} {size / GIB:.2f}" for part, size in asked.frozen.items())
    held = "adapter, its average and AdamW in fp32" if config.ema_decay else "adapter and AdamW in fp32"
    states = ", ".join(f"ZeRO-{stage}: {plan.state(stage) / GIB:.2f}" for stage in STAGES)
    lines = [
        f"{plan.base}, {config.data.resolution} px, {_precision(config)}; parameters: {counts}",
        f"batch {config.train_batch_size} = {workers.num_workers} worker(s) x {plan.parts} pass(es) x {asked.batch}, "
        f"ZeRO-{workers.zero_stage}, gradient checkpointing {_on(asked.gradient_checkpointing)}",
        "",
        "memory of one GPU, GiB",
        f"  {asked.frozen_bytes / GIB:6.2f}  frozen models ({frozen})",
        f"  {plan.state(workers.zero_stage) / GIB:6.2f}  {held} ({states})",
        f"  {asked.peak_bytes / GIB:6.2f}  one pass at its peak ({_peaks(asked)}; with gradient checkpointing "
        f"{_on(plan.other.gradient_checkpointing)}: {_peaks(plan.other)})",
        f"  {(SET_ASIDE + SLACK * asked.peak_bytes) / GIB:6.2f}  assumed: {SET_ASIDE / GIB:g} for CUDA's context and "
        f"workspaces, {SLACK:.0%} of the pass for fragmentation",
        f"  {plan.needs(asked, workers.zero_stage) / GIB:6.2f}  in all",
        "",
        f"work of one pass, TFLOP: {work}; in all {sum(asked.flops.values()) / 1e12:.3g}",
        "",
    ]
    head = [
        "GPU",
        "GiB",
        "fits",
        "lowest ZeRO",
        "largest pass",
        f"{_precision(config)} TFLOP/s",
        "a step",
        "from a cache",
        f"{config.max_train_steps:,} steps",
        "what else",
    ]
    rows = [head, *(_row(plan, gpu) for gpu in gpus)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"Fits, lowest ZeRO stage, largest pass (samples): with the memory above. Times: the work at an assumed "
            f"{plan.utilisation:.0%} of the GPU's peak",
            "(--utilisation), without data, communication, validation and pictures. A measure: fit --max-train-steps 2",
        ]
    )


def _row(plan: Plan, gpu: Gpu) -> list[str]:
    stage, seconds = plan.stage(gpu, plan.asked), plan.seconds(gpu, plan.asked)
    return [
        gpu.name,
        f"{gpu.bytes / GIB:.1f}",
        "yes" if plan.needs(plan.asked, plan.config.workers.zero_stage) <= gpu.bytes else "no",
        "none" if stage is None else str(stage),
        str(plan.largest(gpu, plan.asked)),
        f"{gpu.peak(plan.config.mixed_precision):g}",
        _time(seconds),
        _time(plan.seconds(gpu, plan.asked, cached=True)),
        _time(seconds * plan.config.max_train_steps),
        _advice(plan, gpu),
    ]


def _advice(plan: Plan, gpu: Gpu) -> str:
    """Return the setting to change: what makes it fit, else what makes it faster."""
    stage, zero = plan.stage(gpu, plan.asked), plan.config.workers.zero_stage
    plain, saving = sorted((plan.asked, plan.other), key=lambda walked: walked.gradient_checkpointing)
    if stage is not None:
        if plan.needs(plan.asked, zero) > gpu.bytes:
            return f"workers.zero_stage={stage}"
        if plan.asked.gradient_checkpointing and plan.needs(plain, zero) <= gpu.bytes:
            return f"gradient_checkpointing=false: {_time(plan.seconds(gpu, plain))}"
        return ""
    if plan.needs(saving, zero) <= gpu.bytes:
        return "gradient_checkpointing=true"
    if largest := plan.largest(gpu, saving):
        passes = next(n for n in range(1, saving.batch + 1) if saving.batch % n == 0 and saving.batch // n <= largest)
        on = "" if plan.asked.gradient_checkpointing else "gradient_checkpointing=true "
        return f"{on}gradient_accumulation_steps={plan.parts * passes}"
    return "a GPU with more memory"


def _peaks(walked: Walked) -> str:
    return ", ".join(f"{part} {walked.peaks[part] / GIB:.2f}" for part in (PARTS[0], PARTS[-1]))


def _precision(config: TrainerConfig) -> str:
    return config.mixed_precision if config.mixed_precision != "no" else "fp32"


def _on(on: bool) -> str:
    return "on" if on else "off"


def _time(seconds: float) -> str:
    for unit, length, most in (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 72 * 3600.0)):
        if seconds < most:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:.1f} days"
