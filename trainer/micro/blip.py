"""BLIP: a captioner of frames for the factory, and a matcher of pictures and texts that only judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from factory.toon.traits import Scene
from trainer.micro.clip import normalised
from trainer.micro.corpus import Corpus
from trainer.micro.falsehoods import Words, changed, scrambled
from trainer.micro.heads import Heads
from trainer.micro.text import MAX_TOKENS, caption_of
from trainer.micro.training import Recipe, train

WIDTH = 128
SIDE = 128  # pixels of their pictures: the faces of small figures need them
GRID = 8  # patches along a side
CAPTIONER = Recipe(steps=16000, batch_size=24, learning_rate=1.5e-3, muon=True, decay_from=0.55, ema=0.998, seed=2)
MATCHER = Recipe(steps=12000, batch_size=24, learning_rate=1.5e-3, muon=True, decay_from=0.55, ema=0.998, seed=3)
ALONE = {"captioner": 0.5, "matcher": 0.4}  # share of the steps, at the beginning, for the image tower alone
HARD = {"captioner": 3, "matcher": 2}  # how many times as often as others full figures and pairs are drawn
HEADS = 3.0  # weight of its read-outs after that


def new_blip(kind: type, tokenizer: BertTokenizer, side: int) -> nn.Module:
    """Return a BLIP of class `kind` with new weights, for pictures of `side` pixels, cut into 8 x 8 patches.

    The positions of the patches begin as sines and cosines of their row and column: the tower then learns what depends
    on place, such as a hair style, in half the steps that it takes from random ones.
    """
    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS + 3}
    vision = {"num_hidden_layers": 4, "image_size": side, "patch_size": side // GRID, "initializer_range": 0.02}
    blip = kind(
        BlipConfig(
            text_config=size | text | ids | {"encoder_hidden_size": WIDTH},
            vision_config=size | vision,
            projection_dim=WIDTH,
            image_text_hidden_size=WIDTH,
        )
    )
    with torch.no_grad():
        blip.vision_model.embeddings.position_embedding[0, 1:] = _positions(GRID, WIDTH)
    return blip


def _positions(side: int, width: int) -> Tensor:
    """Return sines and cosines (side * side, width) of each row and column, at frequencies from 1 to 1/100."""
    angles = torch.arange(side)[:, None] / 100 ** torch.linspace(0, 1, width // 4)
    one = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


class Frames:
    """Pixels of a corpus at `side` x `side`, as BLIP's processor gives them: whole pictures, squeezed to the square."""

    def __init__(self, corpus: Corpus, side: int) -> None:
        self.corpus, self.side = corpus, side

    def read(self, indices: np.ndarray, lines: np.ndarray) -> Tensor:
        """Return pixels (B,3,side,side): the line layer where `lines` (B,) is true, else the colour picture."""
        return self._pixels([self._layer(i, line) for i, line in zip(indices, lines, strict=True)])

    def vary(
        self, indices: np.ndarray, lines: np.ndarray, rng: np.random.Generator, *, pairs: bool
    ) -> tuple[Tensor, list[Scene]]:
        """Return the same moved by a 32nd at most, half of them mirrored, and the scenes as they are then.

        A text names the left figure first: where two are mirrored, their order turns. Without `pairs` they are not.
        """
        layers, scenes = [], []
        for i, line in zip(indices, lines, strict=True):
            picture, scene = self._layer(i, line), self.corpus.scenes[i]
            top, left = rng.integers(0, 9, size=2)
            picture = cv2.copyMakeBorder(picture, 4, 4, 4, 4, cv2.BORDER_REFLECT_101)
            picture = picture[top : top + len(picture) - 8, left : left + len(picture) - 8]
            if rng.random() < 0.5 and (pairs or len(scene.figures) == 1):
                picture = picture[:, ::-1]
                scene = replace(scene, figures=scene.figures[::-1], place=-scene.place)
            layers.append(picture)
            scenes.append(scene)
        return self._pixels(layers), scenes

    def _layer(self, i: int, line: bool) -> np.ndarray:
        return np.repeat(self.corpus.lines[i][..., None], 3, 2) if line else self.corpus.images[i]

    def _pixels(self, layers: list[np.ndarray]) -> Tensor:
        size = (self.side, self.side)
        sized = [cv2.resize(np.ascontiguousarray(layer), size, interpolation=cv2.INTER_AREA) for layer in layers]
        return normalised(torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2) / 127.5 - 1)


def _shares(corpus: Corpus, times: float) -> np.ndarray:
    """Return for each picture (N,) the share of the draws that it gets: a full figure or a pair `times` another's."""
    hard = np.array([len(scene.figures) == 2 or scene.camera == "full figure" for scene in corpus.scenes])
    weights = np.where(hard, times, 1)
    return weights / weights.sum()


def train_captioner(
    corpus: Corpus, tokenizer: BertTokenizer, folder: Path, recipe: Recipe = CAPTIONER
) -> BlipForConditionalGeneration:
    """Train a captioner of colour pictures, and return it."""
    torch.manual_seed(recipe.seed)
    blip: BlipForConditionalGeneration = new_blip(BlipForConditionalGeneration, tokenizer, SIDE)  # type: ignore[assignment]
    frames, model = Frames(corpus, SIDE), nn.ModuleDict({"blip": blip, "heads": Heads(WIDTH, figures=2)})
    shares = _shares(corpus, HARD["captioner"])

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = rng.choice(len(corpus), size=recipe.batch_size, p=shares)
        lines = np.zeros(len(chosen), bool)
        pixels, scenes = frames.vary(chosen, lines, rng, pairs=True)
        embedded = blip.vision_model(pixel_values=pixels).last_hidden_state
        told = model["heads"](embedded[:, 0], scenes, lines)
        if step < ALONE["captioner"] * recipe.steps:
            return {"loss": told, "heads": told}
        tokens = tokenizer([caption_of(scene, rng) for scene in scenes], padding=True, return_tensors="pt")
        ids = tokens.input_ids.clone()
        ids[:, 0] = tokenizer.bos_token_id  # as generate() begins
        words = blip.text_decoder(
            input_ids=ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=embedded,
            labels=ids.masked_fill(tokens.attention_mask == 0, -100),
            reduction="mean",
        ).loss
        return {"loss": words + HEADS * told, "words": words, "heads": told}

    train("captioner", model, recipe, loss, folder=folder)
    return blip


def train_matcher(
    corpus: Corpus, tokenizer: BertTokenizer, folder: Path, recipe: Recipe = MATCHER
) -> BlipForImageTextRetrieval:
    """Train a matcher of pictures, colour and lines, and texts: ITM on changed and strange texts, and ITC.

    Matching alone tells one bit of a text, and learns slowly; so of texts with many attributes changed, it is also told
    which words are wrong.
    """
    torch.manual_seed(recipe.seed)
    blip: BlipForImageTextRetrieval = new_blip(BlipForImageTextRetrieval, tokenizer, SIDE)  # type: ignore[assignment]
    frames, heads = Frames(corpus, SIDE), Heads(WIDTH)
    reader, words = nn.Linear(WIDTH, 2), Words(tokenizer)
    model = nn.ModuleDict({"blip": blip, "heads": heads, "reader": reader})
    temperature = nn.Parameter(torch.tensor(0.07).log())
    model.register_parameter("temperature", temperature)
    shares = _shares(corpus, HARD["matcher"])

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        count = recipe.batch_size
        chosen, lines = rng.choice(len(corpus), size=count, p=shares), rng.random(count) < 0.3
        pixels, scenes = frames.vary(chosen, lines, rng, pairs=False)  # the shipped one has learned so
        embedded = blip.vision_model(pixel_values=pixels).last_hidden_state
        seen = heads(embedded[:, 0], scenes, lines)
        if step < ALONE["matcher"] * recipe.steps:
            return {"loss": seen, "heads": seen}
        true, false = [], []
        for scene, line in zip(scenes, lines.tolist(), strict=True):
            true.append(caption_of(scene, rng, line=line))
            false.append(caption_of(changed(scene, rng, line=line), rng, line=line))
        strange = true[1:3] + true[:1]  # a few texts of other pictures
        mixed = [scrambled(scene, rng, line=line) for scene, line in zip(scenes, lines.tolist(), strict=True)]
        texts = [caption_of(scene, rng, line=line) for scene, line in zip(mixed, lines.tolist(), strict=True)]
        tokens = tokenizer([*true, *false, *strange, *texts], padding=True, return_tensors="pt")
        judged = len(true) + len(false) + len(strange)
        place = torch.tensor([*range(count), *range(count), *range(len(strange)), *range(count)])
        states = blip.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=embedded[place]
        ).last_hidden_state
        match = F.cross_entropy(blip.itm_head(states[:judged, 0]), (torch.arange(judged) < count).long())
        labels = [
            words.labels(ids, told, scene)
            for ids, told, scene in zip(tokens.input_ids[judged:], mixed, scenes, strict=True)
        ]
        wrong = F.cross_entropy(reader(states[judged:]).flatten(0, 1), torch.cat(labels))
        alone = blip.text_encoder(
            input_ids=tokens.input_ids[:count], attention_mask=tokens.attention_mask[:count]
        ).last_hidden_state
        image = F.normalize(blip.vision_proj(embedded[:, 0]), dim=-1)
        text = F.normalize(blip.text_proj(alone[:, 0]), dim=-1)
        logits, own = image @ text.T / temperature.exp(), torch.arange(count)
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        terms = {"match": match, "words": wrong, "contrast": contrast, "heads": seen}
        return {"loss": match + 3 * wrong + 0.2 * contrast + HEADS * seen} | terms

    train("matcher", model, recipe, loss, folder=folder)
    return blip


@torch.no_grad()
def match_scores(blip: BlipForImageTextRetrieval, tokenizer: BertTokenizer, pixels: Tensor, texts: list[str]) -> Tensor:
    """Return the probability (B,) that each picture and its text belong together."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    scores = blip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels).itm_score
    return scores.softmax(-1)[:, 1]
