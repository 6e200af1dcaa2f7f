"""CLIP pairs: one whose towers are the base's text encoder and image encoder, another that only judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from trainer.micro.heads import Heads
from trainer.micro.pictures import SIDE, Pictures
from trainer.micro.text import MAX_TOKENS, caption_of
from trainer.micro.training import Recipe, train

RECIPE = Recipe(steps=1600, batch_size=64, learning_rate=1e-3, decay_from=0.4)
JUDGE = Recipe(steps=1200, batch_size=64, learning_rate=1e-3, decay_from=0.4, seed=1)  # the pair that only judges
WIDTH = 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a CLIP pair with new weights: 64 px in patches of 8, and as many tokens as SD v1.5 reads."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPModel(
        CLIPConfig(
            text_config=tower
            | {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
            | ids,
            vision_config=tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"},
            projection_dim=WIDTH,
        )
    )


def normalised(pixels_B3HW: Tensor) -> Tensor:
    """Return pixels in [-1,1] as CLIP's processor would give them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels_B3HW + 1) / 2 - mean) / std


def embed(clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the projected, not yet normalised embeddings (B,E) of pictures in [-1,1] and of texts."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    image: Any = clip.get_image_features(pixel_values=normalised(pixels)).pooler_output
    text: Any = clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return image, text


def train_clip(
    pictures: Pictures,
    held_out: Pictures,
    tokenizer: CLIPTokenizer,
    folder: Path,
    recipe: Recipe = RECIPE,
    name: str = "clip",
) -> CLIPModel:
    """Train a pair on `pictures` and their captions and return it: symmetric InfoNCE and the attribute heads."""
    torch.manual_seed(recipe.seed)
    scenes = pictures.scenes
    clip = new_clip(tokenizer)
    model = nn.ModuleDict({"clip": clip, "image": Heads(WIDTH), "text": Heads(WIDTH)})

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.integers(len(pictures), size=recipe.batch_size)
        lines = rng.random(recipe.batch_size) < 0.4
        told = [scenes[i] for i in chosen]
        texts = [caption_of(scene, rng, line=bool(line)) for scene, line in zip(told, lines, strict=True)]
        image, text = embed(clip, tokenizer, pictures.read(chosen, lines), texts)
        logits = clip.logit_scale.exp().clamp(max=100) * F.normalize(image) @ F.normalize(text).T
        target = torch.arange(len(chosen))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        heads = model["image"](image, told, lines) + model["text"](text, told, np.zeros_like(lines))
        return {"loss": contrast + 1.5 * heads, "contrast": contrast, "heads": heads}

    def validate() -> dict[str, float]:
        return {f"top1_{way}": value for way, value in retrieval(clip, tokenizer, held_out).items()}

    train(name, model, recipe, loss, folder=folder, validate=validate)
    return clip


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, group: int = 32, seed: int = 1
) -> dict[str, float]:
    """Return the share of colour pictures whose own caption ranks first among `group`, and of captions likewise."""
    rng = np.random.default_rng(seed)
    right = {"image_to_text": 0, "text_to_image": 0}
    count = len(pictures) // group * group
    for start in range(0, count, group):
        chosen = np.arange(start, start + group)
        texts = [caption_of(pictures.scenes[i], rng) for i in chosen]
        image, text = embed(clip, tokenizer, pictures.read(chosen, np.zeros(group, bool)), texts)
        scores = F.normalize(image) @ F.normalize(text).T
        target = torch.arange(group)
        right["image_to_text"] += int((scores.argmax(1) == target).sum())
        right["text_to_image"] += int((scores.argmax(0) == target).sum())
    return {way: round(hits / count, 4) for way, hits in right.items()}
