"""The stages of the family's making, in order: each leaves a `save_pretrained` folder, and then is done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import torch
from diffusers import AutoencoderKL
from transformers import BertTokenizer, CLIPModel, CLIPTextModel, CLIPTokenizer

from factory.files import SUMS, locked, new_folder, sha256_file, write_atomic
from factory.toon.film import CODE
from trainer.micro import blip, clip, lines, probe, text, unet, vae
from trainer.micro.corpus import Corpus, draw_corpus
from trainer.micro.pictures import Pictures
from trainer.micro.sheet import write_curve
from trainer.micro.training import Recipe

RECIPES = {
    "clip": clip.RECIPE,
    "vae": vae.RECIPE,
    "unet": unet.RECIPE,
    "judge-clip": clip.JUDGE,
    "captioner": blip.CAPTIONER,
    "matcher": blip.MATCHER,
    "sketch": lines.RECIPE,
    "probe": probe.RECIPE,
}
FACTS = "training.json"  # beside each finished model
NEEDS = {  # the stages whose models a stage is trained with
    "clip": ("tokenizer",),
    "vae": (),
    "unet": ("tokenizer", "clip", "vae"),
    "judge-clip": ("tokenizer",),
    "captioner": ("tokenizer",),
    "matcher": ("tokenizer",),
    "sketch": (),
    "probe": (),
}
COUNTS = {"train": 24_000, "validation": 1_000, "held-out": 600}  # pictures of the corpora


class Workshop:
    """The folder that the family is made in: corpora, curves, states, and the finished models."""

    def __init__(self, folder: Path, *, threads: int = 1, trial: bool = False) -> None:
        """`trial`: a few pictures and steps, to see every stage run, in a folder of their own below."""
        self._output, self.threads, self._trial = folder, threads, trial
        self.folder = folder / "trial" if trial else folder

    def recipe(self, stage: str) -> Recipe:
        """Return the stage's recipe, or its trial."""
        recipe = RECIPES[stage]
        return dataclasses.replace(recipe, steps=4, batch_size=4) if self._trial else recipe

    def count(self, pictures: int) -> int:
        """Return how many pictures to draw: so many, or the trial's."""
        return min(pictures, 64) if self._trial else pictures

    @functools.cache  # noqa: B019 - lives as long as the command
    def corpus(self, name: str) -> Corpus:
        """Return the corpus `train`, `validation` or `held-out`, of combinations never trained on; drawn if need be."""
        folder, count = self.folder / "corpus" / name, self.count(COUNTS[name])
        return draw_corpus(folder, name, count, workers=self.threads, held_out=name == "held-out")

    @functools.cache  # noqa: B019 - lives as long as the command
    def pictures(self, name: str) -> Pictures:
        return Pictures(self.corpus(name))

    def is_done(self, stage: str) -> bool:
        """Return whether the stage has left its model."""
        return (self.folder / stage / "model").is_dir()

    def model(self, stage: str) -> Path:
        """Return the finished model's folder; FileNotFoundError saying which stage to run first."""
        path = self.folder / stage / "model"
        if not self.is_done(stage):
            command = f"python -m trainer micro --output {self._output} --stage {stage}"
            raise FileNotFoundError(f"{path} is not there. First: {command}{' --trial' if self._trial else ''}")
        return path

    def facts(self, stage: str) -> dict[str, Any]:
        """Return how the finished model of `stage` was trained: `recipe`, `inputs`, `seconds`, `threads`."""
        held = json.loads((self.model(stage) / FACTS).read_text())
        return held | {"recipe": held["recipe"] | {"betas": tuple(held["recipe"]["betas"])}}

    def inputs(self, stage: str) -> dict[str, Any]:
        """Return what the stage is trained with: a hash of each model, and the drawing code."""
        return {need: tree_hash(self.model(need)) for need in NEEDS[stage]} | {"drawings": CODE}

    def check(self, stage: str) -> None:
        """Raise ValueError where the finished model of `stage` is of another recipe, or of other inputs than now."""
        if stage not in RECIPES:
            return
        facts = self.facts(stage)
        if Recipe(**facts["recipe"]) != self.recipe(stage):
            raise ValueError(f"{self.folder / stage} was made by another recipe. Remove it to train anew.")
        now = self.inputs(stage)
        other = ", ".join(name for name in now if facts["inputs"].get(name) != now[name])
        if other:
            raise ValueError(f"{self.folder / stage} was made with another {other}. Remove it to train anew.")

    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.model("tokenizer") / "clip", local_files_only=True)

    def bert(self) -> BertTokenizer:
        return BertTokenizer.from_pretrained(self.model("tokenizer") / "bert", local_files_only=True)

    def text_states(self) -> unet.TextStates:
        pair = CLIPModel.from_pretrained(self.model("clip"), local_files_only=True)
        return unet.TextStates(self.tokenizer(), text_encoder(pair))


def tree_hash(folder: Path) -> str:
    """Return 8 digits of a hash over the names and contents of the model's files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (FACTS, SUMS))
    listed = "".join(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:8]


def text_encoder(pair: CLIPModel) -> CLIPTextModel:
    """Return the pair's text tower as the text encoder of a pipeline."""
    encoder = CLIPTextModel(pair.config.text_config)
    encoder.load_state_dict(pair.text_model.state_dict())
    return encoder.eval()


def _tokenizer(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    words = text.captions(shop.corpus("train").scenes)
    save(clip=text.clip_tokenizer(words), bert=text.bert_tokenizer(words, folder))


def _clip(shop: Workshop, folder: Path, save: Callable[..., None], stage: str = "clip") -> None:
    pictures, held_out = shop.pictures("train"), shop.pictures("validation")
    save(clip.train_clip(pictures, held_out, shop.tokenizer(), folder, shop.recipe(stage), stage))


def _vae(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    save(vae.train_vae(shop.pictures("train"), shop.pictures("validation"), folder, shop.recipe("vae")))


def _unet(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    coder = AutoencoderKL.from_pretrained(shop.model("vae"), local_files_only=True)
    pictures, held_out = shop.pictures("train"), shop.pictures("validation")
    save(unet.train_unet(coder, pictures, held_out, shop.text_states(), folder, shop.recipe("unet")))


def _captioner(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    save(blip.train_captioner(shop.corpus("train"), shop.bert(), folder, shop.recipe("captioner")))


def _matcher(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    save(blip.train_matcher(shop.corpus("train"), shop.bert(), folder, shop.recipe("matcher")))


def _sketch(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    save(lines.train_lines(folder, shop.recipe("sketch"), shop.count(lines.COUNT)))


def _probe(shop: Workshop, folder: Path, save: Callable[..., None]) -> None:
    save(probe.train_probe(folder, shop.recipe("probe"), shop.count(probe.COUNT)))


STAGES: dict[str, Callable[..., None]] = {
    "tokenizer": _tokenizer,
    "clip": _clip,
    "vae": _vae,
    "unet": _unet,
    "judge-clip": functools.partial(_clip, stage="judge-clip"),
    "captioner": _captioner,
    "matcher": _matcher,
    "sketch": _sketch,
    "probe": _probe,
}


def run(shop: Workshop, stages: list[str]) -> None:
    """Run the stages that are not done, in order. ValueError when another process is at one of them."""
    torch.set_num_threads(shop.threads)
    cv2.setNumThreads(shop.threads)
    for stage in stages:
        folder = shop.folder / stage
        if shop.is_done(stage):
            shop.check(stage)
            print(f"{stage:<11}done already", flush=True)
            continue
        try:
            with locked(folder, wait=False):
                _claim(shop, stage, folder)
                STAGES[stage](shop, folder, functools.partial(_save, shop, stage))
                if (folder / "curve.jsonl").is_file():
                    write_curve(folder / "curve.jsonl", folder / "curve.svg")
        except BlockingIOError:
            raise ValueError(
                f"Another process is at stage {stage} in {folder}. Wait for it, or name a --stage."
            ) from None
        print(f"{stage:<11}done: {folder / 'model'}", flush=True)


def _claim(shop: Workshop, stage: str, folder: Path) -> None:
    """Write down what the stage is trained with; ValueError where a state that it would go on from had other inputs."""
    if stage not in NEEDS:
        return
    path, inputs = folder / "inputs.json", shop.inputs(stage)
    held = json.loads(path.read_text()) if (folder / "state.pt").is_file() and path.is_file() else inputs
    other = ", ".join(name for name in inputs if held.get(name) != inputs[name])
    if other:
        raise ValueError(f"{folder} was begun with another {other}. Remove it to begin anew.")
    write_atomic(path, json.dumps(inputs) + "\n")


def _save(shop: Workshop, stage: str, model: Any = None, **parts: Any) -> None:
    folder = shop.folder / stage
    with new_folder(folder / "model") as aside:
        for name, part in parts.items():
            part.save_pretrained(aside / name)
        if model is not None:
            model.save_pretrained(aside)
            last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
            facts = {"recipe": asdict(shop.recipe(stage)), "inputs": shop.inputs(stage)}
            facts |= {"seconds": last["seconds"], "threads": shop.threads}
            (aside / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "state.pt").unlink(missing_ok=True)
