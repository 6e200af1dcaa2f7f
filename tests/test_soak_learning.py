"""An adapter learns: its held-out loss falls below the base's, and its references steer what is drawn. Minutes a seed;
leaves its table under docs/."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from factory.picture import encode_png
from factory.toon import caption, draw, random_pose, random_scene
from tests.lines import sample_row, write_samples
from tests.test_soak import REPO, write_table
from trainer import loop
from trainer.adapter import Adapter
from trainer.backbone import load_backbone
from trainer.base import MICRO
from trainer.config import DataConfig, PicturesConfig, TrainerConfig, WorkersConfig, micro
from trainer.data import Samples
from trainer.pictures import draw_picture, write_sheet
from trainer.run import Run

pytestmark = pytest.mark.soak
JUDGE = REPO / "trainer" / "weights" / "judge" / "clip"  # no adapter reads it
SEEDS = (1, 2, 3)
STEPS = 600
TRAINED, HELD_OUT, DRAWN = 2000, 100, 60  # drawings; the last ones of the held out
BELOW = 0.015  # of the base's held-out loss, that the adapter's is below it at least
NOTE = """Two thousand drawings, 600 steps, 100 held-out drawings of their own figures with fixed noise and fixed time
steps. Likeness is that of the judging CLIP pair, which no adapter reads, over 60 held-out references without any text;
p by 20,000 random flips of signs.

![Sketches above, what was drawn from each below](learning.png)"""
DRAW = PicturesConfig(num_inference_steps=20, guidance_scale=3.0, adapter_scale=1.0)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset root of line drawings with captions; figures of the held-out ones are drawn at random like the rest."""
    root, rng, rows = tmp_path_factory.mktemp("drawings"), random.Random(0), []
    for number in range(TRAINED + HELD_OUT):
        scene = random_scene(rng)
        lines = draw(scene, (256, 144), [random_pose(rng) for _ in scene.figures]).lines
        split = "train" if number < TRAINED else "validation"
        rows.append(sample_row(number, encode_png(lines), caption(scene, rng), split))
    return write_samples(root, rows)


def test_the_held_out_loss_falls_below_the_bases_and_references_steer_the_picture(
    ray_session: str, drawings: str, tmp_path: Path
):
    data = dataclasses.replace(micro().data, root=drawings, validation_samples=HELD_OUT)
    base, rows = load_backbone(str(MICRO)), []
    samples = Samples(data, "validation").read(range(DRAWN))
    references = [sample.reference for sample in samples]
    for seed in SEEDS:
        output = tmp_path / f"seed-{seed}"
        loop.fit(made_of(data, output, seed))
        history = Run(output).history()
        alone = next(record["base_validation_loss"] for record in history if "base_validation_loss" in record)
        curve = {record["step"]: record["validation_loss"] for record in history if "validation_loss" in record}
        adapter = Adapter.from_pretrained(output / "adapter")
        adapter.attach(base.unet)
        # without a text: what is alike can come from the reference alone
        made = [draw_picture(base, adapter, "", picture, DRAW, side=64, seed=i) for i, picture in enumerate(references)]
        adapter.detach(base.unet)
        alike = looks(made) @ looks([ImageOps.pad(r, (64, 64), color="white") for r in references]).T
        own, other = np.diag(alike), np.diag(np.roll(alike, 1, axis=1))
        rows.append([seed, f"{alone:.5f}", *(f"{curve[step]:.5f}" for step in (0, 150, 300, 450, STEPS))])
        rows[-1] += [f"{1 - curve[STEPS] / alone:.2%}", f"{own.mean():.3f}", f"{other.mean():.3f}"]
        rows[-1] += [f"{sign_flips(own - other):.5f}", f"{(alike.argmax(1) == np.arange(DRAWN)).mean():.0%}"]
        print(rows[-1], flush=True)
        if seed == SEEDS[0]:
            write_sheet(list(zip(references, made, strict=True))[:8], tmp_path / "sheet.png")
        assert curve[STEPS] < (1 - BELOW) * alone, rows
        assert sign_flips(own - other) < 0.01, rows
    header = ["seed", "base alone", *(f"step {step}" for step in (0, 150, 300, 450, STEPS)), "below the base"]
    header += ["alike: own reference", "another's", "p", "own is nearest of 60"]
    write_table("learning", "What an adapter learns on the micro base", header, rows, NOTE)
    with Image.open(tmp_path / "sheet.png") as sheet:
        both = across(sheet, 8)
        both.resize((2 * both.width, 2 * both.height), Image.Resampling.LANCZOS).save(
            REPO / "docs" / "learning.png", optimize=True
        )


def made_of(data: DataConfig, output: Path, seed: int) -> TrainerConfig:
    return dataclasses.replace(
        micro(),
        data=data,
        output=str(output),
        seed=seed,
        workers=WorkersConfig(num_workers=2),
        max_train_steps=STEPS,
        checkpointing_steps=STEPS // 2,
        validation_steps=STEPS // 4,
    )


@torch.no_grad()
def looks(pictures: list[Image.Image]) -> np.ndarray:
    """Return the judge's embeddings, of unit length, of pictures that are square."""
    judge = CLIPVisionModelWithProjection.from_pretrained(JUDGE, dtype=torch.float32).eval()
    pixels = CLIPImageProcessor.from_pretrained(JUDGE)(pictures, return_tensors="pt").pixel_values
    return torch.nn.functional.normalize(judge(pixels).image_embeds, dim=-1).numpy()


def sign_flips(differences: np.ndarray) -> float:
    """Return how likely a mean this large is if each difference could as well have the other sign (one-sided)."""
    signs = np.random.default_rng(0).choice([-1, 1], (20_000, len(differences)))
    return (1 + int(((signs * differences).mean(1) >= differences.mean()).sum())) / 20_001


def across(sheet: Image.Image, count: int) -> Image.Image:
    """Return a sheet of so many rows of two as two rows: the references above what was drawn from them."""
    side = sheet.width // 2
    found = Image.new("RGB", (count * side, 2 * side))
    for i in range(count):
        for j in range(2):
            found.paste(sheet.crop((j * side, i * side, (j + 1) * side, (i + 1) * side)), (i * side, j * side))
    return found
