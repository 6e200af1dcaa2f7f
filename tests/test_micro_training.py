"""How the micro family is made: the corpus, the words, the loop that goes on, every stage on a few pictures."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from factory import toon
from factory.caption import spoken
from factory.files import check_sealed, locked
from trainer.__main__ import main
from trainer.base import WEIGHTS
from trainer.micro import blip, card, exam, publish, stages, text, training
from trainer.micro.attributes import COLOURS, VALUES, labels, named, value_of
from trainer.micro.corpus import Corpus, draw_corpus, is_held_out, random_scene
from trainer.micro.falsehoods import Words, changed, scrambled
from trainer.micro.heads import Heads
from trainer.micro.pictures import Pictures

COUNT = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return draw_corpus(tmp_path_factory.mktemp("corpus"), "test", COUNT)


def test_a_corpus_is_the_same_again_and_goes_on_where_it_was_stopped(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.micro.corpus.PART", 20)
    monkeypatch.setattr("trainer.micro.corpus._join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        draw_corpus(tmp_path, "test", COUNT)
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert len(parts) == 2
    monkeypatch.undo()
    monkeypatch.setattr("trainer.micro.corpus.PART", 20)
    next(iter(parts)).unlink()
    again = draw_corpus(tmp_path, "test", COUNT)
    assert np.array_equal(again.images, corpus.images)
    assert np.array_equal(again.lines, corpus.lines)
    assert again.scenes == corpus.scenes
    assert np.array_equal(again.wide, corpus.wide)
    assert not list(tmp_path.glob("part-*"))


def test_held_out_combinations_are_never_in_the_training_mix() -> None:
    rng = random.Random(0)
    seen = [random_scene(rng) for _ in range(300)]
    kept = [random_scene(rng, held_out=True, judged=True) for _ in range(50)]
    assert not any(is_held_out(figure, scene.background) for scene in seen for figure in scene.figures)
    assert all(is_held_out(scene.figures[0], scene.background) for scene in kept)
    assert {scene.camera for scene in kept} == {"bust"}
    combinations = [
        is_held_out(toon.Figure(hair=hair, hair_style=style), place)
        for hair in VALUES["hair"]
        for style in VALUES["hair_style"]
        for place in VALUES["background"]
    ]
    assert 0.03 < np.mean(combinations) < 0.1


def test_a_caption_names_its_scene_and_can_be_read_back() -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = toon.random_scene(rng, figures=(toon.random_figure(rng),))
        said, true = named(toon.caption(scene, rng)), {name: value_of(scene, name) for name in VALUES}
        if scene.camera == "close-up":
            said.pop("clothes", None)
            true.pop("clothes")
        assert said == true
    assert named("a girl") == {"accessory": "none", "lighting": "day"}
    assert "eyes" not in named("a girl with red eyes and blue eyes")


def test_one_attribute_is_changed_and_only_one_that_lines_show() -> None:
    rng, draws = np.random.default_rng(0), random.Random(2)
    for line in (False, True):
        for _ in range(100):
            scene = random_scene(draws)
            other = changed(scene, rng, line=line)
            places = range(len(scene.figures))
            (name,) = {n for n in VALUES for i in places if value_of(scene, n, i) != value_of(other, n, i)}
            assert not (line and name in COLOURS)
            assert sum(a != b for a, b in zip(scene.figures, other.figures, strict=True)) == hasattr(toon.Figure, name)
            assert not any(is_held_out(figure, other.background) for figure in other.figures)


def test_the_words_that_a_picture_does_not_show_are_marked(tmp_path: Path) -> None:
    tokenizer = text.bert_tokenizer(text.captions([random_scene(random.Random(i)) for i in range(200)], 400), tmp_path)
    words, rng, marked = Words(tokenizer), np.random.default_rng(0), 0
    for i in range(30):
        true = random_scene(random.Random(i), judged=True)
        told = scrambled(true, rng)
        ids = torch.tensor(tokenizer(text.caption_of(told, rng)).input_ids)
        assert 1 not in words.labels(ids, true, true)
        marks = words.labels(ids, told, true)
        for token, mark in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), marks.tolist(), strict=True):
            if mark >= 0 and token in ("sunset", "classroom", "glasses", "kimono", "twintails", "tearful"):
                shown = {true.background, *vars(true.figures[0]).values()}
                assert mark == ({"tearful": "sad"}.get(token, token) not in shown)
                marked += 1
    assert marked > 5

    figure = toon.Figure(hair="black", eyes="red")
    true = toon.Scene(figures=(figure,))
    red = tokenizer.convert_tokens_to_ids("red")
    for hair, eyes, mark in (("red", "blue", 1), ("red", "red", -100), ("black", "red", 0), ("black", "blue", -100)):
        told = toon.Scene(figures=(replace(figure, hair=hair, eyes=eyes),))
        assert words.labels(torch.tensor([red]), told, true).tolist() == [mark]

    pair = toon.Scene(figures=(figure, toon.Figure(hair="silver", eyes="green")))
    told = replace(pair, figures=(figure, toon.Figure(hair="red", eyes="green")))
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(["black", "red", "beside", "red", "green"]))
    assert words.labels(ids, told, pair).tolist() == [0, 0, -100, 1, 0], "each half by its own figure"


def test_tokenizers_know_every_word_and_spell_the_others() -> None:
    scenes = [random_scene(random.Random(i)) for i in range(400)]
    words = text.captions(scenes, 2000)
    tokenizer = text.clip_tokenizer(words)
    assert max(len(tokenizer(caption).input_ids) for caption in words) <= text.MAX_TOKENS
    for caption in words[:50]:
        assert len(tokenizer.tokenize(caption)) == len(caption.replace(",", " ,").replace("-", " - ").split())
    assert tokenizer.decode(tokenizer("Xylophone über 7").input_ids, skip_special_tokens=True) == "xylophone über 7"


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def _train(folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[float]:
    model, recipe = _Line(), training.Recipe(steps=steps, batch_size=1, learning_rate=0.1, warmup=2, ema=0.9)
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    monkeypatch.setattr(training, "SAY_EVERY", 2)

    def loss(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        target = torch.from_numpy(rng.normal(size=3)).float() + torch.rand(3)
        return {"loss": (model.weight - target).square().sum()}

    training.train("line", model, recipe, loss, folder=folder)
    return model.weight.tolist()


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _train(tmp_path / "whole", 12, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", 12, monkeypatch, stop=7)
    assert _train(tmp_path / "cut", 12, monkeypatch) == whole
    curves = [(tmp_path / name / "curve.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    steps = [[json.loads(row)["step"] for row in curve] for curve in curves]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 10, 12]
    assert whole != [0, 0, 0]


def test_every_stage_takes_its_steps_and_leaves_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["micro", "--output", str(tmp_path), "--trial", "--threads", "1"]
    assert main(command) == 0
    made = tmp_path / "trial"
    assert {path.parent.name for path in made.glob("*/model")} == set(stages.STAGES)
    assert not list(made.glob("*/state.pt"))
    for stage in set(stages.STAGES) - {"tokenizer"}:
        rows = [json.loads(row) for row in (made / stage / "curve.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 4
        assert np.isfinite(rows[-1]["loss"])
        assert (made / stage / "curve.svg").stat().st_size > 1000
    assert all((made / stage / "sheet.png").is_file() for stage in ("vae", "unet"))
    capsys.readouterr()
    assert main([*command, "--stage", "vae"]) == 0
    assert "vae        done already" in capsys.readouterr().out
    assert main(["micro", "--output", str(made), "--stage", "vae"]) == 2  # the same folder, the whole recipe
    assert "another recipe" in capsys.readouterr().err
    assert main([*command, "--install"]) == 2
    assert "A trial's models have seen four steps" in capsys.readouterr().err
    shop = stages.Workshop(tmp_path, trial=True)
    written = publish.install(shop, tmp_path / "factory", tmp_path / "trainer")
    assert len(written) == 6
    for folder in written:
        check_sealed(folder)
    StableDiffusionPipeline.from_pretrained(tmp_path / "trainer/micro", local_files_only=True)
    told = (tmp_path / "trainer/micro/README.md").read_text()
    assert "- unet: steps 4, batch_size 4" in told  # how these weights were made, not what the code now says
    for path in (tmp_path / "trainer").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    (made / "matcher/model").rename(made / "matcher/gone")
    assert len(publish.install(shop, tmp_path / "f", tmp_path / "t")) == 5  # what is not finished is left out
    assert not (tmp_path / "t/judge/matcher").exists()
    assert (tmp_path / "t/judge/clip").is_dir()

    (made / "matcher/gone").rename(made / "matcher/model")
    (made / "vae/model/config.json").write_text("{}")
    with pytest.raises(ValueError, match="unet was made with another vae"):
        publish.install(shop, tmp_path / "f", tmp_path / "t")


def test_the_exam_takes_the_shipped_models_and_the_card_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"PROMPTS": 8, "JUDGED": 8, "SEEDS": (1,), "REFERENCES": 2, "SKETCHES": 2, "ADAPTER_SECONDS": 0.5}
    for name, value in small.items():
        monkeypatch.setattr(exam, name, value)
    shop = stages.Workshop(tmp_path, trial=True)
    monkeypatch.setattr(shop, "facts", lambda stage: {"recipe": {}, "seconds": 60, "threads": 1})
    results = json.loads(exam.run(shop, list(exam.SECTIONS)).read_text())
    assert set(results) == set(exam.SECTIONS)
    assert results["base"]["mean"]["background"] > 2 * results["base"]["chance"]["background"]
    assert {path.name for path in (shop.folder / "exam").glob("*.png")} >= {"base.png", "framings.png", "adapter-1.png"}
    told = card.card(shop, WEIGHTS / "micro", "micro")
    assert all(f"### {name}" in told for name in ("base", "held-out", "framings", "adapter", "step"))
    assert "| chance | 0.125 |" in told
    for kind in ("the base's pictures", "drawings themselves"):
        found = results["judges"][kind]
        assert found["match"] > 0.6 > 0.3 > found["match, another's text"], kind
        assert found["nearest by CLIP"] > 0.6, kind
    assert "| colour, bust |" in card.card(shop, WEIGHTS / "judge/probe", "probe")
    results["base"]["judge"] = "another"
    (shop.folder / "exam/measures.json").write_text(json.dumps(results))
    assert "### base" not in card.card(shop, WEIGHTS / "micro", "micro")  # judged by another probe


def test_an_unknown_or_early_stage_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["micro", "--output", str(tmp_path), "--stage", "vea"]) == 2
    assert "No stage 'vea'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="--stage tokenizer"):
        stages.Workshop(tmp_path).tokenizer()
    (tmp_path / "file").write_text("")
    assert main(["micro", "--output", str(tmp_path / "file"), "--stage", "probe"]) == 2
    assert f"Not a directory: {tmp_path / 'file'}" in capsys.readouterr().err
    assert main(["micro", "--output", str(tmp_path), "--threads", "0"]) == 2
    assert "--threads is 1 or more, not 0" in capsys.readouterr().err


def test_the_help_names_every_stage_and_measure(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["micro", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ", ".join(stages.STAGES) in told
    assert ", ".join(exam.SECTIONS) in told


def test_a_corpus_or_state_made_otherwise_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_corpus(tmp_path, "few", 4)
    with pytest.raises(ValueError, match="holds another corpus"):
        draw_corpus(tmp_path, "few", 5)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", 12, monkeypatch, stop=7)
    with pytest.raises(ValueError, match="another recipe"):
        _train(tmp_path / "cut", 14, monkeypatch)


def test_a_stage_that_another_process_is_at_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with locked(tmp_path / "vae", wait=False):
        assert main(["micro", "--output", str(tmp_path), "--stage", "vae"]) == 2
    assert "Another process is at stage vae" in capsys.readouterr().err


def test_every_word_survives_berts_tokenizer(tmp_path: Path) -> None:
    words = text.captions([random_scene(random.Random(i)) for i in range(400)], 2000)
    tokenizer = text.bert_tokenizer(words, tmp_path)
    for caption in words[:300:2]:
        said = spoken(tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True))
        assert named(said) == named(caption)


def test_wide_pictures_are_shown_whole_between_white_bars(corpus: Corpus) -> None:
    pictures = Pictures(corpus)
    assert corpus.wide.any()
    for i in np.flatnonzero(corpus.wide):
        assert (pictures.images[i, :14] == 255).all()
        assert (pictures.images[i, 50:] == 255).all()
        assert pictures.images[i, 14:50].std() > 5
    assert labels(corpus.scenes[0])[0] == VALUES["hair"].index(corpus.scenes[0].figures[0].hair)


def test_mirrored_pairs_are_told_in_their_new_order(corpus: Corpus) -> None:
    pairs = np.array([i for i, scene in enumerate(corpus.scenes) if len(scene.figures) == 2])
    lines, frames, turned = np.zeros(len(pairs), bool), blip.Frames(corpus, 64), []
    plain = frames.read(pairs, lines)
    for seed in range(8):
        pixels, scenes = frames.vary(pairs, lines, np.random.default_rng(seed), pairs=True)
        for one, own, scene, i in zip(pixels, plain, scenes, pairs, strict=True):
            mirrored = bool((one - own.flip(2)).abs().mean() < (one - own).abs().mean())
            assert scene.figures == corpus.scenes[i].figures[:: -1 if mirrored else 1]
            turned.append(mirrored)
        _, scenes = frames.vary(pairs, lines, np.random.default_rng(seed), pairs=False)
        assert scenes == [corpus.scenes[i] for i in pairs]
    assert 0 < sum(turned) < len(turned)


@torch.no_grad()
def test_read_outs_learn_from_as_many_figures_as_they_have() -> None:
    one, two = toon.Figure(hair="black"), toon.Figure(hair="red")
    single, pair = toon.Scene(figures=(one,)), toon.Scene(figures=(one, two))
    embedding, colour = torch.randn(1, 8), np.zeros(1, bool)
    for figures in (1, 2):
        heads = Heads(8, figures)
        assert float(heads(embedding, [single], colour)) > 0
        assert (float(heads(embedding, [pair], colour)) > 0) == (figures == 2)
    for parameter in heads.parameters():
        parameter.zero_()
    for of, figure in zip(heads.heads, pair.figures, strict=True):
        for head, place in zip(of, labels(replace(pair, figures=(figure,))), strict=True):
            head.bias[place] = 50  # sure of the truth, of each figure its own
    assert float(heads(embedding, [pair], colour)) < 1e-6
    assert float(heads(embedding, [replace(pair, figures=(two, one))], colour)) > 1
