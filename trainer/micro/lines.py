"""The sketch network: colour to the exact line layer, at the sizes that films have."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from factory import toon
from factory.files import new_file
from factory.sketch.generator import SketchGenerator
from factory.toon.film import CODE
from trainer.micro.corpus import random_scene
from trainer.micro.training import Recipe, train

RECIPE = Recipe(steps=2000, batch_size=4, learning_rate=1e-3, seed=4, ema=0.995)
CHANNELS = (24, 48, 96, 128, 128)
COUNT = 1600  # drawings
CROP = 128  # pixels
SIZES = (240, 360, 480, 720)  # short sides that pictures are drawn at


def drawings(folder: Path, name: str, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `count` crops (256 x 256 or the whole) of drawings of many sizes with their line layers, drawn once."""
    path = folder / f"{name}-{count}-{CODE}.npz"
    if not path.is_file():
        images, lines = [], []
        for i in range(count):
            rng = random.Random(f"lines/{name}/{i}")
            side = rng.choice(SIZES)
            scene = random_scene(rng)
            drawing = toon.draw(scene, (side * 16 // 9, side), [toon.random_pose(rng) for _ in scene.figures])
            reach = min(256, side)
            top, left = rng.randint(0, side - reach), rng.randint(0, side * 16 // 9 - reach)
            for layer, kept in ((drawing.image, images), (drawing.lines, lines)):
                crop = layer[top : top + reach, left : left + reach]
                kept.append(cv2.copyMakeBorder(crop, 0, 256 - reach, 0, 256 - reach, cv2.BORDER_REFLECT_101))
        with new_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, images=np.stack(images), lines=np.stack(lines))
    held = np.load(path)
    return list(zip(held["images"], held["lines"], strict=True))


def train_lines(folder: Path, recipe: Recipe = RECIPE, count: int = COUNT) -> SketchGenerator:
    """Train the generator on drawings with noise, blur, JPEG and tone changes laid over, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = drawings(folder, "train", count)
    torch.manual_seed(recipe.seed)
    model = SketchGenerator(CHANNELS)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        images, lines = [], []
        for i in rng.integers(len(pairs), size=recipe.batch_size):
            image, line = pairs[i]
            top, left = rng.integers(0, 256 - CROP, size=2)
            images.append(worn(np.ascontiguousarray(image[top : top + CROP, left : left + CROP]), rng))
            lines.append(line[top : top + CROP, left : left + CROP])
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = torch.from_numpy(np.stack(lines))[:, None].float() / 127.5 - 1
        made = model(x)
        ink = 1 + 4 * (1 - y) / 2  # ink is rare: paper alone would be a good answer
        return {"loss": ((made - y).abs() * ink).mean() + 0.5 * F.mse_loss(made, y), "l1": (made - y).abs().mean()}

    train("sketch", model, recipe, loss, folder=folder)
    _set_statistics(model, pairs)
    return model


@torch.no_grad()
def _set_statistics(model: SketchGenerator, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Take the normalisations' statistics over many pictures with the final weights: those of training lag behind."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    model.train()
    for start in range(0, min(len(pairs), 256), 8):
        images = np.stack([image for image, _ in pairs[start : start + 8]])
        model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    model.eval()


def worn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the RGB crop as film may show it: in other tones, blurred, noisy, compressed; never moved."""
    out = image.astype(np.float32)
    out = (out / 255) ** rng.uniform(0.7, 1.5) * 255 * rng.uniform(0.6, 1.0)
    if rng.random() < 0.3:
        out = out[..., rng.permutation(3)]
    if rng.random() < 0.4:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.3, 1.0))
    if rng.random() < 0.4:
        out = out + rng.normal(0, rng.uniform(1, 8), out.shape)
    out = out.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        _, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 95))])
        out = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return out
