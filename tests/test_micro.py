"""The shipped micro family: whole, small, read by stock libraries offline, and as good as it is said to be.

The thresholds are lower than what docs/micro.md measures, since fewer pictures are drawn here.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
)

from factory import toon
from factory.caption import Captioner
from factory.files import SUMS, check_sealed
from factory.models import WEIGHTS as FACTORY
from factory.models import find_model, model_id
from factory.sketch.engine import SketchConfig, sketch
from trainer.adapter import WEIGHTS as ADAPTER
from trainer.adapter import Adapter, AdapterConfig
from trainer.backbone import Backbone, load_backbone
from trainer.base import GUIDANCE, MICRO, find_base
from trainer.base import WEIGHTS as TRAINER
from trainer.micro import clip, lines, measure
from trainer.micro.attributes import JUDGED, SHOWN_BY_LINES
from trainer.micro.corpus import Corpus, random_scene
from trainer.micro.pictures import Pictures
from trainer.micro.probe import Probe, judge
from trainer.micro.publish import LOCK
from trainer.micro.unet import Sampler


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """64 single busts by day that no training saw."""
    images, layers, scenes = [], [], []
    for i in range(64):
        rng = random.Random(f"shipped/{i}")
        scene = random_scene(rng, judged=True)
        drawing = toon.draw(scene, (128, 128), toon.random_pose(rng))
        images.append(drawing.image)
        layers.append(drawing.lines)
        scenes.append(scene)
    return Corpus(np.stack(images), np.stack(layers), scenes, np.zeros(64, bool))


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe.from_pretrained(TRAINER / "judge/probe")


@pytest.fixture(scope="module")
def base() -> Backbone:
    return load_backbone(MICRO)


# The files


def test_what_is_shipped_is_what_the_locks_list_and_at_most_60_mb() -> None:
    total = 0
    for weights in (FACTORY, TRAINER):
        lock = json.loads((weights / LOCK).read_text())
        found = {
            path.relative_to(weights).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in weights.rglob("*")
            if path.is_file() and path.name != LOCK
        }
        assert found == lock["files"]
        assert lock["bytes"] == sum(entry["bytes"] for entry in found.values())
        assert not [name for name in found if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
        for path in weights.rglob("*.json"):
            assert "_name_or_path" not in path.read_text()  # where it lay on the machine that made it
        for sums in weights.rglob(SUMS):
            check_sealed(sums.parent)
        total += lock["bytes"]
    assert total <= 60e6


def test_a_shipped_id_is_found_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model("animesketch/sketch") == FACTORY / "sketch"
    assert find_model(str(FACTORY)) == FACTORY
    assert re.fullmatch(r"animesketch/sketch@[0-9a-f]{8}", model_id("animesketch/sketch"))
    assert re.fullmatch(r"sketch@[0-9a-f]{8}", model_id(str(FACTORY / "sketch")))  # never the path
    monkeypatch.chdir(FACTORY)
    with pytest.raises(ValueError, match=f"absolute path of the model 'sketch': {FACTORY / 'sketch'}"):
        find_model("sketch")
    with pytest.raises(FileNotFoundError, match=r"one of those shipped: .*animesketch/sketch"):
        find_model("animesketch/sktech")
    with pytest.raises(FileNotFoundError, match="animesketch/macro"):
        find_base("animesketch/macro")


# Stock libraries


def test_stock_diffusers_draws_and_takes_our_adapter(base: Backbone, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(TRAINER / "micro", local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    config = AdapterConfig(cross_attention_dim=128, embedding_dim=128, dim=128)
    adapter = Adapter.for_unet(base.unet, config)
    assert sorted(int(key) for key in adapter.ip_adapter) == list(range(1, 32, 2))
    adapter.save_pretrained(tmp_path / "adapter")
    text = "a calm girl with long red hair"
    noise = torch.randn((1, 8, 16, 16), generator=torch.Generator().manual_seed(5))
    ask = {"latents": noise, "num_inference_steps": 6, "guidance_scale": GUIDANCE}
    plain = stock(text, **ask, output_type="pt").images
    ours = Sampler(base.vae, base.unet, base.encode_text)([text], seed=5, steps=6)  # type: ignore[arg-type]
    assert plain.shape == (1, 3, 64, 64)
    assert (plain - (ours + 1) / 2).abs().max() < 1e-3
    stock.load_ip_adapter(str(tmp_path), subfolder="adapter", weight_name=ADAPTER, image_encoder_folder=None)
    sketch = Image.fromarray(toon.draw(toon.Scene(), (96, 96)).lines)
    with_reference = stock(text, ip_adapter_image=sketch, **ask, output_type="pt").images
    assert (plain - with_reference).abs().max() > 0.01


def test_stock_transformers_reads_the_captioner_and_the_judges() -> None:
    picture = Image.new("RGB", (300, 200), "white")
    captioner = BlipForConditionalGeneration.from_pretrained(FACTORY / "captioner", local_files_only=True)
    processor = BlipProcessor.from_pretrained(FACTORY / "captioner", local_files_only=True)
    inputs = processor(images=picture, return_tensors="pt")
    assert processor.decode(captioner.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    pair = CLIPModel.from_pretrained(TRAINER / "judge/clip", local_files_only=True)
    inputs = CLIPProcessor.from_pretrained(TRAINER / "judge/clip", local_files_only=True)(
        text=["a girl", "two girls"], images=picture, return_tensors="pt", padding=True
    )
    assert pair(**inputs).logits_per_image.shape == (1, 2)
    matcher = BlipForImageTextRetrieval.from_pretrained(TRAINER / "judge/matcher", local_files_only=True)
    inputs = BlipProcessor.from_pretrained(TRAINER / "judge/matcher", local_files_only=True)(
        text="two girls", images=picture, return_tensors="pt"
    )
    assert matcher(**inputs).itm_score.shape == (1, 2)
    assert {model.dtype for model in (captioner, pair, matcher)} == {torch.float32}


@pytest.mark.parametrize(
    "card", sorted(c for root in (FACTORY, TRAINER) for c in root.rglob("README.md")), ids=lambda card: card.parent.name
)
def test_what_a_card_says_of_use_runs(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (96, 64), "white").save(tmp_path / "frame.png")
    for folder in ("factory", "trainer"):
        (tmp_path / folder).symlink_to(Path(__file__).parents[1] / folder)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.+?)```", card.read_text(), re.DOTALL)
    exec(code, {})


# What it can do


def test_the_probe_sees_what_is_drawn_and_can_say_no(probe: Probe, corpus: Corpus) -> None:
    pictures = Pictures(corpus)
    for is_line, names in ((False, JUDGED), (True, SHOWN_BY_LINES)):
        pixels = pictures.first(len(corpus), lines=is_line)
        right = measure.shares(judge(probe, pixels, corpus.scenes), names)
        assert min(right[name] for name in names) >= 0.95, right
        others = corpus.scenes[1:] + corpus.scenes[:1]
        assert max(measure.shares(judge(probe, pixels, others), names)[name] for name in names) < 0.6


def test_prompts_are_followed(base: Backbone, probe: Probe) -> None:
    sampler = Sampler(base.vae, base.unet, base.encode_text)  # type: ignore[arg-type]
    found, _, _ = measure.base(sampler, probe, count=32, seed=9, steps=25)
    assert all(found[name] >= 0.85 for name in JUDGED), found


def test_the_vae_keeps_what_the_probe_sees(base: Backbone, probe: Probe, corpus: Corpus) -> None:
    found = measure.coder(base.vae, probe, Pictures(corpus))  # type: ignore[arg-type]
    assert found["line"]["psnr"] >= 19
    assert found["colour"]["psnr"] >= 20
    for name in JUDGED:
        lost = found["colour"]["original"][name] - found["colour"]["reconstruction"][name]
        assert lost <= (0.2 if name == "eyes" else 0.08), found


def test_the_clip_pair_finds_the_caption(corpus: Corpus) -> None:
    pair = CLIPModel.from_pretrained(TRAINER / "judge/clip", local_files_only=True)
    tokenizer = CLIPProcessor.from_pretrained(TRAINER / "judge/clip", local_files_only=True).tokenizer
    found = clip.retrieval(pair, tokenizer, Pictures(corpus))
    assert min(found.values()) >= 0.95


def test_the_matcher_sees_one_changed_attribute(corpus: Corpus) -> None:
    matcher = BlipForImageTextRetrieval.from_pretrained(TRAINER / "judge/matcher", local_files_only=True)
    tokenizer = BlipProcessor.from_pretrained(TRAINER / "judge/matcher", local_files_only=True).tokenizer
    found = measure.matcher(matcher.eval(), tokenizer, corpus)
    assert found["bust"]["any"] >= 0.98, found
    assert found["no picture"]["any"] < 0.75, found  # what the texts alone give away


def test_the_captioner_names_what_is_drawn(corpus: Corpus) -> None:
    found = measure.captioner(Captioner("animesketch/captioner"), corpus)
    assert found["empty"] == 0
    assert all(found["bust"][name] >= 0.85 for name in JUDGED), found


def test_the_sketch_network_draws_truer_lines_than_xdog(tmp_path: Path) -> None:
    pairs = lines.drawings(tmp_path, "shipped", 12)
    scores = {
        name: np.mean(
            measure.sketch_scores(lambda image, name=name: sketch(image, SketchConfig(converter=name)), pairs)
        )
        for name in ("micro", "xdog")
    }
    assert 1 - scores["micro"] < (1 - scores["xdog"]) / 2, scores  # half as much is wrong


def test_each_row_of_numbers_in_the_docs_is_a_row_of_a_card() -> None:
    cards = [card.read_text() for root in (FACTORY, TRAINER) for card in root.rglob("README.md")]
    number = r"(?<![\w.])(\d+(?:\.\d+)?(?:e-\d+)?)"
    held = [[float(x) for x in re.findall(number, line)] for card in cards for line in card.splitlines() if "|" in line]
    docs = (Path(__file__).parents[1] / "docs/micro.md").read_text()
    checked = 0
    for line in docs.splitlines():
        told = re.findall(rf"{number} %|(?<![\w.])([01]\.\d{{3}}) ", line) if line.startswith("| ") else []
        if told:
            checked += 1
            assert any(_all_in(told, row) for row in held), line
    assert checked > 40


def _all_in(told: list[tuple[str, str]], row: list[float]) -> bool:
    """Return whether each number that is told is one of the row's, rounded; every one of these answers for one."""
    left = list(row)
    for percent, share in told:
        places, scale = len((percent or share).partition(".")[2]), 100 if percent else 1
        fits = [x for x in left if round(scale * x, places) == float(percent or share)]
        if not fits:
            return False
        left.remove(fits[0])
    return True
