"""The cache of the encoders' outputs: equal to the encoders, whole or absent, found for what it was made for alone."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import torch

from factory.files import locked
from tests.lines import files, write_lines
from trainer import cache_writer, loop
from trainer.__main__ import main
from trainer.backbone import load_backbone
from trainer.base import MICRO, find_base
from trainer.cache import TENSORS, Cache, DamagedCache, cache_facts, exists, find_cache, key_of, uri_of
from trainer.cache_writer import EncodeUnit, write_cache
from trainer.config import DataConfig, TrainerConfig
from trainer.data import Samples
from trainer.encoders import Encoders
from trainer.projection import VARIANTS
from trainer.run import RunBusy

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("data") / "lines")


@pytest.fixture(scope="module")
def config(dataset: str) -> TrainerConfig:
    drops = {"image_drop_rate": 0.2, "text_drop_rate": 0.2, "both_drop_rate": 0.1}
    return TrainerConfig(
        pretrained_model_name_or_path=MICRO,
        data=DataConfig(root=dataset, resolution=64, validation_samples=0, random_flip=True, **drops),  # type: ignore[arg-type]
        train_batch_size=4,
        alignment_steps=2,
        seed=5,
    )


@pytest.fixture(scope="module")
def cache(ray_session: str, config: TrainerConfig) -> str:
    """A cache in float16 of ten drawings and their mirror images."""
    return write_cache(config)["cache"]


def in_float32(config: TrainerConfig) -> TrainerConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dtype="float32"))


def facts_of(config: TrainerConfig) -> dict[str, Any]:
    base = find_base(config.pretrained_model_name_or_path)
    return cache_facts(config, Samples(config.data, "train"), base, base.hash())


def opened(uri: str, config: TrainerConfig) -> Cache:
    return Cache(uri, Samples(config.data, "train").frame_ids, device="cpu")


INDICES, FLIPS = [7, 0, 3, 3, 9], [True, False, False, True, True]


@pytest.mark.parametrize(
    ("variant", "dtype", "apart"), [("plus", "float32", 3e-6), ("plus", "float16", 2**-11), ("base", "float16", 2**-11)]
)
def test_a_cache_holds_what_the_encoders_give(
    cache: str, config: TrainerConfig, variant: Any, dtype: str, apart: float
):
    config = dataclasses.replace(config, variant=variant)
    if dtype == "float32":
        config = in_float32(config)
    cache = write_cache(config)["cache"]
    backbone = load_backbone(config.pretrained_model_name_or_path)
    backbone.features = VARIANTS[variant].features
    encoders = Encoders(backbone, Samples(config.data, "train"))
    read, made = opened(cache, config), encoders.read(INDICES, FLIPS)
    kept = read.read(INDICES, FLIPS)
    pairs = [
        *zip(read.posterior(kept), encoders.posterior(made), strict=True),
        (read.texts(kept), encoders.texts(made)),
        (read.features(kept), encoders.features(made)),
    ]
    for name, (ours, theirs) in zip(TENSORS, pairs, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert ((ours - theirs).abs() <= apart * theirs.abs() + 3e-6).all(), name
    assert not torch.equal(kept[2].features, kept[3].features)  # a drawing and its mirror image
    assert torch.equal(kept[2].text, kept[3].text)


LOSSES = """
import dataclasses, json, pickle, sys, torch, torch.distributed as dist
from pathlib import Path
folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
from trainer.worker import Worker
config, caches = pickle.loads((folder / "job").read_bytes())
losses = {}
for name, cache in caches.items():
    (folder / name).mkdir()
    named = dataclasses.replace(config, output=str(folder / name))
    worker = Worker(named, torch.device("cpu"), {"base": {}, "preprocessing": {}}, cache)
    losses[name] = [record["alignment_loss"] for record in worker.run.history()]
    losses[name] += [worker.step(step)["loss"] for step in range(6)]
(folder / "losses.json").write_text(json.dumps(losses))
"""


def test_a_run_on_a_cache_has_the_losses_of_one_with_encoders(cache: str, config: TrainerConfig, tmp_path: Path):
    caches = {"online": None, "float16": cache, "float32": write_cache(in_float32(config))["cache"]}
    (tmp_path / "job").write_bytes(pickle.dumps((config, caches)))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    line = [sys.executable, "-c", LOSSES, str(tmp_path)]
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(set(losses["online"])) == len(losses["online"]) == 2 + 6
    apart = {name: np.abs(np.subtract(losses[name], losses["online"])) for name in caches}
    assert apart["float16"][2:].max() < 5e-5
    assert apart["float32"][2:].max() < 1e-6
    aligned = np.array(losses["online"][:2])  # tens, in units of a small variance
    assert (apart["float16"][:2] < 3e-3 * aligned).all()
    assert (apart["float32"][:2] < 1e-5 * aligned).all()


def test_a_run_takes_the_cache_that_is_there_and_goes_on_as_it_began(
    cache: str, config: TrainerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = dataclasses.replace(config, max_train_steps=1, alignment_steps=0, output=str(tmp_path / "run"))
    longer = dataclasses.replace(config, max_train_steps=2)
    assert loop.fit(config)["step"] == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["cache"] == Path(cache).stem
    with pytest.raises(ValueError, match=f"was made with cache='{Path(cache).stem}', this command says None"):
        loop.fit(dataclasses.replace(longer, data=dataclasses.replace(config.data, cache="never")))
    away = Path(cache).with_suffix(".away")
    shutil.move(cache, away)
    try:
        with pytest.raises(FileNotFoundError, match=r"No cache .*python -m trainer cache --root"):
            loop.fit(longer)
    finally:
        shutil.move(away, cache)


def test_without_a_cache_a_run_says_so_or_refuses(
    cache: str, config: TrainerConfig, capsys: pytest.CaptureFixture[str]
):
    here, facts = facts_of(config), facts_of(config) | {"resolution": 72}

    def found(facts: dict[str, Any], began: dict[str, Any] | None = None, **data: Any) -> str | None:
        return find_cache(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)), facts, began)

    assert found(facts) is None
    assert "the encoders run in each step. To make one: python -m trainer cache" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"or train a new run without: --set data\.cache=never"):
        found(facts, cache="required")
    assert found(here) == found(here, cache="required") == found(here, {"cache": "key"}) == cache
    assert found(here, cache="never") is None
    assert found(here, {"cache": None}) is None
    assert found(here, {}) is None  # of before there were caches


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 72},
        {"target": "image"},
        {"reference": "image"},
        {"keywords": False},
        {"accepted_only": True},
        {"random_flip": False},
        {"cache_dtype": "float32"},
        {"mixed_precision": "bf16"},
        {"variant": "base"},
    ],
)
def test_other_settings_have_another_cache(cache: str, config: TrainerConfig, changes: dict[str, Any]):
    if changes.keys() & {"mixed_precision", "variant"}:
        other = dataclasses.replace(config, **changes)
    else:
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    assert uri_of(config.data, facts_of(config)) == cache
    assert key_of(facts_of(other)) != key_of(facts_of(config))


def test_other_data_or_another_base_have_another_cache(cache: str, config: TrainerConfig, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(config.data.root, root, ignore=shutil.ignore_patterns("caches"))
    copied = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    assert key_of(facts_of(copied)) == Path(cache).stem  # the same data: the cache may be copied along
    lance.dataset(str(root / "samples.lance")).update({"caption": "'another'"}, where="frame_id LIKE '%3'")
    assert key_of(facts_of(copied)) != Path(cache).stem
    before = dataclasses.replace(copied, data=dataclasses.replace(copied.data, version=1))
    assert key_of(facts_of(before)) == Path(cache).stem

    other = tmp_path / "base"
    shutil.copytree(find_base(MICRO).folder, other)
    at_other = dataclasses.replace(config, pretrained_model_name_or_path=str(other))
    assert key_of(facts_of(at_other)) == Path(cache).stem
    settings = other / "feature_extractor" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.48145466", "0.5"))
    assert key_of(facts_of(at_other)) != Path(cache).stem


def test_a_stopped_command_leaves_no_cache_and_the_next_goes_on(
    cache: str, config: TrainerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "root"
    shutil.copytree(config.data.root, root, ignore=shutil.ignore_patterns("caches"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    uri, units = root / "caches" / Path(cache).name, root / "caches" / f"{Path(cache).stem}.units"
    asked: list[tuple[int, int]] = []
    stop_after = 3

    def here(parts: list[tuple[int, int]], *job: Any) -> Iterator[tuple[int, int]]:
        """Encode in this process."""
        encode = EncodeUnit(*job) if parts else None
        for start, end in parts:
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            assert encode
            encode({"start": start, "end": end})
            asked.append((start, end))
            yield start, end

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(cache_writer, "_unit_size", lambda *_: 2)
    monkeypatch.setattr(cache_writer, "_encoded", here)
    with pytest.raises(KeyboardInterrupt):
        write_cache(config)
    assert asked == [(0, 2), (2, 4), (4, 6)]
    assert not exists(str(uri))

    (units / ".12345678.tmp.6-8.arrow").write_bytes(b"of an actor that was killed")
    torn = units / "0-2.arrow"
    torn.write_bytes(torn.read_bytes()[:-20])
    asked, stop_after = [], 99
    monkeypatch.setattr(cache_writer, "_unit_size", lambda *_: 3)  # as for another number of actors
    with monkeypatch.context() as stopped:
        stopped.setattr(lance.LanceDataset, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_cache(config)
    assert asked == [(0, 2), (6, 9), (9, 10)]
    assert not exists(str(uri))
    with locked(units, wait=False), pytest.raises(RunBusy, match="Another process makes the cache"):
        write_cache(config)

    asked = []
    summary = write_cache(config)
    assert asked == []
    assert (summary["samples"], summary["rows"]) == (10, 20)
    assert [path.name for path in uri.parent.iterdir()] == [uri.name]
    assert len(list((uri / "data").iterdir())) == 1
    ours, theirs = lance.dataset(str(uri)).to_table(), lance.dataset(cache).to_table()
    assert ours["frame_id"].equals(theirs["frame_id"])
    a, b = (
        np.frombuffer(b"".join(table["numbers"].to_pylist()), np.float16).astype(np.float32) for table in (ours, theirs)
    )
    assert (np.abs(a - b) <= 2**-10 * np.abs(b) + 1e-5).all()  # the encoders saw other batches

    before = files(uri)
    assert write_cache(config) == summary
    assert files(uri) == before


def test_a_flipped_byte_and_a_missing_row_are_told(cache: str, config: TrainerConfig, tmp_path: Path):
    copy = tmp_path / Path(cache).name
    shutil.copytree(cache, copy)
    (file,) = (copy / "data").iterdir()
    rng, told = np.random.default_rng(0), 0
    whole = file.read_bytes()
    for at in rng.integers(0, int(0.95 * len(whole)), 20):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            table = opened(str(copy), config)
            for i in range(10):
                table.read([i, i], [False, True])
        except (DamagedCache, OSError) as error:
            told += "rm -r" in str(error)
    assert told >= 18  # the others are padding
    with pytest.raises(DamagedCache, match="has 20 rows, not 22"):
        Cache(cache, [*Samples(config.data, "train").frame_ids, "one-more"], device="cpu")
    with pytest.raises(DamagedCache, match=f"is another one, {Path(cache).stem}"):
        opened(str(shutil.move(copy, tmp_path / "0123456789abcdef.lance")), config)


def test_values_beyond_float16_are_refused_by_name(ray_session: str, config: TrainerConfig, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "large"
    shutil.copytree(find_base(MICRO).folder, base)
    weights = base / "image_encoder" / "model.safetensors"
    state = load_file(weights)
    state["vision_model.pre_layrnorm.weight"] = 1e6 * state["vision_model.pre_layrnorm.weight"].float()
    save_file(state, weights, metadata={"format": "pt"})
    large = dataclasses.replace(config, pretrained_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=r"gave features of up to .*data\.cache_dtype=float32"):
        write_cache(large)
    assert not exists(uri_of(large.data, facts_of(large)))


def test_the_command_makes_a_cache_and_tells_what_is_wrong(
    cache: str, config: TrainerConfig, capsys: pytest.CaptureFixture[str]
):
    settings = ["data.resolution=64", "data.image_drop_rate=0.1", "train_batch_size=2"]
    arguments = ["cache", "--root", config.data.root]
    assert main([*arguments, *(f"--set={setting}" for setting in settings)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is whole. Nothing to do" in lines[0]  # neither drop rates nor batches change it
    assert json.loads(lines[-1])["cache"] == cache
    assert main(["cache", "--root", "s3://bucket/anime"]) == 2
    assert "--set data.cache_root=" in capsys.readouterr().err
    elsewhere = dataclasses.replace(config.data, root="s3://bucket/anime", cache_root="/shared")
    assert uri_of(elsewhere, {"recipe": 1}).startswith("/shared/caches/")
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "data.cache=auto" in capsys.readouterr().out
