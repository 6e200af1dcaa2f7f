"""Settings of the server: typed, and a wrong one explained."""

from __future__ import annotations

import dataclasses

import pytest

from serving.config import from_args


def test_arguments_of_the_command_line_become_typed_settings() -> None:
    config = from_args(
        {"adapter": "/runs/7", "base": "owner/name", "num_cpus": "0.5", "max_replicas": "3", "limits.max_n": "2",
         "model": "123", "image_encoder": "h94/IP-Adapter/models/image_encoder", "num_threads": "null"}
    )  # fmt: skip
    assert (config.adapter, config.num_cpus, config.max_replicas, config.limits.max_n) == ("/runs/7", 0.5, 3, 2)
    assert (config.model, config.num_threads, config.max_requests) == ("123", None, 64)
    assert dataclasses.replace(config, ingress_replicas=3).max_requests == 22  # each of them holds its share
    assert config.device_and_dtype == ("cpu", "float32")
    assert dataclasses.replace(config, num_gpus=1).device_and_dtype == ("cuda", "bfloat16")
    assert dataclasses.replace(config, num_gpus=0.5, dtype="float16").device_and_dtype == ("cuda", "float16")
    typed = from_args({"adapter": "/runs/7", "num_cpus": 0.5, "base": None, "limits": {"max_n": 1}})
    assert (typed.num_cpus, typed.base, typed.limits.max_n, typed.limits.max_side) == (0.5, None, 1, 1024)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "adapter is missing. Start with: serve run"),
        ({"adaptor": "/a"}, "Unknown setting adaptor. Did you mean adapter"),
        ({"adapter": "/a", "limits.max_m": "2"}, "Did you mean limits.max_n"),
        ({"adapter": "runs/7"}, r'absolute path: adapter="\$PWD/runs/7"'),
        ({"adapter": "/a", "base": "./twin"}, r'base="\$PWD/twin"'),
        ({"adapter": "/a", "base": "twin"}, "base 'twin' is relative"),
        ({"adapter": "/a", "key_file": "keys"}, "key_file 'keys' is relative"),
        ({"adapter": "/a", "num_cpus": "many"}, "Setting num_cpus"),
        ({"adapter": "/a", "num_cpus": "-1"}, "must not be negative"),
        ({"adapter": "/a", "min_replicas": "2"}, "min_replicas 2 is above max_replicas 1"),
        ({"adapter": "/a", "dtype": "int8"}, "dtype must be one of"),
        ({"adapter": "/a", "max_surge_percent": "101"}, "max_surge_percent must be from 0 to 100"),
        ({"adapter": "/a", "max_queued_requests": "-1"}, "max_queued_requests must be above 0"),
        ({"adapter": "/a", "limits.max_num_inference_steps": "1000"}, "at most 999"),
        ({"adapter": "/a", "limits.min_side": "2048"}, "is above limits.max_side"),
        ({"adapter": "/a", "model": "a b"}, "model must be"),
    ],
    ids=str,
)
def test_a_bad_argument_is_explained(args: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_args(args)
