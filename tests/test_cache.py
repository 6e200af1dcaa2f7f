"""The cache of the encoders' outputs: equal to the encoders, whole or absent, found for what it was made for alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import torch
from lance.fragment import write_fragments

from tests.lines import files, write_lines
from trainer import cache_writer, loop
from trainer.__main__ import main
from trainer.backbone import load_backbone
from trainer.base import find_base
from trainer.cache import TENSORS, Cache, DamagedCache, cache_facts, exists, key_of, uri_of
from trainer.cache_writer import write_cache
from trainer.config import DataConfig, TrainerConfig, WorkersConfig
from trainer.data import Samples
from trainer.encoders import Encoders
from trainer.run import Run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("data") / "lines")


@pytest.fixture(scope="module")
def config(dataset: str, twin: Path) -> TrainerConfig:
    drops = {"image_drop_rate": 0.2, "text_drop_rate": 0.2, "both_drop_rate": 0.1}
    return TrainerConfig(
        pretrained_model_name_or_path=str(twin),
        data=DataConfig(root=dataset, resolution=64, validation_samples=3, random_flip=True, **drops),  # type: ignore[arg-type]
        workers=WorkersConfig(num_workers=2),
        learning_rate=1e-3,
        max_train_steps=5,
        train_batch_size=4,
        validation_steps=5,
        alignment_steps=3,
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


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 3e-6), ("float16", 2**-11)])
def test_a_cache_holds_what_the_encoders_give(cache: str, config: TrainerConfig, dtype: str, apart: float):
    if dtype == "float32":
        config = in_float32(config)
        cache = write_cache(config)["cache"]
    encoders = Encoders(load_backbone(config.pretrained_model_name_or_path), Samples(config.data, "train"))
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


def losses(output: Path) -> list[float]:
    names = ("alignment_loss", "loss", "validation_loss")
    return [record[name] for record in Run(output).history() for name in names if name in record]


def fit(config: TrainerConfig, output: Path, **data: object) -> list[float]:
    data = {"data": dataclasses.replace(config.data, **data)}  # type: ignore[arg-type]
    loop.fit(dataclasses.replace(config, output=str(output), **data))  # type: ignore[arg-type]
    return losses(output)


def test_a_run_on_a_cache_has_the_losses_of_one_with_encoders(cache: str, config: TrainerConfig, tmp_path: Path):
    online = fit(config, tmp_path / "online", cache="never")
    rounded = fit(config, tmp_path / "rounded", cache="required")
    write_cache(in_float32(config))
    exact = fit(config, tmp_path / "exact", cache="required", cache_dtype="float32")
    assert len(online) == 3 + 5 + 2
    assert np.abs(np.subtract(rounded, online)).max() < 1e-3
    assert np.abs(np.subtract(exact, online)).max() < 1e-5
    assert json.loads((tmp_path / "online/run.json").read_text())["cache"] is None
    assert json.loads((tmp_path / "rounded/run.json").read_text())["cache"] == Path(cache).stem


def test_a_run_goes_on_as_it_began_and_says_when_its_cache_is_gone(
    cache: str, config: TrainerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = dataclasses.replace(config, max_train_steps=1, alignment_steps=0, output=str(tmp_path / "run"))
    away = Path(cache).with_suffix(".away")
    loop.fit(config)  # auto: on the cache
    shutil.move(cache, away)
    try:
        with pytest.raises(FileNotFoundError, match=r"No cache .*python -m trainer cache --root"):
            loop.fit(dataclasses.replace(config, max_train_steps=2))
        capsys.readouterr()
        without = dataclasses.replace(config, output=str(tmp_path / "without"))
        loop.fit(without)
        assert "the encoders run in each step. To make one: python -m trainer cache" in capsys.readouterr().out
    finally:
        shutil.move(away, cache)
    loop.fit(dataclasses.replace(without, max_train_steps=2))  # auto: as it began, though there is one now
    assert json.loads((tmp_path / "without/run.json").read_text())["cache"] is None
    required = dataclasses.replace(without, data=dataclasses.replace(config.data, cache="required"))
    with pytest.raises(ValueError, match="was made with cache=None"):
        loop.fit(required)


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 72},
        {"reference": "image"},
        {"random_flip": False},
        {"cache_dtype": "float32"},
        {"mixed_precision": "bf16"},
    ],
)
def test_other_settings_have_another_cache(cache: str, config: TrainerConfig, changes: dict[str, Any]):
    if "mixed_precision" in changes:
        other = dataclasses.replace(config, **changes)
    else:
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    assert uri_of(config.data.root, facts_of(config)) == cache
    assert key_of(facts_of(other)) != key_of(facts_of(config))


def test_other_data_or_another_base_have_another_cache(cache: str, config: TrainerConfig, twin: Path, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(config.data.root, root, ignore=shutil.ignore_patterns("caches"))
    copied = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    assert key_of(facts_of(copied)) == Path(cache).stem  # the same data: the cache may be copied along
    lance.dataset(str(root / "samples.lance")).update({"caption": "'another'"}, where="frame_id LIKE '%3'")
    assert key_of(facts_of(copied)) != Path(cache).stem
    before = dataclasses.replace(copied, data=dataclasses.replace(copied.data, version=1))
    assert key_of(facts_of(before)) == Path(cache).stem

    other = tmp_path / "twin"
    shutil.copytree(twin, other)
    at_other = dataclasses.replace(config, pretrained_model_name_or_path=str(other))
    assert key_of(facts_of(at_other)) == Path(cache).stem
    settings = other / "feature_extractor" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.48145466", "0.5"))
    assert key_of(facts_of(at_other)) != Path(cache).stem


def many(config: TrainerConfig, root: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerConfig:
    """Return settings for a copy of the dataset of which a unit is two samples: five units."""
    shutil.copytree(config.data.root, root, ignore=shutil.ignore_patterns("caches"))
    monkeypatch.setattr(cache_writer, "_ranges", lambda count: [(at, at + 2) for at in range(0, count, 2)])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))


def test_a_stopped_command_leaves_no_cache_and_the_next_goes_on(
    cache: str, config: TrainerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = many(config, tmp_path / "root", monkeypatch)
    uri = Path(config.data.root, "caches", Path(cache).name)
    encoded, committed = cache_writer._encoded, lance.LanceDataset.commit

    def three(parts, *rest):
        yield from encoded(parts[:3], *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(cache_writer, "_encoded", three)
        with pytest.raises(KeyboardInterrupt):
            write_cache(config)
    assert not exists(str(uri))
    schema = lance.dataset(cache).schema
    write_fragments(schema.empty_table(), str(uri), schema=schema, mode="create", data_storage_version="2.2")
    first = sorted((uri / "data").iterdir())
    lost = json.loads((uri.with_suffix(".units") / "0-2.json").read_text())["files"]
    (uri / "data" / next(iter(lost))).write_bytes(b"torn")

    asked: list[tuple[int, int]] = []

    def watched(parts, *rest):
        asked.extend(parts)
        yield from encoded(parts, *rest)

    def lost_commit(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_writer, "_encoded", watched)
    with monkeypatch.context() as stopped:
        stopped.setattr(lance.LanceDataset, "commit", lost_commit)
        with pytest.raises(KeyboardInterrupt):
            write_cache(config)
    assert asked == [(0, 2), (6, 8), (8, 10)]
    assert not exists(str(uri))

    assert lance.LanceDataset.commit is committed
    summary = write_cache(config)
    assert asked == [(0, 2), (6, 8), (8, 10)]  # nothing is encoded again
    assert (summary["samples"], summary["rows"]) == (10, 20)
    assert sorted(path.name for path in uri.parent.iterdir()) == [uri.name]
    assert len(list((uri / "data").iterdir())) == 5 < len(first) + 3
    ours, theirs = lance.dataset(str(uri)).to_table(), lance.dataset(cache).to_table()
    assert ours["frame_id"].equals(theirs["frame_id"])
    for name in TENSORS:
        a, b = (np.stack(table[name].to_numpy()).astype(np.float32) for table in (ours, theirs))
        assert np.abs(a - b).max() < 2e-3  # encoders see other batches

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
        except DamagedCache as error:
            told += "rm -r" in str(error)
    assert told >= 18  # the others are padding
    with pytest.raises(DamagedCache, match="has 20 rows, not 22"):
        Cache(cache, [*Samples(config.data, "train").frame_ids, "one-more"], device="cpu")


def test_values_beyond_float16_are_refused_by_name(ray_session: str, config: TrainerConfig, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "large"
    shutil.copytree(config.pretrained_model_name_or_path, base)
    weights = base / "image_encoder" / "model.safetensors"
    state = load_file(weights)
    state["vision_model.pre_layrnorm.weight"] *= 1e6
    save_file(state, weights, metadata={"format": "pt"})
    large = dataclasses.replace(config, pretrained_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=r"gave features of up to .*data\.cache_dtype=float32"):
        write_cache(large)
    assert not exists(uri_of(large.data.root, facts_of(large)))
    assert write_cache(in_float32(large))["rows"] == 20


def test_the_command_makes_a_cache_and_tells_what_is_wrong(
    cache: str, config: TrainerConfig, capsys: pytest.CaptureFixture[str]
):
    settings = ["data.resolution=64", "data.image_drop_rate=0.3", "train_batch_size=2"]
    arguments = ["cache", "--root", config.data.root, "--base", config.pretrained_model_name_or_path]
    assert main([*arguments, *(f"--set={setting}" for setting in settings)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is whole. Nothing to do" in lines[0]  # neither drop rates nor batches change it
    assert json.loads(lines[-1])["cache"] == cache
    assert main(["cache", "--root", "s3://bucket/anime"]) == 2
    assert "local folders only" in capsys.readouterr().err
    units = Path(uri_of(config.data.root, facts_of(in_float32(config)))).with_suffix(".units")
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "data.cache=auto" in capsys.readouterr().out
    assert not units.exists()
