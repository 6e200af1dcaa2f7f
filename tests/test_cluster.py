"""The files in cluster/ agree with each other, with the code and with the schemas of those who read them."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = REPOSITORY / "cluster"
# A folder of KubeRay's resource definitions (ray.io_rayjobs.yaml, ray.io_rayservices.yaml), where there is one
KUBERAY = Path(os.environ.get("ANIMESKETCH_KUBERAY_CRDS") or REPOSITORY.parent / "shared/kuberay")
MANIFESTS = {"rayjob-factory": "rayjobs", "rayjob-trainer": "rayjobs", "rayservice": "rayservices"}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(f"{name}.yaml")["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def pods(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def locked_ray() -> str:
    (version,) = re.findall(r"^ray(?:\[[^\]]*\])?==([\w.]+)", (REPOSITORY / "requirements.lock").read_text(), re.M)
    return version


def test_the_lock_names_the_ray_that_is_installed() -> None:
    assert locked_ray() == importlib.metadata.version("ray")


def test_every_file_names_the_locked_ray() -> None:
    (in_image,) = re.findall(r"^ARG RAY_VERSION=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert in_image == locked_ray()
    image = read("launcher.yaml")["docker"]["image"]
    assert image.endswith(f"-ray{locked_ray()}")
    for name in MANIFESTS:
        assert cluster_spec(name)["rayVersion"] == locked_ray(), name
        assert {c["image"] for pod in pods(name) for c in pod["containers"]} == {image}, name


def test_the_image_holds_every_package_of_the_project() -> None:
    copied = re.findall(r"^COPY (\w+) \1$", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert copied == ["factory", "trainer", "serving", "cluster"]


def test_import_paths_and_modules_exist() -> None:
    from serving import app

    for application in read("serve.yaml")["applications"]:
        assert application["import_path"] == "serving.app:build"
    assert callable(app.build)
    for name in ("rayjob-factory", "rayjob-trainer"):
        words = read(f"{name}.yaml")["spec"]["entrypoint"].split()
        assert words[:2] == ["python", "-m"]
        assert importlib.util.find_spec(f"{words[2]}.__main__"), words[2]


def test_the_commands_of_the_jobs_are_understood() -> None:
    from factory import arguments
    from trainer import __main__ as trainer

    for name, parser in (("rayjob-factory", arguments.new_parser()), ("rayjob-trainer", trainer._parser())):
        arguments = parser.parse_args(read(f"{name}.yaml")["spec"]["entrypoint"].split()[3:])
        assert arguments.root == "/data/anime"
        assert arguments.preset == "paper"


def test_serve_config_is_what_serve_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(read("serve.yaml"))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.proxy_location == "HeadOnly"


def test_the_arguments_in_the_serve_config_are_settings_of_the_server() -> None:
    from serving.config import from_args

    (application,) = read("serve.yaml")["applications"]
    config = from_args(application["args"])
    assert config.num_gpus == 1
    assert config.key_file == "/etc/animesketch/keys"


def test_the_ray_service_serves_what_serve_yaml_says() -> None:
    from ray.serve.schema import ServeDeploySchema

    served = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(served)
    assert served["applications"] == read("serve.yaml")["applications"]
    # open to the pod network, so a key file is set, and there in every pod
    assert served["http_options"]["host"] == "0.0.0.0"
    for application in served["applications"]:
        folder = str(Path(application["args"]["key_file"]).parent)
        for pod in pods("rayservice"):
            assert folder in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_runtime_env_is_what_ray_reads() -> None:
    from ray.runtime_env import RuntimeEnv

    given = read("runtime_env.yaml")
    parsed = RuntimeEnv(**{**given, "working_dir": str(REPOSITORY)})
    assert parsed["env_vars"] == given["env_vars"]
    assert given["working_dir"] == "."


def test_the_launcher_file_is_what_ray_up_reads() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("launcher.yaml")
    validate_config(prepare_config(read("launcher.yaml")))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**config, "idle_timeout": 10}))
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in line for line in config[command] if "ray start" in line)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_ask_for_tokens_and_keep_work_off_the_head(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    if name != "rayjob-factory":
        for group in spec["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", ["rayjob-factory", "rayjob-trainer"])
def test_jobs_take_their_cluster_with_them(name: str) -> None:
    assert read(f"{name}.yaml")["spec"]["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize(("name", "resource"), MANIFESTS.items())
def test_manifests_fit_kuberays_definitions(name: str, resource: str) -> None:
    definition = KUBERAY / f"ray.io_{resource}.yaml"
    if not definition.is_file() and "ANIMESKETCH_KUBERAY_CRDS" not in os.environ:
        pytest.skip(f"no {definition.name} in {KUBERAY}; ANIMESKETCH_KUBERAY_CRDS names a folder of them")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(definition.read_text(), Loader=loader)["spec"]["versions"]
    manifest = read(f"{name}.yaml")
    version = manifest["apiVersion"].removeprefix("ray.io/")
    schema = closed(next(v for v in versions if v["name"] == version)["schema"]["openAPIV3Schema"])
    jsonschema.Draft202012Validator(schema).validate(manifest)
    # the check can fail: a misspelt key is no field of the definition
    manifest["spec"]["shutdownAfterJobFinished"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinished"):
        jsonschema.Draft202012Validator(schema).validate(manifest)


def closed(schema: Any) -> Any:
    """Return an OpenAPI schema as JSON schema that refuses unknown keys, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    fixed = isinstance(schema.get("properties"), dict) and "type" in schema
    if fixed and schema["properties"] and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out
