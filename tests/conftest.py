"""What tests share: one Ray for the session, a short film, two drawn ones, a dataset built from them, a random-weight
base."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from factory.store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that runs the tests in its background lets them ignore Ctrl+C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(2)  # more than cores slows torch two to ten times


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and on a busy machine they wait for it at every one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """The address of the session's one Ray, with four logical CPUs; it ends with the session."""
    import ray

    # Where nothing listens. Without a dashboard of its own, Ray Train would ask that of another Ray on this machine
    # whether a run's controller lives, hear that it does not, and end the run.
    nowhere = "http://127.0.0.1:9"
    context = ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=True,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": str(REPO), "RAY_API_SERVER_ADDRESS": nowhere}},
        _system_config={"metrics_report_interval_ms": 1000},  # not 10 s: a test reads the counters
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two drawn films of 6 shots at 480x270, with their truth beside them."""
    from factory.toon import plan_clip, write_clip

    folder = tmp_path_factory.mktemp("films") / "series"
    folder.mkdir()
    write_clip(folder / "toon-00.mp4", plan_clip(40, shots=6, size=(480, 270)))
    write_clip(folder / "toon-01.mp4", plan_clip(41, shots=6, size=(480, 270)))
    return folder


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of one second: two shots of 12 frames at 320x180. Read only."""
    from tests.footage import patterns, write_film

    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", patterns(2, 12))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of a new root without rows."""
    from factory.store import Store

    made = Store(str(tmp_path / "root"))
    made.create()
    return made


@pytest.fixture(scope="session")
def small_dataset(ray_session: str, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset root that the whole factory built from `films`; toon-01.mp4 is held out. Read only."""
    from factory import pipeline, settings
    from factory.config import micro
    from factory.sources import find_sources
    from factory.store import Store

    root = tmp_path_factory.mktemp("dataset") / "root"
    config = settings.load(micro(), None, ["split.holdout=[toon-01.mp4]", "split.validation_share=0"])
    pipeline.build(Store(str(root)), find_sources([str(films)]), config)
    return root


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random-weight base with Stable Diffusion v1.5's structure."""
    from trainer.backbone import make_twin

    folder = tmp_path_factory.mktemp("base") / "twin"
    make_twin(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter of `twin` with random weights, wide enough that a reference changes the picture."""
    from tests.servers import save_adapter

    return save_adapter(str(twin), tmp_path_factory.mktemp("run") / "adapter")
