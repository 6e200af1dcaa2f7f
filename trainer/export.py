"""A run's adapter as a folder for the Hugging Face hub: weights, config, a model card with pictures, SHA256SUMS."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from factory.caption import CaptionConfig
from factory.files import DamagedFolder, check_sealed, new_folder, write_atomic
from factory.models import OWNER
from trainer.adapter import CONFIG, WEIGHTS, Adapter, AdapterError, read_config
from trainer.projection import Sizes
from trainer.run import Run

SHEETS = 3  # sample pictures on a card, the newest
PICTURES = "pictures"  # folder of the sheets, in a run and in what is exported
UNKNOWN = "unknown"  # a licence that the hub knows
EXAMPLE = "a girl with long red hair"  # drawn in the card's example


def export(run: str | Path, output: str | Path, *, step: int | str | None = None, license: str | None = None) -> Path:
    """Write the adapter of a run folder to a new folder `output`, ready for the hub, and return it.

    `step`: a checkpoint's, or "best"; None: the newest. `license`: an identifier of the hub; None: unknown.
    FileNotFoundError when run or checkpoint is absent, FileExistsError when `output` holds something, AdapterError when
    what is exported is damaged.
    """
    record, output = Run(run), Path(output)
    source = _source(record, step)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} holds something already. Give another --output.")
    adapter, facts = Adapter.from_pretrained(source), read_config(source)
    if missing := [name for name in ("base", "dataset", "training", "preprocessing", "step") if name not in facts]:
        raise AdapterError(f"{source / CONFIG} has no {missing[0]}: `python -m trainer fit` did not write it whole.")
    sheets = _sheets(record, facts["step"])
    with new_folder(output) as aside:
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(source / name, aside / name)
        for sheet in sheets:
            (aside / PICTURES).mkdir(exist_ok=True)
            shutil.copyfile(sheet, aside / PICTURES / sheet.name)
        prompt = _prompt(facts, record.began() or {})
        text = card(output.name, adapter.config, facts, record.history(), sheets, license, prompt)
        write_atomic(aside / "README.md", text)
    return output


def _source(run: Run, step: int | str | None) -> Path:
    """Return the adapter folder to export, its seal and its checkpoint's checked."""
    if not (run.folder / "run.json").is_file():
        raise FileNotFoundError(f"{run.folder} is no run folder: it has no run.json. Give what `fit` wrote.")
    if step is None or step == "best":
        source = sealed = run.folder / ("best" if step else "adapter")
    else:
        sealed = run.checkpoint(int(step))
        source = sealed / "adapter"
    if not source.is_dir():
        there = ", ".join([*(str(n) for n in run.steps()), *(["best"] if (run.folder / "best").is_dir() else [])])
        raise FileNotFoundError(f"{source} is not there. Checkpoints of this run, for --step: {there or 'none yet'}.")
    try:
        check_sealed(sealed)
    except DamagedFolder as error:
        raise AdapterError(f"{error} Export another --step, or run `fit` again: it mends adapter/.") from None
    return source


def _sheets(run: Run, step: int) -> list[Path]:
    """Return the newest sheets of validation pictures up to `step`, oldest first."""
    found = {
        int(match[1]): path
        for path in (run.folder / PICTURES).glob("*.png")
        if (match := re.fullmatch(r"step-(\d+)", path.stem)) and int(match[1]) <= step
    }
    return [path for _, path in sorted(found.items())][-SHEETS:]


def card(
    name: str,
    sizes: Sizes,
    facts: dict[str, Any],
    history: list[dict[str, Any]],
    sheets: list[Path],
    license: str | None,
    prompt: str,
) -> str:
    """Return the model card, README.md, of an adapter with config.json's `facts` and the run's `history`; `prompt` is
    drawn in its example."""
    base, data, reads = facts["base"], facts["dataset"], facts["preprocessing"]
    encoder = f"{base.get('image_encoder') or 'of the base'}; reads `{reads['features']}`"
    who = license or "unknown: nobody has said so far. Ask before you use it; the data and the base have their own"
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": license or UNKNOWN,
        "tags": ["ip-adapter", "image-prompt", "stable-diffusion", "line-art", "anime"],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base["id"]) and not base["id"].startswith(OWNER):
        front["base_model"] = base["id"]  # folders and shipped bases are not on the hub
    plus = sizes.variant == "plus"
    kind = "IP-Adapter-Plus" if plus else "IP-Adapter"
    pictures = "".join(f"![step {s.stem.removeprefix('step-')}]({PICTURES}/{s.name})\n\n" for s in sheets)
    version = f"version {data['version']}" + (f" (tag {data['tag']})" if data.get("tag") else "")
    limits = [
        f"Drawn and checked with {base['id']} only; other bases of its family may or may not follow it.",
        f"Its data has {data['samples']:,} samples. What they don't show, it does not draw.",
        "A reference is squeezed to a square: of a very long picture little is seen.",
        "It gives the gist of a reference (style, subject, arrangement), not its lines: those take a ControlNet too.",
        "The base's own limits and rules of use hold.",
    ]
    if base.get("random_weights"):
        limits.insert(
            0, "The base has random weights: pictures are noise. This adapter proves a training run, no more."
        )
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---

# {name}

An image-prompt adapter in the layout of {kind} ({sizes.num_tokens} image tokens), trained with AnimeSketch on a frozen
Stable Diffusion: a reference picture steers what is drawn, beside the text.

{pictures and f"Reference and picture, side by side, as the run drew them:{chr(10)}{chr(10)}{pictures}"}## Use

```python
{_use(facts, prompt)}
```

`SHA256SUMS` holds the sha256 of every file here: `sha256sum -c SHA256SUMS`.

## What it was made from

| | |
|---|---|
| base | {base["id"]}, sha256 over its weights {base["weights_hash"]} |
| image encoder | {encoder} |
| data | {data["uri"]}, {version}, {data["samples"]:,} samples |
| learned pictures | `{reads["target_column"]}`, {reads["resolution"]} px |
| references | `{reads["reference_column"]}`: {reads["reference"]} |
| step | {facts["step"]:,} |
| settings | {", ".join(f"{key} {value}" for key, value in facts["training"].items())} |
| code | {facts["code_version"]} |
| licence | {who} |

## Validation loss

On the held-out split, with fixed noise at fixed time steps; at step 0 that of the new adapter.

{_losses(history, facts["step"])}

## Limits

{chr(10).join(f"- {line}" for line in limits)}
"""


def _prompt(facts: dict[str, Any], began: dict[str, Any]) -> str:
    """Return a text like those of the run that `began` so: words for line art end it where it learned lines by them."""
    lines = facts["preprocessing"]["target_column"] == "training_sketch" and began.get("data.keywords", True)
    return ", ".join([EXAMPLE, *(CaptionConfig().keywords if lines else ())])


def _use(facts: dict[str, Any], prompt: str) -> str:
    """Return Python that loads the adapter from this folder with stock diffusers, and sees a reference as it did."""
    side = facts["preprocessing"]["size"]
    id, encoder = facts["base"]["id"], facts["base"].get("image_encoder")
    note = "" if "/" in id and not id.startswith(OWNER) else "  # its folder"
    lines = ["from diffusers import StableDiffusionPipeline", "from PIL import Image"]
    arguments = "base"
    if encoder:
        repo, _, sub = encoder.partition("/models/")
        where = f'"{repo}", subfolder="models/{sub}"' if sub else f'"{encoder}"'
        lines.append("from transformers import CLIPVisionModelWithProjection")
        arguments = f"base, image_encoder=CLIPVisionModelWithProjection.from_pretrained({where})"
    lines += [
        "",
        f'base = "{id}"{note}',
        f"pipeline = StableDiffusionPipeline.from_pretrained({arguments})",
        f'pipeline.load_ip_adapter(".", subfolder="", weight_name="{WEIGHTS}", image_encoder_folder=None)',
        "pipeline.set_ip_adapter_scale(0.5)  # 0: the text alone; 1: as trained",
        "# the whole picture, squeezed to the encoder's square as in training: diffusers alone would crop its centre",
        f'reference = Image.open("reference.png").convert("RGB").resize(({side}, {side}))',
        f'images = pipeline("{prompt}", ip_adapter_image=reference, num_inference_steps=50).images',
        'images[0].save("picture.png")',
    ]
    return "\n".join(lines)


def _losses(history: list[dict[str, Any]], step: int) -> str:
    """Return a table of the validation losses up to `step`: the first, the least, and the last ones."""
    losses = {r["step"]: r["validation_loss"] for r in history if "validation_loss" in r and r["step"] <= step}
    if not losses:
        return "None was taken: unknown."
    least = min(losses, key=lambda at: losses[at])
    shown = sorted({min(losses), least, *sorted(losses)[-5:]})
    rows = "\n".join(f"| {at:,} | {losses[at]:.4f}{' (least)' if at == least else ''} |" for at in shown)
    return f"| step | loss |\n|---|---|\n{rows}"
