"""Sources in an object store, against moto's S3 server: found, hashed, fetched once, and lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pyarrow import fs

from factory import fetch, locations, settings, tasks, worker
from factory.candidates import candidate_frames
from factory.config import micro
from factory.fetch import SourceChanged, on_disk
from factory.locations import SourceGone
from factory.sources import describe_source, find_sources, segments_of
from factory.store import Store
from factory.video import Segment, VideoConfig
from tests.conftest import REPO
from tests.footage import patterns, write_film
from tests.test_factory import OVERRIDES, contents


def _environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Server:
    """moto's S3 server on loopback, with a bucket `films`; it ends with `end`."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = _environment(self.port)
        with open(log, "w") as words:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=words, stderr=words)
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"moto's server did not start: {log.read_text()}")
        self.files = fs.S3FileSystem(
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
            access_key="test",
            secret_key="test",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.files.create_dir("films")

    def put(self, path: Path, key: str) -> str:
        """Upload a file; return its URI as it is typed."""
        with self.files.open_output_stream(f"films/{key}") as target:
            target.write(path.read_bytes())
        return f"s3://films/{key}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path / "moto.log")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    locations._bucket.cache_clear()  # each server has a port of its own
    yield server
    server.end()
    locations._bucket.cache_clear()


@pytest.fixture
def config(tmp_path: Path) -> VideoConfig:
    return VideoConfig(cache_folder=str(tmp_path / "cache"))


def _segment(uri: str) -> Segment:
    (found,) = find_sources([uri])
    source = describe_source(found, VideoConfig())
    assert source["status"] == "pending", source
    (segment,) = segments_of(source)
    return segment


def test_files_folders_and_globs_are_found(server: Server, film: Path) -> None:
    for key in ("a b.mp4", "x/y/é'(1).mkv", "x/-z.mp4", "x/[q]*.mp4", "100%.mp4", "x#y.mp4", "x/notes.txt", "x/.h.mp4"):
        server.put(film, key)
    everything = find_sources(["s3://films/"])
    assert everything == sorted(
        f"s3://films/{name}.{suffix}"
        for name, suffix in (
            ("100%25", "mp4"),
            ("a%20b", "mp4"),
            ("x%23y", "mp4"),
            ("x/-z", "mp4"),
            ("x/%5Bq%5D%2A", "mp4"),
            ("x/y/%C3%A9%27%281%29", "mkv"),
        )
    )
    for uri in everything:
        assert find_sources([uri]) == [uri]
        assert locations.stamp(uri)[0] == film.stat().st_size
    for typed, found in {
        "s3://films/a b.mp4": ["s3://films/a%20b.mp4"],
        "s3://films/x#y.mp4": ["s3://films/x%23y.mp4"],
        "s3://films/x": [uri for uri in everything if "/x/" in uri],
        "s3://films/x/*.mp4": ["s3://films/x/%5Bq%5D%2A.mp4", "s3://films/x/-z.mp4"],
        "s3://films/**/*.mkv": [everything[-1]],
        "s3://films/x/*.txt": ["s3://films/x/notes.txt"],
        "s3://films/*": everything,
        "s3://films/x/*": [uri for uri in everything if "/x/" in uri],
    }.items():
        assert find_sources([typed]) == found, typed
    for nothing in ("s3://films/absent.mp4", "s3://films/absent/*.mp4", "s3://films/*.avi"):
        with pytest.raises(FileNotFoundError, match="No video at"):
            find_sources([nothing])


def test_a_film_is_described_as_the_same_file_on_disk(server: Server, film: Path, config: VideoConfig) -> None:
    server.put(film, "series/film.mp4")
    row = describe_source("s3://films/series/film.mp4", config)
    local = describe_source(str(film), config)
    assert {name for name in row if row[name] != local[name]} == {"uri", "collection", "modified_ns"}
    assert row["collection"] == "series"
    server.put(REPO / "docs/demo.jpg", "series/p.jpg")
    picture = describe_source("s3://films/series/p.jpg", config)
    assert (picture["status"], picture["container"]) == ("pending", "jpeg")
    absent = describe_source("s3://films/series/absent.mp4", config)
    assert (absent["status"], absent["error"]) == ("failed", "cannot be read: there is no such object")
    assert len(absent["source_id"]) == 64


def test_a_film_is_fetched_once_and_decodes_as_on_disk(
    server: Server, film: Path, config: VideoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = _segment(server.put(film, "film.mp4"))
    fetched: list[str] = []
    copy = fetch.copy_stream

    def slow_copy(uri: str, target: object) -> str:
        fetched.append(uri)
        time.sleep(0.3)
        return copy(uri, target)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, "copy_stream", slow_copy)
    sizes: list[int] = []

    def take() -> None:
        with on_disk(segment, config) as here:
            sizes.append(os.path.getsize(here.uri))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [film.stat().st_size] * 6
    assert fetched == ["s3://films/film.mp4"]
    with on_disk(segment, config) as here:
        rows = list(candidate_frames(here, config))
    (local,) = segments_of(describe_source(str(film), config))
    assert rows == list(candidate_frames(local, config))


def test_half_a_film_is_never_used(
    server: Server, film: Path, config: VideoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = _segment(server.put(film, "film.mp4"))
    copy = fetch.copy_stream

    def breaks(uri: str, target: object) -> str:
        target.write(film.read_bytes()[:1000])  # type: ignore[attr-defined]
        raise OSError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "copy_stream", breaks)
        with pytest.raises(OSError, match="the connection was lost"), on_disk(segment, config):
            pass
    folder = fetch.cache_folder(config)
    assert os.listdir(folder) == [".lock"]
    killed = folder / f".0123abcd.tmp.{segment.source_id}"  # what a killed process leaves
    killed.write_bytes(film.read_bytes()[:1000])
    monkeypatch.setattr(fetch, "copy_stream", copy)
    with on_disk(segment, config) as here:
        assert Path(here.uri).read_bytes() == film.read_bytes()
    assert sorted(os.listdir(folder)) == [".lock", segment.source_id]


def test_an_object_that_is_replaced_or_removed_is_a_failure(server: Server, film: Path, config: VideoConfig) -> None:
    uri = server.put(film, "film.mp4")
    segment = _segment(uri)
    server.put(REPO / "README.md", "film.mp4")
    with pytest.raises(SourceChanged, match="Build again"), on_disk(segment, config):
        pass
    server.files.delete_file("films/film.mp4")
    with pytest.raises(SourceGone, match="no such object"), on_disk(segment, config):
        pass
    assert os.listdir(fetch.cache_folder(config)) == [".lock"]


def test_a_copy_that_changes_while_it_is_decoded_is_fetched_again(
    server: Server, film: Path, config: VideoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, copy = _segment(server.put(film, "film.mp4")), fetch.copy_stream
    store = Store(str(tmp_path / "root"))
    store.create()
    run = worker.run_killable

    def changes_once(*args: object, **limits: object) -> Iterator[object]:
        yield from run(*args, **limits)  # type: ignore[arg-type]
        if len(fetched) == 1:
            (fetch.cache_folder(config) / segment.source_id).write_bytes(b"another")

    def counted(uri: str, target: object) -> str:
        fetched.append(uri)
        return copy(uri, target)  # type: ignore[arg-type]

    fetched: list[str] = []
    monkeypatch.setattr(worker, "run_killable", changes_once)
    monkeypatch.setattr(fetch, "copy_stream", counted)
    decode = tasks.DecodeSegment(store, settings.load(micro(), None, [f"video.cache_folder={config.cache_folder}"]))
    assert json.loads(decode(asdict(segment))["entry"])["rows"] == 2
    assert len(fetched) == 2
    assert (fetch.cache_folder(config) / segment.source_id).read_bytes() == film.read_bytes()
    assert len(list(Path(store.uri("candidates"), "data").glob("*.lance"))) == 1


def test_the_cache_stays_within_its_limit_and_keeps_what_is_in_use(
    server: Server, film: Path, config: VideoConfig, tmp_path: Path
) -> None:
    one = _segment(server.put(film, "one.mp4"))
    two = _segment(server.put(write_film(tmp_path / "f.mp4", patterns(2, 13)), "two.mp4"))
    size = max(locations.stamp(segment.uri)[0] for segment in (one, two))
    small = replace(config, cache_gigabytes=1.2 * size / 1e9)
    folder = fetch.cache_folder(config)
    others = [Path(config.cache_folder, "thesis.odt"), folder / "notes"]
    folder.mkdir(parents=True)
    for path in others:
        path.write_bytes(film.read_bytes())
    taken = threading.Event()

    def take_two() -> None:
        with on_disk(two, small):
            taken.set()

    other = threading.Thread(target=take_two)
    with on_disk(one, small) as here:
        other.start()
        assert not taken.wait(1.5)  # it waits for the room that the first one takes
        assert Path(here.uri).exists()
    assert taken.wait(20)
    other.join()
    assert sorted(os.listdir(folder)) == sorted([".lock", "notes", two.source_id])
    assert others[0].exists()
    with (
        pytest.raises(OSError, match=r"raise video\.cache_gigabytes"),
        on_disk(one, replace(config, cache_gigabytes=0.5 * size / 1e9)),
    ):
        pass


def test_a_source_behind_a_lost_network_is_pending_and_others_are_decoded(
    server: Server, film: Path, config: VideoConfig, tmp_path: Path
) -> None:
    uri = server.put(film, "film.mp4")
    segment = _segment(uri)
    store = Store(str(tmp_path / "root"))
    store.create()
    decode = tasks.DecodeSegment(store, settings.load(micro(), None, [f"video.cache_folder={config.cache_folder}"]))
    server.end()
    begun = time.monotonic()
    entry = json.loads(decode(asdict(segment))["entry"])
    assert time.monotonic() - begun < 60
    assert entry["source_id"] == segment.source_id
    assert "NETWORK_CONNECTION" in entry["error"]
    row = describe_source(uri, config)
    assert (entry["status"], row["status"]) == ("pending", "pending")
    assert row["error"].startswith("cannot be read: ")
    (local,) = segments_of(describe_source(str(film), config))
    assert json.loads(decode(asdict(local))["entry"])["rows"] == 2


def test_an_object_that_may_not_be_read_is_a_failed_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbids(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Forbids) as forbids:
        threading.Thread(target=forbids.serve_forever, daemon=True).start()
        for name, value in _environment(forbids.server_port).items():
            monkeypatch.setenv(name, value)
        locations._bucket.cache_clear()
        row = describe_source("s3://films/film.mp4", VideoConfig())
        forbids.shutdown()
    locations._bucket.cache_clear()
    assert row["status"] == "failed"
    assert "ACCESS_DENIED" in row["error"]


_JOB = """
    import os, sys
    import ray
    from factory.__main__ import main

    names = [name for name in os.environ if name.startswith("AWS_")]
    ray.init(runtime_env={"env_vars": {name: os.environ[name] for name in names}}, log_to_driver=False)
    sys.exit(main(sys.argv[1:]))
"""


def test_a_job_over_a_bucket_gives_the_rows_of_the_files(
    ray_session: str, server: Server, small_dataset: Path, films: Path, tmp_path: Path
) -> None:
    for path in films.glob("*.mp4"):
        server.put(path, f"series/{path.name}")
    root = tmp_path / "root"
    sets = [part for override in (*OVERRIDES, f"video.cache_folder={tmp_path}/cache") for part in ("--set", override)]
    command = [sys.executable, "-c", textwrap.dedent(_JOB), "build", "s3://films/series", "--root", str(root), *sets]
    environment = {**os.environ, "RAY_ADDRESS": ray_session}
    assert subprocess.run(command, cwd=REPO, env=environment, timeout=180).returncode == 0
    found, local = contents(root), contents(small_dataset)
    assert found["samples"] == local["samples"]
    assert found["candidates"] == local["candidates"]
    uris = Store(str(root)).table("sources").to_table(columns=["uri"])["uri"].to_pylist()
    assert sorted(uris) == ["s3://films/series/toon-00.mp4", "s3://films/series/toon-01.mp4"]
