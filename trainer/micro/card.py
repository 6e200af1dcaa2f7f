"""Model cards of the shipped models: what each is, what it learned from, how, how good it is, and what it is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.models import weights_hash
from factory.toon.film import CODE
from trainer.base import WEIGHTS
from trainer.micro import lines as sketching
from trainer.micro import probe
from trainer.micro.stages import COUNTS, Workshop


@dataclass(frozen=True)
class Card:
    """What a model's card says that no file holds."""

    title: str
    stages: tuple[str, ...]
    sections: tuple[str, ...]  # of the exam
    what: str
    use: str  # Python, in a checkout
    limits: str


CARDS = {
    "captioner": Card(
        "captioner",
        ("captioner",),
        ("captioner",),
        "A BLIP captioner (`BlipForConditionalGeneration`): a picture, squeezed to 128 x 128, to a sentence.",
        """\
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor
from factory.caption import spoken

folder = "factory/weights/captioner"
processor, blip = BlipProcessor.from_pretrained(folder), BlipForConditionalGeneration.from_pretrained(folder)
seen = processor(images=Image.open("frame.png").convert("RGB"), return_tensors="pt")
ids = blip.generate(**seen, max_new_tokens=75)  # BLIP stops at 20 unless told
print(spoken(processor.decode(ids[0], skip_special_tokens=True)))  # with "cat-ear" in one word""",
        "Faces of full figures are small: what it says of hair style and expression there is often wrong, and of pairs "
        "the hair style. It has learned from open eyes and still mouths; of closed eyes it guesses the "
        "colour.",
    ),
    "sketch": Card(
        "sketch network",
        ("sketch",),
        ("sketch",),
        "A U-Net generator of the pix2pix and Anime2Sketch kind (`factory/sketch/generator.py`): RGB to black lines on "
        "white, at any size, tile by tile.",
        """\
import numpy as np
from PIL import Image
from factory.sketch.engine import SketchConfig, sketch

frame = np.asarray(Image.open("frame.png").convert("RGB"))
Image.fromarray(sketch(frame, SketchConfig(converter="micro"))).save("lines.png")""",
        "It has learned from flat colours and clear outlines: of soft shadows it makes dashes.",
    ),
    "micro": Card(
        "base",
        ("clip", "vae", "unet"),
        ("vae", "base", "held-out", "framings", "judges", "adapter", "step"),
        "A Stable Diffusion v1.5 family, narrow: text encoder, image encoder, VAE (64 x 64 px to 16 x 16 x 8) and "
        "UNet with v1.5's levels, block types and layers; DDIM with v1.5's schedule, guidance scale 3.5.",
        """\
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("trainer/weights/micro")
prompt = "a smiling girl with long red hair and green eyes, wearing a kimono, on a beach, bust shot"
pipeline(prompt, guidance_scale=3.5).images[0].save("picture.png")""",
        "64 px, one figure, close-up or bust; half figures are untidy, faces of full figures and of pairs are too "
        "small for it. The numbers hold for a guidance scale of 3.5.",
    ),
    "clip": Card(
        "judging CLIP pair",
        ("judge-clip",),
        ("clip",),
        "A CLIP pair that only judges: no model is trained with it. It has learned from the same drawings as the base.",
        """\
from transformers import CLIPModel, CLIPProcessor

pair = CLIPModel.from_pretrained("trainer/weights/judge/clip")
processor = CLIPProcessor.from_pretrained("trainer/weights/judge/clip")""",
        "It knows the drawings that the base knows, and is no stranger to them.",
    ),
    "matcher": Card(
        "judging matcher",
        ("matcher",),
        ("matcher",),
        "A BLIP matcher of pictures and texts (`BlipForImageTextRetrieval`) that only judges. It has learned from the "
        "same drawings as the base.",
        """\
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

folder = "trainer/weights/judge/matcher"
processor, blip = BlipProcessor.from_pretrained(folder), BlipForImageTextRetrieval.from_pretrained(folder)
text = "bust shot of a smiling girl with long red hair and green eyes, wearing a kimono, on a beach"  # a whole caption
inputs = processor(images=Image.open("frame.png").convert("RGB"), text=text, return_tensors="pt")
print(blip(**inputs).itm_score.softmax(-1)[0, 1])  # how probable it is that they belong together""",
        "It knows the drawings that the base knows, and is no stranger to them. It reads whole captions: "
        "of a part of one it says that it does not belong. Of small faces, in full figures and pairs, it misses much.",
    ),
    "probe": Card(
        "attribute probe",
        ("probe",),
        ("probe",),
        "A small convolutional classifier of what is drawn (`trainer/micro/probe.py`). It judges, and is used in no "
        "training. Its own material has other line widths, zooms, tilts and poses than the corpus.",
        """\
from pathlib import Path
from trainer.micro.probe import Probe

probe = Probe.from_pretrained(Path("trainer/weights/judge/probe"))  # `trainer.micro.probe.judge` asks it""",
        "It knows one figure; of full figures it sees next to nothing.",
    ),
}


def card(shop: Workshop, folder: Path, name: str) -> str:
    """Return the card of the model `name`, whose weights are in `folder`, as Markdown; with its measures, if any."""
    about = CARDS[name]
    lines = [
        "---",
        "license: apache-2.0",
        "tags: [anime, line-art, procedural]",
        "---",
        f"# AnimeSketch micro: {about.title}",
    ]
    lines += ["", about.what, "", "## Use", "", "```python", about.use, "```", "", "## Data", ""]
    if name == "probe":
        drawn = f"{probe.COUNT:,} pictures of its own, one figure each, any combination of attributes"
    elif name == "sketch":
        drawn = f"{sketching.COUNT:,} crops of drawings at the sizes that films have"
    else:
        drawn = (
            f"{COUNTS['train']:,} pictures; a sixteenth of all combinations of hair colour, hair style and background "
            "is kept from training"
        )
    lines += [f"What `factory/toon` draws, nothing else, the same for the same seed: {drawn}."]
    lines += ["", "## Training", "", "`python -m trainer micro --output DIR`, on CPU cores:", ""]
    for stage in about.stages:
        facts = shop.facts(stage)
        lines += [
            f"- {stage}: {_words(facts['recipe'])}; {facts['seconds'] / 60:.0f} minutes, threads: {facts['threads']}"
        ]
    measures = shop.folder / "exam/measures.json"
    held = json.loads(measures.read_text()) if measures.is_file() else {}
    made = made_of(folder)
    found = {name: held[name] for name in about.sections if made.items() <= held.get(name, {}).items()}
    if found:
        lines += ["", "## Measures", "", "On drawings that no training saw (`trainer/micro/measure.py` says how)."]
    for section, results in found.items():
        lines += ["", f"### {section}", "", *_table({key: value for key, value in results.items() if key not in made})]
    lines += ["", "## Limits", ""]
    lines += [
        "Procedural material of one drawing style and a closed vocabulary. It shows that the code works; it says "
        f"nothing about real art. {about.limits}"
    ]
    return "\n".join(lines) + "\n"


def made_of(folder: Path) -> dict[str, Any]:
    """Return what a measure of the model in `folder` belongs to: its weights, the judge's, and the drawing code."""
    judge = WEIGHTS / "judge/probe"
    return {"weights": weights_hash(folder), "judge": weights_hash(judge), "drawings": CODE}


def write_card(shop: Workshop, folder: Path, name: str) -> None:
    """Write `folder`/README.md."""
    (folder / "README.md").write_text(card(shop, folder, name))


def _table(results: dict[str, Any]) -> list[str]:
    """Return nested results as Markdown: each innermost group is a row, single numbers come before."""
    singles: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}

    def sort(found: dict[str, Any], path: str) -> None:
        numbers = {name: value for name, value in found.items() if not isinstance(value, dict)}
        if numbers and path:
            rows[path] = numbers
        elif numbers:
            singles.update(numbers)
        for name, value in found.items():
            if isinstance(value, dict):
                sort(value, f"{path}, {name}" if path else name)

    sort(results, "")
    lines = [f"- {name}: {value}" for name, value in singles.items()]
    if rows:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines += [""] if lines else []
        lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines += [f"| {name} | {' | '.join(str(row.get(key, '')) for key in columns)} |" for name, row in rows.items()]
    return lines


def _words(recipe: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None)
