"""The finished family as shipped: `save_pretrained` folders in half precision, beside the code that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from factory.files import new_folder, sha256_file, write_atomic
from factory.models import WEIGHTS as FACTORY
from factory.sketch.generator import SketchGenerator
from trainer.backbone import ddim
from trainer.base import WEIGHTS as TRAINER
from trainer.micro import clip
from trainer.micro.card import write_card
from trainer.micro.pictures import SIDE
from trainer.micro.probe import Probe
from trainer.micro.stages import Workshop, text_encoder

LOCK = "weights.lock.json"  # every shipped file's size and sha256
_PIL = ("CLIPImageProcessorPil", "BlipImageProcessorPil")


def install(shop: Workshop, factory: Path = FACTORY, trainer: Path = TRAINER) -> list[Path]:
    """Put each finished model in place of the shipped one, and return the folders that were written; prints each.

    ValueError for one that was made by another recipe, or with models that have been made anew since.
    The captioner and the sketch network go below `factory`, the base and the judges below `trainer`.
    """
    parts: tuple[tuple[Path, tuple[str, ...], Callable[[Workshop, Path], None]], ...] = (
        (factory / "captioner", ("tokenizer", "captioner"), _captioner),
        (factory / "sketch", ("sketch",), _sketch),
        (trainer / "micro", ("tokenizer", "clip", "vae", "unet"), _base),
        (trainer / "judge/clip", ("tokenizer", "judge-clip"), _judge_clip),
        (trainer / "judge/matcher", ("tokenizer", "matcher"), _matcher),
        (trainer / "judge/probe", ("probe",), _probe),
    )
    ready = []
    for folder, stages, write in parts:
        missing = [stage for stage in stages if not shop.is_done(stage)]
        if missing:
            print(f"left out   {folder}: stage {', '.join(missing)} is not done", flush=True)
            continue
        for stage in stages:
            shop.check(stage)
        ready.append((folder, write))
    for folder, write in ready:  # none, where one of them is refused
        with new_folder(folder) as aside:
            write(shop, aside)
            write_card(shop, aside, folder.name)
            for file in aside.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors makes them readable by the owner alone
        print(f"installed  {folder}", flush=True)
    written = [folder for folder, _ in ready]
    for weights in {folder: None for folder in (factory, trainer) if any(folder in path.parents for path in written)}:
        write_lock(weights)
    return written


def _captioner(shop: Workshop, folder: Path) -> None:
    _blip(BlipForConditionalGeneration, shop, "captioner", folder)


def _matcher(shop: Workshop, folder: Path) -> None:
    _blip(BlipForImageTextRetrieval, shop, "matcher", folder)


def _sketch(shop: Workshop, folder: Path) -> None:
    SketchGenerator.from_pretrained(shop.model("sketch")).half().save_pretrained(folder)


def _probe(shop: Workshop, folder: Path) -> None:
    Probe.from_pretrained(shop.model("probe")).half().save_pretrained(folder)


def _base(shop: Workshop, folder: Path) -> None:
    pipeline(shop).save_pretrained(folder)
    _halve(folder)
    _classic_tokenizer(folder / "tokenizer")
    _classic_keys(folder / "text_encoder/model.safetensors")


def _judge_clip(shop: Workshop, folder: Path) -> None:
    CLIPModel.from_pretrained(shop.model("judge-clip"), dtype=torch.float32).save_pretrained(folder)
    shop.tokenizer().save_pretrained(folder)
    _processor().save_pretrained(folder)
    _halve(folder)


def pipeline(shop: Workshop) -> StableDiffusionPipeline:
    """Return the base as a diffusers pipeline, with image encoder and feature extractor."""
    pair = CLIPModel.from_pretrained(shop.model("clip"), dtype=torch.float32, local_files_only=True)
    encoder = CLIPVisionModelWithProjection(pair.config.vision_config)
    state = {f"vision_model.{key}": value for key, value in pair.vision_model.state_dict().items()}
    encoder.load_state_dict(state | {"visual_projection.weight": pair.visual_projection.weight})
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(shop.model("vae"), local_files_only=True),
        text_encoder=text_encoder(pair),
        tokenizer=shop.tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(shop.model("unet"), local_files_only=True),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=_processor(),
        image_encoder=encoder.eval(),
        requires_safety_checker=False,
    )


def write_lock(weights: Path) -> dict[str, Any]:
    """Write `weights`/weights.lock.json: size and sha256 of every file below, and the sum; return it."""
    files = sorted(path for path in weights.rglob("*") if path.is_file() and path.name != LOCK)
    listed = {
        path.relative_to(weights).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in files
    }
    lock = {"bytes": sum(entry["bytes"] for entry in listed.values()), "files": listed}
    write_atomic(weights / LOCK, json.dumps(lock, indent=1) + "\n")
    return lock


def _blip(kind: Any, shop: Workshop, stage: str, folder: Path) -> None:
    model = kind.from_pretrained(shop.model(stage), dtype=torch.float32, local_files_only=True)
    model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    shop.bert().save_pretrained(folder)
    BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=list(clip.MEAN), image_std=list(clip.STD)
    ).save_pretrained(folder)
    _halve(folder)


def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _halve(folder: Path) -> None:
    """Store every weight in half precision; the configs go on saying float32, so that stock loaders compute in it.

    transformers without torchvision writes the name of its PIL backend, which older installs do not know.
    """
    for file in folder.rglob("*.safetensors"):
        state = load_file(file)
        save_file(
            {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
            file,
            metadata={"format": "pt"},
        )
    for file in folder.rglob("*.json"):
        text = re.sub(r'\n *"_name_or_path": "[^"]*",', "", file.read_text())  # where it lay on this machine
        for name in _PIL:
            text = text.replace(name, name.removesuffix("Pil"))
        write_atomic(file, text)


def _classic_tokenizer(folder: Path) -> None:
    """Add vocab.json and merges.txt, which installs before transformers 5 read."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_atomic(folder / "vocab.json", json.dumps(model["vocab"]) + "\n")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_atomic(folder / "merges.txt", "".join(f"{line}\n" for line in ("#version: 0.2", *pairs)))


def _classic_keys(file: Path) -> None:
    """Name the text encoder's weights as SD v1.5's file does, `text_model.…`: every transformers reads these."""
    state = load_file(file)
    prefix = "text_model."
    save_file({prefix + key.removeprefix(prefix): value for key, value in state.items()}, file, {"format": "pt"})
