"""What training steps hold, fp32 on the CPU, in a process of their own; and what the plan predicts of them.

The process: `python -m tests.peak DIVISOR BATCH RESOLUTION CHECKPOINTING STEPS`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.adapter import adapter_sizes
from trainer.backbone import set_checkpointing
from trainer.config import DataConfig, TrainerConfig
from trainer.plan import state_bytes
from trainer.sd15 import BaseSizes, backbone_of
from trainer.walk import Walker, make_inputs, new_adapter, training_pass

REPO = Path(__file__).parent.parent


def sizes(divisor: int) -> BaseSizes:
    """Return SD v1.5 with ViT-H/14, all widths divided by `divisor` (1, 2 or 4); depths and numbers of heads stay."""
    full = BaseSizes()

    def narrow(config: Any, *names: str) -> dict[str, Any]:
        new = dict(config)
        for name in names:
            value = new[name]
            new[name] = tuple(v // divisor for v in value) if isinstance(value, tuple) else value // divisor
        return new

    return BaseSizes(
        id=f"SD v1.5, widths / {divisor}",
        unet=narrow(full.unet, "block_out_channels", "cross_attention_dim") | {"norm_num_groups": 32 // divisor},
        vae=narrow(full.vae, "block_out_channels") | {"norm_num_groups": 32 // divisor},
        text=narrow(full.text, "hidden_size", "intermediate_size"),
        vision=narrow(full.vision, "hidden_size", "intermediate_size"),
    )


def config(resolution: int) -> TrainerConfig:
    return TrainerConfig(data=DataConfig(resolution=resolution), mixed_precision="no")


def measured(divisor: int, batch: int, resolution: int, checkpointing: bool, steps: int = 1) -> dict[str, int]:
    """Return {"idle", "loaded", "peak"}: bytes of a process with the libraries only, with the models too, and at most
    in `steps` steps."""
    arguments = [str(value) for value in (divisor, batch, resolution, int(checkpointing), steps)]
    # a large tensor that is freed goes back to the system at once, not to the allocator's lists
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    line = [sys.executable, "-m", "tests.peak", *arguments]
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def predicted(divisor: int, batch: int, resolution: int, checkpointing: bool) -> dict[str, int]:
    """Return {"loaded", "step"}: bytes of weights and optimizer, and of a step above them, as the plan has them."""
    walker = Walker(sizes(divisor), config(resolution))
    walked = walker.walk(batch, checkpointing)
    loaded = walked.frozen_bytes + state_bytes(walked.parameters["adapter"], stage=0, workers=1)
    return {"loaded": loaded, "step": walked.peak_bytes}


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main(divisor: int, batch: int, resolution: int, checkpointing: int, steps: int) -> None:
    import torch

    from trainer.backbone import ddim

    torch.set_num_threads(2)
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries set up what they keep
    idle = resident("VmRSS")
    asked = config(resolution)
    base = backbone_of(sizes(divisor).models(), "hidden_states[-2]")
    adapter = new_adapter(base, adapter_sizes(base, asked))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)
    set_checkpointing(base, bool(checkpointing))
    for parameter in adapter.parameters():  # AdamW's moments are there from the second step on
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter) + 0.0,
            "exp_avg_sq": torch.zeros_like(parameter) + 0.0,
        }
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for _ in range(steps):
        inputs, plain = make_inputs(base, resolution, batch), torch.autocast("cpu", enabled=False)
        for _ in training_pass(base, adapter, ddim(), inputs, plain):
            pass
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"idle": idle, "loaded": loaded, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
