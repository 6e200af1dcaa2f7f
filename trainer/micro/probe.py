"""The attribute probe: a small convolutional judge, trained on pictures that are drawn otherwise than the corpus.

Its material has other line widths, zooms, tilts and poses, worn as old film is; no training of the family reads it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from factory import toon
from factory.files import new_file
from factory.toon.film import CODE
from factory.toon.traits import Scene
from trainer.micro.attributes import COLOURS, VALUES, labels
from trainer.micro.pictures import SIDE
from trainer.micro.training import Recipe, train

RECIPE = Recipe(steps=2500, batch_size=48, learning_rate=2e-3, decay_from=0.3, seed=5)
COUNT = 14_000  # pictures


class Probe(nn.Module):
    """Pixels (B,3,64,64) in [-1,1] -> logits of every attribute, one tensor (B,values) each."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 128, 2)):
            layers += [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 64, 192), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in VALUES.items()})

    def forward(self, x_B3HW: Tensor) -> dict[str, Tensor]:
        shared = self.body(x_B3HW)
        return {name: head(shared) for name, head in self.heads.items()}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Probe:
        probe = cls()
        probe.load_state_dict(load_file(folder / "model.safetensors"))
        return probe.eval()


@torch.no_grad()
def seen(probe: Probe, pixels_B3HW: Tensor) -> dict[str, Tensor]:
    """Return for each attribute the place (B,) among its VALUES of what the probe sees."""
    found = [probe(part) for part in pixels_B3HW.split(64)]
    return {name: torch.cat([part[name].argmax(1) for part in found]) for name in VALUES}


def judge(probe: Probe, pixels_B3HW: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """Return for each attribute whether (B,) the probe sees the scene's value."""
    truth = torch.tensor([labels(scene) for scene in scenes])
    return {name: values == truth[:, i] for i, (name, values) in enumerate(seen(probe, pixels_B3HW).items())}


def material(folder: Path, count: int = COUNT) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Return images, lines and labels of the probe's own drawings, drawn once: one figure, all framings."""
    path = folder / f"material-{count}-{CODE}.npz"
    if not path.is_file():
        images, lines, truth = [], [], []
        for i in range(count):
            rng = random.Random(f"probe/{i}")
            camera = rng.choices(("bust", "close-up", "half figure", "full figure"), (6, 2, 2, 1))[0]
            scene = toon.random_scene(rng, figures=(toon.random_figure(rng),), camera=camera)
            pose = toon.random_pose(rng)
            pose = replace(pose, yaw=pose.yaw * 1.2, tilt=pose.tilt * 1.8, mouth=rng.choice((0.0, 0.0, 0.5)))
            view = toon.View(zoom=rng.uniform(0.88, 1.15), x=rng.uniform(-0.06, 0.06), y=rng.uniform(-0.04, 0.04))
            drawing = toon.draw(scene, (96, 96), pose, view, line_width=rng.uniform(0.6, 1.8))
            images.append(cv2.resize(drawing.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            lines.append(cv2.resize(drawing.lines, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            truth.append(labels(scene))
        with new_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, images=np.stack(images), lines=np.stack(lines), truth=np.array(truth))
    held = np.load(path)
    return held["images"], held["lines"], held["truth"]


def train_probe(folder: Path, recipe: Recipe = RECIPE, count: int = COUNT) -> Probe:
    """Train the probe on its own material and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    images, lines, truth_array = material(folder, count)
    truth = torch.as_tensor(truth_array)
    torch.manual_seed(recipe.seed)
    probe = Probe()
    hidden = torch.tensor([name in COLOURS for name in VALUES]).float()

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.integers(len(images), size=recipe.batch_size)
        is_line = rng.random(recipe.batch_size) < 0.3
        pixels = [_worn(lines[i] if line else images[i], rng) for i, line in zip(chosen, is_line, strict=True)]
        found = probe(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        seen = 1 - torch.from_numpy(is_line).float()[:, None] * hidden
        terms = [
            (F.cross_entropy(logits, truth[chosen, i], reduction="none") * seen[:, i]).mean()
            for i, logits in enumerate(found.values())
        ]
        return {"loss": torch.stack(terms).mean()}

    train("probe", probe, recipe, loss, folder=folder)
    return probe


def _worn(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float32 pixels (64,64,3) in [-1,1]: moved by up to 3 px, mirrored, in other tones, blurred, noisy."""
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, 2)
    dx, dy = rng.integers(-3, 4, size=2)
    picture = cv2.warpAffine(
        picture, np.array([[1, 0, dx], [0, 1, dy]], np.float32), (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT
    )
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    out = picture.astype(np.float32) / 127.5 - 1
    out = out * rng.uniform(0.85, 1.0) + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.3, 0.9))
    return (out + rng.normal(0, rng.uniform(0, 0.08), out.shape)).astype(np.float32)
