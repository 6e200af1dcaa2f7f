"""The local cluster: commands and their end, loopback past a proxy, a cluster that dies with its owner."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import demo, local, pictures
from cluster.keeper import Kept
from cluster.local import CommandFailed, LocalCluster, free_ports, run, what_matters

# Commands

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_kept_command_takes_its_orphans_with_it(tmp_path: Path) -> None:
    # a daemon as Ray starts them: its parent is gone, it has a session of its own, and it ignores SIGTERM
    script = """
import os, signal, subprocess, sys, time
daemon = subprocess.Popen(
    [sys.executable, "-uc", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE,
)
daemon.stdout.readline()
print(daemon.pid, flush=True)
if sys.argv[1] == "stay": time.sleep(600)
"""
    for stay in ("stay", "go"):
        with Kept([sys.executable, "-c", script, stay]) as child:
            assert child.output is not None
            daemon = psutil.Process(int(child.output.readline()))
            if stay == "go":
                assert child.wait(30) == 0
        assert not running(daemon)


def test_a_failed_command_raises_its_last_lines_and_the_path_of_its_log(tmp_path: Path) -> None:
    script = "import sys; print('half done'); print('Table x has no column y. Run: z', file=sys.stderr); sys.exit(3)"
    shown: list[str] = []
    with pytest.raises(CommandFailed) as caught:
        run([sys.executable, "-u", "-c", script], log=tmp_path / "logs/a.log", show=shown.append)
    told = str(caught.value)
    assert "ended with status 3" in told
    assert "Table x has no column y. Run: z" in told
    assert str(tmp_path / "logs/a.log") in told
    assert shown == ["half done", "Table x has no column y. Run: z"]


def test_the_cause_is_shown_although_noise_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join(["start", "ValueError: no such codec", *(f"closing {i}" for i in range(100))]))
    assert "ValueError: no such codec" in what_matters(log)


def test_a_program_that_is_not_there_is_a_failed_command(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="Could not start /no/such/program"):
        run(["/no/such/program"], log=tmp_path / "a.log")


@pytest.mark.parametrize("ended_by", ["the caller", "itself"])
def test_the_folder_of_a_kept_command_goes_where_the_caller_ends_it(ended_by: str, tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "token").touch()
    script = "import sys, time; print('up', flush=True); time.sleep(600 if sys.argv[1] == 'the caller' else 0)"
    child = Kept([sys.executable, "-c", script, ended_by], removes=folder)
    assert child.output is not None
    assert child.output.readline() == b"up\n"
    if ended_by == "itself":
        assert child.wait(30) == 0
    child.end()
    assert folder.exists() == (ended_by == "itself")


# The cluster


@pytest.fixture
def closed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that sends all HTTP to a proxy that nobody runs."""
    (port,) = free_ports(1)
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
        for spelt in (name, name.upper()):
            if name == "no_proxy":
                monkeypatch.delenv(spelt, raising=False)
            else:
                monkeypatch.setenv(spelt, f"http://127.0.0.1:{port}")


class Answers(BaseHTTPRequestHandler):
    """Answers every request with its path and Authorization, and with one picture."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = {
            "path": self.path,
            "authorization": self.headers["Authorization"],
            "data": [{"b64_json": "", "seed": 5}],
        }
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_asked_on_loopback_goes_past_the_proxy(stub_server: str, closed_proxy: None, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"):  # Python by itself takes the proxy
        urllib.request.urlopen(stub_server)
    cluster = LocalCluster(log=tmp_path / "head.log")
    cluster.dashboard, cluster.token = stub_server, "secret"
    told = cluster.get("/api/jobs/")
    assert (told["path"], told["authorization"]) == ("/api/jobs/", "Bearer secret")
    assert demo._healthy(stub_server)
    asked = pictures.Request(shows="a", route="generations", group="f", prompt="a", reference=None, seed=5)
    assert list(pictures.ask(stub_server, tmp_path, [asked], tmp_path / "images")) == [asked]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": ".intra"}, ".intra,127.0.0.1,localhost"),
        ({"no_proxy": "a.b", "NO_PROXY": ".intra"}, "a.b,127.0.0.1,localhost"),  # as Python reads the two
        ({"no_proxy": "*"}, "*"),  # means all only where it stands alone
    ],
)
def test_loopback_is_added_to_what_needs_no_proxy(environ: dict[str, str], expected: str) -> None:
    assert local._no_proxy(environ) == expected


def running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def listening(processes: set[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return found


def test_a_local_cluster_wants_its_token_stays_on_loopback_runs_jobs_and_ends(
    closed_proxy: None, tmp_path: Path
) -> None:
    with LocalCluster(log=tmp_path / "head.log") as cluster:
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                local.loopback.open(urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers))
            assert refused.value.code in (401, 403)
        assert cluster.get("/api/jobs/") == []
        token_file = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert token_file.parent.stat().st_mode & 0o777 == 0o700  # Ray's sockets lie below it

        shown: list[str] = []
        code = "import os, factory; print('in', os.path.isfile('pyproject.toml'), factory.__name__)"
        cluster.submit(["python", "-c", code], log=tmp_path / "job.log", show=shown.append)
        assert shown == ["in True factory"]

        with pytest.raises(CommandFailed, match=r"(?s)ended with status 3\..*no column y.*job2\.log"):
            cluster.submit(
                ["python", "-c", "print('no column y'); raise SystemExit(3)"], log=tmp_path / "job2.log", show=len
            )

        # a job that would go on for ever, with a daemon of its own
        code = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
        job = [local.tool("ray"), "job", "submit", "--no-wait", "--address", cluster.dashboard]
        run([*job, "--", "python", "-c", code], log=tmp_path / "job3.log", env=cluster.env, show=len)
        keeper = psutil.Process(cluster.pid)
        wait_for(lambda: any(p.name() == "sleep" for p in keeper.children(recursive=True)))
        started = {keeper, *keeper.children(recursive=True)}
        assert len(started) > 5
        assert all(ip.endswith("127.0.0.1") or ip == "::1" for ip in listening(started))
    assert not [process for process in started if running(process)]
    assert not token_file.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_ends_with_the_process_that_opened_it(number: int, tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from cluster.local import LocalCluster
with LocalCluster(log=pathlib.Path({str(tmp_path / "head.log")!r})) as cluster:
    print(cluster.pid, cluster.env["RAY_AUTH_TOKEN_PATH"], flush=True)
    time.sleep(600)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert child.stdout is not None
        pid, token = child.stdout.readline().split()
        keeper = psutil.Process(int(pid))
        started = {keeper, *keeper.children(recursive=True)}
        assert len(started) > 5
        child.send_signal(number)
        child.wait(60)
        wait_for(lambda: not any(running(process) for process in started), 60)
        assert not Path(os.fsdecode(token)).parent.exists()  # after SIGKILL its keeper removes it
    finally:
        child.kill()
        child.wait()


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
