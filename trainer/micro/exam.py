"""The exam: every measure on the shipped weights, into one JSON file, with sample sheets beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer, BlipForImageTextRetrieval, CLIPModel, CLIPTokenizer

from factory.caption import Captioner
from factory.files import write_atomic
from factory.models import WEIGHTS as FACTORY
from factory.models import find_model
from factory.sketch.engine import SketchConfig, sketch
from trainer.backbone import Backbone, load_backbone
from trainer.base import MICRO, WEIGHTS
from trainer.micro import adapted, lines, measure
from trainer.micro.card import made_of
from trainer.micro.clip import retrieval
from trainer.micro.pictures import Pictures
from trainer.micro.probe import Probe
from trainer.micro.sheet import write_sheet
from trainer.micro.stages import Workshop
from trainer.micro.text import caption_of
from trainer.micro.unet import Latents, Sampler
from trainer.micro.vae import reconstruct

JUDGE = WEIGHTS / "judge"
SEEDS = (1, 2, 3)
PROMPTS = 300
JUDGED = 100  # pictures that CLIP pair and matcher judge
ADAPTER_SECONDS = 300.0
ADAPTER_PICTURES = 8000  # whose latents, features and text states are made beforehand
REFERENCES = 200  # pictures that an adapter is asked with, of each kind
SKETCHES = 60  # drawings that lines are drawn of


class Exam:
    """The shipped models and the corpora that they are measured on."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.folder = shop.folder / "exam"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.probe = Probe.from_pretrained(find_model("animesketch/probe", JUDGE))

    @functools.cached_property
    def backbone(self) -> Backbone:
        return load_backbone(MICRO)

    @functools.cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.backbone.vae, self.backbone.unet, self.backbone.encode_text)

    def base(self, *, held_out: bool = False) -> dict[str, Any]:
        """What prompts of single busts by day give, and chance; `held_out`: of combinations that no training saw."""
        name, by_seed = "held-out" if held_out else "base", {}
        for seed in SEEDS:
            found, pictures, texts = measure.base(self.sampler, self.probe, count=PROMPTS, seed=seed, held_out=held_out)
            by_seed[f"seed {seed}"] = found
            print(f"{name}, seed {seed}: {json.dumps(found)}", flush=True)
            if seed == SEEDS[0]:
                write_sheet(pictures[:60], self.folder / f"{name}.png")
                write_atomic(self.folder / f"{name}.txt", "\n".join(texts[:60]) + "\n")
        bounds = {"chance": measure.CHANCE, "the VAE's ceiling": self.vae()["colour"]["reconstruction"]}
        return bounds | by_seed | {"mean": _mean(list(by_seed.values()))}

    def judge_itself(self) -> dict[str, Any]:
        """What the probe sees of drawings."""
        return measure.judge_itself(self.probe, self.shop.pictures("validation"))

    def framings(self) -> dict[str, Any]:
        """What prompts of any framing and light give."""
        found, pictures = measure.framings(self.sampler, self.probe, count=PROMPTS, seed=SEEDS[0])
        write_sheet(pictures[:60], self.folder / "framings.png")
        return found

    def step(self) -> dict[str, Any]:
        """The time of one step with guidance of one picture, with as many threads as the command was given."""
        return {"threads": self.shop.threads, "ms": measure.guided_step_ms(self.sampler)}

    def vae(self) -> dict[str, Any]:
        """Reconstructions of pictures that no training saw."""
        pictures = self.shop.pictures("validation")
        for kind, is_line in (("colour", False), ("line", True)):
            true = pictures.first(24, lines=is_line)
            both = torch.cat([true[:12], reconstruct(self.backbone.vae, true[:12])])
            write_sheet(both, self.folder / f"vae-{kind}.png")
        return measure.coder(self.backbone.vae, self.probe, pictures)

    @functools.cached_property
    def pair(self) -> tuple[CLIPModel, CLIPTokenizer]:
        folder = find_model("animesketch/clip", JUDGE)
        pair = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        return pair, CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    @functools.cached_property
    def matching(self) -> tuple[BlipForImageTextRetrieval, BertTokenizer]:
        folder = find_model("animesketch/matcher", JUDGE)
        model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        return model, BertTokenizer.from_pretrained(folder, local_files_only=True)

    def clip(self) -> dict[str, Any]:
        """Retrieval among 32."""
        return {split: retrieval(*self.pair, self.shop.pictures(split)) for split in ("validation", "held-out")}

    def matcher(self) -> dict[str, Any]:
        """ROC-AUC of captions with one attribute changed."""
        return {
            f"{split}, {kind}": measure.matcher(*self.matching, self.shop.corpus(split), lines=kind == "line")
            for split in ("validation", "held-out")
            for kind in ("colour", "line")
        }

    def judges(self) -> dict[str, Any]:
        """What CLIP pair and matcher say of pictures and their prompts, and of drawings and their captions."""
        _, made, prompts = measure.base(self.sampler, self.probe, count=JUDGED, seed=SEEDS[0])
        pictures = self.shop.pictures("validation")
        busts = measure.judged(pictures)[:JUDGED]
        captions = [caption_of(pictures.scenes[i], np.random.default_rng(i)) for i in busts]
        drawn = pictures.read(busts, np.zeros(len(busts), bool))
        of = functools.partial(measure.judges, *self.pair, *self.matching)
        return {"the base's pictures": of(made, prompts), "drawings themselves": of(drawn, captions)}

    def captioner(self) -> dict[str, Any]:
        """Attributes named rightly."""
        captioner = Captioner("animesketch/captioner")
        return {split: measure.captioner(captioner, self.shop.corpus(split)) for split in ("validation", "held-out")}

    def sketch(self) -> dict[str, Any]:
        """F-scores of lines within a pixel, on drawings that no training saw: as drawn, and worn as films are."""
        pairs = lines.drawings(self.folder, "validation", SKETCHES)
        worn = [(lines.worn(image, np.random.default_rng(i)), true) for i, (image, true) in enumerate(pairs)]
        return {
            kind: {
                name: round(float(np.mean(measure.sketch_scores(functools.partial(sketch, config=config), drawn))), 4)
                for name, config in ((name, SketchConfig(converter=name)) for name in ("micro", "xdog"))
            }
            for kind, drawn in (("as drawn", pairs), ("worn", worn))
        }

    def adapter(self) -> dict[str, Any]:
        """What references bring through an adapter trained for five minutes, by seed."""
        found: dict[str, Any] = {"seconds": ADAPTER_SECONDS, "threads": self.shop.threads}
        pictures = Pictures(self.shop.corpus("train").first(ADAPTER_PICTURES))
        held_out = self.shop.pictures("validation")
        latents, encoded = Latents(self.backbone.vae, pictures), adapted.Encoded(self.backbone, pictures)
        for seed in SEEDS:
            model = adapted.Adapted(self.backbone, self.sampler, seed)
            steps = model.train(latents, encoded, ADAPTER_SECONDS)
            found[f"seed {seed}"] = {"steps": steps} | adapted.measured(model, self.probe, held_out, REFERENCES)
            self._adapter_sheet(model, held_out, seed)
            model.adapter.detach(self.backbone.unet)
            print(f"adapter, seed {seed}: {json.dumps(found[f'seed {seed}'])}", flush=True)
        return found

    def _adapter_sheet(self, model: adapted.Adapted, pictures: Pictures, seed: int) -> None:
        rows = []
        for is_line in (False, True):
            references = pictures.first(12, lines=is_line)
            rows += [references, model.draw(references)]
        write_sheet(torch.cat(rows), self.folder / f"adapter-{seed}.png")


SECTIONS: dict[str, tuple[Callable[[Exam], dict[str, Any]], Path]] = {  # each with the folder that is measured
    "vae": (Exam.vae, WEIGHTS / "micro"),
    "clip": (Exam.clip, JUDGE / "clip"),
    "matcher": (Exam.matcher, JUDGE / "matcher"),
    "captioner": (Exam.captioner, FACTORY / "captioner"),
    "sketch": (Exam.sketch, FACTORY / "sketch"),
    "base": (Exam.base, WEIGHTS / "micro"),
    "held-out": (functools.partial(Exam.base, held_out=True), WEIGHTS / "micro"),
    "framings": (Exam.framings, WEIGHTS / "micro"),
    "judges": (Exam.judges, WEIGHTS / "micro"),
    "probe": (Exam.judge_itself, JUDGE / "probe"),
    "step": (Exam.step, WEIGHTS / "micro"),
    "adapter": (Exam.adapter, WEIGHTS / "micro"),
}


def run(shop: Workshop, sections: list[str]) -> Path:
    """Measure the sections and lay them into exam/measures.json, which is returned."""
    torch.set_num_threads(shop.threads)
    exam = Exam(shop)
    path = exam.folder / "measures.json"
    for name in sections:
        measured, folder = SECTIONS[name]
        found = made_of(folder) | measured(exam)
        held = json.loads(path.read_text()) if path.is_file() else {}
        write_atomic(path, json.dumps(held | {name: found}, indent=1) + "\n")
        print(f"{name}: {json.dumps(found)}", flush=True)
    return path


def _mean(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([result[name] for result in results])), 4) for name in results[0]}
